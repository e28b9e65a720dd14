"""Calibrated probabilities, and what is unusual: temperatures and quantiles fitted on held-out cells.

Owns fitting, scoring, storing (`calibration.json` in the run) and looking up; leaves the logits to those who ask the
model, how unusual a cell is to `novelty`, and what sets of labels are to `conformal`. Letters: n cells, k labels, q
quantiles.

A temperature T divides the logits of one phenotype under one question (Guo et al. 2017, "On calibration of modern
neural networks", section 4.2): the most probable label stays the same, its probability changes. T is fitted on half of
the held-out donors; log loss and calibration error before and after are those of the other half.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from perturbgene.errors import NewerFormatError
from perturbgene.files import check_format, read_json, write_json
from perturbgene.forms import misfit
from perturbgene.inference.conformal import fit_floors
from perturbgene.inference.novelty import NOVELTY_FILE, Usual
from perturbgene.training.cell_space import EMBEDDING_FILE

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION = 2
#: Most cells whose logits are kept for fitting: only one number is fitted.
MOST_CELLS = 50_000
#: With fewer labeled cells nothing is fitted; the temperature stays 1.
LEAST_CELLS = 20
#: What `calibration.json` holds.
_FORM = {
    "temperatures": [{
        "phenotype": str, "asked": [str], "given": [str], "temperature": float, "num_cells": int,
        "scores": {str: float}, "novelty_quantiles": [float], "floors": [float],
        "usual": (type(None), {"range_2": [float], "coefficients_p3": [[float]], "deviation_p": [float]}),
    }],
    "gene_quantiles": [float], "split": str, "weights": str,
}  # fmt: skip
NUM_BINS = 15  # of the calibration error, as in Guo et al.
#: Limits of the logarithm of a temperature: 0.05 to 20.
_LOG_BOUNDS = (-3.0, 3.0)
#: Standard deviation of the logarithm of a temperature below 1 before any cell is seen: a factor of 2.
_LOG_DEVIATION = float(np.log(2))


def log_loss(logits_nk: np.ndarray, labels_n: np.ndarray, *, temperature: float = 1.0) -> float:
    """Return the mean negative log-probability of the true label, in nats."""
    log_probability_nk = log_softmax(logits_nk / temperature, axis=-1)
    return float(-log_probability_nk[np.arange(len(labels_n)), labels_n].mean())


def calibration_error(logits_nk: np.ndarray, labels_n: np.ndarray, *, temperature: float = 1.0) -> float:
    """Return the expected calibration error of the chosen labels, in 0..1, over 15 bins of equal width.

    Example:
        >>> logits_nk = np.log(np.array([[0.8, 0.2]] * 5))  # says 80 % five times, and is right five times
        >>> round(calibration_error(logits_nk, np.zeros(5, dtype=int)), 6)
        0.2
    """
    probability_nk = softmax(logits_nk / temperature, axis=-1)
    confidence_n, is_right_n = probability_nk.max(axis=1), probability_nk.argmax(axis=1) == labels_n
    bin_n = np.minimum((confidence_n * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap_b = np.bincount(bin_n, weights=confidence_n - is_right_n, minlength=NUM_BINS)
    return float(np.abs(gap_b).sum() / len(labels_n))


def fit_temperature(logits_nk: np.ndarray, labels_n: np.ndarray) -> float:
    """Return the temperature with the lowest log loss, within exp(-3)..exp(3), where those below 1 have a price.

    The price is that of a normal prior on the logarithm. Thousands of cells decide alone; of few that are all answered
    right, the lowest log loss would be at the least temperature, and the first wrong answer among other cells would be
    given with a probability of 1.
    """

    def surprise(log_t: float) -> float:
        losses = len(labels_n) * log_loss(logits_nk, labels_n, temperature=float(np.exp(log_t)))
        return losses + (min(log_t, 0.0) / _LOG_DEVIATION) ** 2 / 2

    result = minimize_scalar(
        surprise,
        bounds=_LOG_BOUNDS,
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(result.x))


@dataclass(frozen=True)
class Temperature:
    """The temperature of one phenotype under one question."""

    phenotype: str
    asked: tuple[str, ...]  # asked in the same sequence, with this one
    given: tuple[str, ...]
    temperature: float  # divides the logits
    num_cells: int  # labeled cells it was fitted on
    scores: dict[str, float] = field(default_factory=dict)  # `log_loss_before`, `ece_after`, ..., of `n` other cells
    is_at_limit: bool = False  # the best temperature may be outside the range that was searched
    usual: Usual | None = None  # of the held-out cells' novelty
    novelty_quantiles: tuple[float, ...] = ()  # 0, 1, ..., 100 % quantiles of their score
    floors: tuple[float, ...] = ()  # of sets of labels, one for each of `conformal.LEVELS`
    num_units: int = 0  # donors that the floors were fitted on, or cells if these name no two donors

    def distance(self, asked: Sequence[str], given: Sequence[str]) -> int:
        """Return how many phenotypes differ between this question and another."""
        return len(set(self.asked) ^ set(asked)) + len(set(self.given) ^ set(given))

    def describe(self) -> str:
        """Say in words what it was fitted for."""
        with_ = f" with {', '.join(sorted(set(self.asked) - {self.phenotype}))}" if len(self.asked) > 1 else ""
        given = f" given {', '.join(self.given)}" if self.given else ""
        limit = ", the limit of its range" if self.is_at_limit else ""
        return f"temperature {self.temperature:.3f}{limit}, fitted for {self.phenotype} asked{with_}{given or ' alone'}"


def quantiles(values_n: np.ndarray) -> tuple[float, ...]:
    """Return the 0, 1, ..., 100 % quantiles of the finite values; empty without any."""
    finite = values_n[np.isfinite(values_n)]
    return tuple(np.quantile(finite, np.linspace(0, 1, 101)).tolist()) if len(finite) else ()


def percentile(values_n: np.ndarray, quantiles_q: Sequence[float]) -> np.ndarray:
    """Return the share of held-out cells with a lower value, in 0..100; NaN for NaN or without quantiles.

    Example:
        >>> percentile(np.array([-1.0, 0.25, 7.0]), [0.0, 0.5, 1.0]).tolist()
        [0.0, 25.0, 100.0]
    """
    if not len(quantiles_q):
        return np.full(len(values_n), np.nan)
    return np.interp(values_n, quantiles_q, np.linspace(0, 100, len(quantiles_q)))


def split_halves(donors_n: np.ndarray | None, *, num_cells: int) -> tuple[np.ndarray, str]:
    """Split the cells in half, keeping each donor's cells together if there are at least two donors.

    Returns:
        True for cells to fit on, shape (n,), and "donors" or "cells". The split depends on the donors' names alone.
    """
    names, unit_n = np.unique((np.zeros(num_cells) if donors_n is None else donors_n).astype(str), return_inverse=True)
    is_by_donor = len(names) > 1
    if not is_by_donor:
        names, unit_n = np.arange(num_cells), np.arange(num_cells)
    order = np.argsort([hashlib.sha256(str(name).encode()).digest() for name in names], kind="stable")
    before_u = np.concatenate([[0], np.cumsum(np.bincount(unit_n)[order])])[:-1]
    is_fitted_u = np.zeros(len(names), dtype=bool)
    is_fitted_u[order] = before_u < (num_cells / 2 if is_by_donor else num_cells // 2)
    is_fitted_u[order[-1:]] = False  # at least one donor on either side
    return is_fitted_u[unit_n], "donors" if is_by_donor else "cells"


def fit(
    logits_nk: np.ndarray,
    labels_n: np.ndarray,
    is_fitted_n: np.ndarray,
    *,
    phenotype: str,
    asked: Sequence[str],
    given: Sequence[str],
    donors_n: np.ndarray | None = None,
) -> Temperature:
    """Fit one phenotype under one question, and score it on the cells that it was not fitted on.

    A label of -1 is unknown. Without donors, each cell is one. A temperature at the limit of its range is reported.
    """
    is_known_n = labels_n >= 0
    first, second = is_known_n & is_fitted_n, is_known_n & ~is_fitted_n
    temperature = fit_temperature(logits_nk[first], labels_n[first]) if first.sum() >= LEAST_CELLS else 1.0
    is_at_limit = bool(abs(np.log(temperature)) > _LOG_BOUNDS[1] - 1e-3)
    scores: dict[str, float] = {"n": int(second.sum())}
    for name, t in (("before", 1.0), ("after", temperature)) if second.any() else ():
        scores[f"log_loss_{name}"] = log_loss(logits_nk[second], labels_n[second], temperature=t)
        scores[f"ece_{name}"] = calibration_error(logits_nk[second], labels_n[second], temperature=t)
    units_n = (np.arange(len(labels_n)) if donors_n is None else donors_n)[first]
    probability_nk = softmax(logits_nk[first] / temperature, axis=-1)
    floors_q = fit_floors(probability_nk[np.arange(len(units_n)), labels_n[first]], units_n) if len(units_n) else ()
    fitted = Temperature(
        phenotype,
        tuple(asked),
        tuple(given),
        temperature,
        int(first.sum()),
        scores,
        is_at_limit=is_at_limit,
        floors=floors_q,
        num_units=len(np.unique(units_n)),
    )
    if is_at_limit:
        logger.warning(
            "%s. The logits of these cells say %s about the labels, so the probabilities are not to be trusted.",
            fitted.describe(),
            "almost nothing" if temperature > 1 else "more than their size shows",
        )
    return fitted


@dataclass(frozen=True)
class Calibration:
    """All temperatures of a run, and what they were fitted on."""

    temperatures: tuple[Temperature, ...] = ()
    gene_quantiles: tuple[float, ...] = ()  # of the held-out cells' mean log-likelihood of masked genes
    split: str = "cells"  # "donors" or "cells": what was halved
    weights: str = ""  # `weights_hash` of the run

    def nearest(self, phenotype: str, *, asked: Sequence[str], given: Sequence[str]) -> Temperature | None:
        """Return the temperature of the question that differs in the fewest phenotypes; None without any."""
        own = [entry for entry in self.temperatures if entry.phenotype == phenotype]
        return min(own, key=lambda entry: entry.distance(asked, given), default=None)

    def save(self, run: str | Path) -> Path:
        """Write `calibration.json` into a run folder; what only an older one of the same weights has, stays in it."""
        older = read_calibration(run) or Calibration()
        entries = {
            (t.phenotype, frozenset(t.asked), frozenset(t.given)): t for t in (*older.temperatures, *self.temperatures)
        }
        genes_q = self.gene_quantiles or older.gene_quantiles
        joined = replace(self, temperatures=tuple(entries.values()), gene_quantiles=genes_q)
        path = Path(run) / CALIBRATION_FILE
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(joined)}, indent=1)
        return path


def read_calibration(run: str | Path) -> Calibration | None:
    """Return what `evaluate` fitted for a run; None without it, and with a warning if it belongs to other weights."""
    path = Path(run) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(path)
        if check_format(path, content.pop("format_version", None), reads=FORMAT_VERSION) < FORMAT_VERSION:
            raise ValueError("an older perturbgene wrote it")
        if wrong := misfit(content, _FORM):
            raise ValueError(wrong)
        if not all(entry["temperature"] > 0 for entry in content["temperatures"]):
            raise ValueError("a temperature is not above 0")
        entries = [_temperature(**entry) for entry in content.pop("temperatures")]
        genes = tuple(content.pop("gene_quantiles"))
        calibration = Calibration(tuple(entries), genes, **content)
    except NewerFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s): probabilities are not calibrated. Run `evaluate` again.", path, error)
        return None
    if calibration.weights != weights_hash(run):
        logger.warning("%s was fitted for other weights: probabilities are not calibrated. Run `evaluate` again.", path)
        return None
    return calibration


def _temperature(usual: dict[str, Any] | None, **entry: Any) -> Temperature:
    """Return an entry of `calibration.json`, whose lists are tuples."""
    lists = {name: tuple(entry[name]) for name in ("asked", "given", "novelty_quantiles", "floors")}
    return Temperature(**{**entry, **lists}, usual=None if usual is None else Usual(**usual))


def weights_hash(run: str | Path) -> str:
    """Return the SHA-256 of a run's weights; "" if the folder holds none."""
    files = sorted(path for path in Path(run).glob("*.safetensors") if path.name not in (NOVELTY_FILE, EMBEDDING_FILE))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""
