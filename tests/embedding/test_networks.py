"""Similarities on a few hand-made vectors: neighbours, graphs and the ranking of roles."""

import numpy as np
import pandas as pd
import pytest

from perturbgene.embedding import networks
from perturbgene.embedding.networks import centred, link_graph, nearest_genes, role_distances, role_table, unit_rows

FOUR = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])


def test_a_vector_without_length_stays_zero() -> None:
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_the_common_part_is_the_mean_over_tokens_and_genes_without_cells_do_not_count() -> None:
    found = centred(np.array([[1.0, 0], [5.0, 4.0], [np.nan, np.nan]]), np.array([3, 1, 0]))
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


def test_blocks_of_rows_do_not_change_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(23, 5))
    whole = nearest_genes(vectors, top_k=4).toarray()
    monkeypatch.setattr(networks, "BLOCK_ROWS", 6)
    np.testing.assert_allclose(nearest_genes(vectors, top_k=4).toarray(), whole, atol=1e-7)


@pytest.mark.parametrize("num_genes", [0, 1])
def test_too_few_genes_have_no_links(num_genes: int) -> None:
    links = nearest_genes(np.ones((num_genes, 3)), top_k=5)
    assert (links.shape, links.nnz) == ((num_genes, num_genes), 0)


def test_a_graph_names_its_genes_and_weighs_its_links() -> None:
    graph = link_graph(nearest_genes(FOUR, top_k=1), names=list("abcd"), nodes={"n_cells": np.array([5, 6, 7, 8])})
    assert graph.nodes["b"] == {"n_cells": 6}
    assert sorted(graph.edges) == [("a", "b"), ("c", "d")]
    assert graph.edges["a", "b"]["weight"] == pytest.approx(0.995037)


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
