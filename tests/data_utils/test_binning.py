"""Edges are checked at the door; bins against numpy.digitize and by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbgene.data_utils.binning import (
    HIGHEST,
    LOWEST_EDGE,
    TOP_WIDTH,
    BinEdges,
    ValueHistogram,
    checked_edges,
    read_edges,
)
from perturbgene.errors import InputError


def test_a_bin_stands_for_its_middle_whoever_asks() -> None:
    """The model's prior and the counterfactual table use this one definition."""
    edges = BinEdges.per_gene({"A": [1.0, 3.0, 4.0], "B": [2.0, 4.0, 8.0]}, genes=["A", "B"])
    assert edges.values().tolist() == [[0, 2.25, 3.5, 4.5], [0, 3, 6, 10]]
    assert BinEdges.shared([2.0]).values().tolist() == [[0, 2]]
    shared = BinEdges.shared([1e-4, 2.0, 3.0])
    assert shared.levels() == pytest.approx(shared.values()[0] / shared.values()[0, 1:].mean())


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        pytest.param([], "non-empty list", id="no edge"),
        pytest.param([[0.5, 1.0]], "non-empty list", id="a table"),
        pytest.param([1.0, 0.1], r"edge 1 \(0.1\) does not exceed edge 0 \(1\)", id="descending"),
        pytest.param([1.0, 1.0], r"edge 1 \(1\) does not exceed edge 0 \(1\)", id="twice the same"),
        pytest.param([0.0, 1.0], "above 0", id="zero"),
        pytest.param([-1.0, 1.0], "above 0", id="negative"),
        pytest.param([0.5, float("nan")], "finite", id="NaN"),
        pytest.param([0.5, float("inf")], "finite", id="infinite"),
        pytest.param(["a", "b"], "must be numbers", id="words"),
        pytest.param(["0.5", "1"], "must be numbers", id="numbers as text"),
        pytest.param([0.5, None], "must be numbers", id="null"),
        pytest.param([True], "must be numbers", id="a truth value"),
        pytest.param([[0.5], [1.0, 2.0]], "must be numbers", id="ragged"),
    ],
)
def test_edges_that_make_no_bins_are_refused(edges: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_edges(edges)


def test_edges_per_gene_stand_in_panel_order_whatever_the_order_of_the_file() -> None:
    edges = BinEdges.per_gene({"B": [2.0, 3.0], "A": [0.5, 1.0], "extra": [9.0]}, genes=["A", "B"])
    assert edges.edges_ge.tolist() == [[0.5, 1.0], [2.0, 3.0]]
    assert (edges.num_edges, edges.is_shared) == (2, False)


def test_a_gene_without_edges_is_named() -> None:
    with pytest.raises(InputError, match="lack 1 genes of the panel: 'B'"):
        BinEdges.per_gene({"A": [0.5]}, genes=["A", "B"])


def test_genes_with_different_numbers_of_edges_are_refused() -> None:
    with pytest.raises(InputError, match=r"same count for every gene, but counts are \[1, 2\]"):
        BinEdges.per_gene({"A": [0.5], "B": [0.5, 1.0]}, genes=["A", "B"])


def test_a_bad_edge_of_one_gene_names_the_gene() -> None:
    with pytest.raises(InputError, match="bin_edges of gene B must increase"):
        BinEdges.per_gene({"A": [0.5, 1.0], "B": [1.0, 0.5]}, genes=["A", "B"])


@pytest.mark.parametrize("content", [[0.5, 1.0], {"A": [0.5], "B": [1.0]}], ids=["shared list", "gene to list"])
def test_edges_are_read_from_json_as_written(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "edges.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_edges(path) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("0.5", "hold a float")],
    ids=["broken JSON", "a bare number"],
)
def test_an_edge_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "edges.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_edges(path)


def test_edges_are_written_in_the_form_in_which_they_are_given() -> None:
    assert BinEdges.shared([0.5, 1.0]).to_json(["A", "B"]) == [0.5, 1.0]
    per_gene = {"A": [0.5], "B": [1.0]}
    assert BinEdges.per_gene(per_gene, genes=["A", "B"]).to_json(["A", "B"]) == per_gene


def test_quantile_edges_cut_values_into_bins_of_about_equal_size() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=10_000)
    histogram = ValueHistogram()
    histogram.add(values)
    edges = histogram.quantile_edges(4)
    sizes = np.bincount(np.digitize(values, edges))
    assert edges[0] == LOWEST_EDGE
    assert sizes[0] <= 1
    assert sizes[1:4] == pytest.approx([2500] * 3, rel=0.05)
    assert sizes[4:].sum() == pytest.approx(2500, rel=0.05)
    assert np.diff(edges[3:]) == pytest.approx([TOP_WIDTH] * (len(edges) - 4)) and edges[-1] >= HIGHEST - TOP_WIDTH


def test_quantile_edges_do_not_depend_on_the_order_or_the_blocks_of_the_values() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=1_000)
    whole, parts = ValueHistogram(), ValueHistogram()
    whole.add(values)
    for part in np.split(values[::-1], 4):
        parts.add(part)
    assert whole.quantile_edges(5) == parts.quantile_edges(5)


def test_no_values_give_no_edges() -> None:
    assert ValueHistogram().quantile_edges(4) == []
