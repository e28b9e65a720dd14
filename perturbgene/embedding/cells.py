"""Embeddings: what a trained model has made of cells, of an asked phenotype and of named genes, as arrays in `obsm`.

Owns which hidden states are read off a cell and how they are pooled; leaves reading them to `states`, ranks and files
to `parts`, and means of genes over cells to `gene_means`. Letters: n cells, m positions read, h hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from perturbgene.data_utils.data_collators import ask, pack
from perturbgene.data_utils.shards import write_h5ad_copy
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.embedding.genes import run_gene_means
from perturbgene.embedding.states import (
    GeneTokens,
    as_run,
    check_masked,
    find_genes,
    hidden_at,
    label_embeddings,
    open_cells,
)
from perturbgene.errors import InputError, listed
from perturbgene.inference.asking import Given, given_labels
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    BATCH_TOKENS,
    CellResults,
    Ranks,
    RowArray,
    cell_results,
    check_target,
    collect_results,
    has_genes,
    read_cells,
    reading_options,
    stream_batches,
)

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.configs import EmbedConfig

Pooling = Literal["cls", "genes"]
KEY = "X_perturbgene"


@dataclass(frozen=True)
class Wanted:
    """What is read off every cell.

    Args:
        pooling: "cls" is the final state of `[CLS]`, "genes" the mean of those of the cell's genes.
        phenotypes: Asked one by one; the final state of each one's `[MASK]`.
        genes: Panel indices, by the name that each is called in the output.
        given: Phenotypes whose labels stand in the sequence.
    """

    pooling: Pooling = "cls"
    phenotypes: tuple[str, ...] = ()
    genes: Mapping[str, int] | None = None
    given: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Names in `obsm`, in the order of `embed_block`."""
        names = [*self.phenotypes, *(f"gene_{name}" for name in self.genes or {})]
        return [KEY, *(f"{KEY}_{name.replace('/', '_')}" for name in names)]  # a slash would be a folder within HDF5


def embed_block(run: Run, block: TokenBlock, wanted: Wanted) -> dict[str, np.ndarray]:
    """Embed a block of cells.

    Returns:
        `obsm` key -> float32 (n, h), rows in the order of the cells. A cell that expresses no gene of the panel is NaN
        throughout, as `predict` gives it no label; where it does not express a gene that was named, that gene's is NaN.
    """
    tokens = GeneTokens.of(block, run.tokenizer)
    named = np.array(list((wanted.genes or {}).values()), dtype=np.int64)
    if wanted.pooling == "genes":
        read_m = tokens.position_m
    else:
        read_m = np.union1d(block.offsets_n1[:-1], tokens.position_m[np.isin(tokens.gene_m, named)])
    hidden_mh = hidden_at(run, pack(block), read_m)
    has_genes_n = has_genes(block, run.tokenizer)
    if wanted.pooling == "genes":
        cells_nh = _mean_by(hidden_mh, tokens.cell_m, len(block))
    else:
        cells_nh = hidden_mh[np.searchsorted(read_m, block.offsets_n1[:-1])]
    found = [cells_nh]
    found += [_phenotype_states(run, block, category, wanted.given) for category in wanted.phenotypes]
    for states_nh in found:
        states_nh[~has_genes_n] = np.nan
    for gene in named:
        is_gene_m = tokens.gene_m == gene
        states_nh = np.full_like(cells_nh, np.nan)
        states_nh[tokens.cell_m[is_gene_m]] = hidden_mh[np.searchsorted(read_m, tokens.position_m[is_gene_m])]
        found.append(states_nh)
    return dict(zip(wanted.keys, found, strict=True))


def _mean_by(values_mh: np.ndarray, group_m: np.ndarray, num_groups: int) -> np.ndarray:
    """Average rows by group, summed in float64, float32 (groups, h); NaN where a group has none."""
    sums = torch.zeros((num_groups, values_mh.shape[1]), dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(group_m), torch.from_numpy(values_mh).double())
    count_n1 = np.bincount(group_m, minlength=num_groups)[:, None]
    return np.where(count_n1 > 0, sums.numpy() / np.maximum(count_n1, 1), np.nan).astype(np.float32)


def _phenotype_states(run: Run, block: TokenBlock, category: str, given: Sequence[str]) -> np.ndarray:
    """Ask one phenotype of every cell and return the final state of its `[MASK]`, (n, h)."""
    batch = ask(block, run.tokenizer, asked=[category], given=given)
    return hidden_at(run, batch, batch.pop("label_positions").numpy())


# -- embed ------------------------------------------------------------------------------------------------------------


def wanted_of(
    run: Run, *, pooling: Pooling = "cls", phenotypes: Sequence[str] = (), genes: Sequence[str] = (),
    given: Sequence[str] = (),
) -> Wanted:  # fmt: skip
    """Check what is asked of a run.

    Raises:
        InputError: A gene or phenotype is unknown, a phenotype is asked and given, or a classifier is asked for one.
    """
    if phenotypes:
        check_masked(run, what="phenotypes")
    for category in phenotypes:
        run.tokenizer.vocabulary.check_category(category)
    if both := sorted(set(phenotypes) & set(given)):
        raise InputError(f"{listed(both)} cannot be asked and given at once. Remove it from --phenotype or --given.")
    found = dict(zip(genes, find_genes(run.tokenizer, genes).tolist(), strict=True))
    return Wanted(pooling, tuple(phenotypes), found, tuple(given))


def embed(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    pooling: Pooling = "cls",
    phenotypes: Sequence[str] = (),
    genes: Sequence[str] = (),
    given: Given | None = None,
    device: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    **reading: Any,
) -> "AnnData":
    """Return a copy of the cells with their embeddings in `obsm`.

    Args:
        adata: Cells, or the path of an h5ad file that fits into memory; no label column is needed.
        model: Run folder, or a loaded run.
        pooling: "cls" takes the final state of `[CLS]`, "genes" the mean of those of the cell's genes.
        phenotypes: Asked one by one; `obsm["X_perturbgene_PHENOTYPE"]` holds the state of the question.
        genes: Ids or symbols; `obsm["X_perturbgene_gene_GENE"]` holds each one's contextual embedding, NaN in cells
            without it, and `obs["perturbgene_has_GENE"]` says which cells have it.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`; all others are absent, so
            that no label leaks into the embedding.
        device: "auto", "cpu", "cuda", ...
        batch_tokens: Tokens per batch at most.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        The copy; `obsm["X_perturbgene"]` is float32 of shape (n, h). Cells that express no gene of the panel are NaN.

    Raises:
        InputError: See `wanted_of` and `open_cells`.

    Example:
        >>> import perturbgene as pg
        >>> pg.embed("cells.h5ad", "runs/mlm").obsm["X_perturbgene"].shape
        (255, 32)
    """
    run, given = as_run(model, device=device), given_labels(given)
    wanted = wanted_of(run, pooling=pooling, phenotypes=phenotypes, genes=genes, given=list(given))
    cells = read_cells(adata) if isinstance(adata, str | Path) else adata
    dataset = open_cells(cells, run, given, **reading)
    batches = stream_batches(dataset, text="embed", ranks=Ranks(), most_tokens=batch_tokens)
    found = collect_results(CellResults(dataset.num_cells), batches, lambda block: embed_block(run, block, wanted))
    result = cells.to_memory() if cells.isbacked else cells.copy()
    for key, rows in found.items():
        result.obsm[key] = rows[:]
    for name, column in _presence(wanted, found).items():
        result.obs[name] = column
    result.uns["perturbgene"] = _facts(run, wanted, given, coverage=dataset.coverage)
    return result


def _presence(wanted: Wanted, found: Mapping[str, RowArray]) -> dict[str, np.ndarray]:
    """Return for each named gene which cells have it, as columns of obs."""
    keys = wanted.keys[len(wanted.keys) - len(wanted.genes or {}) :]
    return {
        f"perturbgene_has_{name}": _is_known(found[key]) for name, key in zip(wanted.genes or {}, keys, strict=True)
    }


def _is_known(rows: RowArray) -> np.ndarray:
    return np.concatenate([np.isfinite(block_mh[:, 0]) for _, block_mh in rows.blocks()])


def _facts(run: Run, wanted: Wanted, given: Mapping[str, str | None], *, coverage: float) -> dict[str, Any]:
    """Say where embeddings came from, with the static embedding of every label of the phenotypes that were asked."""
    question = {"pooling": wanted.pooling, "phenotypes": list(wanted.phenotypes), "genes": list(wanted.genes or {})}
    facts = provenance(run, {"verb": "embed", **question, "given": dict(given)}, coverage=coverage)
    if wanted.phenotypes:
        facts["label_embeddings"] = {name: label_embeddings(run, name) for name in wanted.phenotypes}
    return facts


def run_embed(config: "EmbedConfig") -> str | None:
    """Run the `embed` verb: copy the file with embeddings of its cells, or write embeddings of genes by group."""
    ranks = Ranks.join(config.device)
    source, target = check_target(config.input, config.output, overwrite=config.overwrite, verb="embed")
    run = load_run(config.run, device=ranks.device(config.device))
    if config.is_of_genes:
        return run_gene_means(config, run, source=source, target=target, ranks=ranks)
    given = config.given_labels
    wanted = wanted_of(run, pooling=config.pooling, phenotypes=config.phenotype, genes=config.genes, given=list(given))
    dataset = open_cells(source, run, given, ranks=ranks, **reading_options(config))
    with cell_results(target, num_cells=dataset.num_cells, ranks=ranks) as parts:
        batches = stream_batches(dataset, text="embed", ranks=ranks, most_tokens=config.batch_tokens)
        found = collect_results(parts, batches, lambda block: embed_block(run, block, wanted))
        if not ranks.is_main:
            return None
        facts = _facts(run, wanted, given, coverage=dataset.coverage)
        write_h5ad_copy(source, target, uns=facts, obs=_presence(wanted, found), obsm=found)
        num_empty = int((~_is_known(found[KEY])).sum())
    empty = f"; {num_empty:,} express no gene of the panel and are NaN" if num_empty else ""
    return (
        f"{dataset.num_cells:,} cells embedded by {config.run} ({', '.join(wanted.keys)}), written to {target}{empty}"
    )
