"""A page holds its cells in few bytes, and names stay text whatever is in them."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from perturbgene.files import PAGE_MARKER
from perturbgene.reports.answers import MOST_CELLS, answers_page
from perturbgene.reports.labels import Phenotype
from perturbgene.reports.page import map_data, write_page

ODD_LABELS = ["</script><script>alert(1)</script>", "{{ 7 * 7 }}", "=HYPERLINK(A1)", "$\\alpha$", "<b>B & 'T'"]


def predictions(num_cells: int, labels: list[str]) -> pd.DataFrame:
    """Return made-up predictions of `predict`, with a donor and a number."""
    rng = np.random.default_rng(0)
    columns = {
        "predicted_cell_type": pd.Categorical.from_codes(rng.integers(len(labels), size=num_cells), labels),
        "predicted_cell_type_probability": rng.random(num_cells).astype(np.float32),
        "donor_id": pd.Categorical(rng.integers(30, size=num_cells).astype(str)),
        "total_counts": rng.random(num_cells) * 1e4,
    }
    return pd.DataFrame(columns, index=[f"cell_{number}-1" for number in range(num_cells)])


def write(obs: pd.DataFrame, path, *, num_drawn: int) -> str:
    """Write a page of predictions of which the first cells are on the map, and return its text."""
    places_m2 = np.random.default_rng(1).normal(size=(num_drawn, 2))
    section = Phenotype("cell_type", obs, "cell_type")
    drawn = {"rows_m": np.arange(num_drawn), "places_m2": places_m2, "map_note": f"a sample of {num_drawn:,}"}
    write_page(answers_page("t", "s", [], [section], columns=list(obs.columns), **drawn), path)
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """Return what the script reads; there is one such element."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(text)


def test_a_page_of_100_000_cells_is_small_and_counts_all_of_them(tmp_path):
    page = write(predictions(100_000, [f"type {k}" for k in range(40)]), tmp_path / "a.html", num_drawn=MOST_CELLS)
    assert len(page.encode()) < 2_000_000
    data = data_of(page)
    assert data["map"]["count"] == MOST_CELLS == len(data["map"]["names"])
    assert np.sum(data["phenotypes"][0]["types"]) == 100_000


def test_labels_stay_text(tmp_path):
    page = write(predictions(60, ODD_LABELS), tmp_path / "a.html", num_drawn=60)
    assert page.startswith(PAGE_MARKER) and page.count("<script") == page.count("</script>") == 2
    assert "<b>B" not in page and "&lt;/script&gt;&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    assert sorted(data_of(page)["map"]["columns"][0]["labels"]) == sorted(ODD_LABELS)


def test_nothing_outside_the_page_is_named_and_no_style_or_handler_is_inline(tmp_path):
    page = write(predictions(60, ["B", "T"]), tmp_path / "a.html", num_drawn=60)
    assert re.findall(r"default-src (\S+?);", page) == ["'none'"]
    assert not re.findall(r'\s(?:src|href|style|on\w+)="', page.split("<script", 1)[0])
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address


def test_codes_of_the_map_are_those_of_the_labels_and_0_is_missing():
    obs = pd.DataFrame({"type": pd.Categorical(["T", None, "B", "T"]), "x": [1.0, np.nan, 3.0, 2.0]})
    [column] = map_data(np.zeros((4, 2)), obs[["type"]])["columns"]
    codes = np.frombuffer(base64.b64decode(column["codes"]), dtype="<u2")
    assert [column["labels"][code - 1] if code else None for code in codes] == ["T", None, "B", "T"]


@pytest.mark.parametrize(
    "values",
    [
        pd.array([1, None] * 30, dtype="Int64"), pd.array([True, None] * 30, dtype="boolean"), [np.nan] * 60,
        pd.array(["a", None] * 30, dtype="string"), pd.Categorical([None] * 60), np.arange(60), [np.inf] * 60,
        pd.to_datetime(["2020-01-01"] * 60), [f"barcode {number}" for number in range(60)],
    ],
)  # fmt: skip
def test_a_column_of_any_kind_colors_the_map_or_is_left_out(values):
    obs = pd.DataFrame({"first": np.repeat(["a", "b"], 30), "odd": pd.Series(values)})
    columns = map_data(np.random.default_rng(0).normal(size=(60, 2)), obs)["columns"]
    assert [column["name"] for column in columns][:1] == ["first"]
    json.dumps(columns, allow_nan=False)


def test_a_file_that_is_no_report_is_not_replaced(tmp_path):
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(Exception, match="exists and is not a report. Choose another --output"):
        write(predictions(20, ["B"]), tmp_path / "thesis.html", num_drawn=20)
    assert (tmp_path / "thesis.html").read_text() == "mine"
