"""Every shell command of the manuals runs as it is written, on a small run and cells that have what it names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import anndata as ad
import pytest

from perturbgene.main import main

DOCS = Path(__file__).parents[2] / "docs"

#: Page -> how many commands it shows; a block that is not found would leave nothing to run.
PAGES = {"asking.md": 17, "embedding.md": 4, "formats.md": 3, "perturbation.md": 5, "report.md": 4}

#: What the small run was not trained on -> what takes its place.
KNOWN = {"disease=normal": "tissue=lung", "disease=asthma": "tissue=blood", "GATA1": "CD79B", "SPI1": "CD74"}


def commands_of(page: str) -> list[list[str]]:
    """Return the words of each command in the page's bash blocks."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments_of(command: list[str]) -> list[str]:
    """Return what `perturbgene` gets; torchrun's own parser reads its part, whose part one process plays here."""
    if command[0] == "perturbgene":
        return command[1:]
    assert command[0] == "torchrun"
    from torch.distributed.run import parse_args

    read = parse_args(command[1:])
    assert read.module and read.training_script == "perturbgene.main"
    return list(read.training_script_args)


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, which `evaluate` adds to, and the files that the pages name."""
    shutil.copytree(small_folder / "runs", tmp_path / "runs")
    for name in ("cells", "labelled", "patients", "reference"):
        shutil.copy(small_folder / "cells.h5ad", tmp_path / f"{name}.h5ad")
    (tmp_path / "data").mkdir()
    shutil.copy(small_folder / "cells.h5ad", tmp_path / "data/cells.h5ad")
    unlabelled = ad.read_h5ad(small_folder / "cells.h5ad")
    unlabelled.obs = unlabelled.obs[[]]
    unlabelled.write_h5ad(tmp_path / "new_cells.h5ad")
    (tmp_path / "shared.txt").write_text("\n".join(unlabelled.var_names[::5]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_manual_runs_and_writes_its_output(
    page: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [arguments_of(command) for command in commands_of(page)]
    assert len(commands) == PAGES[page]
    for command in commands:
        known = [KNOWN.get(word, word) for word in command]
        is_to_file = ">" in known
        known = known[: known.index(">")] if is_to_file else known
        code, printed = main(known), capsys.readouterr()
        assert code == 0, f"{shlex.join(command)}\n{printed.err}"
        outputs = [known[at + 1] for at, word in enumerate(known) if word == "--output"]
        if known[0] == "merge":
            outputs = [known[1]]
        if "--part" in known:
            outputs = [f"{outputs[0]}.parts"]
        if known[0] == "check":
            assert json.loads(printed.out)["ok"] if is_to_file else "Accepted for" in printed.out
            continue
        assert all((folder / output).stat().st_size for output in outputs), command
        assert outputs or (folder / "runs/mlm/evaluation/metrics.json").is_file()
