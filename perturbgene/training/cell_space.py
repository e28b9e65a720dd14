"""The embedding of a cell: which final states are read from it, and its place among the training cells of the run.

Owns pooling of states and the joined space, which training saves as `embedding.safetensors`; leaves files to the verb
`embed`, and how good an embedding is to `inference.embedding_scores`. Letters: n cells, m positions read, g genes of
the panel, k labels, h hidden size, c coordinates that are linear in expression.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.decomposition import PCA

from perturbgene.data_utils.data_collators import ask
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.eval_utils import hidden_at
from perturbgene.model import GeneBertForClassification
from perturbgene.training.transfer import LOADING, quiet
from perturbgene.training.votes import READING, Scaled, direct_path, expression_of

logger = logging.getLogger(__name__)

EMBEDDING_FILE = "embedding.safetensors"
#: Training cells that principal components are fitted to, and those whose states are read: drawn at random.
MOST_CELLS, MOST_STATES = 10_000, 1_000
#: Most principal components, and most coordinates for the logits of one phenotype.
NUM_COMPONENTS, MOST_LOGITS = 25, 50
#: What genes are divided by: their standard deviation to this power. With the weights of the logits and of the states,
#: relative to components, it was chosen on seven pairs of data sets (docs/experiments.md).
POWER, LOGITS_WEIGHT, STATES_WEIGHT = 0.5, 0.5, 0.125

Pooling = Literal["auto", "joined", "asked", "cls", "genes"]


# -- states -------------------------------------------------------------------------------------------------------


def asked_of(tokenizer: GeneTokenizer, given: Collection[str] = ()) -> list[str]:
    """Return the phenotypes of a run that are not given."""
    return [name for name in tokenizer.included_phenotypes if name not in given]


def trained_pooling(model: Any, tokenizer: GeneTokenizer, given: Collection[str] = ()) -> Pooling:
    """Return the pooling of the states that the model's loss has trained."""
    if isinstance(model, GeneBertForClassification):
        return "cls"
    return "asked" if asked_of(tokenizer, given) else "genes"


def pooled_states(
    model: Any, tokenizer: GeneTokenizer, block: TokenBlock, *, pooling: Pooling, given: Collection[str] = ()
) -> np.ndarray:
    """Embed a block of cells by final states of the encoder.

    Args:
        model: Of `mlm` or `cls`.
        tokenizer: The one that it was trained with.
        block: Cells. Their phenotypes are left out, unless they are given.
        pooling: "asked", "cls" or "genes", see `embed`.
        given: Phenotypes that stay in the sequence.

    Returns:
        Float32 of shape (n, h), rows in the order of the cells; NaN for a cell that expresses no gene of the panel.
    """
    asked = asked_of(tokenizer, given) if pooling == "asked" else []
    batch = ask(block, tokenizer, asked=asked, given=list(given))
    asked_m, starts_n1 = batch.pop("label_positions").numpy(), batch["cu_seqlens"].numpy()
    if pooling == "genes":
        read_m = np.flatnonzero(batch["token_type_ids"].numpy() >= tokenizer.first_gene_type)
    else:
        read_m = asked_m if pooling == "asked" else starts_n1[:-1]
    hidden_mh = hidden_at(model, batch, read_m)
    cell_m = np.searchsorted(starts_n1, read_m, side="right") - 1
    sums_nh = torch.zeros((len(block), hidden_mh.shape[1]), dtype=torch.float64)
    sums_nh.index_add_(0, torch.from_numpy(cell_m), torch.from_numpy(hidden_mh).double())
    count_n1 = np.maximum(np.bincount(cell_m, minlength=len(block)), 1)[:, None]
    cells_nh = (sums_nh.numpy() / count_n1).astype(np.float32)
    cells_nh[tokenizer.num_genes(block) == 0] = np.nan
    return cells_nh


# -- the joined space ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JoinedSpace:
    """Principal components of training cells, the genes' votes for labels, and the trained states, side by side.

    Each of the three has mean 0 over the training cells and, there, a total variance of 1 times its squared weight.
    States alone lose to principal components of the same cells, since they keep only what the loss asks for.

    Args:
        axes_gc: What each gene adds per unit of expression to components and logits.
        mean_g: Mean expression in training cells that measured the gene, which genes that are not measured count with.
        mean_h, scale: Mean of the states, and what they are multiplied by; 0 where the transformer was not trained.
    """

    axes_gc: np.ndarray
    mean_g: np.ndarray
    mean_h: np.ndarray
    scale: float

    @classmethod
    def fit(cls, model: Any, cells: IterableAnnDataset, *, has_states: bool) -> "JoinedSpace | None":
        """Fit the space to training cells.

        Args:
            model: As it will be saved.
            cells: All training cells.
            has_states: Whether the transformer has learned anything.

        Returns:
            The space, or None if there are too few cells or genes for one component, or no gene varies.
        """
        expression_ng, mean_g, states_mh = _read(model, cells, has_states=has_states)
        scaled = Scaled.of(expression_ng, power=POWER)
        if min(expression_ng.shape) < 2 or not scaled.variance_g.any():
            return None
        components = _components(scaled.values_ng, most=NUM_COMPONENTS)
        parts = [scaled.scale_g[:, None] * components.components_.T / np.sqrt(components.explained_variance_.sum())]
        for votes_gk in (phenotypes := _votes(model, cells.tokenizer)):
            logits_nk = expression_ng @ votes_gk
            if not logits_nk.var(axis=0).any():
                continue
            if votes_gk.shape[1] > MOST_LOGITS:
                axes_kc = _components(logits_nk, most=MOST_LOGITS).components_.T
                votes_gk, logits_nk = votes_gk @ axes_kc, logits_nk @ axes_kc
            parts.append(votes_gk * (LOGITS_WEIGHT / np.sqrt(len(phenotypes) * logits_nk.var(axis=0).sum())))
        variance = states_mh.var(axis=0).sum() if len(states_mh) else 0.0
        scale = STATES_WEIGHT / np.sqrt(variance) if variance > 0 else 0.0
        mean_h = states_mh.mean(axis=0) if len(states_mh) else np.zeros(model.config.hidden_size)
        axes_gc = np.hstack(parts).astype(np.float32)
        return cls(axes_gc, mean_g.astype(np.float32), mean_h.astype(np.float32), float(scale))

    def place(self, model: Any, tokenizer: GeneTokenizer, block: TokenBlock, given: Collection[str] = ()) -> np.ndarray:
        """Embed a block of cells.

        Returns:
            Float32 of shape (n, c + h), or (n, c) if the states say nothing; NaN for cells without genes of the panel.
        """
        measured_sg, table_n = block.tables(len(tokenizer.panel))
        tables, table_n = np.unique(table_n, return_inverse=True)
        center_sc = (measured_sg[tables] * self.mean_g) @ self.axes_gc
        cells_nc = (
            expression_of(block, model.config)[:, tokenizer.first_gene_type :] @ self.axes_gc - center_sc[table_n]
        )
        cells_nc[tokenizer.num_genes(block) == 0] = np.nan
        if not self.scale:
            return np.asarray(cells_nc, dtype=np.float32)
        pooling = trained_pooling(model, tokenizer, given)
        if pooling == trained_pooling(model, tokenizer):
            states_nh = pooled_states(model, tokenizer, block, pooling=pooling, given=given) - self.mean_h
        else:  # all phenotypes are given: there is nothing to ask
            states_nh = np.zeros((len(block), len(self.mean_h)))
        return np.hstack([cells_nc, self.scale * states_nh]).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `embedding.safetensors`."""
        arrays = {"axes": self.axes_gc, "mean": self.mean_g, "states_mean": self.mean_h}
        arrays["states_scale"] = np.array([self.scale])
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / EMBEDDING_FILE)

    @classmethod
    def load(cls, run: str | Path) -> "JoinedSpace | None":
        """Return the space of a run; None if its folder has none, or, with a warning, a damaged one."""
        path = Path(run) / EMBEDDING_FILE
        if not path.exists():
            return None
        try:
            arrays = load_file(path)
            return cls(arrays["axes"], arrays["mean"], arrays["states_mean"], float(arrays["states_scale"][0]))
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            logger.warning("%s is damaged (%s): cells are embedded by the run's states alone", path, error)
            return None


def save_space(folder: Path, model: Any, cells: IterableAnnDataset, *, has_states: bool) -> None:
    """Fit the joined space of a run whose weights `folder` has, and save it there; what cannot be fitted is left out.

    Args:
        folder: Where the weights are, and the space will be.
        model: The model in memory; one that is spread over processes (FSDP) is read from the folder instead, since only
            this process is here.
        cells: All training cells.
        has_states: Whether the transformer has learned anything.
    """
    with quiet(READING), quiet(LOADING):
        if any(hasattr(weight, "full_tensor") for weight in model.parameters()):
            model = type(model).from_pretrained(folder)
        space = JoinedSpace.fit(model, cells, has_states=has_states)
    if space is not None:
        space.save(folder)


def _read(
    model: Any, cells: IterableAnnDataset, *, has_states: bool
) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Return the expression of some cells, its means over cells that measured a gene, and states of fewer cells."""
    tokenizer, config = cells.tokenizer, model.config
    drawn_n = np.random.default_rng(0).permutation(cells.num_cells)
    rows, rows_of_states = np.sort(drawn_n[:MOST_CELLS]), drawn_n[:MOST_STATES]
    pooling = trained_pooling(model, tokenizer)
    parts, states = [], list[np.ndarray]()
    num_cells_g = np.zeros(len(tokenizer.panel))
    for block in cells.blocks():
        if not len(block := replace(_among(block, rows), labels_n=None)):
            continue
        parts.append(expression_of(block, config)[:, tokenizer.first_gene_type :])
        measured_sg, table_n = block.tables(len(tokenizer.panel))
        num_cells_g += np.bincount(table_n, minlength=len(measured_sg)) @ measured_sg
        if has_states and len(block := _among(block, rows_of_states)):
            found_nh = pooled_states(model, tokenizer, block, pooling=pooling)
            states.append(found_nh[np.isfinite(found_nh[:, 0])])
    expression_ng = sparse.vstack(parts, format="csr")
    mean_g = np.asarray(expression_ng.sum(axis=0)).ravel() / np.maximum(num_cells_g, 1)
    return expression_ng, mean_g, np.concatenate(states) if states else np.zeros((0, config.hidden_size))


def _among(block: TokenBlock, cells_m: np.ndarray) -> TokenBlock:
    return block.take(np.flatnonzero(np.isin(block.cells_n, cells_m)))


def _components(values_nc: Any, *, most: int) -> PCA:
    """Fit at most so many principal components, fewer than there are cells and coordinates."""
    return PCA(min(most, min(values_nc.shape) - 1), svd_solver="arpack", random_state=0).fit(values_nc)


def _votes(model: Any, tokenizer: GeneTokenizer) -> Sequence[np.ndarray]:
    """Return the votes for the labels of each phenotype, (g, k), less their mean over labels."""
    if (path := direct_path(model)) is None:
        return []
    votes_gk = path.votes_tk.detach().cpu().float().numpy()[tokenizer.first_gene_type :]
    columns = [slice(None)]
    if not isinstance(model, GeneBertForClassification):
        ranges = [tokenizer.vocabulary.id_range(name) for name in tokenizer.included_phenotypes]
        first = model.config.first_label_id
        columns = [slice(start - first, stop - first) for start, stop in ranges]
    return [votes_gk[:, ids] - votes_gk[:, ids].mean(axis=1, keepdims=True) for ids in columns]
