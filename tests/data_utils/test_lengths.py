"""Lengths told from offsets alone: exact on prepared shards, scaled where columns lie outside the panel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from perturbgene.data_utils.lengths import gene_counts, genes_per_value, stored_values
from perturbgene.data_utils.opening import H5adFile
from perturbgene.data_utils.shards import ShardCache
from tests.nine_genes import GENES, a_tokenizer

# Cells of 3, 0 and 9 stored values; of the middle value of cell 0 no token is made (it lies below the first edge, 1).
VALUES = np.array([[2.0, 0.5, 2.0, 0, 0, 0, 0, 0, 0], [0] * 9, [2.0] * 9], dtype=np.float32)


def shard_of(source: Any, **settings: Any) -> tuple[Any, Any]:
    """Return the first shard of a path or AnnData, and a nine-gene tokenizer."""
    tokenizer = a_tokenizer(**settings)
    return ShardCache([source], **tokenizer.shard_options())[0], tokenizer


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_stored_values_are_counted_for_every_form_of_matrix(
    make_adata: Callable[..., ad.AnnData], tmp_path: Path, form: Callable[..., Any]
) -> None:
    adata = make_adata(VALUES, genes=GENES)
    adata.X = form(adata.X.toarray())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert stored_values(H5adFile(str(tmp_path / "cells.h5ad"))).tolist() == [3, 0, 9]


def test_counting_reads_no_value_of_a_csr_file(write_h5ad: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = H5adFile(write_h5ad(VALUES, genes=GENES))
    monkeypatch.setattr(H5adFile, "read_rows", lambda *_: pytest.fail("values were read"))
    assert stored_values(file).tolist() == [3, 0, 9]


def test_genes_are_the_stored_values_where_all_become_tokens(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES * 2, genes=GENES))
    assert gene_counts(shard, tokenizer).tolist() == [3, 0, 9]


def test_genes_are_no_more_than_max_length_has_room_for(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES * 2, genes=GENES), max_length=8)
    assert gene_counts(shard, tokenizer).tolist() == [3, 0, 4]  # [CLS], two phenotypes and [EOS] take four of 8


def test_columns_outside_the_panel_scale_all_cells_of_the_file_alike(make_adata: Callable[..., ad.AnnData]) -> None:
    adata = make_adata(np.full((40, 12), 2.0, dtype=np.float32), genes=[*GENES, "X1", "X2", "X3"])
    shard, tokenizer = shard_of(adata)
    assert genes_per_value(shard, tokenizer, np.full(40, 12)) == pytest.approx(9 / 12)
    assert gene_counts(shard, tokenizer).tolist() == [9] * 40


def test_values_below_the_first_edge_scale_too(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES, genes=GENES))
    assert genes_per_value(shard, tokenizer, np.array([3, 0, 9])) == pytest.approx(11 / 12)


def test_the_fewer_cells_a_batch_has_the_more_room_is_left_for_error(make_adata: Callable[..., ad.AnnData]) -> None:
    """Cells differ in their share of the panel, and a batch of two may hold two of those with the most."""
    shard, tokenizer = shard_of(make_adata(VALUES, genes=GENES))
    stored_n = np.array([3, 0, 9])
    shares = [genes_per_value(shard, tokenizer, stored_n, cells_per_batch=cells) for cells in (1000, 100, 30, 1)]
    assert 11 / 12 < shares[0] < shares[1] < shares[2] < shares[3] == 1


def test_an_empty_file_has_no_lengths(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(np.zeros((0, 9), dtype=np.float32), genes=GENES))
    assert gene_counts(shard, tokenizer).tolist() == []
