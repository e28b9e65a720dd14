"""The cells of an evaluation with everything that was answered about them: `cells.h5ad` next to the scores.

Owns what each column is called; leaves answers to `eval_utils` and `baselines`. Letters: n cells, m kept cells.

`obs` has, for each phenotype X, the true label `X`, the first answer `predicted_X` (with nothing given), its calibrated
probability `predicted_X_probability` and the uncalibrated one `predicted_X_raw_probability`, the calibrated probability
of the true label `audit_X_probability`, `fitted_X` (True if the run or its temperature was fitted on the cell), and
`predicted_X.NAME` for each further question and baseline.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from perturbgene.data_utils.h5ad_writing import write_adata
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT
from perturbgene.eval_utils import Evaluator, LogitCollector
from perturbgene.files import whole_file
from perturbgene.inference.baselines import Answers
from perturbgene.inference.calibration import Calibration, read_calibration, split_halves
from perturbgene.inference.embedding_scores import CellEmbeddings
from perturbgene.inference.run import Run, provenance

if TYPE_CHECKING:
    from anndata import AnnData

CELLS_FILE = "cells.h5ad"
#: The column of the donors, whatever it is called in the files.
DONOR = "donor"
#: Where embeddings are, as `embed` writes them; NaN for cells that were not embedded.
EMBEDDING = "X_perturbgene"


def column_name(phenotype: str) -> str:
    """Return the name of a phenotype's column; a slash would be a folder within HDF5."""
    return phenotype.replace("/", "_")


def evaluated_cells(
    run: Run, dataset: IterableAnnDataset, evaluator: Evaluator, logits: LogitCollector, embedded: CellEmbeddings,
    baselines: Mapping[str, Mapping[str, Answers]], *, donors_n: np.ndarray | None, is_seen_n: np.ndarray,
) -> "AnnData":  # fmt: skip
    """Return the cells whose logits were kept, with their answers and embeddings; no expression.

    Args:
        run: The run, whose stored temperatures are used.
        dataset, evaluator, logits, embedded: What was evaluated, and the answers.
        baselines: Phenotype -> baseline -> its answers.
        donors_n: Donor of each cell, or None.
        is_seen_n: True for training cells.
    """
    import anndata

    calibration, columns, cells_m = (
        read_calibration(run.path) or Calibration(),
        dict[str, Any](),
        np.zeros(0, dtype=int),
    )
    for category, question, own_m, logits_mk, true_m in logits.joined():
        labels, name = list(evaluator.labels[category]), column_name(category)
        if name in columns:
            answers_m = np.full(len(cells_m), ABSENT)  # missing for cells that this question was not asked about
            answers_m[np.searchsorted(cells_m, own_m)] = logits_mk.argmax(axis=1)
            predicted = pd.Categorical.from_codes(answers_m, categories=labels)
            columns[f"predicted_{name}.{column_name(question.name)}"] = predicted
            continue
        cells_m, predicted = own_m, pd.Categorical.from_codes(logits_mk.argmax(axis=1), categories=labels)
        entry = calibration.nearest(category, asked=question.asked, given=question.given)
        columns |= {name: pd.Categorical.from_codes(true_m, categories=labels), f"predicted_{name}": predicted}
        probability_mk = softmax(logits_mk / np.float32(entry.temperature if entry else 1.0), axis=1)
        columns[f"predicted_{name}_raw_probability"] = softmax(logits_mk, axis=1).max(axis=1)
        columns[f"predicted_{name}_probability"] = probability_mk.max(axis=1)
        own_m = probability_mk[np.arange(len(true_m)), np.maximum(true_m, 0)]
        columns[f"audit_{name}_probability"] = np.where(true_m >= 0, own_m, np.nan).astype(np.float32)
        new_m = np.flatnonzero(~is_seen_n[cells_m])
        is_fitted_m = np.full(len(cells_m), entry is not None)
        if entry:
            of_donor = None if donors_n is None else donors_n[cells_m[new_m]]
            is_fitted_m[new_m] = split_halves(of_donor, num_cells=len(new_m))[0]
        columns[f"fitted_{name}"] = is_fitted_m
        for other, answers in baselines.get(category, {}).items():
            predicted = pd.Categorical.from_codes(answers.predicted_n[cells_m], categories=labels)
            columns[f"predicted_{name}.{other}"] = predicted
    if donors_n is not None:
        columns.setdefault(DONOR, pd.Categorical(donors_n[cells_m]))
    names_n = np.concatenate([shard.source.obs_names for shard in dataset.shards])
    obs = pd.DataFrame(columns, index=pd.Index(names_n[cells_m].astype(str)))
    facts = provenance(run, {"verb": "evaluate"}, coverage=dataset.coverage)
    facts |= {"num_cells": dataset.num_cells, "num_training_cells": int(is_seen_n.sum())}
    table, (own_cells, states_oh) = anndata.AnnData(obs=obs, uns={"perturbgene": facts}), embedded.joined()
    if len(own_cells):
        states_mh = np.full((len(cells_m), states_oh.shape[1]), np.nan, dtype=np.float32)
        _, rows, chosen = np.intersect1d(cells_m, own_cells, return_indices=True)
        states_mh[rows] = states_oh[chosen]
        table.obsm[EMBEDDING] = states_mh
    return table


def write_cells(table: "AnnData", folder: Path) -> None:
    """Write `cells.h5ad`, whole or not at all."""
    with whole_file(folder / CELLS_FILE) as temporary:
        write_adata(table, temporary, compression="gzip")
