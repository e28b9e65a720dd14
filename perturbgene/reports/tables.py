"""Every number of a report about answers as one long table, and the cells that somebody should look at.

Owns what rows and measures are called; leaves numbers to `labels`. Letters: k labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.reports.labels import Phenotype
from perturbgene.reports.statistics import NUM_STEPS

#: Tables of a section -> what names their rows.
KEYS = {"types": "label", "scores": "name", "given": "given", "donors": "donor", "clusters": "cluster"}
#: Columns of the long table, and those that each row of the cells has first.
COLUMNS = ("phenotype", "table", "row", "measure", "value")
FIRST = ("phenotype", "why", "cell")

Number = tuple[str, str, str, str, float]  # a row of the long table


def number_table(
    phenotypes: Sequence[Phenotype], contents: Sequence[Mapping[str, Any]], embedding: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """Return a row for each number of a page.

    Args:
        phenotypes: The sections.
        contents: What the template shows of each.
        embedding: Rows of the table that compares embeddings.

    Returns:
        `phenotype`, `table`, `row`, `measure` and `value`: "scores", "ridge", "accuracy", 0.87.
    """
    rows = [row for one, shown in zip(phenotypes, contents, strict=True) for row in _numbers(one, shown)]
    for scores in embedding:
        rows += _measures(str(scores["phenotype"]), "embedding", str(scores["embedding"]), scores)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _numbers(phenotype: Phenotype, shown: Mapping[str, Any]) -> Iterator[Number]:
    """Yield the numbers of one phenotype."""
    name = phenotype.name
    for table, key in KEYS.items():
        for row in shown.get(table, ()):
            yield from _measures(name, table, str(row[key]), row)
    for row in shown["markers"]:
        for gene in row["genes"]:
            numbers = {measure: gene[measure] for measure in ("support", "mean_in", "mean_out")}
            yield from _measures(name, "markers", f"{row['label']}: {gene['gene']}", numbers)
    curves = phenotype.data()
    for step in range(NUM_STEPS):
        at = {kind: curves[kind][step] for kind in ("coverage", "expected", "measured") if curves[kind]}
        yield from _measures(name, "thresholds", f"{step / NUM_STEPS:.2f}", at)
    if shown["confusion"]:
        labels, counts_kk = phenotype.counts()
        for true, counts_k in zip(labels, counts_kk.tolist(), strict=True):
            yield from _measures(name, "confusion", true, dict(zip(labels, counts_k, strict=True)))
    if found := shown["reliability"]:
        for key in ("before", "after"):
            yield name, "reliability", key, "calibration_error", found[key]
            for number, row in enumerate(found[f"bins_{key}"].to_dict("records")):
                yield from _measures(name, "reliability", f"{key} {number}", row)


def _measures(phenotype: str, table: str, row: str, values: Mapping[str, Any]) -> Iterator[Number]:
    """Yield the numbers among the values of one row; the two ends of an interval are two."""
    for measure, value in values.items():
        if measure == "interval" and value:
            yield phenotype, table, row, "interval_low", value[0]
            yield phenotype, table, row, "interval_high", value[1]
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            yield phenotype, table, row, measure, float(value)


def cell_table(phenotypes: Sequence[Phenotype]) -> pd.DataFrame:
    """Return the cells to look at: those with an improbable label, and those with the least sure answers.

    Returns:
        `phenotype`, `why` ("improbable label" or "unsure answer"), `cell`, and as far as they are known `label`,
        `label_probability`, `answer`, `probability`, `next_answer` and `donor`.
    """
    parts = [pd.DataFrame(columns=list(FIRST))]
    for one in phenotypes:
        parts += [one.doubted_labels().assign(phenotype=one.name, why="improbable label")]
        parts += [one.unsure().assign(phenotype=one.name, why="unsure answer")]
    table = pd.concat([part.astype(object) for part in parts if len(part) or part is parts[0]], ignore_index=True)
    return table[[*FIRST, *(name for name in table.columns if name not in FIRST)]]
