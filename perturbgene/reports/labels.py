"""What a report says of one phenotype: types, thresholds, scores, donors, confusion, reliability.

Owns tables and sentences; leaves arithmetic to `statistics` and HTML to `page`. Letters: n cells, k labels, b bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.eval_utils import GIVEN
from perturbgene.inference.evaluate import row_name
from perturbgene.inference.evaluated_cells import DONOR, column_name
from perturbgene.inference.given_baselines import GIVEN_NAMES
from perturbgene.reports.page import Chart, finite
from perturbgene.reports.statistics import (
    NUM_STEPS,
    Thresholds,
    by_similarity,
    confused_pairs,
    donor_interval,
    reliability,
    steps_of,
)

#: Most labels in the confusion matrix: those of which most cells are wrong.
MOST_CONFUSED = 60
#: Most cells in tables of doubtful answers and labels, on the page and in the CSV next to it.
MOST_SHOWN, MOST_LISTED = 15, 1_000
#: Labels of a lower probability are doubted, unless they are the answer.
IMPROBABLE = 0.5
#: Most donors and clusters in their tables: those with most cells.
MOST_DONORS, MOST_CLUSTERS = 60, 60


@dataclass(frozen=True)
class Phenotype:
    """One phenotype of the cells that a report is about.

    Args:
        name: Its name.
        obs: The cells, with the columns of `predict` or of `evaluated_cells`.
        column: Its name in columns of `obs`.
        scores: Question or baseline -> scores, as `evaluate` returns them; empty for predictions.
        coverage, markers: Rows of `coverage.csv` and `markers.csv` of this phenotype.
        threshold: Where the slider starts, in 0..1.
        is_evaluated: True if `obs` holds the true labels.
        clusters: Column of `obs` within which `majority_X` was counted; "" if it was not.
    """

    name: str
    obs: pd.DataFrame
    column: str
    scores: Mapping[str, Any] = field(default_factory=dict)
    coverage: pd.DataFrame | None = None
    markers: pd.DataFrame | None = None
    threshold: float = 0.5
    is_evaluated: bool = False
    clusters: str = ""

    @property
    def answer_n(self) -> pd.Series:
        """The most probable label of each cell, also where `predict --abstain` has written `unknown`."""
        first = f"predicted_{self.column}_1"
        return self.obs[first if first in self.obs else f"predicted_{self.column}"]

    @property
    def probability_n(self) -> np.ndarray:
        """The probability of that label; NaN without an answer."""
        first = f"predicted_{self.column}_1_probability"  # where `predict --coarse` may have answered with another term
        column = first if first in self.obs else f"predicted_{self.column}_probability"
        return self.obs[column].to_numpy(dtype=np.float64)

    @property
    def known_n(self) -> np.ndarray:
        """Whether the true label is known."""
        return self.obs[self.column].notna().to_numpy() if self.is_evaluated else np.zeros(len(self.obs), dtype=bool)

    def right_n(self, column: str = "") -> np.ndarray:
        """Return 1 where an answer is right, 0 where it is wrong, NaN where the label is not known."""
        answer_n = self.obs[column] if column else self.answer_n
        is_right_n = answer_n.astype(object).to_numpy() == self.obs[self.column].astype(object).to_numpy()
        return np.where(self.known_n, is_right_n, np.nan)

    # -- sections -------------------------------------------------------------------------------------------------

    def content(self, number: int) -> dict[str, Any]:
        """Return what the template shows of it; `number` is its place on the page."""
        found = Thresholds.of(self.probability_n, self.right_n() if self.is_evaluated else None)
        content = {"name": self.name, "id": f"p{number}", "is_evaluated": self.is_evaluated, "types": self.types()}
        content |= {"threshold": self.threshold, "charts": self.threshold_charts(found, number)}
        content |= {"unsure": self.unsure(most=MOST_SHOWN).to_dict("records")}
        content |= {"doubted": self.doubted_labels(most=MOST_SHOWN).to_dict("records")}
        content |= {"clusters": self.cluster_rows(), "scores": [], "given": [], "donors": [], "pairs": []}
        content |= {"confusion": None, "reliability": None, "markers": self.marker_rows()}
        if self.is_evaluated and self.known_n.any():
            content |= {"scores": self.score_rows(), "given": self.given_rows(), "donors": self.donor_rows()}
            content["reliability"] = self.reliability()
            content |= {"confusion": self.confusion(), "pairs": self.pairs()}
        return content

    def data(self) -> dict[str, Any]:
        """Return what the script needs to move the threshold."""
        found = Thresholds.of(self.probability_n, self.right_n() if self.is_evaluated else None)
        curves = {"coverage": found.coverage_b, "expected": found.expected_b, "measured": found.measured_b}
        return {**{name: finite(values_b) for name, values_b in curves.items()}, "types": self._steps().tolist()}

    def _steps(self) -> np.ndarray:
        """Return the number of cells by predicted label, most first, and bin of probability, shape (k, b)."""
        labels = self._labels()
        code_n = pd.Index(labels).get_indexer(self.answer_n.astype(object))
        is_counted_n = (code_n >= 0) & np.isfinite(self.probability_n)
        flat_n = code_n[is_counted_n] * NUM_STEPS + steps_of(self.probability_n[is_counted_n])
        return np.bincount(flat_n, minlength=len(labels) * NUM_STEPS).reshape(len(labels), NUM_STEPS)

    def _labels(self) -> list[str]:
        """Return the labels of the table of types: those predicted, most cells first, then those that are only true."""
        labels = list(self.answer_n.value_counts().loc[lambda count: count > 0].index)
        if self.is_evaluated:
            labels += [name for name in self.obs[self.column].dropna().unique() if name not in set(labels)]
        return labels

    def types(self) -> list[dict[str, Any]]:
        """Return a row for each label: cells, share of doubtful ones, and precision and recall where they are known."""
        rows, answer_n = [], self.answer_n.astype(object).to_numpy()
        true_n = self.obs[self.column].astype(object).to_numpy() if self.is_evaluated else None
        for label in self._labels():
            is_called_n = answer_n == label
            is_doubtful_n = is_called_n & (self.probability_n < self.threshold)
            row = {"label": label, "n": int(is_called_n.sum()), "mean": _mean(self.probability_n[is_called_n])}
            row["doubtful"] = float(is_doubtful_n.sum() / max(is_called_n.sum(), 1))
            if true_n is not None:
                is_true_n = true_n == label
                row["n_true"] = int(is_true_n.sum())
                row["recall"] = _mean(is_called_n[is_true_n])
                row["precision"] = _mean(is_true_n[is_called_n & self.known_n])
            rows.append(row)
        return rows

    def threshold_charts(self, found: Thresholds, number: int) -> list[Chart]:
        """Return the histogram of probabilities, and accuracy against coverage."""
        top = float(max(found.count_b.max(), 2))
        histogram = Chart("How sure the answers are", "probability of the answer", "cells", top=top)
        histogram.add_bars(found.count_b)
        drawn = found.expected_b if found.measured_b is None else np.append(found.expected_b, found.measured_b)
        least = float(np.nanmin(drawn)) if np.isfinite(drawn).any() else 0.0
        curve = Chart(
            "What a threshold leaves", "share of cells that keep a label", "accuracy of these",
            low=float(np.clip(np.floor(10 * least) / 10, 0, 0.9)), marker=f"p{number}-dot",
        )  # fmt: skip
        curve.add_line("expected from the probabilities", found.coverage_b.tolist(), found.expected_b.tolist())
        if found.measured_b is not None:
            curve.add_line("measured on these cells", found.coverage_b.tolist(), found.measured_b.tolist())
        return [histogram, curve]

    def unsure(self, *, most: int = MOST_LISTED) -> pd.DataFrame:
        """Return the cells whose answer is least probable, see `_cells`."""
        rows = np.flatnonzero(np.isfinite(self.probability_n))
        return self._cells(rows[np.argsort(self.probability_n[rows], kind="stable")[:most]])

    def doubted_labels(self, *, most: int = MOST_LISTED) -> pd.DataFrame:
        """Return the cells whose own label is improbable and not the answer, the least probable first, see `_cells`."""
        own_n = self.obs.get(f"audit_{self.column}_probability")
        if own_n is None:
            return pd.DataFrame()
        is_doubted_n = own_n.to_numpy() < IMPROBABLE  # not where it is NaN, since no label is known
        if self.column in self.obs:
            is_doubted_n &= self.answer_n.astype(object).to_numpy() != self.obs[self.column].astype(object).to_numpy()
        rows = np.flatnonzero(is_doubted_n)
        return self._cells(rows[np.argsort(own_n.to_numpy()[rows], kind="stable")[:most]])

    def _cells(self, rows_m: np.ndarray) -> pd.DataFrame:
        """Return cells with what is known of label, answer and donor, as columns of text and probabilities."""
        names = {
            "label": self.column, "label_probability": f"audit_{self.column}_probability", "answer": self.answer_n.name,
            "probability": f"predicted_{self.column}_probability", "next_answer": f"predicted_{self.column}_2",
            "donor": DONOR,
        }  # fmt: skip
        cells = self.obs.iloc[rows_m]
        known = {key: cells[name].to_numpy() for key, name in names.items() if name in cells}
        return pd.DataFrame({"cell": cells.index.astype(str), **known})

    def marker_rows(self) -> list[dict[str, Any]]:
        """Return a row for each label with the genes that speak for it, as text and as numbers."""
        if self.markers is None:
            return []
        form = "{gene} {support:.2f} ({mean_in:.2f}, {mean_out:.2f})".format_map
        return [
            {"label": label, "n": int(part["num_cells"].iloc[0]), "genes": part.to_dict("records"),
             "text": "; ".join(form(gene) for gene in part.to_dict("records"))}
            for label, part in self.markers.groupby("label", sort=False)
        ]  # fmt: skip

    def cluster_rows(self) -> list[dict[str, Any]]:
        """Return a row for each cluster, the least agreed first: cells, the label that most get, and their share."""
        if not self.clusters:
            return []
        voted = self.obs[self.obs[f"majority_{self.column}"].notna() & self.obs[self.clusters].notna()]
        grouped = voted.groupby(self.clusters, observed=True)
        table = grouped[[f"majority_{self.column}", f"majority_{self.column}_share"]].first().assign(n=grouped.size())
        table.columns = ["label", "share", "n"]
        table = table.nlargest(MOST_CLUSTERS, "n").sort_values("share", kind="stable")
        return [{"cluster": name, **row.to_dict()} for name, row in table.iterrows()]

    def score_rows(self) -> list[dict[str, Any]]:
        """Return a row for each question in which nothing is given and each baseline, with an interval over donors."""
        rows = []
        for name, scores in self.scores.items():
            if name.startswith(GIVEN):
                continue
            text = row_name(name)
            row = {"name": text.removeprefix("(baseline) "), "is_baseline": text.startswith("(baseline)")}
            row |= {key: scores.get(key) for key in ("n", "accuracy", "balanced_accuracy", "macro_f1", "log_loss")}
            row |= {key: scores["ontology"][key] for key in ("finer", "coarser") if "ontology" in scores}
            rows.append({**row, "interval": self._interval(name), "best": bool(scores.get("best"))})
        return rows

    def _interval(self, name: str) -> tuple[float, float] | None:
        """Return the interval over donors of the accuracy of a question or baseline, if it can be known."""
        column = f"predicted_{self.column}"
        if name != next(iter(self.scores)):
            column = f"{column}.{column_name(name)}"
        if DONOR not in self.obs or column not in self.obs:
            return None
        is_scored_n = self.known_n & self.obs[column].notna().to_numpy()
        donors_n = self.obs[DONOR].astype(str).to_numpy()
        return donor_interval(self.right_n(column)[is_scored_n] == 1, donors_n[is_scored_n])

    def given_rows(self) -> list[dict[str, Any]]:
        """Return a row for each set of given phenotypes, next to the baselines that are given the same; [] without."""
        rows = []
        for name, scores in self.scores.items():
            same = scores.get("baselines", {})
            if name == "alone":
                same = {other: self.scores[other] for other in GIVEN_NAMES if other in self.scores}
            elif not name.startswith(GIVEN) and not same:
                continue
            row = {
                "given": row_name(name).removeprefix("given ").removesuffix(" given"),
                "interval": self._interval(name),
            }
            row |= {key: scores.get(key) for key in ("n", "accuracy", "macro_f1", "log_loss")}
            row["temperature"] = scores.get("calibration", {}).get("temperature")
            row |= {f"by_{other}": same[other]["accuracy"] if other in same else None for other in GIVEN_NAMES}
            accuracy_of = {"run": scores["accuracy"]} | {other: same[other]["accuracy"] for other in same}
            row["best"] = max(accuracy_of, key=lambda who: accuracy_of[who] or 0)
            rows.append(row)
        return rows if len(rows) > 1 else []

    def donor_rows(self) -> list[dict[str, Any]]:
        """Return a row for each donor, the worst first: cells, accuracy, and coverage of 90 % sets."""
        if DONOR not in self.obs:
            return []
        cells = pd.DataFrame({"donor": self.obs[DONOR].astype(str).to_numpy(), "accuracy": self.right_n()})
        best = next((name for name, scores in self.scores.items() if scores.get("best")), "")
        if f"predicted_{self.column}.{best}" in self.obs:
            cells["best"] = self.right_n(f"predicted_{self.column}.{best}")
        grouped = cells[self.known_n].groupby("donor")
        table = grouped.mean().assign(n=grouped.size()).nlargest(MOST_DONORS, "n").sort_values("accuracy")
        shown = self.coverage
        if shown is not None:
            first = next(iter(self.scores), "")
            shown = shown[(shown["level"] == 0.9) & (shown["question"] == first)].astype({"donor": str})
            table = table.join(shown.set_index("donor")[["coverage", "mean_set_size"]])
        other = row_name(best).removeprefix("(baseline) ")
        return [{"donor": name, "other": other, **row.dropna().to_dict()} for name, row in table.iterrows()]

    def counts(self) -> tuple[list[str], np.ndarray]:
        """Return the labels and counts, true labels as rows."""
        table = pd.crosstab(
            self.obs[self.column].astype(object)[self.known_n], self.answer_n.astype(object)[self.known_n]
        )
        labels = sorted({*table.index, *table.columns})
        return labels, table.reindex(index=labels, columns=labels, fill_value=0).to_numpy()

    def confusion(self) -> dict[str, Any]:
        """Return the confusion matrix in an order that puts confused labels side by side."""
        labels, counts_kk = self.counts()
        wrong_k = counts_kk.sum(axis=0) + counts_kk.sum(axis=1) - 2 * np.diag(counts_kk)
        kept = np.sort(np.argsort(-wrong_k, kind="stable")[:MOST_CONFUSED])
        order = kept[by_similarity(counts_kk[np.ix_(kept, kept)])]
        share_kk = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1)
        rows = [
            {"label": labels[row], "cells": [
                {"count": int(counts_kk[row, column]), "share": float(share_kk[row, column]), "said": labels[column],
                 "shade": int(np.ceil(10 * share_kk[row, column]))}
                for column in order
            ]}
            for row in order
        ]  # fmt: skip
        return {"labels": [labels[at] for at in order], "rows": rows, "left_out": len(labels) - len(order)}

    def pairs(self) -> list[dict[str, Any]]:
        """Return the pairs that are confused most, with the cells of which the run was most sure."""
        labels, counts_kk = self.counts()
        true_n, answer_n = (it.astype(object).to_numpy() for it in (self.obs[self.column], self.answer_n))
        rows = []
        for true, said, count, share in confused_pairs(counts_kk):
            chosen = np.flatnonzero((true_n == labels[true]) & (answer_n == labels[said]))
            chosen = chosen[np.argsort(-self.probability_n[chosen], kind="stable")][:3]
            row = {"true": labels[true], "said": labels[said], "n": count, "share": share}
            rows.append({**row, "cells": [str(name) for name in self.obs.index[chosen]]})
        return rows

    def reliability(self) -> dict[str, Any] | None:
        """Return the reliability diagram before and after the temperature, of cells that it was not fitted on."""
        fitted_n = self.obs[f"fitted_{self.column}"].to_numpy(dtype=bool)
        rows = np.flatnonzero(self.known_n & ~fitted_n)
        if not len(rows) or not fitted_n.any():
            return None
        chart = Chart("Whether probabilities can be trusted", "probability", "accuracy", has_diagonal=True)
        found: dict[str, Any] = {"chart": chart, "n": len(rows)}
        for key, name, column in (
            ("before", "before", "raw_probability"),
            ("after", "after the temperature", "probability"),
        ):
            probability_n = self.obs[f"predicted_{self.column}_{column}"].to_numpy(dtype=np.float64)
            table, found[key] = reliability(probability_n[rows], self.right_n()[rows])
            found[f"bins_{key}"] = table
            chart.add_line(name, table["probability"].tolist(), table["accuracy"].tolist(), counts=table["n"].tolist())
        return found


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if len(values) and np.isfinite(values.astype(float)).any() else float("nan")
