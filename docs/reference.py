"""Write the pages of the reference from what the program says of itself: manual pages, docstrings, signatures."""

import inspect
import re
import textwrap
from pathlib import Path

import perturbgene as pg
from perturbgene.cli.parsing import manual_page
from perturbgene.cli.verbs import CONFIGS

ROOT = Path(__file__).parents[1]
#: Name in docs/reference -> page outside docs that is copied there.
OUTSIDE = {"contributing": "CONTRIBUTING.md", "security": "SECURITY.md", "benchmarks": "benchmarks/README.md"}

#: Verb -> the page about it and its title.
MANUALS = {
    "prepare": ("training", "training.md"),
    "check": ("what is read, and what is refused", "formats.md"),
    "mlm": ("training", "training.md"),
    "cls": ("training", "training.md"),
    "evaluate": ("compare with simple baselines", "asking.md#compare-with-simple-baselines"),
    "predict": ("asking a trained run", "asking.md#predict"),
    "embed": ("embeddings", "embedding.md"),
    "counterfactual": ("counterfactuals", "embedding.md#counterfactuals"),
    "perturb": ("what the numbers of a perturbation mean", "perturbation.md"),
    "attribute": ("which genes explain a label", "perturbation.md#attribution"),
    "merge": ("many machines", "asking.md#many-machines"),
    "report": ("looking at results", "report.md"),
    "download": ("training", "training.md"),
}


def literal(text: str, language: str = "text") -> str:
    return f"````{language}\n{text.strip()}\n````\n"


def prose(text: str) -> str:
    """Return plain text as Markdown: flags as code, nothing else changed by its signs."""
    parts = re.split(r"(`[^`]*`|--[\w-]*)", text)
    signs = [re.sub(r"([\\*_<>\[\]{}|$#])", r"\\\1", part) for part in parts[::2]]
    codes = [part if part.startswith("`") else f"`{part}`" for part in parts[1::2]]
    return "".join(sign + code for sign, code in zip(signs, [*codes, ""], strict=True))


def entries(group: str) -> str:
    """Return a group of flags of a manual page: a heading, and each flag with its explanation."""
    title, *lines = group.splitlines()
    flags = re.split(r"^  (?=--)", "\n".join(lines), flags=re.M)[1:]
    parts = [flag.partition("\n") for flag in flags]
    return f"## {title}\n\n" + "\n\n".join(f"`{name}`\n: {prose(' '.join(text.split()))}" for name, _, text in parts)


def command_page(verb: str) -> str:
    """Return the page of a verb: what `perturbgene VERB -h` prints, with headings, and a link to the page about it."""
    summary, about, usage, example, *groups, lists = manual_page(CONFIGS[verb]).split("\n\n")
    calls = [usage.removeprefix("Usage\n"), example.removeprefix("Example\n")]
    name, page = MANUALS[verb]
    return "\n\n".join(
        [
            f"# perturbgene {verb}",
            f"{prose(summary.partition(': ')[2])} {prose(' '.join(about.split()))} Read on: [{name}](../{page}).",
            *(literal(call) for call in calls),
            prose(" ".join(lists.split())),
            *map(entries, groups),
            "",
        ]
    )


def commands_page() -> str:
    """Return the list of all verbs, each with what it does."""
    firsts = {verb: manual_page(config).partition("\n")[0].partition(": ")[2] for verb, config in CONFIGS.items()}
    rows = "\n".join(f"| [{verb}]({verb}.md) | {prose(first)} |" for verb, first in firsts.items())
    lists = "\n".join(firsts)
    return (
        "# Commands\n\nThe manual page of each command, as `perturbgene VERB -h` prints it.\n\n"
        f"| command | what it does |\n| --- | --- |\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{lists}\n```\n"
    )


def explained(doc: str) -> str:
    """Return a Google docstring as Markdown: paragraphs, lists of arguments and errors, examples as code."""
    parts, title = [], ""
    for block in doc.split("\n\n"):
        heading, _, rest = block.partition("\n")
        if is_section := bool(re.fullmatch(r"[A-Z]\w+:", heading)) and rest.startswith("    "):
            title, block = heading.rstrip(":"), rest
            parts.append(f"**{title}**")
        text = textwrap.dedent(block)
        if block.startswith("    ") and (title == "Example" or not is_section):
            parts.append(literal(text, "pycon" if ">>>" in text else "text"))
        elif is_section and title in ("Args", "Raises", "Attributes"):
            named = [entry.partition(":") for entry in re.split(r"\n(?=\S)", text)]
            parts += [f"`{name}`\n: {prose(' '.join(meaning.split()))}" for name, _, meaning in named]
        else:
            parts.append(prose(" ".join(text.split())))
    return "\n\n".join(parts)


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
            explained(inspect.getdoc(value) or ""),
            "",
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
    pages = {verb: command_page(verb) for verb in CONFIGS}
    pages["commands"] = commands_page()
    pages["python"] = python_page()
    for copy, page in OUTSIDE.items():
        pages[copy] = moved((ROOT / page).read_text(encoding="utf-8"), Path(page).parent.as_posix())
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # Sphinx builds again what is newer
            path.write_text(text, encoding="utf-8")
