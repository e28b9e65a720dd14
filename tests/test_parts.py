"""Commands that several jobs divide: parts merge to the bytes that one job writes, or a line says what is wrong."""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perturbgene as pg
from perturbgene.cli.parsing import parse_args
from perturbgene.data_utils.shards import Shard
from perturbgene.errors import InputError
from perturbgene.inference.predict import Predictor
from perturbgene.main import main
from tests.forked import in_two_processes, needs_fork
from tests.nine_genes import GENES
from tests.untrained import a_run, save, some_cells

NAMED = f"--genes {GENES[0]} {GENES[1]}+{GENES[2]} --donor donor --num_controls 4 --top_k 3"
ALL = "--genes all --donor donor --groupby tissue --num_controls 4 --top_k 3"
#: Of 120 cells: three batches of at most 50, and three parts of a sum.
COMMANDS = {
    "predict": ("out.h5ad", 1, 2, "--audit --given tissue --majority_by donor"),
    "predict chosen cells": ("out.h5ad", 1, 3, "--where donor=d1 --batch_size 20"),
    "predict more parts than batches": ("out.h5ad", 1, 4, "--ask cell_type"),
    "embed": ("out.h5ad", 1, 2, f"--phenotype cell_type --genes {GENES[0]}"),
    "perturb named": ("out.csv", 1, 2, f"{NAMED} --towards tissue=blood --show_q"),
    "perturb all": ("out.csv", 2, 3, f"{ALL} --towards tissue=blood --show_q"),
    "perturb raised": ("out.csv", 1, 2, f"{NAMED} --kind over_express"),
    "attribute": ("out.csv", 1, 2, "--ask cell_type"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained `run` and 120 `cells.h5ad`."""
    folder = tmp_path_factory.mktemp("given")
    save(a_run(), folder / "run")
    some_cells(120).write_h5ad(folder / "cells.h5ad")
    return folder


@pytest.fixture
def folder(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own with copies of run and cells."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(verb: str, output: str, *more: str) -> int:
    return main([verb, "run", "cells.h5ad", "--output", output, "--device", "cpu", "--batch_size", "50", *more])


@pytest.fixture
def make_parts(folder: Path) -> Callable[..., None]:
    """Return a function that predicts cell types in parts of three."""

    def make(*numbers: int, output: str = "out.h5ad", more: str = "", count: int = 3) -> None:
        for number in numbers:
            assert run("predict", output, "--ask", "cell_type", "--part", f"{number}/{count}", *more.split()) == 0

    return make


def files_of(path: Path) -> dict[str, bytes]:
    """Return all files of an output, by what follows its stem."""
    found = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(f"{path.stem}.*"))
    start = len(str(path.with_suffix("")))
    return {str(it)[start:]: it.read_bytes() for it in found if it.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_merge_to_the_bytes_that_one_command_writes(name: str, folder: Path) -> None:
    output, rounds, count, more = COMMANDS[name]
    verb = name.split()[0]
    for place in ("whole", "divided"):
        (folder / place).mkdir()
    assert run(verb, f"whole/{output}", *more.split()) == 0
    for _ in range(rounds):
        for number in reversed(range(1, count + 1)):
            assert run(verb, f"divided/{output}", "--part", f"{number}/{count}", *more.split()) == 0
            assert os.listdir(folder / "divided") == [f"{output}.parts"]
    assert main(["merge", f"divided/{output}", "--device", "cpu"]) == 0
    whole, divided = files_of(folder / "whole" / output), files_of(folder / "divided" / output)
    assert whole.keys() == divided.keys()
    assert [name for name, content in whole.items() if divided[name] != content] == []
    assert not (folder / f"divided/{output}.parts").exists()


def test_the_exact_effects_of_all_genes_wait_until_all_parts_have_screened(folder, capsys) -> None:
    said = []
    for number in (1, 2, 1):
        assert run("perturb", "out.csv", *ALL.split(), "--part", f"{number}/2") == 0
        said.append(capsys.readouterr().out)
    assert "part 1 of 2 has screened its cells; part 2 not yet. When all have, run all parts once more" in said[0]
    assert "part 2 of 2 is finished" in said[1]  # it was the last to screen
    assert "part 1 of 2 is finished" in said[2]


def test_a_part_reads_only_its_cells(make_parts, monkeypatch) -> None:
    read, rows = Shard.read, []

    def note(self: Shard, rows_m: np.ndarray, **options: Any) -> Any:
        rows.extend(rows_m.tolist())
        return read(self, rows_m, **options)

    monkeypatch.setattr(Shard, "read", note)
    make_parts(2)
    assert sorted(rows) == list(range(50, 100))


def test_a_finished_part_is_not_computed_again_and_a_killed_one_starts_over(make_parts, folder, monkeypatch, capsys):
    answer = Predictor.answer
    monkeypatch.setattr(Predictor, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("predict", "out.h5ad", "--ask", "cell_type", "--part", "1/3") == 130
    assert not (folder / "out.h5ad.parts/part-1-of-3").exists()
    monkeypatch.setattr(Predictor, "answer", answer)
    make_parts(1, 2, 3)
    monkeypatch.setattr(Predictor, "answer", None)
    make_parts(1, 2, 3, more="--batch_tokens 5 --overwrite")
    assert capsys.readouterr().out.count("is there already") == 3
    assert main(["merge", "out.h5ad"]) == 0
    assert run("predict", "out.h5ad", "--ask", "cell_type", "--part", "1/3") == 2  # queued again, too late
    assert "out.h5ad exists" in capsys.readouterr().err


# -- what does not fit together ----------------------------------------------------------------------------------------


def test_missing_parts_are_named_with_the_command_that_makes_them(make_parts, folder, capsys) -> None:
    assert main(["merge", "out.h5ad"]) == 2
    assert "out.h5ad.parts has no parts of out.h5ad. Run its command with --part 1/N" in capsys.readouterr().err
    make_parts(2, count=4)
    assert main(["merge", "out.h5ad"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "parts 1, 3, 4 of out.h5ad are missing (3 of 4). Run `perturbgene predict run cells.h5ad --output" in line
    assert "--array=1,3,4" in line
    words = shlex.split(line.split("`")[1])
    assert main(words[1:]) == 0
    assert (folder / "out.h5ad.parts/part-1-of-4").is_dir()


def test_parts_of_perturb_that_are_not_finished_are_named(folder, capsys) -> None:
    for number in (1, 2):
        assert run("perturb", "out.csv", *ALL.split(), "--part", f"{number}/2") == 0
    assert main(["merge", "out.csv", "--device", "cpu"]) == 2
    assert "part 1 of out.csv is not finished (1 of 2). Run `perturbgene perturb run" in capsys.readouterr().err
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("settings", r"part-1-of-3 and .*part-2-of-3 are not of one command: they differ in --top_k"),
        ("number", r"part-1-of-2 and .*part-1-of-3 are not of one command: they differ in the number of parts"),
        (
            "twice",
            r"part 2 is there twice, in other.h5ad.parts/part-2-of-3 and out.h5ad.parts/part-2-of-3. Name only one",
        ),
        ("input", r"parts of out.h5ad cannot be merged any more: the input changed since they were computed"),
        ("run", r"cannot be merged any more: the run \(weights, tokenizer or calibration\) changed since"),
        ("damage", r"part-2-of-3 cannot be used: 000.npy has .* bytes instead of .*run that part again"),
        ("record", r"part-2-of-3 is no part of an output: its piece.json is missing or damaged"),
    ],
)
def test_pieces_that_do_not_fit_together_are_refused(change, message, make_parts, folder, capsys) -> None:
    make_parts(1, 3)
    make_parts(2, more="--top_k 2" if change == "settings" else "")
    named: list[str] = []
    if change == "number":
        make_parts(1, count=2)
    if change == "twice":
        make_parts(2, output="other.h5ad")
        named = [str(path.relative_to(folder)) for path in sorted(folder.glob("*.parts/part-*"))]
    if change == "input":
        cells = some_cells(120, seed=1)
        cells.write_h5ad("cells.h5ad")
    if change == "run":
        (folder / "run/calibration.json").write_text("{}")
    if change == "damage":
        os.truncate("out.h5ad.parts/part-2-of-3/000.npy", 200)
    if change == "record":
        os.truncate("out.h5ad.parts/part-2-of-3/piece.json", 20)
    assert main(["merge", "out.h5ad", *named]) == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)
    assert not (folder / "out.h5ad").exists()
    assert (folder / "out.h5ad.parts/part-1-of-3").is_dir()


def test_a_part_of_another_command_is_replaced_only_if_told(make_parts, folder, capsys) -> None:
    make_parts(1)
    other = ["--ask", "tissue", "--part", "1/3"]
    assert run("predict", "out.h5ad", *other) == 2
    assert "part-1-of-3 was written by a command that differs in --ask" in capsys.readouterr().err
    assert run("predict", "out.h5ad", *other, "--overwrite") == 0


def test_copies_of_the_input_and_of_pieces_from_elsewhere_fit(make_parts, folder, monkeypatch) -> None:
    make_parts(1, 3)
    shutil.copytree("run", "elsewhere/run")
    (folder / "elsewhere/cells.h5ad").write_bytes((folder / "cells.h5ad").read_bytes())
    monkeypatch.chdir(folder / "elsewhere")
    make_parts(2, output="mine.h5ad")
    monkeypatch.chdir(folder)
    pieces = ["out.h5ad.parts/part-1-of-3", "out.h5ad.parts/part-3-of-3", "elsewhere/mine.h5ad.parts/part-2-of-3"]
    assert main(["merge", "out.h5ad", *pieces]) == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("0/10", "parts count from 1. Give --part 1/10 to 10/10; for an array of Slurm, --array=1-10"),
        ("11/10", "the last of 10 parts is 10/10"),
        ("/10", r"must be K/N, e.g. 3/10. The number of the part is empty"),
        ("3", "must be K/N"),
        ("1/-2", "must be K/N"),
    ],
)
def test_a_part_that_cannot_be_is_refused_before_any_work(part, message) -> None:
    with pytest.raises(InputError, match=message):
        parse_args(["predict", "run", "cells.h5ad", "--output", "out.h5ad", f"--part={part}"])


def test_means_of_groups_are_not_divided() -> None:
    with pytest.raises(InputError, match="part divides what is written about each cell, but groupby and network"):
        parse_args(["embed", "run", "cells.h5ad", "--output", "out.h5ad", "--groupby", "tissue", "--part", "1/2"])


@pytest.mark.parametrize(
    "words",
    [
        "predict run 'my cells.h5ad' --output out.h5ad --ask cell_type --given 'tissue=left lung' sex --no_report",
        "perturb run a.h5ad --output a.csv --genes A+B C --towards x=y --from x=z --exact --part 2/3",
    ],
)
def test_the_command_of_settings_gives_these_settings(words: str) -> None:
    config: Any = parse_args(shlex.split(words))
    assert parse_args(shlex.split(config.command())[1:]) == config


# -- other ways to run them ----------------------------------------------------------------------------------------


def test_the_report_comes_with_the_merge(folder, make_parts, monkeypatch) -> None:
    reported = []
    monkeypatch.setattr("perturbgene.main.write_report", reported.append)
    make_parts(1, 2, 3)
    assert not reported
    assert main(["merge", "out.h5ad"]) == 0
    assert [(config.verb, config.output, config.ask) for config in reported] == [("predict", "out.h5ad", ["cell_type"])]
    make_parts(1, 2, 3, output="quiet.h5ad")
    assert main(["merge", "quiet.h5ad", "--no_report"]) == 0
    assert len(reported) == 1


def test_functions_write_and_merge_parts_of_files(folder) -> None:
    options: dict[str, Any] = {"ask": "cell_type", "given": {"tissue": "blood"}, "output": "out.h5ad", "batch_size": 50}
    for number in (1, 2):
        part = pg.predict("cells.h5ad", pg.load_run("run"), part=f"{number}/2", **options)
    assert part == Path("out.h5ad.parts/part-2-of-2")
    assert pg.merge("out.h5ad") == Path("out.h5ad")
    with pytest.raises(InputError, match="part divides the cells of a file, but they are AnnData. Give a path"):
        pg.predict(some_cells(), "run", part="1/2", output="out.h5ad")
    with pytest.raises(InputError, match="output is for one part of embed. Give --part too"):
        pg.embed("cells.h5ad", "run", output="out.h5ad")


@needs_fork
@pytest.mark.parametrize("verb", ["embed", "perturb", "predict in parts"])
def test_two_processes_of_torchrun_write_what_one_writes(verb, folder) -> None:
    output, _, _, more = COMMANDS[{"perturb": "perturb all", "embed": "embed"}.get(verb, "predict")]
    words = [verb.split()[0], "run", "cells.h5ad", "--device", "cpu", "--batch_size", "50", *more.split(), "--output"]
    (folder / "one").mkdir()
    assert main([*words, f"one/{output}"]) == 0
    for part in (["--part", "1/2"], ["--part", "2/2"]) if "parts" in verb else [[]]:
        done = in_two_processes([*words, output, *part], folder / "log")
        assert done.codes == [0, 0], done.printed
    if "parts" in verb:
        assert main(["merge", output]) == 0
    if verb == "perturb":
        assert (folder / output).read_bytes() == (folder / "one" / output).read_bytes()
        return
    import anndata as ad

    one, two = ad.read_h5ad(folder / "one" / output), ad.read_h5ad(folder / output)
    for name in one.obsm:
        np.testing.assert_allclose(two.obsm[name], one.obsm[name], atol=1e-5)
