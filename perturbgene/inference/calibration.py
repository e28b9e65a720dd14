"""Probabilities that mean what they say, and how strange a cell is: temperatures and quantiles of held-out cells.

Owns fitting, scoring, storing (`calibration.json` in the run) and looking up; leaves the logits to those who ask the
model. Letters: n cells, k labels, q quantiles.

A temperature T divides the logits of one phenotype under one question (Guo et al. 2017, "On calibration of modern
neural networks", section 4.2): the answer stays, its probability moves. It is fitted on half of the held-out donors;
log loss and calibration error before and after are those of the other half.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION = 1
#: Cells whose logits are kept for fitting at most: one number is fitted, which more cells hardly move.
MOST_CELLS = 50_000
#: Fewer labelled cells than this fit nothing; the temperature stays 1.
LEAST_CELLS = 20
NUM_BINS = 15  # of the calibration error, as in Guo et al.
_LOG_BOUNDS = (-3.0, 3.0)


def energy(logits_nk: np.ndarray) -> np.ndarray:
    """Return -logsumexp of each cell's logits, shape (n,): high where no label fits (Liu et al. 2020, equation 4)."""
    return -np.asarray(logsumexp(logits_nk, axis=-1))


def log_loss(logits_nk: np.ndarray, labels_n: np.ndarray, *, temperature: float = 1.0) -> float:
    """Return the mean negative log-probability of the true label, in nats.

    Example:
        >>> round(log_loss(np.zeros((1, 2)), np.array([0])), 4)
        0.6931
    """
    log_probability_nk = log_softmax(logits_nk / temperature, axis=-1)
    return float(-log_probability_nk[np.arange(len(labels_n)), labels_n].mean())


def calibration_error(logits_nk: np.ndarray, labels_n: np.ndarray, *, temperature: float = 1.0) -> float:
    """Return the expected calibration error of the chosen labels, in 0..1, over 15 bins of equal width.

    Example:
        >>> logits_nk = np.log(np.array([[0.8, 0.2]] * 5))  # says 80 % five times
        >>> round(calibration_error(logits_nk, np.array([0, 0, 0, 0, 1])), 6), round(
        ...     calibration_error(logits_nk, np.array([0, 0, 0, 0, 0])), 6)
        (0.0, 0.2)
    """
    probability_nk = np.exp(log_softmax(logits_nk / temperature, axis=-1))
    confidence_n, is_right_n = probability_nk.max(axis=1), probability_nk.argmax(axis=1) == labels_n
    bin_n = np.minimum((confidence_n * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap_b = np.bincount(bin_n, weights=confidence_n - is_right_n, minlength=NUM_BINS)
    return float(np.abs(gap_b).sum() / len(labels_n))


def fit_temperature(logits_nk: np.ndarray, labels_n: np.ndarray) -> float:
    """Return the temperature of the least log loss, within exp(-3)..exp(3).

    Example:
        >>> logits_nk = np.log(np.array([[0.99, 0.01]] * 10))  # says 99 %, is right 8 times of 10
        >>> sure = fit_temperature(logits_nk, np.array([0] * 8 + [1] * 2))
        >>> bool(np.isclose(1 / (1 + 99 ** (-1 / sure)), 0.8, atol=1e-4))
        True
    """
    result = minimize_scalar(
        lambda log_t: log_loss(logits_nk, labels_n, temperature=float(np.exp(log_t))),
        bounds=_LOG_BOUNDS,
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(result.x))


@dataclass(frozen=True)
class Temperature:
    """What was fitted for one phenotype under one question.

    Args:
        phenotype: Whose answer it is.
        asked, given: Phenotypes asked in the same sequence (with this one), and given.
        temperature: Divides the logits.
        num_cells: Labelled cells it was fitted on.
        scores: `log_loss_before`, `log_loss_after`, `ece_before`, `ece_after` and `n` of the other half.
        energy_quantiles: 0, 1, ..., 100 % quantiles of the energy of held-out cells.
    """

    phenotype: str
    asked: tuple[str, ...]
    given: tuple[str, ...]
    temperature: float
    num_cells: int
    scores: dict[str, float] = field(default_factory=dict)
    energy_quantiles: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, frozenset[str], frozenset[str]]:
        """By which it replaces an older one."""
        return self.phenotype, frozenset(self.asked), frozenset(self.given)

    def distance(self, asked: Sequence[str], given: Sequence[str]) -> int:
        """Count the phenotypes by which another question differs."""
        return len(set(self.asked) ^ set(asked)) + len(set(self.given) ^ set(given))

    def describe(self) -> str:
        """Say in words what it was fitted for."""
        with_ = f" with {', '.join(sorted(set(self.asked) - {self.phenotype}))}" if len(self.asked) > 1 else ""
        given = f" given {', '.join(self.given)}" if self.given else ""
        return f"temperature {self.temperature:.3f}, fitted for {self.phenotype} asked{with_}{given or ' alone'}"


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


def split_halves(units_n: np.ndarray | None, *, num_cells: int) -> tuple[np.ndarray, str]:
    """Halve the cells, whole donors together where there are at least two.

    Args:
        units_n: The donor of each cell, shape (n,), or None.
        num_cells: n.

    Returns:
        True for cells to fit on, shape (n,), and how the split was made. It depends on the donors' names alone.
    """
    units = np.zeros(num_cells) if units_n is None else units_n
    names, unit_n = np.unique(units.astype(str), return_inverse=True)
    if len(names) < 2:
        order = np.argsort([hashlib.sha256(b"%d" % cell).digest()[:8] for cell in range(num_cells)], kind="stable")
        is_fitted_n = np.zeros(num_cells, dtype=bool)
        is_fitted_n[order[: num_cells // 2]] = True
        return is_fitted_n, "cells"
    order = np.argsort([hashlib.sha256(str(name).encode()).digest() for name in names], kind="stable")
    before_u = np.concatenate([[0], np.cumsum(np.bincount(unit_n)[order])])[:-1]
    is_fitted_u = np.zeros(len(names), dtype=bool)
    is_fitted_u[order] = before_u < num_cells / 2
    is_fitted_u[order[-1]] = False  # one donor at least on either side
    return is_fitted_u[unit_n], "donors"


def fit(
    logits_nk: np.ndarray,
    labels_n: np.ndarray,
    is_fitted_n: np.ndarray,
    *,
    phenotype: str,
    asked: Sequence[str],
    given: Sequence[str],
) -> Temperature:
    """Fit one phenotype under one question, and score it on the cells that it was not fitted on.

    Args:
        logits_nk: Over the phenotype's labels.
        labels_n: Index of the true label; -1 where there is none.
        is_fitted_n: True for cells to fit on.
        phenotype, asked, given: The question.
    """
    is_known_n = labels_n >= 0
    first, second = is_known_n & is_fitted_n, is_known_n & ~is_fitted_n
    temperature = fit_temperature(logits_nk[first], labels_n[first]) if first.sum() >= LEAST_CELLS else 1.0
    scores: dict[str, float] = {"n": int(second.sum())}
    for name, t in (("before", 1.0), ("after", temperature)) if second.any() else ():
        scores[f"log_loss_{name}"] = log_loss(logits_nk[second], labels_n[second], temperature=t)
        scores[f"ece_{name}"] = calibration_error(logits_nk[second], labels_n[second], temperature=t)
    return Temperature(
        phenotype, tuple(asked), tuple(given), temperature, int(first.sum()), scores, quantiles(energy(logits_nk))
    )


@dataclass(frozen=True)
class Calibration:
    """All that was fitted for a run, and on what.

    Args:
        temperatures: One for each phenotype and question.
        gene_quantiles: 0, 1, ..., 100 % quantiles of the held-out cells' mean log-likelihood of masked genes.
        split: "donors" or "cells": what was halved.
        weights: `weights_hash` of the run it was fitted for.
    """

    temperatures: tuple[Temperature, ...] = ()
    gene_quantiles: tuple[float, ...] = ()
    split: str = "cells"
    weights: str = ""

    def nearest(self, phenotype: str, *, asked: Sequence[str], given: Sequence[str]) -> Temperature | None:
        """Return what was fitted for the question that differs by the fewest phenotypes, None without any."""
        own = [entry for entry in self.temperatures if entry.phenotype == phenotype]
        return min(own, key=lambda entry: entry.distance(asked, given), default=None)

    def joined(self, newer: "Calibration") -> "Calibration":
        """Return the newer one with what only the older has, when both are of the same weights."""
        if self.weights != newer.weights:
            return newer
        known = {entry.key for entry in newer.temperatures}
        kept = [entry for entry in self.temperatures if entry.key not in known]
        genes = newer.gene_quantiles or self.gene_quantiles
        return Calibration((*kept, *newer.temperatures), genes, newer.split, newer.weights)

    def save(self, run: str | Path) -> Path:
        """Write `calibration.json` into a run folder, by way of a temporary name."""
        path = Path(run) / CALIBRATION_FILE
        temporary = path.with_suffix(f".{os.getpid()}.part")
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def read_calibration(run: str | Path) -> Calibration | None:
    """Return what `evaluate` fitted for a run; None, said once, when there is none or it belongs to other weights."""
    path = Path(run) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another version")
        entries = [
            Temperature(**{**entry, **{name: tuple(entry[name]) for name in ("asked", "given", "energy_quantiles")}})
            for entry in content.pop("temperatures")
        ]
        genes = tuple(content.pop("gene_quantiles"))
        calibration = Calibration(tuple(entries), genes, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s): probabilities stay as they are. Run `evaluate` again.", path, error)
        return None
    if calibration.weights != weights_hash(run):
        logger.warning("%s was fitted for other weights: probabilities stay as they are. Run `evaluate` again.", path)
        return None
    return calibration


def weights_hash(run: str | Path) -> str:
    """Return the SHA-256 of a run's weights; "" where the folder holds none."""
    digest, files = hashlib.sha256(), sorted(Path(run).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""
