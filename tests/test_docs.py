"""The pages of docs: each is in the table of contents, their links lead somewhere, their words and errors are ours."""

import ast
import errno
import importlib
import json
import os
import re
from functools import cache
from pathlib import Path

import pytest

from perturbgene.cli.parsing import manual_page
from perturbgene.cli.verbs import CONFIGS
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


def test_links_of_pages_copied_into_the_site_lead_to_pages_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    reference = importlib.import_module("reference")
    here = DOCS / "reference"
    copies = {here / f"{name}.md" for name in reference.OUTSIDE}
    for page in reference.OUTSIDE.values():
        text = reference.moved((ROOT / page).read_text(encoding="utf-8"), Path(page).parent.as_posix())
        paths = {(here / link).resolve() for link in re.findall(r"\]\((\.\.[^)\s#]+\.md)[^)\s]*\)", text)}
        assert paths - copies <= set(DOCS.glob("*.md"))


def test_every_command_has_a_page_with_all_its_flags_and_a_link_to_its_manual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    reference = importlib.import_module("reference")
    assert set(reference.MANUALS) == set(CONFIGS)
    for verb, config in CONFIGS.items():
        page = reference.command_page(verb)
        flags = re.findall(r"^  (--.*)$", manual_page(config).partition("\n\nInput and output\n")[2], flags=re.M)
        assert len(flags) >= 4
        assert [flag for flag in flags if f"\n`{flag}`\n: " not in page] == []
        assert " lone `--` is" in page  # not a dash
        assert re.search(r"^\w.* Read on: \[.*\]\(\.\./", page, flags=re.M)


def docstrings(tree: ast.AST) -> set[int]:
    """Return the numbers of the nodes that are docstrings."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    firsts = [body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)]
    return {id(value) for value in firsts}


@cache
def shown_strings() -> list[str]:
    """Return the strings that the package prints or writes: no docstrings, and no help of settings."""
    texts = []
    for path in (ROOT / "perturbgene").rglob("*.py"):
        if path.name == "faq.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        helps = [node for node in calls if getattr(node.func, "id", "") in ("option", "_mask_rate")]
        silent = docstrings(tree) | {id(node) for call in helps for node in ast.walk(call)}
        strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in silent]
        texts += [node.value for node in strings if isinstance(node.value, str)]
    return texts


def glossary(table: str) -> list[str]:
    """Return the first cells of a table of the glossary."""
    [section] = re.findall(rf"^## {table}\n(.*?)(?=^## |\Z)", PAGES[DOCS / "glossary.md"], flags=re.S | re.M)
    return re.findall(r"^\| (.*?) \|", section, flags=re.M)[2:]


def test_the_glossary_explains_words_that_users_see() -> None:
    shown = shown_strings()
    sentences = "\n".join(text for text in shown if " " in text.strip())
    words = glossary("Words of messages")
    assert len(words) >= 30
    strange = [word for word in words if not re.search(rf"\b{word.replace(' ', '[ _-]')}\b", sentences)]
    assert [word for word in strange if word not in shown] == []  # a word alone begins a line or heads a column


def test_the_glossary_has_the_columns_that_are_written_and_that_the_manuals_explain() -> None:
    columns = {name for cell in glossary("Columns of tables") for name in re.findall("`(.*?)`", cell)}
    written = set(re.findall(r"[a-z_0-9]+", "\n".join(shown_strings())))
    plain = {name for name in columns if "_X" not in name}
    assert plain - written == set()
    explained: set[str] = set()
    for page in ("perturbation.md", "embedding.md"):
        for table in re.findall(r"^\| column \| meaning \|\n(.*?)\n\n", PAGES[DOCS / page], flags=re.S | re.M):
            explained |= {name for row in table.splitlines() for name in re.findall("`(.*?)`", row.split(" | ")[0])}
    assert len(explained) >= 15
    assert explained - columns == set()


def test_the_words_of_every_explained_error_are_in_the_code(code: str) -> None:
    words = [text for texts in ENTRIES.values() for text in texts if text != os.strerror(errno.ENOSPC)]
    assert [text for text in words if text not in code] == []
