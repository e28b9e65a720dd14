"""Files of ours say their format: a newer one is refused in a line that says so, one without a number is read."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import yaml
from transformers import AutoModelForMaskedLM

import perturbgene as pg
from perturbgene.cli.parsing import load_config, parse_args
from perturbgene.corpus.manifest import MANIFEST_VERSION, Corpus
from perturbgene.data_utils.iterable_ann_dataset import STATE_VERSION
from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.tokenization import FORMAT_VERSION, GeneTokenizer
from perturbgene.errors import InputError, NewerFormatError
from perturbgene.files import check_format, damaged_file, read_json
from perturbgene.inference import calibration
from perturbgene.inference.parts import Piece
from perturbgene.inference.run import facts_of, load_run
from perturbgene.main import main
from perturbgene.model import GeneBertForPhenotypicMLM
from perturbgene.model.config import RUN_FORMAT
from perturbgene.reports.effects import read_perturbation
from perturbgene.training.checkpoints import check_settings, clean_up, newest_whole, set_damaged_aside
from perturbgene.training.transfer import run_config
from tests.nine_genes import a_tokenizer

ARCHIVE = sorted(path.parent for path in (Path(__file__).parent / "archives").glob("*/cells.h5ad"))[-1]
PART, CHECKPOINT = "part-1-of-1", next(ARCHIVE.glob("mlm/checkpoint-*")).relative_to(ARCHIVE).as_posix()
SETTINGS = "mlm/run.yaml"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newest archive, copied, with the record of a part and of a table of `perturb`, and a run without sums."""
    shutil.copytree(ARCHIVE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path(PART).mkdir()
    common = {"format": 1, "version": "", "verb": "predict", "run": "", "settings": {}, "input": {"path": ""}}
    common["input"] |= {"changed": 0, "sample": ""}
    record = {"number": 1, "count": 1, "identity": common, "settings": {}, "place": "", "cells": [0, 1], "arrays": []}
    Path(f"{PART}/piece.json").write_text(json.dumps(record))
    Path("ko.json").write_text('{"format_version": 1, "effect": "x"}')
    columns = "perturbation,group,num_donors,ci_low,ci_high,method,null_mean,p_value,q_value,num_cells"
    Path("ko.csv").write_text(f"{columns}\n")
    return tmp_path


def facts_in(path: str) -> dict[str, Any]:
    with closing(open_source(path)) as source:
        return facts_of(source)


#: File -> where its number is, the newest that is read, and what reads it.
FORMATS: dict[str, tuple[str, int, Callable[[], object]]] = {
    "corpus/manifest.json": ("manifest_version", MANIFEST_VERSION, lambda: Corpus.open("corpus")),
    "corpus/tokenizer.json": ("format_version", FORMAT_VERSION, lambda: GeneTokenizer.from_pretrained("corpus")),
    "mlm/config.json": ("run_format", RUN_FORMAT, lambda: load_run("mlm", device="cpu")),
    "mlm/sums.json": ("format_version", 1, lambda: load_run("mlm", device="cpu")),
    "mlm/calibration.json": ("format_version", 2, lambda: calibration.read_calibration("mlm")),
    f"{CHECKPOINT}/manifest.json": ("version", 1, lambda: newest_whole(Path("mlm"))),
    SETTINGS: ("format_version", 1, lambda: load_config(SETTINGS)),
    f"{PART}/piece.json": ("identity.format", 1, lambda: Piece.read(Path(PART))),
    "ko.json": ("format_version", 1, lambda: read_perturbation(Path("ko.csv"))),
    "mlm.h5ad": ("format_version", 1, lambda: facts_in("mlm.h5ad")),
}


def test_the_page_of_formats_has_every_number() -> None:
    page = (ARCHIVE.parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)`.* \| `([a-z_.]+)` \| (\d+) \|", page, flags=re.M)
    names = {"ko.json": 'uns["perturbgene"]', "mlm.h5ad": 'uns["perturbgene"]'}
    read = {(names.get(path, Path(path).name), key, str(newest)) for path, (key, newest, _) in FORMATS.items()}
    assert set(rows) == read


def change(path: str, key: str, number: Any) -> None:
    """Write another number of the format into a file; None removes it."""
    if path.endswith(".h5ad"):
        cells = ad.read_h5ad(path)
        content = dict(cells.uns["perturbgene"])
    else:
        content = yaml.safe_load(Path(path).read_text())
    *outer, last = key.split(".")
    inner = content[outer[0]] if outer else content
    assert last in inner
    inner.pop(last)
    if number is not None:
        inner[last] = number
    if path.endswith(".h5ad"):
        cells.uns["perturbgene"] = content
        cells.write_h5ad(path)
    else:
        Path(path).write_text(json.dumps(content) if path.endswith(".json") else yaml.safe_dump(content))


@pytest.mark.parametrize("path", FORMATS)
def test_a_newer_format_is_refused_with_what_is_read_and_what_to_do(path: str, files: Path) -> None:
    key, newest, read = FORMATS[path]
    change(path, key, newest + 1)
    name = path if not path.endswith(".h5ad") else f"{path}: uns/perturbgene"
    words = (
        rf"{name} has format {newest + 1}, but this perturbgene \({pg.__version__}\) reads formats up to {newest}\. "
        r"Update perturbgene: pip install -U perturbgene\.$"
    )
    with pytest.raises(NewerFormatError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [path for path in FORMATS if "calibration" not in path and PART not in path])
def test_a_file_without_a_number_is_read(path: str, files: Path) -> None:
    """Parts have had one from the beginning, and what `evaluate` fitted in format 1 is fitted again."""
    key, _, read = FORMATS[path]
    change(path, key, None)
    read()


@pytest.mark.parametrize("number", ["2", 0, -1, 1.5, [], True - 1])
def test_a_number_that_is_none_is_damage(number: object) -> None:
    with pytest.raises(InputError, match=r"x\.json is damaged: its format is .* Restore it"):
        check_format("x.json", number, reads=3)


def test_numbers_of_hdf5_are_numbers() -> None:
    assert check_format("x", np.int64(2), reads=2) == 2


def test_a_command_refuses_a_newer_run_in_one_line_before_it_reads_weights(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change("mlm/config.json", "run_format", RUN_FORMAT + 1)
    monkeypatch.setattr(GeneBertForPhenotypicMLM, "from_pretrained", lambda *args, **options: pytest.fail("read"))
    assert main(["predict", "mlm", "cells.h5ad", "--output", "out.h5ad"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "mlm/config.json has format" in line] == said[-1:]
    assert "Update perturbgene" in said[-1] and not Path("out.h5ad").exists()


@pytest.mark.parametrize("read", [run_config, AutoModelForMaskedLM.from_pretrained], ids=["a start", "an Auto class"])
def test_every_way_to_weights_refuses_a_newer_run(read: Callable[[str], object], files: Path) -> None:
    change("mlm/config.json", "run_format", RUN_FORMAT + 1)
    with pytest.raises(NewerFormatError, match="mlm/config.json has format"):
        read("mlm")


@pytest.mark.parametrize("step", [set_damaged_aside, clean_up, newest_whole])
def test_a_newer_checkpoint_is_neither_set_aside_nor_deleted(step: Callable[[Path], object], files: Path) -> None:
    change(f"{CHECKPOINT}/manifest.json", "version", 2)
    name = Path(CHECKPOINT).name
    partial = files / f"mlm/.{name}.partial"
    if step is clean_up:
        partial.mkdir()
        (partial / "written_by_perturbgene").touch()
        (files / CHECKPOINT).rename(partial / name)
    before = sorted(files.rglob("*"))
    with pytest.raises(NewerFormatError, match=f"{name}/manifest.json has format 2"):
        step(files / "mlm")
    assert sorted(files.rglob("*")) == before


def test_newer_settings_are_refused_where_they_are_compared_and_where_they_are_given(files: Path) -> None:
    change(SETTINGS, "format_version", 2)
    with pytest.raises(NewerFormatError, match="run.yaml has format 2"):
        check_settings(Path(CHECKPOINT), {}, num_ranks=1, may_change=True)
    with pytest.raises(NewerFormatError, match="run.yaml has format 2"):
        parse_args(["mlm", "--config", SETTINGS])


def test_a_newer_state_of_a_data_set_is_refused(make_adata: Callable[..., ad.AnnData]) -> None:
    tokenizer = a_tokenizer(included_phenotypes=[])
    stream = pg.IterableAnnDataset(make_adata([[1.0] * 9], genes=tokenizer.panel.genes), tokenizer)
    state = stream.state_dict()
    stream.check_state(state)
    with pytest.raises(NewerFormatError, match=f"state of the data set has format {STATE_VERSION + 1}"):
        stream.check_state(state | {"version": STATE_VERSION + 1})


@pytest.mark.parametrize("content", ["{}", "[]", '{"version": 1, "files": {}}'])
def test_another_manifest_is_not_taken_for_that_of_a_corpus(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="is not that of a corpus. Make one with `perturbgene prepare`"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("content", ["[", "[]", '{"model.safetensors": 1}', '{"model.safetensors": {"bytes": 3}}'])
def test_damaged_sums_are_said_to_be(content: str, tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(content)
    with pytest.raises(InputError, match="sums.json is damaged"):
        damaged_file(tmp_path)


def test_json_that_would_exhaust_the_stack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 1_000_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
