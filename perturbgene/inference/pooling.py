"""The embedding of a cell: which final states of the encoder are read and how they are pooled.

Owns the choice and the means; leaves files to `embed`, and how good an embedding is to `embedding_scores`.
Letters: n cells, m positions read, h hidden size.
"""

from collections.abc import Collection
from typing import Literal

import numpy as np
import torch

from perturbgene.data_utils.data_collators import ask
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import num_genes

Pooling = Literal["auto", "asked", "cls", "genes"]


def asked_of(run: Run, given: Collection[str] = ()) -> list[str]:
    """Return the phenotypes of a run that are not given."""
    return [name for name in run.tokenizer.included_phenotypes if name not in given]


def default_pooling(run: Run, given: Collection[str] = ()) -> Pooling:
    """Return what "auto" means: the pooling whose states the run's loss has trained."""
    return "cls" if run.is_classifier else "asked" if asked_of(run, given) else "genes"


def pooled_states(run: Run, block: TokenBlock, *, pooling: Pooling, given: Collection[str] = ()) -> np.ndarray:
    """Embed a block of cells.

    Args:
        run: The run.
        block: Cells. Their phenotypes are left out, unless they are given.
        pooling: "asked", "cls" or "genes", see `embed`.
        given: Phenotypes that stay in the sequence.

    Returns:
        Float32 of shape (n, h), rows in the order of the cells; NaN for a cell that expresses no gene of the panel.
    """
    asked = asked_of(run, given) if pooling == "asked" else []
    batch = ask(block, run.tokenizer, asked=asked, given=list(given))
    asked_m, starts_n1 = batch.pop("label_positions").numpy(), batch["cu_seqlens"].numpy()
    if pooling == "genes":
        read_m = np.flatnonzero(batch["token_type_ids"].numpy() >= run.tokenizer.first_gene_type)
    else:
        read_m = asked_m if pooling == "asked" else starts_n1[:-1]
    hidden_mh = run.hidden_at(batch, read_m)
    cell_m = np.searchsorted(starts_n1, read_m, side="right") - 1
    sums_nh = torch.zeros((len(block), hidden_mh.shape[1]), dtype=torch.float64)
    sums_nh.index_add_(0, torch.from_numpy(cell_m), torch.from_numpy(hidden_mh).double())
    count_n1 = np.maximum(np.bincount(cell_m, minlength=len(block)), 1)[:, None]
    cells_nh = (sums_nh.numpy() / count_n1).astype(np.float32)
    cells_nh[num_genes(block, run.tokenizer) == 0] = np.nan
    return cells_nh
