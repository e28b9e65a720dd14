"""Write the pages of the reference from what the program says of itself: manual pages, docstrings, signatures."""

import inspect
import re
from pathlib import Path

import perturbgene as pg
from perturbgene.cli.parsing import manual_page
from perturbgene.cli.verbs import CONFIGS

ROOT = Path(__file__).parents[1]
#: Name in docs/reference -> page outside docs that is copied there.
OUTSIDE = {"contributing": "CONTRIBUTING.md", "security": "SECURITY.md", "benchmarks": "benchmarks/README.md"}


def literal(text: str, language: str = "text") -> str:
    return f"````{language}\n{text.strip()}\n````\n"


def command_pages() -> dict[str, str]:
    """Return the page of each verb: what `perturbgene VERB -h` prints."""
    return {verb: f"# perturbgene {verb}\n\n{literal(manual_page(config))}" for verb, config in CONFIGS.items()}


def python_page() -> str:
    """Return the page of all public functions and classes: signature, where each lives, docstring."""
    parts = ["# Python functions and classes\n\nAll of these are names of `import perturbgene as pg`.\n"]
    for name in pg.__all__:
        value = getattr(pg, name)
        home = pg.VERBS[name][0] if name in pg.VERBS else value.__module__
        is_error = isinstance(value, type) and issubclass(value, Exception)
        called = "message" if is_error else ", ".join(map(str, inspect.signature(value).parameters.values()))
        parts += [
            f"## pg.{name}\n\nLives in `{home}`.\n",
            literal(f"{name}({called})"),
            literal(inspect.getdoc(value) or ""),
        ]
    return "\n".join(parts)


def moved(text: str, folder: str) -> str:
    """Return a page of another folder with its relative links as seen from docs/reference."""

    def link(match: re.Match[str]) -> str:
        target = match.group(1)
        if re.match(r"https?:|#", target):
            return match.group(0)
        name, _, anchor = target.partition("#")
        path = (ROOT / folder / name).resolve().relative_to(ROOT).as_posix()
        copies = {page: f"reference/{copy}.md" for copy, page in OUTSIDE.items()}
        path = copies.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")
        return f"](../{path}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def write(folder: Path) -> None:
    """Write all generated pages and the list of them."""
    folder.mkdir(exist_ok=True)
    pages = command_pages()
    lists = "\n".join(f"perturbgene {verb} <{verb}>" for verb in pages)
    pages["python"] = python_page()
    for copy, page in OUTSIDE.items():
        pages[copy] = moved((ROOT / page).read_text(encoding="utf-8"), Path(page).parent.as_posix())
    pages["commands"] = f"# Commands\n\nWhat each prints with `-h`.\n\n```{{toctree}}\n{lists}\n```\n"
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # Sphinx builds again what is newer
            path.write_text(text, encoding="utf-8")
