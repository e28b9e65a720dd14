"""The script that asks a GPU everything runs to its end on a CPU, and says what failed without stopping."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import PARTS, Part, Row, Setting, largest_difference, main, run_part, table
from tests.forked import needs_fork, start

ROOT = Path(__file__).parents[1]


@pytest.mark.soak
@needs_fork
def test_the_quick_run_on_a_cpu_has_rows_of_every_part_and_agrees_with_itself(tmp_path: Path) -> None:
    def run() -> None:
        os.chdir(ROOT)
        sys.exit(main(["--device", "cpu", "--quick", "--json", str(tmp_path / "gpu.json")]))

    process = start(run, output=tmp_path / "printed.txt")
    process.join(timeout=280)
    printed = (tmp_path / "printed.txt").read_text()
    assert process.exitcode == 0, printed
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {part.name for part in PARTS}
    assert not [row for row in rows if row["what"] in ("failed", "died", "stopped")]
    agreement = [row for row in rows if row["part"] == "agreement"]
    assert len(agreement) == 6 and all(row["is_met"] for row in agreement)
    assert "no GPU was used" in printed


def fails(setting: Setting, rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    yield "before", 1.0
    raise ValueError("on purpose")


def hangs(setting: Setting, rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    import time

    yield "before", 1.0
    time.sleep(60)


def dies(setting: Setting, rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    yield "before", 1.0
    os._exit(9)


@pytest.mark.parametrize(
    ("run", "what", "value"),
    [(fails, "failed", "ValueError: on purpose"), (hangs, "stopped", "took longer"), (dies, "died", "see a_part.log")],
)
def test_a_part_that_fails_is_reported_and_keeps_what_it_found(run: Any, what: str, value: str, tmp_path: Path) -> None:
    before, last = run_part(Part("a part", 0.4, run), Setting(tmp_path, "cpu", True), [])
    assert (before.what, before.value, before.is_met) == ("before", 1.0, None)
    assert (last.what, last.is_met) == (what, False) and value in str(last.value)
    assert "| a part | before | 1 |  |  |" in table([before, last]) and "**no**" in table([last])


def test_answers_are_compared_relative_to_the_largest() -> None:
    assert largest_difference([100.0, 1.0], [100.0, 2.0]) == pytest.approx(0.01)
    with pytest.raises(AssertionError, match="missing"):
        largest_difference([1.0, np.nan], [1.0, 2.0])
