"""Commands and snippets of the pages that no other test runs: each is read by its own parser, and cheap ones run.

`test_readme`, `test_manuals` and `test_roads` run those of README.md and of the pages in `RUN_ELSEWHERE`.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

from perturbgene.configs import HelpRequested, parse_args
from perturbgene.errors import InputError
from perturbgene.main import main

ROOT = Path(__file__).parents[1]
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCS["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_ELSEWHERE = {
    "README.md", "training.md", "asking.md", "embedding.md", "formats.md", "perturbation.md", "report.md",
    "transfer.md",
}  # fmt: skip
#: Programs that a rented machine has, and files of the reader: nothing to check but that the shell understands them.
OTHERS = {"cd", "tee", "sudo", "git", "wandb", "rsync", "pip", "python", "python3", "source", "."}
#: What stands for what the reader has; "..." is left out.
FILLED = {"URL...": "https://host/a.h5ad"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS[page], flags=re.S)


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each command; lines that end in a backslash go on, and a pipe or && ends a command."""
    joined = text.replace("\\\n", " ")
    parts = [part for line in joined.splitlines() for part in re.split(r" 2>&1 \| | && ", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def of_perturbgene(words: list[str]) -> list[str] | None:
    """Return what `perturbgene` gets of a command, also behind another program that starts it; None of any other."""
    words = [FILLED.get(word, word) for word in words if word not in ("...", "nice")]
    if words[0] in ("torchrun", "accelerate"):
        return words[words.index("perturbgene.main") + 1 :]
    return words[1:] if words[0] == "perturbgene" else None


@pytest.mark.parametrize("page", [page for page in DOCS if page not in RUN_ELSEWHERE and "```bash" in DOCS[page]])
def test_every_block_of_commands_is_understood(page: str, in_folder: Path) -> None:
    for name in ("reference.h5ad", "new_cells.h5ad", "mouse.h5ad", "orthologs.csv", "data"):
        os.symlink("cells.h5ad", name)
    for words in [words for block in blocks(page, "bash") for words in commands_in(block)]:
        ours = of_perturbgene(words)
        if ours is None:
            assert words[0] in OTHERS or (words[0] == "make" and f"\n{words[1]}:" in (ROOT / "Makefile").read_text())
        elif "-h" not in ours:
            parse_args([*ours, "https://host/a.h5ad"] if ours == ["download"] else ours).check_machine()


def inline_commands() -> dict[str, str]:
    """Return command -> page of all that stand within a sentence or a table."""
    found = {}
    for page, text in DOCS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        for command in re.findall(r"`((?:perturbgene|torchrun) [^`]*)`", prose):
            found[" ".join(command.split())] = page
    return found


@pytest.mark.parametrize("command", inline_commands())
def test_every_command_in_a_sentence_is_understood(command: str) -> None:
    words = of_perturbgene(shlex.split(command))
    assert words is not None
    if words == ["VERB", "--flag", "value"]:
        return
    try:
        parse_args(words)
    except HelpRequested:
        assert words[-1] in ("-h", "--help-all")
    except InputError as error:  # a sentence may leave out what is required
        assert re.search(r"is missing\. Give|Neither corpus nor train_data_paths", str(error)), command


def test_the_first_command_of_the_quick_start_runs(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("cells.h5ad", "reference.h5ad")
    [first, *_] = [words for words in commands_in(blocks("quick-start.md", "bash")[1])]
    assert main(first[1:]) == 0
    assert "Accepted for prepare." in capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in DOCS[page] and page != "README.md"])
def test_every_snippet_runs(page: str, in_folder: Path) -> None:
    for name in ("reference.h5ad", "new_cells.h5ad"):
        os.symlink("cells.h5ad", name)
    if page == "quick-start.md":
        shared = Path("runs").resolve()  # `evaluate` adds to a run that other tests read
        Path("runs").unlink()
        shutil.copytree(shared, "runs")
        for words in commands_in(blocks(page, "bash")[1]):
            assert words[1] not in ("evaluate", "predict") or main(words[1:]) == 0
    if "embedded.h5ad" in DOCS[page]:
        assert main(["embed", "runs/mlm", "cells.h5ad", "--output", "embedded.h5ad"]) == 0
    with patch("scanpy.tl.umap") as umap, patch("scanpy.pp.neighbors") as neighbors:  # compiled for half a minute
        for snippet in blocks(page, "python"):
            exec(snippet, {})
    assert umap.called == neighbors.called == ("umap" in DOCS[page] and page == "embedding.md")


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {kind for text in DOCS.values() for kind in re.findall(r"^```(\S*)\n.*?^```$", text, flags=re.S | re.M)}
    assert kinds <= {"bash", "python", "text", "", "{toctree}"}
    shell = "\n".join(block for page in DOCS for block in blocks(page, "bash")).replace("<this repository>", "URL")
    subprocess.run(["bash", "-n"], input=shell, text=True, check=True, timeout=60)
