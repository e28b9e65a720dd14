"""docs/robustness.md is written from the lists of bad inputs and of faults: `python -m tests.test_robustness`."""

from pathlib import Path

from tests.test_bad_inputs import CASES
from tests.test_faults import FAULTS

PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
HEAD = """# Bad inputs and faults, and what comes of them

Refused means: exit code 2, one line that says what was given, why not, what to do; nothing written. Exit code 3 means
that the machine is at fault (a full disk, no memory, a killed process), also in one line: the same command then starts
over or continues, and training continues with `--resume_from_checkpoint`. 128 + n: signal n stopped the command.

Every line with a test is one, `pytest "tests/test_bad_inputs.py::test_bad_inputs[ID]"` or
`pytest -m "" "tests/test_faults.py::test_faults[ID]"`, or has the test that it names. `make test` runs all but those
that say `make faults`, which runs the others (about five minutes on one core). This page is written from these tests:
`make robustness`.
"""
FAULTS_HEAD = """
## Faults of the machine

Outputs are written under another name and renamed when they are whole. Each has one writer at a time, whose lock the
system releases when it ends. Checkpoints have the sums of their files. A training that finishes no step, batch,
checkpoint or evaluation for an hour shows where each of its threads and loader workers is, and ends.
"""


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
        test = fault.test.split("::")[-1] or ("yes" if fault.is_sampled else "`make faults`")
        lines.append(f"| {fault.id} | {fault.what} | {fault.outcome} | {fault.exit} | {test} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make robustness`"


def test_no_two_lines_of_the_page_have_one_id() -> None:
    ids = [one.id for one in (*CASES, *FAULTS)]
    assert len(set(ids)) == len(ids)


def test_lines_that_name_a_test_name_one_that_exists() -> None:
    for test in [one.test for one in (*CASES, *FAULTS) if one.test]:
        path, name = test.split("::")
        assert f"def {name}(" in (PAGE.parents[1] / path).read_text(encoding="utf-8"), test


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
