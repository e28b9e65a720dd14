"""The scale of a matrix is recognised on a few values; the arithmetic is checked against scanpy."""

from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy
from scipy import sparse

from perturbgene.data_utils.scale import (
    Normalization,
    check_scale,
    check_values,
    count_thresholds,
    library_sizes,
    log1p_cp10k,
    needs_normalizing,
    recognize_counts,
)
from perturbgene.errors import InputError


def cells(*rows: Any, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, offsets and row numbers of cells."""
    offsets = np.cumsum([0, *map(len, rows)])
    return np.concatenate([np.asarray(row) for row in rows]), offsets, first + np.arange(len(rows))


@pytest.mark.parametrize(
    ("values", "is_counts"),
    [
        pytest.param(np.array([1, 2, 7], np.uint16), True, id="unsigned integers"),
        pytest.param(np.array([1, 2, 7], np.int64), True, id="integers"),
        pytest.param(np.array([1.0, 2.0, 700.0], np.float32), True, id="whole floats"),
        pytest.param(np.array([True, False]), True, id="booleans"),
        pytest.param(np.array([0.69, 1.1, 9.2]), False, id="logarithms"),
        pytest.param(np.zeros(0, np.float32), True, id="nothing stored"),
    ],
)
def test_counts_are_non_negative_whole_numbers(values: np.ndarray, is_counts: bool) -> None:
    assert recognize_counts(*cells(values), source="X") is is_counts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            [0.5, -1.04], r"a.h5ad \(X\) holds negative expression values \(lowest -1.04\).*--layer", id="z-scores"
        ),
        pytest.param([1, -1], "negative", id="negative integers"),
        pytest.param([1.0, np.nan], r"a.h5ad \(X\) holds NaN or infinite", id="NaN"),
        pytest.param([1.0, np.inf], "NaN or infinite", id="infinite"),
        pytest.param([0.5, 812.3], "up to 812.3: neither raw counts nor log-normalized", id="fractional and large"),
    ],
)
def test_values_without_a_bin_are_refused_with_the_matrix_named(values: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognize_counts(*cells(values), source="a.h5ad (X)")


@pytest.mark.parametrize(
    ("rows", "is_counts", "message"),
    [
        pytest.param([[0.7, 1.1], [1.0, 2.0, 3.0]], None, "rows 6 hold counts, rows 5 fractional", id="in the sample"),
        pytest.param([[1.0, 2.0, 3.0]] * 5, False, "rows 5, 6, 7 and 2 more hold counts, rows elsewhere", id="counts"),
        pytest.param([[2.0, 60.0]], False, "rows 5 hold counts", id="a count beyond any logarithm"),
        pytest.param([[1.0, 2.0], [0.7]], True, r"rows 6 fractional values \(such as 0.7\)", id="logs among counts"),
    ],
)
def test_cells_on_two_scales_are_refused_in_both_orders_with_their_rows(
    rows: list[list[float]], is_counts: bool | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"a.h5ad mixes scales.*{message}"):
        if is_counts is None:
            recognize_counts(*cells(*rows, first=5), source="a.h5ad")
        else:
            check_scale(*cells(*rows, first=5), is_counts=is_counts, source="a.h5ad")


def test_a_few_whole_values_among_logarithms_may_be_logarithms() -> None:
    check_scale(*cells([1.0, 2.0], [1.0, 1.0, 1.0], [0.0], []), is_counts=False, source="X")
    assert not recognize_counts(*cells([1.0, 2.0], [0.7, 1.1]), source="X")


@pytest.mark.parametrize("normalization", ["none", "log1p_cp10k"])
def test_a_chosen_normalization_still_refuses_negative_values(normalization: Normalization) -> None:
    with pytest.raises(InputError, match="negative"):
        needs_normalizing(*cells([-1.0]), normalization=normalization, source="X")


@pytest.mark.parametrize(
    ("normalization", "values", "expected"),
    [
        pytest.param("auto", [1.0, 2.0], True, id="auto on counts"),
        pytest.param("auto", [0.5, 2.0], False, id="auto on logarithms"),
        pytest.param("none", [1.0, 2.0], False, id="none on counts"),
        pytest.param("log1p_cp10k", [0.5, 812.3], True, id="log1p_cp10k on anything"),
    ],
)
def test_normalization_is_chosen_or_recognised(
    normalization: Normalization, values: list[float], expected: bool
) -> None:
    assert needs_normalizing(*cells(values), normalization=normalization, source="X") is expected


def test_unsigned_values_are_never_negative() -> None:
    check_values(np.array([0, 255], np.uint8), source="X")


def test_library_sizes_sum_each_cell_also_when_cells_are_empty() -> None:
    sizes = library_sizes(np.array([1, 2, 3, 250, 250], np.uint8), np.array([0, 0, 3, 3, 5, 5]))
    assert sizes.tolist() == [0.0, 6.0, 0.0, 500.0, 0.0]


def test_no_cell_has_no_library_size() -> None:
    assert library_sizes(np.zeros(0), np.zeros(1, np.int64)).tolist() == []


def test_log1p_cp10k_is_what_scanpy_computes() -> None:
    counts_ng = np.random.default_rng(0).poisson(2.0, size=(9, 7)).astype(np.float64)
    cells = ad.AnnData(sparse.csr_matrix(counts_ng))
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    ours = log1p_cp10k(counts_ng, counts_ng.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, cells.X.toarray(), rtol=1e-6)


def test_a_count_that_reaches_an_edge_in_exact_arithmetic_reaches_its_threshold() -> None:
    library_size, counts = 20_000.0, np.arange(1.0, 50.0)
    edges = np.log1p(counts * 1e4 / library_size)
    assert (counts >= count_thresholds(edges) * library_size).all()
    assert (counts - 1e-3 < count_thresholds(edges) * library_size).all()
