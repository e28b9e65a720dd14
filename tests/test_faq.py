"""docs/faq.md: each error in it happens as it is written, the command line points to it, and what it advises helps."""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from perturbgene.configs import HelpRequested, parse_args
from perturbgene.errors import InputError
from perturbgene.faq import ENTRIES, pointer
from perturbgene.main import main
from tests.faq_tries import TRIES, WARNINGS, write_files

PAGE = (Path(__file__).parents[1] / "docs/faq.md").read_text(encoding="utf-8")


def entries(kind: str) -> dict[str, str]:
    """Return heading -> text of the entries below the second-level headings that begin with `kind`."""
    sections = re.findall(rf"^## {kind}.*?\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
    return dict(re.findall(r"^### (.*?)\n\n(.*?)(?=^### |\Z)", "\n".join(sections), flags=re.S | re.M))


def anchor(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def block(text: str) -> str:
    [line] = re.findall(r"```text\n(.*)\n```", text)
    return line


def is_as_written(line: str, written: str) -> bool:
    """Return whether a line is the one of the page, in which ... stands for anything."""
    return re.fullmatch(".+".join(map(re.escape, written.split("..."))), line) is not None


ERRORS = {anchor(heading): text for heading, text in entries("Errors").items()}
NOTED = {anchor(heading): text for heading, text in entries("Warnings").items()}


def names() -> set[str]:
    return {*os.listdir(), *(f"runs/{name}" for name in os.listdir("runs"))}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands run."""
    folder = tmp_path_factory.mktemp("faq")
    with chdir(folder):
        write_files()
    return folder


@pytest.fixture
def _at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work there, and clear away what was written."""
    monkeypatch.chdir(desk)
    before = names()
    yield
    for name in sorted(names() - before):
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)


@pytest.mark.usefixtures("_at_the_desk")
@pytest.mark.parametrize("entry", TRIES)
def test_an_error_happens_as_written_and_the_advice_helps(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    tried = TRIES[entry]
    with tried.fault():
        code = main(shlex.split(tried.command))
    line = capsys.readouterr().err.splitlines()[-1]
    assert code in (2, 3), line
    message, _, place = line.removesuffix("]").rpartition(" [docs/faq.md#")
    assert place == entry, line
    assert is_as_written(message, block(ERRORS[entry])), line
    if tried.remedy and tried.is_run:
        assert main(shlex.split(tried.remedy)) == 0, capsys.readouterr().err
    elif tried.remedy:
        try:
            parse_args(shlex.split(tried.remedy))
        except HelpRequested:
            assert tried.remedy.endswith(" -h")


@pytest.mark.usefixtures("_at_the_desk")
@pytest.mark.parametrize("command", WARNINGS)
def test_warnings_are_as_written(command: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="perturbgene"):
        assert main(shlex.split(command)) == 0
    for entry in WARNINGS[command]:
        assert any(is_as_written(line, block(NOTED[entry])) for line in caplog.messages), caplog.text


@pytest.mark.usefixtures("_at_the_desk")
def test_the_glossary_has_every_column_of_answers_and_markers() -> None:
    more = "--audit --abstain 0.5 --majority_by tissue"
    assert main(shlex.split(f"predict runs/mlm cells.h5ad --output out.h5ad --ask cell_type {more}")) == 0
    assert main(shlex.split("attribute runs/mlm cells.h5ad --output out.csv --ask cell_type")) == 0
    own = set(ad.read_h5ad("cells.h5ad", backed="r").obs)
    columns = {*ad.read_h5ad("out.h5ad").obs} - own | {*pd.read_csv("out.csv")}
    text = (Path(__file__).parents[1] / "docs/glossary.md").read_text(encoding="utf-8")
    assert len(columns) >= 15
    assert columns - {name.replace("_X", "_cell_type") for name in re.findall("`(.*?)`", text)} == set()


def test_the_table_the_page_and_the_tries_have_the_same_entries() -> None:
    assert list(ERRORS) == list(ENTRIES) == list(TRIES)
    assert list(NOTED) == [entry for entries in WARNINGS.values() for entry in entries]
    assert len(ERRORS) >= 25 and len(entries("Questions")) >= 10


def test_the_site_makes_the_anchors_of_github() -> None:
    headings = [heading for kind in ("Errors", "Questions", "Warnings") for heading in entries(kind)]
    assert len(headings) == len({anchor(heading) for heading in headings})
    of_docutils = [re.sub("[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in headings]
    assert of_docutils == [anchor(heading) for heading in headings]


def test_every_entry_says_in_short_what_to_do() -> None:
    for text in [*ERRORS.values(), *NOTED.values(), *entries("Questions").values()]:
        advice = re.sub(r"```.*?```", "", text, flags=re.S)
        assert 3 <= len(advice.split()) <= 75, text


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_words_of_an_entry_are_in_its_message_and_in_no_other(entry: str) -> None:
    messages = {other: block(text) for other, text in ERRORS.items()}
    assert pointer(messages[entry]) == f" [docs/faq.md#{entry}]"
    for words in ENTRIES[entry]:
        assert [other for other, message in messages.items() if words in message and other != entry] == []


def test_the_longest_words_decide_and_other_messages_have_no_pointer() -> None:
    assert (
        pointer("run x cannot be used: a is damaged. Restore the folder as it was.") == " [docs/faq.md#run-is-damaged]"
    )
    assert pointer("no words of an entry") == ""


def test_in_python_the_message_has_no_pointer() -> None:
    with pytest.raises(InputError, match=r"^'predicts' is not a verb\. [^\[]*$"):
        parse_args(["predicts"])
