"""What the values of a matrix are: counts, logarithms of some base and total, or neither.

Owns recognizing the scale of sampled cells (`recognize`), checking every other cell against it (`check_cells`) and
turning values into linear ones (`Scale.linear`); leaves library sizes and files to `shards`. The evidence, in this
order: whole numbers; linear values that add up to one total in all cells; linear values that are multiples of the
cell's smallest, as counts are of 1; values that no logarithm can have. Letters: n cells, l values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from perturbgene.data_utils.kernels import exp_sums, find_count_rows, scan_rows, scan_values
from perturbgene.data_utils.scale import TARGET_SUM, native
from perturbgene.errors import InputError, listed

#: log2(1 + 1,000,000), the largest logarithm of counts per million: fractional values above it are no logarithms.
HIGHEST_LOG_VALUE = 20.0

#: Totals that expression is usually divided to, besides the median of the file's library sizes (scanpy's default).
USUAL_TOTALS = (1.0, 100.0, 1e3, 1e4, 1e5, 1e6)

#: No library is larger: such sums are exponentials of values that are no logarithms.
_HIGHEST_TOTAL = 1e9
#: Totals of cells on one scale differ by less than this share: values may be stored with three decimals.
_SAME_TOTAL = 1e-3
#: A whole transcriptome has more genes; if a file with fewer was cut to them, sums of its rows are too small.
FEWEST_GENES = 10_000

#: Fewer sampled values than this prove nothing but whole numbers and usual totals.
_FEWEST_VALUES = 50
#: Fewer sampled cells than this may agree by chance.
_FEWEST_CELLS = 8
#: Largest distance of a ratio from a whole number, if the ratio is one.
_NEARLY_WHOLE = 0.02

#: Scale of values -> how they become linear ones.
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda values: values,
    "log1p": np.expm1,
    "log2(1 + x)": lambda values: np.expm1(values * np.log(2)),
    "log10(1 + x)": lambda values: np.expm1(values * np.log(10)),
    "log1p of log1p": lambda values: np.expm1(np.expm1(values)),
}

#: counts: whole numbers, or on request. fractional: counts that were corrected, or all multiplied by one number.
#: per_total: linear values add up to `total` in every cell. cut: they did before genes were cut away.
#: per_cell: each cell was divided by a number of its own. assumed: too few values to know. as_given: on request.
Kind = Literal["counts", "fractional", "per_total", "cut", "per_cell", "assumed", "as_given"]


@dataclass(frozen=True)
class Scale:
    """What the values of a matrix are.

    Args:
        kind: What is known of the cells' totals.
        transform: Name in `TRANSFORMS`.
        total: What a cell's linear values add up to, for the kinds `per_total` and `cut`.
        example: A value, for messages.
        reason: Why a scale had to be assumed.
    """

    kind: Kind
    transform: str = ""
    total: float | None = None
    example: float = 0.0
    reason: str = "too few values to recognize their scale"

    @property
    def is_binned_as_is(self) -> bool:
        """True if values are compared with the edges of the bins as they are."""
        is_log1p_cp10k = self.transform == "log1p" and self.total is not None and is_near(self.total, TARGET_SUM)
        return self.kind in ("as_given", "assumed") or is_log1p_cp10k

    @property
    def name(self) -> str:
        """The scale in words, such as "log1p of counts per 1,000,000"."""
        if self.kind == "as_given":
            return "values as they are"
        if self.kind == "assumed":
            return "log"
        names = {"fractional": "fractional counts", "per_cell": "counts over a factor of each cell"}
        text = names.get(self.kind, "counts")
        if self.total is not None:
            text = "fractions of the total" if self.total == 1 else f"counts per {_number(self.total)}"
        return f"{self.transform} of {text}" if self.transform else text

    @property
    def note(self) -> str:
        """What a user should know about how the values are read, or ''."""
        if self in (COUNTS, AS_GIVEN) or (self.is_binned_as_is and self.kind != "assumed"):
            return ""
        if self.kind == "assumed":
            return (
                f"holds {self.reason}; values such as {self.example:g} are taken for log1p of counts per 10,000. If "
                "they are counts, give --normalization log1p_cp10k"
            )
        text = f"holds {self.name} (such as {self.example:g}), recognized by "
        text += {
            "counts": "the same smallest value in every cell",
            "fractional": "values that no logarithms of expression have",
            "per_total": "the same total in every cell",
            "cut": "values that are multiples of one count, though genes were cut away after normalizing",
            "per_cell": "values that are multiples of the cell's smallest",
        }[self.kind]
        factor = f" (factor {_number(TARGET_SUM / self.total)})" if self.total else ""
        return f"{text}; brought to log1p of counts per 10,000{factor}"

    def linear(self, values_l: np.ndarray) -> np.ndarray:
        """Return values in proportion to counts, float64 of shape (l,) unless they are linear already."""
        return TRANSFORMS[self.transform](values_l.astype(np.float64)) if self.transform else values_l


COUNTS = Scale("counts")
AS_GIVEN = Scale("as_given")


def _number(value: float) -> str:
    """Write a number, if it is not huge without an exponent, to a few places."""
    if value >= 1e12:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 and is_near(value, round(value)) else f"{value:,.6g}"


def is_near(value: float, other: float) -> bool:
    """True if two totals are the same within the precision of stored values."""
    return abs(value - other) <= _SAME_TOTAL * other


def check_values(values_l: np.ndarray, *, source: str) -> None:
    """Raise an InputError when a value is NaN, infinite or negative."""
    if values_l.dtype.kind in "bu" or not values_l.size or scan_values(native(values_l))[0]:
        return
    if values_l.dtype.kind == "f" and not np.isfinite(values_l).all():
        raise InputError(
            f"{source} holds NaN or infinite expression values, which have no bin. Clean the matrix, or choose another "
            "with --layer."
        )
    if values_l.min() < 0:
        raise InputError(
            f"{source} holds negative expression values (lowest {values_l.min():g}): they look scaled or z-scored, and "
            "bins need counts or log-normalized values. Choose the matrix with --layer NAME, or --layer raw for .raw."
        )


@dataclass(frozen=True)
class _Sample:
    """Sampled cells that have values, without stored zeros: values, float64 of shape (l,), offsets and row numbers."""

    values_l: np.ndarray
    offsets_n1: np.ndarray
    rows_n: np.ndarray
    totals_n: np.ndarray | None

    def take(self, is_kept_n: np.ndarray) -> "_Sample":
        """Return some of the cells."""
        is_kept_l, lengths_n = np.repeat(is_kept_n, np.diff(self.offsets_n1)), np.diff(self.offsets_n1)[is_kept_n]
        totals_n = None if self.totals_n is None else self.totals_n[is_kept_n]
        offsets = np.concatenate([[0], np.cumsum(lengths_n)])
        return _Sample(self.values_l[is_kept_l], offsets, self.rows_n[is_kept_n], totals_n)

    @cached_property
    def linear(self) -> dict[str, np.ndarray]:
        """Values, float64 of shape (l,), if they are on each scale of `TRANSFORMS`."""
        with np.errstate(over="ignore"):
            return {name: undo(self.values_l) for name, undo in TRANSFORMS.items()}

    @cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """Sum of each cell's linear values, float64 of shape (n,)."""
        with np.errstate(over="ignore"):
            return {name: np.add.reduceat(linear_l, self.offsets_n1[:-1]) for name, linear_l in self.linear.items()}

    @property
    def example(self) -> float:
        """A value that is not whole."""
        return float(self.values_l[self.values_l % 1 != 0][0])


def recognize(
    values_l: np.ndarray,
    offsets_n1: np.ndarray,
    rows_n: np.ndarray,
    *,
    source: str,
    num_genes: int,
    totals_n: np.ndarray | None = None,
) -> Scale:
    """Return the scale of sampled cells; the one place where scales are recognized.

    Args:
        values_l: Stored values, shape (l,).
        offsets_n1: Where each cell starts, shape (n + 1,).
        rows_n: Row number of each cell, for messages.
        source: The matrix, for messages.
        num_genes: Number of genes of the file.
        totals_n: Total counts of each cell as `obs` has them, shape (n,), or None.

    Raises:
        InputError: Values are negative or not finite, of several scales, or of none that is known.
    """
    check_values(values_l, source=source)
    if values_l.dtype.kind in "bui" or not values_l.any() or scan_values(native(values_l))[1]:
        return COUNTS
    expressed_before = np.concatenate([[0], np.cumsum(values_l != 0)])[offsets_n1]
    sample = _Sample(values_l[values_l != 0].astype(np.float64), expressed_before, rows_n, totals_n)
    sample = sample.take(np.diff(expressed_before) > 0)
    is_counts_n = np.zeros(len(sample.rows_n), dtype=bool)
    find_count_rows(sample.values_l, sample.offsets_n1, HIGHEST_LOG_VALUE, is_counts_n)
    others = sample.take(~is_counts_n)
    multiples = _by_multiples(others)
    is_dense = len(others.values_l) > 0.95 * max(num_genes, _FEWEST_VALUES) * len(others.rows_n)
    if is_dense and multiples is None:
        raise _unknown(others, "nearly every gene of every cell has a value", source=source)
    scale = _per_total(others, source) or multiples or _by_size(others)
    if is_counts_n.any():
        sums_n = sample.sums[""][is_counts_n]  # of values per million, those of a few cells are whole by chance
        if scale and not scale.transform and all(is_near(total, scale.total or total) for total in sums_n):
            return scale
        what = scale.name if scale else f"fractional values such as {others.example:g}"
        raise _mixed(sample.rows_n, is_counts_n, "counts", what, source=source)
    is_per_cell = scale is not None and (scale.kind, scale.transform) == ("per_cell", "log1p")
    if is_per_cell and num_genes < FEWEST_GENES and (sample.sums["log1p"] <= (1 + _SAME_TOTAL) * TARGET_SUM).all():
        reason = "logarithms of few genes, from which the total that they were normalized to cannot be known"
        return Scale("assumed", "log1p", example=sample.example, reason=reason)
    if scale is None and len(sample.values_l) < _FEWEST_VALUES:
        return Scale("assumed", "log1p", example=sample.example)
    if scale is None:
        why = "neither they nor what they are the logarithms of add up to one total, or are multiples of one count"
        raise _unknown(sample, why, source=source)
    return scale


def _per_total(sample: _Sample, source: str) -> Scale | None:
    """Return the scale on which all cells have the same total, if there is one.

    Raises:
        InputError: Many cells have the same total, but not all.
    """
    num_cells, is_rich = len(sample.rows_n), len(sample.values_l) >= _FEWEST_VALUES and len(sample.rows_n) > 2
    matches: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
    for name, sums_n in sample.sums.items():
        sorted_n = np.sort(sums_n)
        num_above_n = np.searchsorted(sorted_n, sorted_n * (1 + 2 * _SAME_TOTAL), side="right") - np.arange(num_cells)
        first = int(np.argmax(num_above_n))
        total = float(np.median(sorted_n[first : first + int(num_above_n[first])]))
        total = next((usual for usual in USUAL_TOTALS if is_near(total, usual)), total)
        if total < _HIGHEST_TOTAL and (is_rich or total in USUAL_TOTALS):
            matches[name] = (total, np.abs(sums_n - total) <= 1.5 * _SAME_TOTAL * total, sums_n)
    if not matches:
        return None
    name = max(matches, key=lambda key: int(matches[key][1].sum()))
    total, is_equal_n, _ = matches[name]
    scale = Scale("per_total", name, total, sample.example)
    is_common = total in USUAL_TOTALS or is_equal_n.sum() >= max(5, 0.2 * num_cells)
    if is_equal_n.all() or (is_common and (np.abs(matches[name][2] - total) < 0.02 * total).all()):  # rounded values
        return scale
    if is_equal_n.sum() >= max(5, 0.2 * num_cells):
        rest = sample.take(~is_equal_n)
        other = _by_multiples(rest) or _by_size(rest)
        is_cut = other is not None and other.transform == name and is_near(other.total or 0.0, total)
        if not is_cut:  # else genes were cut away in some cells only
            sums = listed(sorted({_number(value) for value in rest.sums[name][:3]}), most=3)
            raise _mixed(sample.rows_n, is_equal_n, scale.name, f"values that add up to {sums}", source=source)
    for name, sums_n in sample.sums.items():  # some genes were left out after normalizing, of little expression
        for total in USUAL_TOTALS if is_rich else ():
            if (sums_n > 0.9 * total).all() and (sums_n < (1 + _SAME_TOTAL) * total).all():
                return Scale("cut", name, total, sample.example)
    return None


def _by_multiples(sample: _Sample) -> Scale | None:
    """Return the scale on which a cell's values are multiples of its smallest, which is one count."""
    best, share = "", 0.0
    for name, linear_l in sample.linear.items():
        step_n = np.minimum.reduceat(linear_l, sample.offsets_n1[:-1])
        with np.errstate(invalid="ignore", over="ignore"):
            ratio_l = linear_l / np.repeat(step_n, np.diff(sample.offsets_n1))
        ratio_l = ratio_l[(ratio_l > 1.5) & (ratio_l < 500)]
        if len(ratio_l) >= _FEWEST_VALUES // 2:
            found = float((np.abs(ratio_l - np.round(ratio_l)) < _NEARLY_WHOLE).mean())
            best, share = (name, found) if found > share else (best, share)
    if share < 0.9:
        return None
    step_n, example = np.minimum.reduceat(sample.linear[best], sample.offsets_n1[:-1]), sample.example
    total = _total_of(step_n, sample.totals_n)
    if total is not None:
        return Scale("cut", best, total, example)
    if len(step_n) < _FEWEST_CELLS:
        return Scale("assumed", "log1p", example=example) if best == "log1p" else None
    if np.ptp(np.quantile(step_n, [0.1, 0.9])) <= _SAME_TOTAL * np.median(step_n):  # one step in all cells
        return Scale("counts" if best else "fractional", best, example=example)
    return Scale("per_cell", best, example=example)


def _total_of(step_n: np.ndarray, totals_n: np.ndarray | None) -> float | None:
    """Return the total that cells were divided to, from what one count has become; None if it differs by cell.

    Total over step is the cell's library size: as `obs` has it, or a whole number in every cell for the true total
    only, whose multiples and parts give others. A median of library sizes is a whole number or half of one.
    """
    if totals_n is not None:
        total_n = step_n * totals_n
        total = float(np.median(total_n))
        usual = next((usual for usual in USUAL_TOTALS if abs(total - usual) < 0.01 * usual), None)
        if (np.abs(total_n - total) < 0.01 * total).mean() > 0.8 and (usual or len(step_n) >= _FEWEST_CELLS):
            return usual or total
    if len(step_n) < _FEWEST_CELLS or np.ptp(step_n) <= _SAME_TOTAL * step_n[0]:
        return None
    step_n = step_n[np.linspace(0, len(step_n) - 1, min(len(step_n), 32)).astype(int)]
    candidates = np.concatenate([[1.0], np.arange(20.0, 1e5, 0.5), [1e5, 1e6]])
    num_misses, distance = np.zeros(len(candidates), dtype=np.int64), np.zeros(len(candidates))
    for step in step_n:
        size = candidates / step
        error = np.abs(size - np.round(size))
        num_misses += (error > 0.1) | (size < 20) | (size > 1e5)
        distance += error
    found = np.flatnonzero(num_misses <= len(step_n) // 10)
    if not len(found):
        return None
    found = found[candidates[found] <= candidates[found[0]] * 1.01]
    return float(candidates[found[np.argmin(distance[found])]])


def _by_size(sample: _Sample) -> Scale | None:
    """Recognize fractional counts: by totals in `obs`, by many whole ones, or because no logarithm is so large.

    A cell's total of expm1 is at most what it was divided to, and cut to fewer genes it varies by a factor of a few;
    of counts, it is the exponential of the largest one.
    """
    scale, totals_n = Scale("fractional", example=sample.example), sample.totals_n
    if totals_n is not None and np.mean(np.abs(sample.sums[""] - totals_n) < 1e-3 * totals_n) > 0.9:
        return scale
    if sample.values_l.max() > HIGHEST_LOG_VALUE or (sample.sums["log2(1 + x)"] > 1.1 * USUAL_TOTALS[-1]).any():
        return scale
    if len(sample.values_l) < _FEWEST_VALUES:
        return None
    low, high = np.quantile(sample.sums["log1p"], [0.05, 0.95])
    return scale if (sample.values_l % 1 == 0).mean() > 0.05 or high > 100 * low else None


def _unknown(sample: _Sample, why: str, *, source: str) -> InputError:
    """Say that values may be counts, logarithms or neither."""
    return InputError(
        f"{source} holds fractional values up to {sample.values_l.max():g} whose scale is not known: {why}. They may "
        "be scaled, shifted, denoised or corrected. Choose a matrix of counts with --layer; or, if these are counts, "
        "give --normalization log1p_cp10k; if they are on the scale of the run, --normalization none."
    )


def _mixed(rows_n: np.ndarray, is_first_n: np.ndarray, first: str, other: str, *, source: str) -> InputError:
    """Say which cells are on which scale."""
    rows = [listed(rows_n[is_kind_n].tolist(), most=3) or "elsewhere" for is_kind_n in (is_first_n, ~is_first_n)]
    return InputError(
        f"{source} mixes scales: rows {rows[0]} hold {first}, rows {rows[1]} hold {other}. Bring all to one scale, or "
        "give --normalization log1p_cp10k to take all values for counts, or none to take all as they are."
    )


def check_cells(
    values_l: np.ndarray, offsets_n1: np.ndarray, rows_n: np.ndarray, *, scale: Scale, source: str
) -> np.ndarray | None:
    """Raise an InputError if cells contradict what was recognized on sampled cells of their file.

    All values are looked at once. Exponentials are estimated to a few percent, and computed for doubtful cells only.

    Returns:
        The sum of each cell's values, float64 of shape (n,), if it was needed.
    """
    if values_l.dtype.kind != "f" or not values_l.size:
        return None
    values_l, is_odd_n, sums_n = native(values_l), np.zeros(len(rows_n), dtype=bool), np.zeros(len(rows_n))
    if scale.transform:
        logs_l = native(np.expm1(values_l)) if scale.transform == "log1p of log1p" else values_l
        base = {"log2(1 + x)": np.log(2), "log10(1 + x)": np.log(10)}.get(scale.transform, 1.0)
        are_sound = exp_sums(logs_l, offsets_n1, base, sums_n)
        find_count_rows(values_l, offsets_n1, HIGHEST_LOG_VALUE, is_odd_n)
    else:
        are_sound, are_whole = scan_rows(values_l, offsets_n1, sums_n)
        if scale == COUNTS and not are_whole:
            is_odd_n = np.diff(np.concatenate([[0], np.cumsum(values_l % 1 != 0)])[offsets_n1]) > 0
        elif scale.kind == "fractional":
            is_odd_n = _are_usual_logs(values_l, offsets_n1)
    if not are_sound:
        check_values(values_l, source=source)
    if scale.total is not None:
        is_odd_n |= _have_other_total(values_l, offsets_n1, sums_n, scale)
    if is_odd_n.any():
        odd_l = values_l[np.repeat(is_odd_n, np.diff(offsets_n1))]
        fractional_l = odd_l[odd_l % 1 != 0]
        what = f"values of another scale, such as {fractional_l[0]:g}" if len(fractional_l) else "counts"
        raise _mixed(rows_n, ~is_odd_n, scale.name, what, source=source)
    return None if scale.transform else sums_n


def _have_other_total(values_l: np.ndarray, offsets_n1: np.ndarray, sums_n: np.ndarray, scale: Scale) -> np.ndarray:
    """Return True for cells whose linear values, of estimated sums, do not add up to the file's total, shape (n,)."""
    assert scale.total is not None
    lowest, highest = (scale.total, scale.total) if scale.kind == "per_total" else (0.0, 3.0 * scale.total)
    is_odd_n = (np.diff(offsets_n1) > 0) & ((sums_n < 0.94 * lowest) | (sums_n > 1.06 * highest))
    for row in np.flatnonzero(is_odd_n):
        total = TRANSFORMS[scale.transform](values_l[offsets_n1[row] : offsets_n1[row + 1]].astype(np.float64)).sum()
        is_odd_n[row] = total != 0 and not 0.97 * lowest <= total <= 1.03 * highest
    return is_odd_n


def _are_usual_logs(values_l: np.ndarray, offsets_n1: np.ndarray) -> np.ndarray:
    """Return True for cells whose expm1 add up to 10,000 or a million exactly, if several do, bool of shape (n,).

    Of cells that come near by chance, as small counts do, a few are computed exactly, and all if one of these is odd.
    """
    sums_n, is_log_n = np.zeros(len(offsets_n1) - 1), np.zeros(len(offsets_n1) - 1, dtype=bool)
    exp_sums(values_l, offsets_n1, 1.0, sums_n)
    for total in (1e4, 1e6):
        near = np.flatnonzero(np.abs(sums_n - total) < 0.06 * total)
        for number, row in enumerate((*near[:: len(near) // 8 + 1], *near)):
            if number >= 8 and not is_log_n.any():
                break
            exact = np.expm1(values_l[offsets_n1[row] : offsets_n1[row + 1]].astype(np.float64)).sum()
            is_log_n[row] |= bool(abs(exact - total) < 1e-5 * total)
    return is_log_n if is_log_n.sum() > 1 else np.zeros_like(is_log_n)
