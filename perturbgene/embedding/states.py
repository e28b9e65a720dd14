"""Reading the hidden states of a run: which cells are opened with which slots, and where in them a state is read.

Owns the layout of a question about embeddings and one pass of the encoder; leaves pooling to `embedding` and means to
`gene_means`. Letters: n cells, l tokens, m positions read, a genes named, h hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from perturbgene.data_utils.data_collators import Batch
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.eval_utils import inference_mode, to_device
from perturbgene.inference.asking import constant_labels
from perturbgene.inference.run import Run, load_run
from perturbgene.inference.streaming import Ranks

#: A process by itself.
ALONE = Ranks()


def as_run(model: str | Path | Run, *, device: str = "auto") -> Run:
    """Return a loaded run as it is, or load a run folder."""
    return model if isinstance(model, Run) else load_run(model, device=device)


def check_masked(run: Run, *, what: str) -> None:
    """Refuse a classifier where something hidden must be asked."""
    if run.is_classifier:
        raise InputError(f"{run.path} is a classifier, which cannot be asked for {what}. Give an mlm run.")


def open_cells(
    data: Any, run: Run, given: Mapping[str, str | None], *, ranks: Ranks = ALONE, **reading: Any
) -> IterableAnnDataset:
    """Open one file (or AnnData) for this rank, with slots for the given phenotypes only.

    Raises:
        InputError: A phenotype or label is unknown, or `obs` lacks the column of one that is to be read from it.
    """
    tokenizer = layout_of(run, list(given))
    constants = constant_labels(tokenizer, given)
    options = {"batch_size": 256, **reading, "rank": ranks.rank, "world_size": ranks.size}
    dataset = IterableAnnDataset(data, tokenizer, constant_labels=constants, **options)
    for name in [name for name, label in given.items() if label is None]:
        dataset.shards[0].source.obs_column(name)
    return dataset


def find_genes(tokenizer: GeneTokenizer, names: Sequence[str]) -> np.ndarray:
    """Return the panel index of each gene, named by id or by symbol, int64 of shape (a,).

    Raises:
        InputError: The panel lacks one; the message suggests the nearest.
    """
    return tokenizer.panel.find_all(names, flag="genes")


def layout_of(run: Run, given: Sequence[str]) -> GeneTokenizer:
    """Return a tokenizer that reads the given labels only.

    Slots that are not read leave no room for more genes: a long cell keeps the genes that `evaluate` keeps, whatever is
    given.
    """
    tokenizer = run.tokenizer
    for category in given:
        tokenizer.vocabulary.check_category(category)
    num_trained = len(tokenizer.included_phenotypes)
    max_length = max(3 + len(given), tokenizer.max_length - max(0, num_trained - len(given)))
    return tokenizer.with_settings(included=list(given), max_length=max_length)


def label_embeddings(run: Run, category: str) -> pd.DataFrame:
    """Return the static embedding of each label of a phenotype: what its token adds, before any cell is seen.

    Returns:
        One row per label, h columns.
    """
    start, stop = run.tokenizer.vocabulary.id_range(category)
    weights_vh = run.model.genebert.embeddings.word_embeddings.weight.detach()
    values_kh = weights_vh[start:stop].float().cpu().numpy()
    columns = [str(at) for at in range(values_kh.shape[1])]
    return pd.DataFrame(values_kh, index=list(run.tokenizer.phenotypes[category]), columns=columns)


def hidden_at(run: Run, batch: Batch, positions_m: np.ndarray) -> np.ndarray:
    """Run the encoder on a packed batch and return its final states at ascending flat positions, float32 (m, h)."""
    if not len(positions_m):
        return np.zeros((0, run.model.config.hidden_size), dtype=np.float32)
    reads = {"read_positions": torch.from_numpy(positions_m.astype(np.int64))}
    with inference_mode(run.model):
        encoded = run.model.genebert(**to_device({**batch, **reads}, run.model.device))
    return encoded.last_hidden_state.float().cpu().numpy()


@dataclass(frozen=True)
class GeneTokens:
    """The gene tokens of a block: where they stand, whose they are and which gene, each of shape (m,)."""

    position_m: np.ndarray
    cell_m: np.ndarray
    gene_m: np.ndarray

    @classmethod
    def of(cls, block: TokenBlock, tokenizer: GeneTokenizer) -> "GeneTokens":
        """Find them."""
        position_m = np.flatnonzero(block.token_type_ids_l >= tokenizer.first_gene_type)
        cell_m = np.searchsorted(block.offsets_n1, position_m, side="right") - 1
        gene_m = block.token_type_ids_l[position_m].astype(np.int64) - tokenizer.first_gene_type
        return cls(position_m, cell_m, gene_m)
