"""Mean embeddings of genes by group of cells, streamed: the table, the network within a group, the roles across them.

Owns the running sums, their merging over ranks and the h5ad table; leaves reading states to `states` and what the means
say to `networks`. Letters: n cells, m positions read, g genes, k groups, r rows of the table, h hidden size.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbgene.data_utils.data_collators import pack
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.order import cell_key
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.embedding.networks import centred, link_graph, nearest_genes, role_distances, role_table, unit_rows
from perturbgene.embedding.states import GeneTokens, as_run, hidden_at, open_cells
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.inference.asking import Given, given_labels
from perturbgene.inference.run import Run, provenance
from perturbgene.inference.streaming import (
    ALL,
    BATCH_TOKENS,
    CellResults,
    Ranks,
    cell_results,
    read_groups,
    reading_options,
    stream_batches,
    sum_over_ranks,
)

if TYPE_CHECKING:
    import networkx
    from anndata import AnnData

    from perturbgene.configs import EmbedConfig

logger = logging.getLogger(__name__)

NETWORK_KEY = "perturbgene_network"

#: Sums of more bytes than this are refused: they would come from a column with a value per cell.
MOST_SUM_BYTES = 16e9


# -- sums -------------------------------------------------------------------------------------------------------------


class GeneSums:
    """Running sums of genes' contextual embeddings by group, in two halves of the cells that tell how noisy they are.

    Memory is 2 x groups x genes x hidden size in float64, whatever the number of cells.

    Args:
        num_groups, num_genes, hidden_size: Sizes k, g, h.
    """

    def __init__(self, *, num_groups: int, num_genes: int, hidden_size: int) -> None:
        self.sums_2kgh = np.zeros((2, num_groups, num_genes, hidden_size))
        self.counts_2kg = np.zeros((2, num_groups, num_genes), dtype=np.int64)

    def add(self, run: Run, block: TokenBlock, group_n: np.ndarray) -> None:
        """Embed the genes of a block; cells of group -1 are left out."""
        block = block.take(np.flatnonzero(group_n >= 0))
        if not len(block):
            return
        group_n = group_n[group_n >= 0]
        tokens = GeneTokens.of(block, run.tokenizer)
        half_n = halves(block.cells_n)
        shape = self.counts_2kg.shape
        place_m = np.ravel_multi_index((half_n[tokens.cell_m], group_n[tokens.cell_m], tokens.gene_m), shape)
        hidden_mh = hidden_at(run, pack(block), tokens.position_m)
        sums = torch.from_numpy(self.sums_2kgh.reshape(-1, self.sums_2kgh.shape[-1]))
        sums.index_add_(0, torch.from_numpy(place_m), torch.from_numpy(hidden_mh).double())
        self.counts_2kg += np.bincount(place_m, minlength=self.counts_2kg.size).reshape(shape)

    def means(self) -> np.ndarray:
        """Mean of each gene in each group, float64 (k, g, h); 0 where no cell of the group expresses the gene."""
        counts_kg = self.counts_2kg.sum(axis=0)
        return self.sums_2kgh.sum(axis=0) / np.maximum(counts_kg, 1)[..., None]

    def half_means(self) -> np.ndarray:
        """Mean over each half of the cells, float64 (2, k, g, h)."""
        return self.sums_2kgh / np.maximum(self.counts_2kg, 1)[..., None]


def halves(cells_n: np.ndarray) -> np.ndarray:
    """Deal cells to two halves by a hash of their number, int64 of shape (n,) in 0..1: the same for any ranks."""
    return np.array([int(cell_key(0, 0, int(cell))) & 1 for cell in cells_n], dtype=np.int64)


# -- tables -----------------------------------------------------------------------------------------------------------


def sum_genes(
    run: Run, dataset: IterableAnnDataset, *, groups: Sequence[str], group_n: np.ndarray, parts: CellResults,
    batch_tokens: int = BATCH_TOKENS,
) -> GeneSums:  # fmt: skip
    """Stream the cells of all ranks into sums; only rank 0 gets those of all.

    Raises:
        InputError: The sums would not fit into memory.
    """
    shape = (2, len(groups), len(run.tokenizer.panel), run.model.config.hidden_size)
    if (num_bytes := 8.0 * np.prod(shape, dtype=np.float64)) > MOST_SUM_BYTES:
        raise InputError(
            f"{shape[1]:,} groups x {shape[2]:,} genes x {shape[3]} numbers need {num_bytes / 1e9:,.0f} GB. Choose a "
            "column with fewer values for --groupby."
        )
    sums = GeneSums(num_groups=shape[1], num_genes=shape[2], hidden_size=shape[3])
    for block in stream_batches(dataset, text="embed genes", ranks=parts.ranks, most_tokens=batch_tokens):
        sums.add(run, block, group_n[block.cells_n])
    sums.sums_2kgh, sums.counts_2kg = sum_over_ranks([sums.sums_2kgh, sums.counts_2kg], parts)
    return sums


def gene_table(sums: GeneSums, run: Run, *, groups: Sequence[str]) -> "AnnData":
    """Lay out mean embeddings as one row per gene and group.

    Returns:
        `X` float32, one row for each gene of each group that expresses it; `obs`: `gene`, `symbol`, `group`, `n_cells`
        and `split_half_distance`, the cosine distance between the means of two halves of the cells (centred).
    """
    import anndata

    panel, counts_kg = run.tokenizer.panel, sums.counts_2kg.sum(axis=0)
    group_r, gene_r = np.nonzero(counts_kg)
    gene_names, group_names = np.array(panel.genes, dtype=object)[gene_r], np.array(groups, dtype=object)[group_r]
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(gene_names),
            "symbol": pd.Categorical([panel.display_name(int(gene)) for gene in gene_r]),
            "group": pd.Categorical(group_names, categories=list(groups)),
            "n_cells": counts_kg[group_r, gene_r],
            "split_half_distance": _split_half_distances(sums)[group_r, gene_r],
        },
        index=gene_names + "|" + group_names,
    )
    means_rh = sums.means()[group_r, gene_r].astype(np.float32)
    return anndata.AnnData(means_rh, obs=obs, var=pd.DataFrame(index=[str(at) for at in range(means_rh.shape[1])]))


def _split_half_distances(sums: GeneSums) -> np.ndarray:
    """Return the cosine distance between centred means of both halves, (k, g); NaN where a half has no cell."""
    means_2kgh, counts_2kg = sums.half_means(), sums.counts_2kg
    unit_2kgh = np.stack([
        np.stack([unit_rows(centred(means_gh, counts_g)) for means_gh, counts_g in zip(*half, strict=True)])
        for half in zip(means_2kgh, counts_2kg, strict=True)
    ])  # fmt: skip
    distance_kg = 1.0 - (unit_2kgh[0] * unit_2kgh[1]).sum(axis=-1)
    return np.where((counts_2kg > 0).all(axis=0), distance_kg, np.nan)


def gene_embeddings(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    groupby: str | None = None,
    given: Given | None = None,
    device: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    **reading: Any,
) -> "AnnData":
    """Return the mean contextual embedding of every gene in every group of cells; see `gene_table`.

    Args:
        adata: Cells, or the path of an h5ad file.
        model: Run folder, or a loaded run.
        groupby: Column of `obs`; None takes all cells as one group.
        given, device, batch_tokens, reading: As for `embed`.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.gene_embeddings("cells.h5ad", "runs/mlm", groupby="cell_type")
        >>> table.n_vars, table.obs["group"].cat.categories.tolist()
        (32, ['B cell', 'NK cell', 'monocyte'])
    """
    run, given = as_run(model, device=device), given_labels(given)
    dataset = open_cells(adata, run, given, **reading)
    groups, group_n = read_groups(dataset, groupby)
    parts = CellResults(dataset.num_cells)
    sums = sum_genes(run, dataset, groups=groups, group_n=group_n, parts=parts, batch_tokens=batch_tokens)
    table = gene_table(sums, run, groups=groups)
    question = {"verb": "embed", "groupby": groupby or ALL, "given": given}
    table.uns["perturbgene"] = provenance(run, question, coverage=dataset.coverage)
    return table


def _group_rows(table: "AnnData", group: str | None, min_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a group with enough cells, and their centred vectors."""
    groups = list(table.obs["group"].cat.categories)
    if group is None and len(groups) > 1:
        raise InputError(f"the genes were averaged in {len(groups)} groups. Name one of: {listed(groups, most=12)}.")
    name = groups[0] if group is None else group
    if name not in groups:
        raise InputError(f"{name!r} is no group of these genes. {did_you_mean(name, groups)}")
    rows = np.flatnonzero(table.obs["group"] == name)
    counts_g = table.obs["n_cells"].to_numpy()[rows]
    centred_gh = centred(table.X[rows], counts_g)
    is_kept_g = counts_g >= min_cells
    return rows[is_kept_g], centred_gh[is_kept_g]


def gene_network(
    table: "AnnData", *, group: str | None = None, top_k: int = 10, min_similarity: float = 0.5, min_cells: int = 10
) -> "networkx.Graph":
    """Link genes whose mean contextual embeddings are alike within a group of cells.

    Args:
        table: Of `gene_embeddings`.
        group: Which group; may be left out when there is one.
        top_k: Most links that start from a gene.
        min_similarity: Least cosine similarity, of vectors without the part that all genes share.
        min_cells: A gene needs to be expressed by this many cells of the group.

    Returns:
        Nodes are gene ids with `symbol` and `n_cells`; edges have a `weight`. `networkx.write_graphml` writes it.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.gene_embeddings("cells.h5ad", "runs/mlm", groupby="cell_type")
        >>> network = pg.gene_network(table, group="NK cell", top_k=3, min_cells=20)
        >>> "NKG7" in network, min(weight for _, _, weight in network.edges(data="weight")) >= 0.5
        (True, True)
    """
    rows, links_gg = _links(table, group, top_k=top_k, min_similarity=min_similarity, min_cells=min_cells)
    return _graph(table, rows, links_gg)


def _links(
    table: "AnnData", group: str | None, *, top_k: int, min_similarity: float, min_cells: int
) -> tuple[np.ndarray, sparse.csr_array]:
    """Return the rows of a group's genes in the table, and the links among them."""
    rows, vectors_gh = _group_rows(table, group, min_cells)
    return rows, nearest_genes(vectors_gh, top_k=top_k, min_similarity=min_similarity)


def _graph(table: "AnnData", rows: np.ndarray, links_gg: sparse.csr_array) -> "networkx.Graph":
    obs = table.obs.iloc[rows]
    nodes = {"symbol": obs["symbol"].astype(str).tolist(), "n_cells": obs["n_cells"].tolist()}
    return link_graph(links_gg, names=obs["gene"].astype(str).tolist(), nodes=nodes)


def gene_roles(table: "AnnData", *, min_cells: int = 10) -> pd.DataFrame:
    """Rank genes by how much their contextual embedding differs between groups; see `networks.role_table`.

    Args:
        table: Of `gene_embeddings` with at least two groups.
        min_cells: A group counts for a gene that this many of its cells express.

    Example:
        >>> import perturbgene as pg
        >>> roles = pg.gene_roles(pg.gene_embeddings("cells.h5ad", "runs/mlm", groupby="cell_type"))
        >>> "NKG7" in roles["gene"].tolist(), roles["excess"].is_monotonic_decreasing
        (True, True)
    """
    groups = list(table.obs["group"].cat.categories)
    if len(groups) < 2:
        raise InputError("one group has nothing to differ from. Average the genes by a column with --groupby.")
    genes = table.obs[["gene", "symbol"]].astype(str).drop_duplicates("gene", ignore_index=True)
    gene_r = genes.reset_index().set_index("gene")["index"].loc[table.obs["gene"].astype(str)].to_numpy()
    group_r = table.obs["group"].cat.codes.to_numpy()
    vectors_kgh = np.zeros((len(groups), len(genes), table.n_vars))
    counts_kg, noise_kg = np.zeros(vectors_kgh.shape[:2], dtype=np.int64), np.full(vectors_kgh.shape[:2], np.nan)
    vectors_kgh[group_r, gene_r], counts_kg[group_r, gene_r] = table.X, table.obs["n_cells"]
    noise_kg[group_r, gene_r] = table.obs["split_half_distance"]
    vectors_kgh = np.stack([centred(*of_group) for of_group in zip(vectors_kgh, counts_kg, strict=True)])
    distance_gkk = role_distances(vectors_kgh, counts_kg, min_cells=min_cells)
    return role_table(distance_gkk, noise_kg, genes=genes, groups=groups)


# -- the verb ---------------------------------------------------------------------------------------------------------


def run_gene_means(config: "EmbedConfig", run: Run, *, source: str, target: Path, ranks: Ranks) -> str | None:
    """Write what `embed --groupby` or `embed --network` asks for; every file by way of a temporary name."""
    given = config.given_labels
    dataset = open_cells(source, run, given, ranks=ranks, **reading_options(config))
    groups, group_n = read_groups(dataset, config.groupby)
    with cell_results(target, num_cells=dataset.num_cells, ranks=ranks) as parts:
        sums = sum_genes(
            run, dataset, groups=groups, group_n=group_n, parts=parts, batch_tokens=config.batch_tokens
        )  # fmt: skip
        if not ranks.is_main:
            return None
    table = gene_table(sums, run, groups=groups)
    question = {"verb": "embed", "groupby": config.groupby or ALL, "given": given}
    table.uns["perturbgene"] = provenance(run, question, coverage=dataset.coverage)
    lines = [f"{table.n_obs:,} mean embeddings of genes in {len(groups)} groups, written to {target}"]
    if config.network:
        lines += _write_networks(table, target, config)
    write_whole(target, table.write_h5ad)
    if len(groups) > 1:
        roles = gene_roles(table, min_cells=config.min_cells)
        path = target.with_suffix(".roles.csv")
        write_whole(path, lambda temporary: roles.to_csv(temporary, index=False))
        first = ", ".join(roles["symbol"].head(10))
        lines.append(f"{len(roles):,} genes by how much they differ between groups ({first}, ...): {path}")
    return "\n".join(lines)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name of the same ending, then rename it.

    Raises:
        InputError: The file cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}). Choose another --output.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_networks(table: "AnnData", target: Path, config: "EmbedConfig") -> list[str]:
    """Write each group's network as GraphML, and the links of all groups as `obsp["perturbgene_network"]`."""
    import networkx

    groups, lines = list(table.obs["group"].cat.categories), []
    names = _file_parts(groups)
    places, weights = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    for group in groups:
        rows, links_gg = _links(
            table, group, top_k=config.top_k, min_similarity=config.min_similarity, min_cells=config.min_cells
        )
        path = target.with_suffix(f".{names[group]}.graphml" if len(groups) > 1 else ".graphml")
        graph = _graph(table, rows, links_gg)
        write_whole(path, partial(networkx.write_graphml, graph))
        lines.append(f"{group}: {graph.number_of_nodes():,} genes, {graph.number_of_edges():,} links, {path}")
        links = links_gg.tocoo()
        places.append(np.stack([rows[coords] for coords in links.coords], axis=1))
        weights.append(links.data)
    place_e2 = np.concatenate(places)
    shape = (table.n_obs, table.n_obs)
    table.obsp[NETWORK_KEY] = sparse.csr_matrix((np.concatenate(weights), tuple(place_e2.T)), shape=shape)
    return lines


def _file_parts(groups: Sequence[str]) -> dict[str, str]:
    """Spell each group so that it may stand in the name of a file; the same spelling twice gets a number."""
    names: dict[str, str] = {}
    for number, group in enumerate(groups):
        name = re.sub(r"[^\w.+-]+", "_", group)
        names[group] = f"{name}.{number}" if name in names.values() else name
    return names
