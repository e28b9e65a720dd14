"""docs/robustness.md is written from the lists that tests work through: `python -m tests.test_robustness`."""

import re
from pathlib import Path

from tests.fuzz import FORMS, ON_CELLS, ON_CORPUS, ON_RUN, TEXTS
from tests.lines import Checked
from tests.test_bad_inputs import CASES
from tests.test_faults import FAULTS
from tests.test_fuzz import NUM_MUTANTS
from tests.test_properties import PROPERTIES
from tests.test_repeatable import PROMISES
from tests.test_tasks import CHECKS

PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
HEAD = """# Bad inputs, faults, and what is repeatable

Refused means: exit code 2, one line that says what was given, why not, what to do; nothing written. Exit code 3 means
that the machine is at fault (a full disk, no memory, a killed process), also in one line: the same command then starts
over or continues, and training continues with `--resume_from_checkpoint`. 128 + n: signal n stopped the command.

Every line with a test is one, `pytest "tests/test_bad_inputs.py::test_bad_inputs[ID]"` or
`pytest -m "" "tests/test_faults.py::test_faults[ID]"`, or has the test that it names. `make test` runs all but those
that say `make faults`, which runs the others (minutes). This page is written from these tests:
`make robustness`.
"""
FAULTS_HEAD = """
## Faults of the machine

Outputs are written under another name and renamed when they are whole. Each has one writer at a time, whose lock the
system releases when it ends. Checkpoints have the sums of their files. A training that finishes no step, batch,
checkpoint or evaluation for an hour shows where each of its threads and loader workers is, and ends; so does a question
that several processes answer (`torchrun`) where one of them computes nothing or gives no sign of life.
"""

REPEATABLE_HEAD = """
## What is repeatable

The contract, on one machine with the same versions of PyTorch and numpy and the same number of threads. Bit by bit:
the weights, whatever does not concern them, and the tokens, masks and order of cells, on any machine. Within 1e-5:
steps that are divided otherwise among processes or accumulated batches, and answers about cells in other batches.

Not promised: the weights on another number of threads (`OMP_NUM_THREADS`), another version of PyTorch, another kind
of CPU or GPU, in bfloat16 next to float32, or with the backward pass of flash attention; and dropout on another number
of processes. A run is not resumed on shards that are divided otherwise: it is refused.

`pytest -m "" "tests/test_repeatable.py::test_repeatable[ID]"`, or the test that a line names.

| id | what changes | what is equal | test |
|---|---|---|---|"""
PROPERTIES_HEAD = """
## Properties

Of any order, cell, label, edit and command line: hypothesis draws them, and shows the smallest that fails.

| id | what | holds | test |
|---|---|---|---|"""
TASKS_HEAD = """
## What holds for every question

Each line for each of the verbs: `pytest "tests/test_tasks.py::test_tasks[ID-VERB]"`.

| id | asked about | outcome | verbs |
|---|---|---|---|"""

DAMAGE_HEAD = """
## Files damaged at random

Bits are flipped, bytes overwritten, set to 0, cut off or doubled; values in JSON and YAML become others. Every command
either refuses the file in one line and writes nothing, or ends with an output that anndata reads whole, with a row for
each cell: no crash, no traceback, nothing that never ends. A damage that leaves a sound file with another number or
letter in it is not seen.

`python -m tests.fuzz "h5ad csr" 17` runs one of them again. `make test` runs one of each, `make fuzz` all.

| file | how many | commands |
|---|---|---|"""


def page() -> str:
    """Return docs/robustness.md."""
    lines = [HEAD]
    for letter, title in {"B": "Bad inputs", "S": "Inputs that attack"}.items():
        lines += [f"## {title}", "", "| id | input | outcome | exit | test |", "|---|---|---|---|---|"]
        for case in [case for case in CASES if case.id.startswith(letter)]:
            test = case.test.split("::")[-1] or ("yes" if case.check else "no")
            lines.append(f"| {case.id} | {case.what} | {case.outcome} | {case.exit} | {test} |")
        lines.append("")
    lines[-1:] = [FAULTS_HEAD, "| id | fault | outcome | exit | test |", "|---|---|---|---|---|"]
    for fault in sorted(FAULTS, key=lambda one: int(one.id.split("-")[0][1:])):
        lines.append(f"| {fault.id} | {fault.what} | {fault.outcome} | {fault.exit} | {_test_of(fault)} |")
    lines.append(REPEATABLE_HEAD)
    for promise in PROMISES:
        lines.append(f"| {promise.id} | {promise.what} | {promise.outcome} | {_test_of(promise)} |")
    lines.append(PROPERTIES_HEAD)
    lines += [f"| {one.id} | {one.what} | {one.outcome} | {one.test.split('::')[-1]} |" for one in PROPERTIES]
    lines.append(TASKS_HEAD)
    lines += [f"| {one.id} | {one.what} | {one.outcome} | {', '.join(one.tasks)} |" for one in CHECKS]
    lines.append(DAMAGE_HEAD)
    for form, number in NUM_MUTANTS.items():
        commands = ON_CELLS if form in FORMS else ON_CORPUS if TEXTS[form] == "corpus" else ON_RUN
        lines.append(f"| {form} | {number} | {', '.join(commands)} |")
    return "\n".join(lines) + "\n"


def _test_of(line: Checked) -> str:
    return line.test.split("::")[-1] or ("yes" if line.is_sampled else "`make faults`")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make robustness`"


def test_no_two_lines_of_the_page_have_one_id() -> None:
    ids = [one.id for one in (*CASES, *FAULTS, *PROMISES, *PROPERTIES, *CHECKS)]
    assert len(set(ids)) == len(ids)


def test_lines_that_name_a_test_name_one_that_exists() -> None:
    for test in [one.test for one in (*CASES, *FAULTS, *PROMISES, *PROPERTIES) if one.test]:
        path, name = test.split("::")
        assert f"def {name}(" in (PAGE.parents[1] / path).read_text(encoding="utf-8"), test


def test_the_promises_of_the_security_page_are_those_that_have_tests() -> None:
    text = (PAGE.parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    tested = {one.id.partition("-")[0] for one in CASES if one.id.startswith("S")}
    assert set(re.findall(r"\bS\d+\b", text)) == tested == {f"S{number}" for number in range(1, 13)}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
