"""Means of genes by group: they equal means of single cells' embeddings, on any number of ranks, and make networks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import networkx
import numpy as np
import pandas as pd
import pytest

from perturbgene.data_utils.kernels import cell_key
from perturbgene.embedding import genes as gene_means
from perturbgene.embedding.cells import KEY, embed
from perturbgene.embedding.genes import (
    centered,
    gene_embeddings,
    gene_network,
    gene_roles,
    mean_embeddings,
    nearest_genes,
    role_distances,
    role_table,
    unit_rows,
)
from perturbgene.errors import InputError
from perturbgene.inference.run import Run
from perturbgene.main import main
from tests.inference.test_streaming import ThreadRanks
from tests.nine_genes import GENES
from tests.untrained import HIDDEN, a_run, save, some_cells


@pytest.fixture(scope="module")
def run() -> Run:
    return a_run()


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return some_cells(60)


def test_a_mean_is_the_mean_of_the_gene_s_embeddings_in_the_cells_of_the_group(run: Run, cells: ad.AnnData) -> None:
    table = gene_embeddings(cells, run, groupby="tissue", batch_size=7)
    single = embed(cells, run, genes=["G4"])
    is_in_n = (single.obs["perturbgene_has_G4"] & (single.obs["tissue"] == "spleen")).to_numpy()
    row = table.obs.index.get_loc("G4|spleen")
    np.testing.assert_allclose(table.X[row], single.obsm[f"{KEY}_gene_G4"][is_in_n].mean(axis=0), atol=1e-6)
    assert table.obs["n_cells"].iloc[row] == is_in_n.sum()


def test_every_gene_of_every_group_that_expresses_it_has_a_row(run: Run, cells: ad.AnnData) -> None:
    few = cells[:4]
    table = gene_embeddings(few, run, groupby="donor")
    expressed = pd.DataFrame(few.X.toarray() > 0, columns=GENES).groupby(few.obs["donor"].to_numpy()).sum()
    found = table.obs.pivot_table("n_cells", "group", "gene", observed=False, fill_value=0)
    expected = expressed.loc[:, expressed.any()]
    np.testing.assert_array_equal(found[expected.columns].to_numpy(), expected.to_numpy())


def test_a_category_that_no_cell_has_is_no_group(run: Run, cells: ad.AnnData) -> None:
    some = cells.copy()
    some.obs["tissue"] = some.obs["tissue"].astype("category").cat.add_categories(["gone", "also gone"])
    assert gene_embeddings(some, run, groupby="tissue").obs["group"].cat.categories.tolist() == ["blood", "spleen"]


def test_cells_that_express_no_gene_of_the_panel_are_refused(run: Run, cells: ad.AnnData) -> None:
    values = np.zeros((60, 10), dtype=np.float32)
    values[:, 9] = 1.5
    some = ad.AnnData(values, obs=cells.obs, var=pd.DataFrame(index=[*GENES, "of no panel"]))
    with pytest.raises(InputError, match="no cell of 'AnnData' expresses a gene of the panel"):
        gene_embeddings(some, run, groupby="tissue")


def test_without_a_column_all_cells_are_one_group(run: Run, cells: ad.AnnData) -> None:
    table = gene_embeddings(cells, run)
    assert table.obs["group"].unique().tolist() == ["all"] and table.X.shape == (9, HIDDEN)


def test_cells_whose_group_is_missing_are_left_out_and_counted(
    run: Run, cells: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    some = cells.copy()
    some.obs["tissue"] = some.obs["tissue"].astype(object)
    some.obs.iloc[:10, some.obs.columns.get_loc("tissue")] = None
    caplog.set_level("INFO", logger="perturbgene")
    table = gene_embeddings(some, run, groupby="tissue")
    assert "10 of 60 cells have no tissue" in caplog.text
    whole = gene_embeddings(some[10:].copy(), run, groupby="tissue")
    np.testing.assert_allclose(table.X, whole.X, atol=1e-6)


def test_the_distance_of_halves_compares_means_without_their_common_part(run: Run, cells: ad.AnnData) -> None:
    table = gene_embeddings(cells, run)
    half_n, centred = np.array([int(cell_key(0, 0, cell)) & 1 for cell in range(60)]), []
    for half in (0, 1):
        part = gene_embeddings(cells[half_n == half].copy(), run)
        weights = part.obs["n_cells"].to_numpy() / part.obs["n_cells"].sum()
        centred.append(part.X - weights @ part.X)
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in centred)
    np.testing.assert_allclose(table.obs["split_half_distance"], 1 - (a * b).sum(axis=1), atol=1e-5)


def test_ranks_add_up_to_the_sums_of_one_process(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    meeting = threading.Barrier(3)

    def means_of(rank: int) -> np.ndarray:
        ranks = ThreadRanks(rank, 3, meeting=meeting)
        table = mean_embeddings(cells, run, "tissue", {}, target=tmp_path / "out", ranks=ranks)
        assert (table is not None) == (rank == 0)
        return None if table is None else table.X

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(means_of, range(3)))
    table = gene_embeddings(cells, run, groupby="tissue")
    np.testing.assert_allclose(found[0], table.X, atol=1e-6)


def test_a_column_with_a_value_per_cell_is_refused_where_sums_would_not_fit(
    run: Run, cells: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gene_means, "MOST_SUM_BYTES", 1000.0)
    with pytest.raises(InputError, match="2 groups x 9 genes x 8 numbers need .* fewer values for --groupby"):
        gene_embeddings(cells, run, groupby="tissue")


def test_a_column_without_any_value_is_no_grouping(run: Run, cells: ad.AnnData) -> None:
    some = cells.copy()
    some.obs["nothing"] = np.nan
    with pytest.raises(InputError, match="has no value"):
        gene_embeddings(some, run, groupby="nothing")


# -- networks and roles -------------------------------------------------------------------------------------------


def test_a_network_links_genes_of_one_group(run: Run, cells: ad.AnnData) -> None:
    table = gene_embeddings(cells, run, groupby="tissue")
    graph = gene_network(table, group="blood", top_k=2, min_similarity=-1, min_cells=1)
    assert set(graph) == set(GENES) and min(dict(graph.degree).values()) >= 2
    rows = table.obs["group"] == "blood"
    weights = table.obs["n_cells"][rows].to_numpy() / table.obs["n_cells"][rows].sum()
    vectors = pd.DataFrame(table.X[rows] - weights @ table.X[rows], index=table.obs["gene"][rows].astype(str))
    for a, b, weight in graph.edges(data="weight"):
        x, y = vectors.loc[a].to_numpy(), vectors.loc[b].to_numpy()
        assert weight == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-4)


def test_genes_of_few_cells_are_not_linked(run: Run, cells: ad.AnnData) -> None:
    table = gene_embeddings(cells, run)
    most = int(table.obs["n_cells"].max())
    assert len(gene_network(table, min_cells=most)) == (table.obs["n_cells"] == most).sum()


@pytest.mark.parametrize(("group", "message"), [(None, "averaged in 2 groups"), ("spln", "Did you mean 'spleen'")])
def test_a_network_is_of_one_group_that_exists(run: Run, cells: ad.AnnData, group: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gene_network(gene_embeddings(cells, run, groupby="tissue"), group=group)


def test_a_gene_whose_surroundings_differ_between_groups_ranks_first(run: Run) -> None:
    cells = some_cells(80, seed=3)
    values = cells.X.toarray()
    values[:, 1:] = 0
    values[:, 0], values[:, 1], values[:, 2] = 1.5, 1.5, 1.5
    values[:40, 3], values[40:, 4] = 3.5, 3.5
    cells.X = values
    cells.obs["side"] = ["left"] * 40 + ["right"] * 40
    roles = gene_roles(gene_embeddings(cells, run, groupby="side"))
    assert sorted(roles["gene"]) == ["G0", "G1", "G2"]  # G3 and G4 are in one group each
    np.testing.assert_allclose(roles["mean_noise"], 0, atol=1e-6)
    assert (roles["excess"] > 0).all() and roles["excess"].is_monotonic_decreasing


def test_one_group_has_no_roles(run: Run, cells: ad.AnnData) -> None:
    with pytest.raises(InputError, match="one group has nothing to differ from"):
        gene_roles(gene_embeddings(cells, run))


# -- nearest genes and roles on hand-made vectors ----------------------------------------------------------------

FOUR = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])


def test_a_vector_without_length_stays_zero() -> None:
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_the_common_part_is_the_mean_over_tokens_and_genes_without_cells_do_not_count() -> None:
    found = centered(np.array([[1.0, 0], [5.0, 4.0], [np.nan, np.nan]]), np.array([3, 1, 0]))
    np.testing.assert_allclose(found[:2], [[-1.0, -1.0], [3.0, 3.0]])


def test_links_hold_the_cosine_in_both_directions_and_none_to_the_gene_itself() -> None:
    links = nearest_genes(FOUR, top_k=1).toarray()
    cosine = 1 / np.sqrt(1.01)
    np.testing.assert_allclose(links, [[0, cosine, 0, 0], [cosine, 0, 0, 0], [0, 0, 0, cosine], [0, 0, cosine, 0]])


def test_a_gene_may_get_more_links_than_start_from_it() -> None:
    hub = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    links = nearest_genes(hub, top_k=1, min_similarity=0.5).toarray() > 0
    assert links.sum(axis=1).tolist() == [2, 1, 1]


def test_weak_links_are_left_out() -> None:
    assert nearest_genes(FOUR, top_k=3, min_similarity=0.9).nnz == 4
    assert nearest_genes(FOUR, top_k=3, min_similarity=-1).nnz == 12


@pytest.mark.parametrize("num_genes", [0, 1])
def test_too_few_genes_have_no_links(num_genes: int) -> None:
    links = nearest_genes(np.ones((num_genes, 3)), top_k=5)
    assert (links.shape, links.nnz) == ((num_genes, num_genes), 0)


def test_a_distance_needs_enough_cells_in_both_groups() -> None:
    vectors = np.array([[[1.0, 0], [1, 0]], [[0, 1.0], [1, 0]], [[-1.0, 0], [1, 0]]])
    counts = np.array([[9, 9], [9, 9], [9, 2]])
    found = role_distances(vectors, counts, min_cells=3)
    np.testing.assert_allclose(found[0], [[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_array_equal(np.isnan(found[1]), [[False, False, True], [False, False, True], [True] * 3])


def test_genes_are_ranked_by_the_distance_beyond_the_noise_of_the_means() -> None:
    distance = np.array([[[0, 1.0], [1.0, 0]], [[0, 0.8], [0.8, 0]], [[0, np.nan], [np.nan, 0]]])
    noise = np.array([[1.6, 0.2, 0.0], [0.8, 0.2, 0.0]])
    genes = pd.DataFrame({"gene": ["g0", "g1", "g2"]})
    table = role_table(distance, noise, genes=genes, groups=["A", "B"])
    assert table["gene"].tolist() == ["g1", "g0"]
    np.testing.assert_allclose(table["mean_noise"], [0.1, 0.6])
    np.testing.assert_allclose(table["excess"], [0.7, 0.4])
    assert table["furthest_groups"].tolist() == ["A | B", "A | B"]


def test_the_noise_to_expect_between_groups_is_a_quarter_of_the_sum_of_split_half_distances() -> None:
    rng, num_cells, num_genes = np.random.default_rng(0), 200, 300
    halves = 5 + rng.normal(size=(2, 2, num_genes, num_cells // 2, 6)).mean(axis=3)  # two groups that do not differ
    unit = unit_rows(halves)
    noise_kg = 1 - (unit[:, 0] * unit[:, 1]).sum(axis=-1)
    distance = role_distances(halves.mean(axis=1), np.full((2, num_genes), num_cells), min_cells=1)
    table = role_table(distance, noise_kg, genes=pd.DataFrame({"gene": range(num_genes)}), groups=["A", "B"])
    assert table["mean_distance"].mean() == pytest.approx(table["mean_noise"].mean(), rel=0.15)


# -- the command line ---------------------------------------------------------------------------------------------


def test_the_command_writes_table_networks_and_roles(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    line = f"embed {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/genes.h5ad --device cpu"
    flags = "--groupby cell_type --network --min_similarity 0 --min_cells 2"
    assert main([*line.split(), *flags.split()]) == 0
    table = ad.read_h5ad(tmp_path / "genes.h5ad")
    np.testing.assert_allclose(table.X, gene_embeddings(cells, run, groupby="cell_type").X, atol=1e-5)
    graph = networkx.read_graphml(tmp_path / "genes.NK_cell.graphml")
    expected = gene_network(table, group="NK cell", min_similarity=0, min_cells=2)
    assert set(graph.edges) == set(expected.edges) and graph.nodes["G1"]["symbol"] == "G1"
    is_nk = (table.obs["group"] == "NK cell").to_numpy()
    links = table.obsp["perturbgene_network"]
    assert links[is_nk][:, is_nk].nnz == 2 * expected.number_of_edges() and links[is_nk][:, ~is_nk].nnz == 0
    roles = pd.read_csv(tmp_path / "genes.roles.csv")
    pd.testing.assert_frame_equal(roles, gene_roles(table, min_cells=2), check_dtype=False)
    assert table.uns["perturbgene"]["groupby"] == "cell_type"
    assert not list(tmp_path.glob(".*"))


def test_a_network_needs_no_groups(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    line = (
        f"embed {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/genes.h5ad --device cpu --network"
    )
    assert main(line.split()) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.h5ad", "run", "genes.h5ad", "genes.graphml"}
