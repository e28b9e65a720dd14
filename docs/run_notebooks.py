"""Run the notebooks of docs/notebooks: `make notebooks` keeps what they show, `make check-notebooks` compares it.

Each runs in a kernel and an empty folder of its own, two at a time. Times, versions and ids of cells, which differ from
run to run, do not get into the files.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"

#: Most seconds for one cell.
TIMEOUT = 300

#: Lines about the speed of a training.
TIMES = re.compile(r"^(?:about .* for the remaining|step \d+/).*\n", flags=re.MULTILINE)

#: Paths of a machine.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|Users|private|mnt|data)/\S*")

#: What of a notebook is kept besides its cells.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(text: str) -> dict[str, Any]:
    """Execute a notebook.

    Raises:
        CellExecutionError: A cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(text, as_version=4)
    options: dict[str, Any] = {"timeout": TIMEOUT, "kernel_name": "python3", "record_timing": False}
    with tempfile.TemporaryDirectory() as folder:
        options |= {"extra_arguments": ["--log-level=ERROR"], "resources": {"metadata": {"path": folder}}}
        NotebookClient(notebook, coalesce_streams=True, **options).execute()
    return json.loads(nbformat.writes(notebook))


def outputs_of(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the outputs of a cell, each with its texts joined."""
    joined = []
    for output in cell.get("outputs", ()):
        data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
        joined.append({**output, "data": data, "text": "".join(output.get("text", ""))})
    return joined


def tidied(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook without what differs from run to run: times, versions and ids."""
    for number, cell in enumerate(notebook["cells"], start=1):
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = TIMES.sub("", "".join(output["text"])).splitlines(keepends=True)
    return {**notebook, "metadata": METADATA}


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """Return what each cell shows besides printed lines: the types of its tables and figures."""
    return [
        [", ".join(sorted(output["data"])) for output in outputs_of(cell) if output["output_type"] != "stream"]
        for cell in notebook["cells"]
    ]


def faults(notebook: dict[str, Any]) -> list[str]:
    """Return what must not be kept: errors, what is printed to stderr, paths of a machine."""
    found = []
    for number, cell in enumerate(notebook["cells"], start=1):
        for output in outputs_of(cell):
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.get('ename', 'stderr')}: {output['text'][:200]}")
            texts = [output["text"], *(text for kind, text in output["data"].items() if kind.startswith("text"))]
            found += [f"cell {number}: {path.group()}" for text in texts for path in MACHINE_PATH.finditer(text)]
    return found


def run(path: Path, is_check: bool) -> tuple[str, list[str]]:
    """Execute a notebook, and keep it unless this is a check; return a line about it and what is wrong with it."""
    from nbclient.exceptions import CellExecutionError

    started, before = time.monotonic(), path.read_text(encoding="utf-8")
    try:
        after = tidied(executed(before))
    except CellExecutionError as error:
        return f"{path.name}: failed", [str(error)]
    wrong = faults(after)
    if is_check and kinds(after) != kinds(json.loads(before)):
        wrong.append("it shows other tables or figures than the file: run `make notebooks` and look at the difference")
    if not is_check and not wrong:
        text = json.dumps(after, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return f"{path.name}: {time.monotonic() - started:.0f} s", wrong


def main() -> None:
    """Run all notebooks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb (default: all)")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    arguments = parser.parse_args()
    paths = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    # The debugger and tqdm warn of what no reader of a notebook can change.
    os.environ |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    is_wrong = False
    with ProcessPoolExecutor(2) as pool:
        for line, wrong in pool.map(run, paths, [arguments.check] * len(paths)):
            print("\n  ".join([line, *wrong]), flush=True)
            is_wrong |= bool(wrong)
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
