"""The scale of a matrix is recognized from its values, in every form that people have normalized them to."""

from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy
from scipy import sparse

from perturbgene.data_utils.recognition import (
    COUNTS,
    TRANSFORMS,
    Scale,
    check_cells,
    check_values,
    recognize,
)
from perturbgene.data_utils.scale import log1p_cp10k
from perturbgene.errors import InputError

NUM_CELLS, NUM_GENES = 40, 300
RNG = np.random.default_rng(0)
RATES_G = RNG.gamma(0.4, 2.0, NUM_GENES)
COUNTS_NG = RNG.poisson(RATES_G * RNG.lognormal(0.5, 0.5, (NUM_CELLS, 1))).astype(np.float64)
SIZE_N1 = COUNTS_NG.sum(axis=1, keepdims=True)
CP10K_NG = np.log1p(COUNTS_NG / SIZE_N1 * 1e4)
FACTOR_N1 = RNG.lognormal(0, 0.3, (NUM_CELLS, 1))

#: What people keep in X -> (values, shape (n, g); the name that we give it). All of them are the same cells.
FORMS = {
    "counts": (COUNTS_NG, "counts"),
    "log1p CP10k": (CP10K_NG, "log1p of counts per 10,000"),
    "log1p CPM": (np.log1p(COUNTS_NG / SIZE_N1 * 1e6), "log1p of counts per 1,000,000"),
    "log1p of the median": (
        np.log1p(COUNTS_NG / SIZE_N1 * np.median(SIZE_N1)), f"log1p of counts per {np.median(SIZE_N1):,.6g}",
    ),
    "log2 CPM": (np.log2(1 + COUNTS_NG / SIZE_N1 * 1e6), "log2(1 + x) of counts per 1,000,000"),
    "log10 CP10k": (np.log10(1 + COUNTS_NG / SIZE_N1 * 1e4), "log10(1 + x) of counts per 10,000"),
    "CPM": (COUNTS_NG / SIZE_N1 * 1e6, "counts per 1,000,000"),
    "fractions": (COUNTS_NG / SIZE_N1, "fractions of the total"),
    "doubly logged": (np.log1p(CP10K_NG), "log1p of log1p of counts per 10,000"),
    "log2 of scran": (np.log2(1 + COUNTS_NG / FACTOR_N1), "log2(1 + x) of counts over a factor of each cell"),
    "log1p of counts": (np.log1p(COUNTS_NG), "log1p of counts"),
    "counts times 0.97": (COUNTS_NG * 0.97, "fractional counts"),
    "counts minus 0.1": (np.maximum(COUNTS_NG - 0.1, 0), "fractional counts"),
}  # fmt: skip


def cells(*rows: Any, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, offsets and row numbers of cells."""
    offsets = np.cumsum([0, *map(len, rows)])
    return np.concatenate([np.asarray(row) for row in rows]), offsets, first + np.arange(len(rows))


def csr(values_ng: np.ndarray, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, offsets and row numbers of a dense matrix, as stored in float32."""
    matrix = sparse.csr_matrix(values_ng.astype(dtype))
    return matrix.data, matrix.indptr.astype(np.int64), np.arange(matrix.shape[0])


def found(values_ng: np.ndarray, **options: Any) -> Scale:
    return recognize(*csr(values_ng), **{"source": "X", "num_genes": 3000, **options})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognized_by_name(form: str) -> None:
    values_ng, name = FORMS[form]
    assert found(values_ng, num_genes=20_000).name == name


@pytest.mark.parametrize("form", [form for form in FORMS if form != "counts minus 0.1"])
def test_linear_values_of_every_form_give_the_same_log1p_cp10k_up_to_rounding(form: str) -> None:
    values_l, offsets, rows = csr(FORMS[form][0])
    scale = recognize(values_l, offsets, rows, source="X", num_genes=20_000)
    linear_l = scale.linear(values_l)
    size_n = np.add.reduceat(linear_l.astype(np.float64), offsets[:-1])
    ours_l = log1p_cp10k(linear_l, np.repeat(size_n, np.diff(offsets)))
    np.testing.assert_allclose(ours_l, CP10K_NG[COUNTS_NG > 0], rtol=3e-6)  # float32 keeps 6e-8 of each logarithm


@pytest.mark.parametrize(
    ("form", "total"),
    [("log1p CP10k", 1e4), ("log1p CPM", 1e6), ("log1p of the median", np.median(SIZE_N1)), ("log2 CPM", 1e6),
     ("log10 CP10k", 1e4), ("CPM", 1e6)],
)  # fmt: skip
def test_the_total_is_known_though_genes_were_cut_away_after_normalizing(form: str, total: float) -> None:
    scale = found(FORMS[form][0][:, ::3])
    assert (scale.kind, scale.total) == ("cut", total)


def test_the_total_of_rounded_and_cut_values_is_known_from_obs() -> None:
    scale = found(np.round(CP10K_NG[:, ::3], 3), totals_n=SIZE_N1[:, 0])
    assert (scale.kind, scale.total, scale.is_binned_as_is) == ("cut", 1e4, True)


def test_a_total_that_cannot_be_known_is_assumed_with_a_note() -> None:
    scale = found(np.round(CP10K_NG[:, ::3], 3))
    assert scale.kind == "assumed"
    assert "cannot be known" in scale.note


def test_scanpys_default_target_is_recognized() -> None:
    adata = ad.AnnData(sparse.csr_matrix(COUNTS_NG))
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    assert found(adata.X.toarray()).name == FORMS["log1p of the median"][1]


def test_alevin_like_counts_of_which_most_are_whole_are_fractional() -> None:
    values_ng = COUNTS_NG.copy()
    values_ng[:, ::7] *= 0.631
    values_ng = np.minimum(values_ng, 12)
    assert found(values_ng).name == "fractional counts"


def test_corrected_counts_are_known_from_totals_in_obs() -> None:
    soup_ng = np.minimum(COUNTS_NG, 2) * RNG.uniform(0.7, 1.0, COUNTS_NG.shape)
    with pytest.raises(InputError, match="scale is not known"):
        found(soup_ng)
    assert found(soup_ng, totals_n=soup_ng.sum(axis=1)).name == "fractional counts"


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        pytest.param(np.array([1, 2, 7], np.uint16), COUNTS, id="unsigned integers"),
        pytest.param(np.array([1, 2, 7], np.int64), COUNTS, id="integers"),
        pytest.param(np.array([1.0, 2.0, 700.0], np.float32), COUNTS, id="whole floats"),
        pytest.param(np.array([True, False]), COUNTS, id="booleans"),
        pytest.param(np.zeros(0, np.float32), COUNTS, id="nothing stored"),
        pytest.param(np.array([0.69, 1.1, 9.2]), Scale("assumed", "log1p", None, 0.69), id="a few logarithms"),
        pytest.param(np.array([0.5, 812.3]), Scale("fractional", "", None, 0.5), id="beyond logarithms"),
    ],
)
def test_few_values_are_counts_if_they_are_whole(values: np.ndarray, scale: Scale) -> None:
    assert recognize(*cells(values), source="X", num_genes=9) == scale


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            [0.5, -1.04], r"a.h5ad \(X\) holds negative expression values \(lowest -1.04\).*--layer", id="z-scores"
        ),
        pytest.param([1, -1], "negative", id="negative integers"),
        pytest.param([1.0, np.nan], r"a.h5ad \(X\) holds NaN or infinite", id="NaN"),
        pytest.param([1.0, np.inf], "NaN or infinite", id="infinite"),
    ],
)
def test_values_without_a_bin_are_refused_with_the_matrix_named(values: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognize(*cells(values), source="a.h5ad (X)", num_genes=9)


SCALED_NG = (CP10K_NG - CP10K_NG.mean(axis=0)) / np.maximum(CP10K_NG.std(axis=0), 1e-9)
DENOISED_NG = (COUNTS_NG + RNG.uniform(0, 0.1, COUNTS_NG.shape)) * 10


@pytest.mark.parametrize(
    ("values_ng", "why"),
    [
        pytest.param(SCALED_NG - SCALED_NG.min(), "nearly every gene of every cell has a value", id="shifted z-scores"),
        pytest.param(10 * (SCALED_NG - SCALED_NG.min()), "nearly every gene", id="large shifted z-scores"),
        pytest.param(SCALED_NG - SCALED_NG.min(axis=0), "add up to one total", id="z-scores shifted by gene"),
        pytest.param(np.clip(SCALED_NG, 0, 10), "add up to one total", id="positive z-scores"),
        pytest.param(DENOISED_NG, "nearly every gene", id="denoised counts"),
        pytest.param(DENOISED_NG / DENOISED_NG.sum(axis=1, keepdims=True), "nearly every gene", id="denoised shares"),
    ],
)
def test_values_of_no_known_scale_are_refused_with_the_reason_and_what_to_do(values_ng: np.ndarray, why: str) -> None:
    with pytest.raises(InputError, match=f"scale is not known: .*{why}.*shifted, denoised.*--layer.*--normalization"):
        found(values_ng, num_genes=NUM_GENES)


def test_rounded_values_have_one_scale() -> None:
    assert found(np.round(CP10K_NG, 2)).name == "log1p of counts per 10,000"


def test_logarithms_of_counts_that_were_not_normalized_are_said() -> None:
    assert "holds log1p of counts (such as 1.09861), recognized by the same smallest" in found(np.log1p(COUNTS_NG)).note


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("counts", "log1p CP10k", "rows 0, 1, 2 and 17 more hold counts, rows 20, .* log1p of counts per 10,000"),
        ("log1p CPM", "counts", "rows 20, 21, 22 and 17 more hold counts, rows 0, .* log1p of counts per 1,000,000"),
        ("log1p CP10k", "log1p CPM", "rows 0, 1, 2 and 17 more hold log1p of counts per 10,000, rows 20, 21"),
        ("log1p CP10k", "counts times 0.97", "rows 0, 1, 2 and 17 more hold log1p of counts per 10,000, rows 20"),
        ("CPM", "log2 CPM", "rows 0, 1, 2 and 17 more hold counts per 1,000,000, rows 20"),
    ],
)
def test_sampled_cells_on_two_scales_are_refused_with_their_rows(first: str, second: str, message: str) -> None:
    values_ng = np.concatenate([FORMS[first][0][:20], FORMS[second][0][20:]])
    with pytest.raises(InputError, match=f"X mixes scales: {message}"):
        found(values_ng)


@pytest.mark.parametrize("other", ["counts", "log1p CPM", "log2 CPM", "counts times 0.97"])
@pytest.mark.parametrize("form", ["counts", "log1p CP10k", "log1p CPM", "CPM", "log10 CP10k"])
def test_one_cell_of_another_scale_is_found_wherever_it_is(form: str, other: str) -> None:
    values_ng = FORMS[form][0]
    scale = found(values_ng)
    check_cells(*csr(values_ng), scale=scale, source="X")
    if form != other:
        values_ng = np.concatenate([values_ng[:9], FORMS[other][0][9:10], values_ng[10:]])
        with pytest.raises(InputError, match="X mixes scales.*rows 9 "):
            check_cells(*csr(values_ng), scale=scale, source="X")


def test_logarithms_among_fractional_counts_are_found() -> None:
    values_ng = np.concatenate([COUNTS_NG[:20] * 0.97, CP10K_NG[20:]])
    with pytest.raises(InputError, match="X mixes scales.*rows 20, 21, 22"):
        check_cells(*csr(values_ng), scale=Scale("fractional"), source="X")


def test_a_few_whole_values_among_logarithms_may_be_logarithms() -> None:
    check_cells(*cells([1.0, 2.0], [1.0, 1.0, 1.0], [0.0], []), scale=Scale("cut", "log1p", 1e4), source="X")
    assert recognize(*cells([1.0, 2.0], [0.7, 1.1]), source="X", num_genes=9).kind == "assumed"


def test_empty_cells_and_stored_zeros_are_no_evidence() -> None:
    values_l, offsets, _ = csr(CP10K_NG)
    scale = recognize(
        np.concatenate([values_l, [0.0, 0.0]]), np.append(offsets, [offsets[-1], offsets[-1] + 2]), np.arange(42),
        source="X", num_genes=3000,
    )  # fmt: skip
    assert scale.name == "log1p of counts per 10,000"


def test_unsigned_values_are_never_negative() -> None:
    check_values(np.array([0, 255], np.uint8), source="X")


def test_transforms_undo_what_they_are_called() -> None:
    count = np.array([0.0, 1.0, 250.0])
    logs = {"": count, "log1p": np.log1p(count), "log2(1 + x)": np.log2(1 + count),
            "log10(1 + x)": np.log10(1 + count), "log1p of log1p": np.log1p(np.log1p(count))}  # fmt: skip
    assert set(logs) == set(TRANSFORMS)
    for name, undo in TRANSFORMS.items():
        np.testing.assert_allclose(undo(logs[name]), count, rtol=1e-12)
