"""Mean embeddings of genes by group of cells: the table, the network within a group, the roles across groups.

Owns the running sums, the h5ad table and what the means say: which genes are alike within a group and which differ
between groups; leaves hidden states to `Run` and ranks to `streaming`. Letters: n cells, m positions read, g genes, k
groups, r rows of the table, p pairs of groups, h hidden size, e links.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from perturbgene.cli.verbs import EmbedConfig
from perturbgene.data_utils.data_collators import pack
from perturbgene.data_utils.h5ad_writing import write_adata
from perturbgene.data_utils.kernels import cell_key
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import check_new, whole_files
from perturbgene.inference.held_out import about_untrained
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    ALL,
    ALONE,
    GeneTokens,
    Given,
    Ranks,
    given_labels,
    open_cells,
    read_groups,
    reading_options,
    stream_batches,
    sum_over_ranks,
)

if TYPE_CHECKING:
    import networkx
    from anndata import AnnData

logger = logging.getLogger(__name__)

NETWORK_KEY = "perturbgene_network"

#: Sums of more bytes than this are refused: they would come from a column with a value per cell.
MOST_SUM_BYTES = 16e9


# -- sums -------------------------------------------------------------------------------------------------------------


class GeneSums:
    """Running sums of genes' contextual embeddings by group, in two halves of the cells that show how noisy they are.

    Memory is 2 x groups x genes x hidden size in float64, whatever the number of cells.

    Raises:
        InputError: The sums would not fit into memory.
    """

    def __init__(self, run: Run, *, num_groups: int) -> None:
        num_genes, hidden_size = len(run.tokenizer.panel), run.model.config.hidden_size
        if (num_bytes := 16.0 * num_groups * num_genes * hidden_size) > MOST_SUM_BYTES:
            raise InputError(
                f"{num_groups:,} groups x {num_genes:,} genes x {hidden_size} numbers need {num_bytes / 1e9:,.0f} GB. "
                "Choose a column with fewer values for --groupby."
            )
        self.run = run
        self.sums_2kgh = np.zeros((2, num_groups, num_genes, hidden_size))
        self.counts_2kg = np.zeros((2, num_groups, num_genes), dtype=np.int64)

    def add(self, block: TokenBlock, group_n: np.ndarray) -> None:
        """Embed the genes of a block; cells of group -1 are left out."""
        block = block.take(np.flatnonzero(group_n >= 0))
        if not len(block):
            return
        group_n = group_n[group_n >= 0]
        tokens = GeneTokens.of(block, self.run.tokenizer)
        # Dealt by a hash of the cell's number: the same for any ranks.
        half_n = np.array([int(cell_key(0, 0, int(cell))) & 1 for cell in block.cells_n], dtype=np.int64)
        shape = self.counts_2kg.shape
        place_m = np.ravel_multi_index((half_n[tokens.cell_m], group_n[tokens.cell_m], tokens.gene_m), shape)
        hidden_mh = self.run.hidden_at(pack(block), tokens.position_m)
        sums = torch.from_numpy(self.sums_2kgh.reshape(-1, self.sums_2kgh.shape[-1]))
        sums.index_add_(0, torch.from_numpy(place_m), torch.from_numpy(hidden_mh).double())
        self.counts_2kg += np.bincount(place_m, minlength=self.counts_2kg.size).reshape(shape)

    def table(self, groups: Sequence[str]) -> "AnnData":
        """Return mean embeddings, one row for each gene of each group that expresses it.

        Returns:
            `X` float32; `obs`: `gene`, `symbol`, `group`, `n_cells` and `split_half_distance`, the cosine distance
            between the centered means of two halves of the cells, NaN where one half has no cell.
        """
        import anndata

        panel, counts_kg = self.run.tokenizer.panel, self.counts_2kg.sum(axis=0)
        means_2kgh = self.sums_2kgh / np.maximum(self.counts_2kg, 1)[..., None]
        first_kgh, second_kgh = (
            np.stack([unit_rows(centered(*group)) for group in zip(means_kgh, counts, strict=True)])
            for means_kgh, counts in zip(means_2kgh, self.counts_2kg, strict=True)
        )
        distance_kg = 1.0 - (first_kgh * second_kgh).sum(axis=-1)
        distance_kg[~(self.counts_2kg > 0).all(axis=0)] = np.nan
        group_r, gene_r = np.nonzero(counts_kg)
        gene_names, group_names = np.array(panel.genes, dtype=object)[gene_r], np.array(groups, dtype=object)[group_r]
        columns = {
            "gene": pd.Categorical(gene_names),
            "symbol": pd.Categorical([panel.display_name(int(gene)) for gene in gene_r]),
            "group": pd.Categorical(group_names, categories=list(groups)),
            "n_cells": counts_kg[group_r, gene_r],
            "split_half_distance": distance_kg[group_r, gene_r],
        }
        means_kgh = self.sums_2kgh.sum(axis=0) / np.maximum(counts_kg, 1)[..., None]
        means_rh = means_kgh[group_r, gene_r].astype(np.float32)
        obs = pd.DataFrame(columns, index=gene_names + "|" + group_names)
        return anndata.AnnData(means_rh, obs=obs, var=pd.DataFrame(index=[str(at) for at in range(means_rh.shape[1])]))


# -- what the means say -----------------------------------------------------------------------------------------------


def unit_rows(vectors_gh: np.ndarray) -> np.ndarray:
    """Scale vectors of shape (..., h) to length 1, in float64; one without length stays 0."""
    vectors_gh = np.asarray(vectors_gh, dtype=np.float64)
    length_g1 = np.linalg.norm(vectors_gh, axis=-1, keepdims=True)
    return vectors_gh / np.where(length_g1 > 0, length_g1, 1.0)


def centered(vectors_gh: np.ndarray, counts_g: np.ndarray) -> np.ndarray:
    """Subtract the mean of the genes' vectors, weighted by cells; rows without a cell may hold anything.

    Contextual vectors share a large part, which alone makes every cosine high (Mu & Viswanath 2018, "All-but-the-Top",
    arXiv:1702.01417, algorithm 1, step 1).
    """
    weight_g = counts_g / max(1, counts_g.sum())
    filled_gh = np.where(counts_g[:, None] > 0, np.asarray(vectors_gh, dtype=np.float64), 0.0)
    return filled_gh - weight_g @ filled_gh


def nearest_genes(vectors_gh: np.ndarray, *, top_k: int, min_similarity: float = -1.0) -> sparse.csr_array:
    """Link each gene to its most similar genes.

    Args:
        vectors_gh: One vector per gene, shape (g, h).
        top_k: Maximum number of links that start from a gene; it may get more from others.
        min_similarity: Weaker links are left out.

    Returns:
        Cosine similarities, float32, symmetric, without a diagonal, shape (g, g).

    Example:
        >>> links = nearest_genes(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), top_k=1)
        >>> [(int(a), int(b)) for a, b in zip(*links.nonzero())]
        [(0, 1), (1, 0), (2, 3), (3, 2)]
    """
    num_genes, top_k = len(vectors_gh), min(top_k, len(vectors_gh) - 1)
    if top_k < 1:
        return sparse.csr_array((num_genes, num_genes), dtype=np.float32)
    search = NearestNeighbors(n_neighbors=top_k, metric="cosine", algorithm="brute")
    distance_gk, neighbor_gk = search.fit(np.asarray(vectors_gh, dtype=np.float64)).kneighbors()
    from_e, to_e, similarity_e = np.repeat(np.arange(num_genes), top_k), neighbor_gk.ravel(), 1.0 - distance_gk.ravel()
    pair_e = np.minimum(from_e, to_e) * num_genes + np.maximum(from_e, to_e)
    first = np.unique(pair_e, return_index=True)[1]  # a link that both genes chose counts once
    first = first[similarity_e[first] >= min_similarity]
    places = (np.concatenate([from_e[first], to_e[first]]), np.concatenate([to_e[first], from_e[first]]))
    weights = np.tile(similarity_e[first].astype(np.float32), 2)
    return sparse.csr_array((weights, places), shape=(num_genes, num_genes))


def role_distances(vectors_kgh: np.ndarray, counts_kg: np.ndarray, *, min_cells: int) -> np.ndarray:
    """Return how far apart each gene's centered mean vectors are in two groups: cosine distance, 0..2.

    Returns:
        Symmetric in the groups, shape (g, k, k); NaN where one of the two has fewer than `min_cells` cells.
    """
    unit_kgh = unit_rows(vectors_kgh)
    distance_gkk = 1.0 - np.einsum("agh,bgh->gab", unit_kgh, unit_kgh, optimize=True)
    is_known_gk = (counts_kg >= max(1, min_cells)).T
    distance_gkk[~(is_known_gk[:, :, None] & is_known_gk[:, None, :])] = np.nan
    return np.clip(distance_gkk, 0.0, 2.0)


def role_table(
    distance_gkk: np.ndarray, noise_kg: np.ndarray, *, genes: pd.DataFrame, groups: Sequence[str]
) -> pd.DataFrame:
    """Rank genes by how much their embedding differs between groups, beyond the noise of the means.

    A mean over n cells is itself uncertain. With D the distance between the means of two halves of a group's cells, two
    groups that do not differ are (D_a + D_b) / 4 apart on average, as halves hold half of the cells each.

    Args:
        distance_gkk: Of `role_distances`.
        noise_kg: Distance between the two halves of each group.
        genes: One row of facts per gene (`gene`, `symbol`), in order.
        groups: Names of the groups.

    Returns:
        For each gene that at least two groups express: `num_groups`, `mean_distance` over pairs of groups,
        `mean_noise` to expect of the same pairs, `excess` = distance - noise, and the two groups that are furthest
        apart with their distance; by falling excess.
    """
    first, second = (np.array(side, dtype=np.int64) for side in zip(*combinations(range(len(groups)), 2), strict=True))
    pair_gp = distance_gkk[:, first, second]
    noise_gp = ((noise_kg[first] + noise_kg[second]) / 4).T
    is_known_gp = np.isfinite(pair_gp)
    rows = np.flatnonzero(is_known_gp.any(axis=1))
    pair_gp, noise_gp, is_known_gp = pair_gp[rows], noise_gp[rows], is_known_gp[rows]
    furthest = np.where(is_known_gp, pair_gp, -1.0).argmax(axis=1)
    names = np.array(groups, dtype=object)
    table = genes.iloc[rows].reset_index(drop=True)
    table["num_groups"] = np.isfinite(distance_gkk[rows]).any(axis=2).sum(axis=1)
    table["mean_distance"] = _known_mean(pair_gp)
    table["mean_noise"] = _known_mean(np.where(is_known_gp, noise_gp, np.nan))
    table["excess"] = table["mean_distance"] - table["mean_noise"]
    table["furthest_groups"] = [
        f"{a} | {b}" for a, b in zip(names[first[furthest]], names[second[furthest]], strict=True)
    ]
    table["furthest_distance"] = np.take_along_axis(pair_gp, furthest[:, None], axis=1)[:, 0]
    return table.sort_values("excess", ascending=False, kind="stable", ignore_index=True)


def _known_mean(values_gp: np.ndarray) -> np.ndarray:
    """Average the numbers of each row, shape (g,); NaN where a row has none."""
    count_g = np.isfinite(values_gp).sum(axis=1)
    return np.where(count_g > 0, np.nansum(values_gp, axis=1) / np.maximum(count_g, 1), np.nan)


# -- functions --------------------------------------------------------------------------------------------------------


def gene_embeddings(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    groupby: str | None = EmbedConfig.groupby,
    given: Given | None = None,
    device: str = EmbedConfig.device,
    batch_tokens: int = EmbedConfig.batch_tokens,
    **reading: Any,
) -> "AnnData":
    """Return the mean contextual embedding of every gene in every group of cells; see `GeneSums.table`.

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
    run = load_run(model, device=device)
    table = mean_embeddings(adata, run, groupby, given_labels(given), batch_tokens=batch_tokens, **reading)
    assert table is not None  # a single process
    return table


def mean_embeddings(
    source: Any, run: Run, groupby: str | None, given: Mapping[str, str | None], *,
    batch_tokens: int = EmbedConfig.batch_tokens, target: Path | None = None, ranks: Ranks = ALONE, **reading: Any,
) -> "AnnData | None":  # fmt: skip
    """Return the table of all ranks, None on other ranks than the first; several ranks meet next to `target`."""
    dataset = open_cells(source, run, given, ranks=ranks, **reading)
    groups, group_n = read_groups(dataset, groupby)
    sums = GeneSums(run, num_groups=len(groups))
    for block in stream_batches(dataset, text="embed genes", ranks=ranks, most_tokens=batch_tokens):
        sums.add(block, group_n[block.cells_n])
    own = [sums.sums_2kgh, sums.counts_2kg]
    sums.sums_2kgh, sums.counts_2kg = sum_over_ranks(own, target=target, ranks=ranks)
    if not ranks.is_main:
        return None
    for line in about_untrained(run.path):
        logger.warning(line)
    if not sums.counts_2kg.any():
        raise InputError(f"no cell of {listed(dataset.paths)} expresses a gene of the panel. Give other cells.")
    table = sums.table(groups)
    question = {"verb": "embed", "groupby": groupby or ALL, "given": dict(given)}
    table.uns["perturbgene"] = provenance(run, question, coverage=dataset.coverage)
    return table


def _network(
    table: "AnnData", group: str | None, *, top_k: int, min_similarity: float, min_cells: int
) -> tuple["networkx.Graph", np.ndarray, sparse.csr_array]:
    """Return a group's network, the rows of its genes (those with enough cells), and the links among them."""
    import networkx

    groups = list(table.obs["group"].cat.categories)
    if group is None and len(groups) > 1:
        raise InputError(f"the genes were averaged in {len(groups)} groups. Name one of: {listed(groups, most=12)}.")
    name = groups[0] if group is None else group
    if name not in groups:
        raise InputError(f"{name!r} is no group of these genes. {did_you_mean(name, groups)}")
    rows = np.flatnonzero(table.obs["group"] == name)
    counts_g = table.obs["n_cells"].to_numpy()[rows]
    vectors_gh = centered(table.X[rows], counts_g)[counts_g >= min_cells]
    rows, links_gg = rows[counts_g >= min_cells], nearest_genes(vectors_gh, top_k=top_k, min_similarity=min_similarity)
    graph, obs = networkx.Graph(), table.obs.iloc[rows]
    names = obs["gene"].astype(str).tolist()
    for gene, symbol, n_cells in zip(names, obs["symbol"].astype(str), obs["n_cells"].tolist(), strict=True):
        graph.add_node(gene, symbol=symbol, n_cells=n_cells)
    upper = sparse.triu(links_gg).tocoo()
    for a, b, weight in zip(*upper.coords, upper.data, strict=True):
        graph.add_edge(names[a], names[b], weight=round(float(weight), 6))
    return graph, rows, links_gg


def gene_network(
    table: "AnnData",
    *,
    group: str | None = None,
    top_k: int = EmbedConfig.top_k,
    min_similarity: float = EmbedConfig.min_similarity,
    min_cells: int = EmbedConfig.min_cells,
) -> "networkx.Graph":
    """Link genes whose mean contextual embeddings are alike within a group of cells.

    Args:
        table: Made by `gene_embeddings`.
        group: Which group; needed if there are several.
        top_k: Maximum number of links that start from a gene.
        min_similarity: Minimum cosine similarity, of vectors without the part that all genes share.
        min_cells: Minimum number of cells of the group that express a gene.

    Returns:
        Nodes are gene ids with `symbol` and `n_cells`; edges have a `weight`. `networkx.write_graphml` writes it.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.gene_embeddings("cells.h5ad", "runs/mlm", groupby="cell_type")
        >>> network = pg.gene_network(table, group="NK cell", top_k=3, min_cells=20)
        >>> "NKG7" in network, min(weight for _, _, weight in network.edges(data="weight")) >= 0.5
        (True, True)
    """
    return _network(table, group, top_k=top_k, min_similarity=min_similarity, min_cells=min_cells)[0]


def gene_roles(table: "AnnData", *, min_cells: int = EmbedConfig.min_cells) -> pd.DataFrame:
    """Rank genes by how much their contextual embedding differs between groups; see `role_table`.

    Args:
        table: Made by `gene_embeddings`, with at least two groups.
        min_cells: Minimum number of cells of a group that express a gene for the group to count.

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
    vectors_kgh = np.stack([centered(*of_group) for of_group in zip(vectors_kgh, counts_kg, strict=True)])
    distance_gkk = role_distances(vectors_kgh, counts_kg, min_cells=min_cells)
    return role_table(distance_gkk, noise_kg, genes=genes, groups=groups)


# -- the verb ---------------------------------------------------------------------------------------------------------


def run_gene_means(config: EmbedConfig, run: Run, *, source: str, target: Path, ranks: Ranks) -> str | None:
    """Write what `embed --groupby` or `embed --network` asks for; the target is renamed last, when all is there."""
    table = mean_embeddings(
        source, run, config.groupby, config.given_labels, batch_tokens=config.batch_tokens, target=target, ranks=ranks,
        **reading_options(config),
    )  # fmt: skip
    if table is None:
        return None
    groups = list(table.obs["group"].cat.categories)
    names, roles_path = file_names(groups), target.with_suffix(".roles.csv")
    graph_paths = {
        group: target.with_suffix(f".{names[group]}.graphml" if len(groups) > 1 else ".graphml") for group in groups
    }
    lines = [f"{table.n_obs:,} mean embeddings of genes in {len(groups)} groups, written to {target}"]
    others = [*([roles_path] if len(groups) > 1 else []), *(graph_paths.values() if config.network else [])]
    check_new(target, *others, overwrite=config.overwrite)
    with whole_files(target, *others) as folder:
        if config.network:
            lines += _write_networks(table, {group: folder / path.name for group, path in graph_paths.items()}, config)
        if len(groups) > 1:
            roles = gene_roles(table, min_cells=config.min_cells)
            roles.to_csv(folder / roles_path.name, index=False)
            first = ", ".join(roles["symbol"].head(10))
            lines.append(f"{len(roles):,} genes by how much they differ between groups ({first}, ...): {roles_path}")
        write_adata(table, folder / target.name)
    return "\n".join(lines)


def _write_networks(table: "AnnData", paths: Mapping[str, Path], config: EmbedConfig) -> list[str]:
    """Write each group's network as GraphML, and put the links of all groups into `obsp["perturbgene_network"]`."""
    import networkx

    lines, places, weights = [], [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    options = {name: getattr(config, name) for name in ("top_k", "min_similarity", "min_cells")}
    for group, path in paths.items():
        graph, rows, links_gg = _network(table, group, **options)
        networkx.write_graphml(graph, path)
        lines.append(f"{group}: {graph.number_of_nodes():,} genes, {graph.number_of_edges():,} links, in {path.name}")
        links = links_gg.tocoo()
        places.append(np.stack([rows[coords] for coords in links.coords], axis=1))
        weights.append(links.data)
    place_e2, shape = np.concatenate(places), (table.n_obs, table.n_obs)
    table.obsp[NETWORK_KEY] = sparse.csr_matrix((np.concatenate(weights), tuple(place_e2.T)), shape=shape)
    return lines


def file_names(groups: Sequence[str]) -> dict[str, str]:
    """Spell each group so that it can be part of a file name; the same spelling twice gets a number.

    Example:
        >>> file_names(["a b", "a/b", "c"])
        {'a b': 'a_b', 'a/b': 'a_b.1', 'c': 'c'}
    """
    names: dict[str, str] = {}
    for number, group in enumerate(groups):
        name = re.sub(r"[^\w.+-]+", "_", group)
        names[group] = f"{name}.{number}" if name in names.values() else name
    return names
