"""The pages of docs: each is in the table of contents, their links lead somewhere, their words and errors are ours."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from perturbgene.faq import ENTRIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
for path in sorted(DOCS.glob("notebooks/*.ipynb")):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    PAGES[path] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
#: Written by docs/reference.py when the site is built.
GENERATED = {
    "reference/commands",
    "reference/python",
    "reference/benchmarks",
    "reference/contributing",
    "reference/security",
}


@pytest.fixture(scope="module")
def code() -> str:
    """All modules in one text, strings over several lines joined."""
    paths = [path for path in (ROOT / "perturbgene").rglob("*.py") if path.name != "faq.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_table_of_contents() -> None:
    lists = re.findall(r"```\{toctree\}\n(.*?)```", PAGES[DOCS / "index.md"], flags=re.S)
    names = {line for text in lists for line in text.splitlines() if re.fullmatch(r"[a-z/-]+", line)}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert names - GENERATED == pages - {"index"}
    assert names >= GENERATED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_glossary_explains_words_that_the_code_uses(code: str) -> None:
    words = re.findall(r"^\| ([a-z][a-z ]*) \|", PAGES[DOCS / "glossary.md"], flags=re.M)[1:]
    assert len(words) >= 15
    assert [word for word in words if not re.search(rf"\b{word}\b", code)] == []


def test_the_words_of_every_explained_error_are_in_the_code(code: str) -> None:
    words = [text for texts in ENTRIES.values() for text in texts if text != os.strerror(errno.ENOSPC)]
    assert [text for text in words if text not in code] == []
