"""The benchmark of inference compares ways that give the same answer, and reports each."""

import numpy as np

from benchmarks.inference import cut, knock_out_rows, reading_rows
from tests.perturbation.test_screening import CELLS, a_run, cells

TOWARDS = "cell_type=B cell"


def test_cells_are_cut_to_a_number_of_genes() -> None:
    shorter = cut(CELLS, 3, 5)
    assert np.diff(shorter.offsets_n1).tolist() == [7, 7]  # the cell of four genes has too few
    assert len(cut(CELLS, 3, 10)) == 0


def test_every_way_of_reading_has_a_row_and_the_same_answer() -> None:
    rows = list(reading_rows(a_run(), CELLS, TOWARDS))
    assert [row["verb"] for row in rows] == ["predict"] * 3 + ["embed"] * 3
    assert all(row["cells/s"] > 0 for row in rows)


def test_the_screen_is_reported_with_its_quality_and_beside_exact_runs() -> None:
    rows = {row["how"]: row for row in knock_out_rows(a_run(), cells(list(range(9))), TOWARDS, num_genes=9, sample=9)}
    assert rows["one edited cell at a time"]["x"] == 1.0
    assert rows["ours, exact"]["x ours"] == 1.0
    assert -1 <= rows["screen"]["spearman"] <= 1 and 0 <= rows["screen"]["recall"] <= 1
    assert {"screen, float32", "screen and 64 exact", "screen and 64 exact, bfloat16"} <= set(rows)
