"""The notebooks as they are kept: run from the top, with figures, nothing of a machine, calls that the package has.

`make check-notebooks` runs them.
"""

import ast
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import perturbgene as pg
from perturbgene.cli.parsing import known_flags
from perturbgene.configs import CONFIGS

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
#: Most bytes of a notebook with its figures.
MOST_BYTES = 400_000

spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs/run_notebooks.py")
assert spec and spec.loader
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_of(path)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_there_are_five() -> None:
    assert [path.stem for path in PATHS] == ["annotate", "counterfactuals", "donors", "knockouts", "transfer"]


@each
def test_a_notebook_was_run_once_from_top_to_bottom_and_is_kept_tidy(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], [cell["execution_count"] for cell in code_of(path)]) == (
        4, list(range(1, len(code_of(path)) + 1)),
    )  # fmt: skip
    assert run_notebooks.faults(notebook) == []
    assert run_notebooks.tidied(json.loads(json.dumps(notebook))) == notebook
    assert path.stat().st_size < MOST_BYTES


@each
def test_each_cell_that_draws_shows_a_figure_with_a_description(path: Path) -> None:
    drawing = [cell for cell in code_of(path) if "plt.subplots(" in "".join(cell["source"])]
    assert len(drawing) >= 3
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 20


@each
def test_each_call_is_of_a_function_and_keywords_that_the_package_has(path: Path) -> None:
    ours = [call for call in calls(path) if ast.unparse(call.func).startswith("pg.")]
    assert len(ours) >= 4
    for call in ours:
        name = ast.unparse(call.func).removeprefix("pg.")
        allowed = set(inspect.signature(getattr(pg, name)).parameters)
        if "settings" in allowed:
            allowed |= set(known_flags(CONFIGS[name]))
        assert {word.arg for word in call.keywords if word.arg} <= allowed, name


@each
def test_a_notebook_ends_with_a_check_of_what_its_text_says(path: Path) -> None:
    last = code_of(path)[-1]
    assert (last["metadata"].get("tags"), "assert " in "".join(last["source"])) == (["remove-cell"], True)


def test_what_must_not_be_kept_is_found() -> None:
    printed = {"output_type": "stream", "name": "stdout", "text": ["wrote /home/me/a.csv\n", "1/2 and/or a/b\n"]}
    warned = {"output_type": "stream", "name": "stderr", "text": ["careful\n"]}
    notebook = {"cells": [{"cell_type": "code", "outputs": [printed, warned]}]}
    assert run_notebooks.faults(notebook) == ["cell 1: /home/me/a.csv", "cell 1: stderr: careful\n"]


def test_lines_about_speed_and_ids_are_not_kept() -> None:
    text = ["about 20 seconds for the remaining 98 steps\n", "step 9/9 · 201 cells/s\n", "evaluated at step 9\n"]
    notebook = {"cells": [{"id": "a1b2", "outputs": [{"text": text}]}], "metadata": {"language_info": {"version": "3"}}}
    tidy = run_notebooks.tidied(notebook)
    assert tidy["cells"] == [{"id": "cell-1", "outputs": [{"text": ["evaluated at step 9\n"]}]}]
    assert tidy["metadata"] == run_notebooks.METADATA
