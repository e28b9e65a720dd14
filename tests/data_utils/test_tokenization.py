"""The token contract, row by row: every expected row here is written by hand, on three to nine genes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbgene.data_utils.labels import token_text
from perturbgene.data_utils.sources import H5adFile, MemoryFile
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError

Make = Callable[..., Any]

CELL = [[0.7, 0.0, 2.5, 1.2]]
LABELS = {"sex": ["male"], "cell_type": ["B cell"]}


def rows(cells: Any) -> list[tuple[list[int], list[int]]]:
    """Spell tokenised cells as (input ids, token types)."""
    cells = [cells] if isinstance(cells, dict) else cells
    return [(cell["input_ids"].tolist(), cell["token_type_ids"].tolist()) for cell in cells]


def rows_of_file(tokenizer: GeneTokenizer, path: str, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Tokenise a whole file."""
    shard = tokenizer.open(H5adFile(path), **options)
    block = tokenizer.tokenize_block(shard.read(np.arange(len(shard))))
    return [(ids.tolist(), types.tolist()) for ids, types in map(block.cell, range(len(block)))]


# -- layout --------------------------------------------------------------------------------------------------------


def test_a_cell_is_cls_phenotypes_in_the_given_order_genes_by_panel_and_eos(
    four_gene_tokenizer: GeneTokenizer, make_adata: Make
) -> None:
    assert rows(four_gene_tokenizer(make_adata(CELL, obs=LABELS))) == [([0, 7, 4, 9, 11, 10, 1], [0, 2, 1, 3, 5, 6, 0])]


def test_sizes_count_every_id_and_type(four_gene_tokenizer: GeneTokenizer) -> None:
    tokenizer = four_gene_tokenizer
    assert (tokenizer.vocab_size, tokenizer.type_vocab_size, len(tokenizer)) == (12, 7, 12)
    assert (tokenizer.first_bin_id, tokenizer.first_gene_type) == (8, 3)
    assert tokenizer.phenotype_id_ranges == [[4, 6], [6, 8]]


def test_one_cell_is_a_dict_of_long_vectors_with_all_attention(
    four_gene_tokenizer: GeneTokenizer, make_adata: Make
) -> None:
    cell = four_gene_tokenizer(make_adata(CELL, obs=LABELS))
    assert isinstance(cell, dict)
    assert [*cell] == ["input_ids", "token_type_ids", "attention_mask"]
    assert all(tensor.dtype == torch.long and tensor.shape == (7,) for tensor in cell.values())
    assert cell["attention_mask"].tolist() == [1] * 7


def test_many_cells_are_a_list(four_gene_tokenizer: GeneTokenizer, make_adata: Make) -> None:
    cells = four_gene_tokenizer(make_adata([*CELL, [0, 0, 0, 0.5]]))
    assert rows(cells) == [([0, 9, 11, 10, 1], [0, 3, 5, 6, 0]), ([0, 9, 1], [0, 6, 0])]


def test_no_cell_is_an_empty_list(four_gene_tokenizer: GeneTokenizer, make_adata: Make) -> None:
    assert four_gene_tokenizer(make_adata(CELL)[:0]) == []


def test_a_value_on_an_edge_joins_the_upper_bin(four_gene_tokenizer: GeneTokenizer, make_adata: Make) -> None:
    cells = four_gene_tokenizer(make_adata([[0.499, 0.5, 1.0, 2.0]]))
    assert rows(cells) == [([0, 9, 10, 11, 1], [0, 4, 5, 6, 0])]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_on_an_edge_that_float32_cannot_hold_joins_the_upper_bin(
    make_tokenizer: Make, make_adata: Make, dtype: type
) -> None:
    tokenizer = make_tokenizer(bin_edges=[0.7, 0.9])
    cells = tokenizer(make_adata(np.array([[0.7, 0.9, 0.69, 0.89]], dtype=dtype)))
    assert rows(cells) == [([0, 9, 10, 9, 1], [0, 3, 4, 6, 0])]


PER_GENE = {"LYZ": [0.1, 0.2], "CD3E": [1.0, 2.0], "MS4A1": [0.5, 3.0], "NKG7": [2.6, 9.0]}


def test_each_gene_may_have_its_own_edges(make_tokenizer: Make, make_adata: Make) -> None:
    cells = make_tokenizer(bin_edges=PER_GENE)(make_adata([[1.0, 3.0, 2.5, 0.15]]))
    assert rows(cells) == [([0, 9, 10, 9, 1], [0, 3, 4, 6, 0])]


def test_edges_of_a_gene_are_found_without_its_version(make_tokenizer: Make) -> None:
    ids = ["ENSG00000198851", "ENSG00000156738"]
    tokenizer = make_tokenizer(genes=ids, bin_edges={f"{ids[1]}.3": [2.0], f"{ids[0]}.7": [1.0]})
    assert tokenizer.bin_edges.edges_ge.tolist() == [[1.0], [2.0]]


def test_edges_of_two_versions_of_a_gene_are_refused(make_tokenizer: Make) -> None:
    ids = ["ENSG00000198851.1", "ENSG00000198851.2"]
    with pytest.raises(InputError, match="ENSG00000198851.* more than once"):
        make_tokenizer(genes=ids[:1], bin_edges={ids[0]: [2.0], ids[1]: [1.0]})


def test_the_same_label_in_two_categories_is_two_ids(make_tokenizer: Make, make_adata: Make) -> None:
    tokenizer = make_tokenizer(phenotypes={"sex": ["unknown", "male"], "cell_type": ["unknown"]})
    cells = tokenizer(make_adata(CELL, obs={"sex": ["unknown"], "cell_type": ["unknown"]}))
    assert rows(cells) == [([0, 5, 4, 8, 10, 9, 1], [0, 2, 1, 3, 5, 6, 0])]


# -- genes by name -------------------------------------------------------------------------------------------------


def test_permuted_and_extra_columns_give_the_same_tokens(pbmc: ad.AnnData) -> None:
    genes = pbmc.var_names[:300].tolist()
    tokenizer = GeneTokenizer(genes=genes, phenotypes={}, bin_edges=[0.5, 1.5, 2.5])
    order = np.random.default_rng(0).permutation(pbmc.n_vars)
    plain = rows(tokenizer(pbmc[:, genes]))
    assert rows(tokenizer(pbmc)) == plain
    assert rows(tokenizer(pbmc[:, order])) == plain


def test_missing_columns_leave_the_tokens_of_the_others_as_they_are(make_tokenizer: Make, make_adata: Make) -> None:
    adata = make_adata(CELL, obs=LABELS)
    assert rows(make_tokenizer()(adata[:, ["LYZ", "CD3E"]])) == [([0, 7, 4, 9, 10, 1], [0, 2, 1, 3, 6, 0])]


def test_counts_with_their_stored_total_do_not_depend_on_the_columns_left(
    make_tokenizer: Make, make_adata: Make
) -> None:
    tokenizer = make_tokenizer(normalization="auto", bin_edges=[6.0, 7.0, 8.0])
    adata = make_adata([[50, 0, 100, 250]], obs={"perturbgene_library_size": [1000.0]})
    whole, part = rows(tokenizer(adata))[0], rows(tokenizer(adata[:, ["LYZ", "CD3E"]]))[0]
    assert whole == ([0, 9, 9, 10, 1], [0, 3, 5, 6, 0])
    assert part == ([0, 9, 10, 1], [0, 3, 6, 0])


def test_missing_genes_are_said(four_gene_tokenizer: GeneTokenizer, make_adata: Make, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        four_gene_tokenizer(make_adata([[1.0, 2.0]], genes=["LYZ", "other"]))
    assert "1 of 4 panel genes found (25.0%), 1 columns not in the panel" in caplog.text


def test_cells_without_any_gene_of_the_panel_are_refused(four_gene_tokenizer: GeneTokenizer, make_adata: Make) -> None:
    with pytest.raises(InputError, match="0 of 4 panel genes found"):
        four_gene_tokenizer(make_adata([[1.0, 2.0]], genes=["a", "b"]))


@pytest.mark.parametrize(
    ("genes", "var"),
    [
        pytest.param(["ENSG00000090382.7", "ENSG00000198851.3"], {}, id="Ensembl versions"),
        pytest.param(["LYZ", "CD3E"], {}, id="symbols of the panel"),
        pytest.param(["x", "y"], {"feature_name": ["LYZ", "CD3E"]}, id="feature_name of the file"),
        pytest.param(["x", "y"], {"gene_ids": ["ENSG00000090382", "ENSG00000198851"]}, id="gene_ids of the file"),
    ],
)
def test_genes_are_found_by_any_of_their_names(make_tokenizer: Make, make_adata: Make, genes: Any, var: Any) -> None:
    panel = {"genes": ["ENSG00000198851", "ENSG00000090382"], "gene_symbols": ["CD3E", "LYZ"]}
    cells = make_tokenizer(**panel)(make_adata([[0.7, 2.5]], genes=genes, var=var))
    assert rows(cells) == [([0, 11, 9, 1], [0, 3, 4, 0])]


# -- duplicate columns ---------------------------------------------------------------------------------------------

TWICE = ["CD3E", "LYZ", "CD3E", "extra"]


def counting_tokenizer(make_tokenizer: Make, **changes: Any) -> GeneTokenizer:
    return make_tokenizer(normalization="log1p_cp10k", bin_edges=[7.0, 8.0], **changes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_columns_of_one_gene_are_summed_for_counts(make_tokenizer: Make, make_adata: Make, dtype: type) -> None:
    """(100 + 100) of 400 is log1p(5000) = 8.5; 100 of 400 would be 7.8."""
    adata = make_adata(np.array([[100, 100, 100, 100]], dtype=dtype), genes=TWICE)
    assert rows(counting_tokenizer(make_tokenizer)(adata)) == [([0, 10, 9, 1], [0, 3, 6, 0])]


def test_a_sum_beyond_a_byte_does_not_wrap(make_tokenizer: Make, make_adata: Make) -> None:
    adata = make_adata(np.array([[200, 200, 200, 200]], dtype=np.uint8), genes=TWICE)
    assert rows(counting_tokenizer(make_tokenizer)(adata)) == [([0, 10, 9, 1], [0, 3, 6, 0])]


def test_genes_that_the_file_lacks_stay_unmeasured_beside_summed_columns(
    make_tokenizer: Make, make_adata: Make
) -> None:
    tokenizer = counting_tokenizer(make_tokenizer)
    block = tokenizer.tokenize_block(
        tokenizer.open(MemoryFile(make_adata([[1, 1, 1, 1]], genes=TWICE))).read(np.arange(1))
    )
    measured_tg, table_n = block.tables(4)
    assert measured_tg[table_n[0]].tolist() == [True, False, False, True]


@pytest.mark.parametrize("column", [-1, 4], ids=["negative", "beyond the last"])
def test_a_column_index_outside_a_matrix_with_summed_columns_is_refused(
    make_tokenizer: Make, make_adata: Make, column: int
) -> None:
    adata = make_adata([[1, 1, 1, 1]], genes=TWICE)
    adata.X.indices[1] = column
    with pytest.raises(InputError, match="column index outside the matrix"):
        counting_tokenizer(make_tokenizer)(adata)


def test_columns_of_one_gene_are_refused_for_log_values(make_tokenizer: Make, make_adata: Make) -> None:
    with pytest.raises(InputError, match=r"same gene \('CD3E'\) .*cannot be summed"):
        make_tokenizer(normalization="auto")(make_adata([[0.5, 1.2, 0.3, 0.1]], genes=TWICE))


# -- truncation ----------------------------------------------------------------------------------------------------

LONG = [[0.7, 0.6, 2.5, 1.2]]


def test_a_long_cell_keeps_the_first_genes_of_the_panel_and_eos(make_tokenizer: Make, make_adata: Make) -> None:
    tokenizer = make_tokenizer(max_length=4, included_phenotypes=())
    assert rows(tokenizer(make_adata(LONG))) == [([0, 9, 9, 1], [0, 3, 4, 0])]
    reordered = make_adata([LONG[0][::-1]], genes=["LYZ", "NKG7", "MS4A1", "CD3E"])
    assert rows(tokenizer(reordered)) == [([0, 9, 9, 1], [0, 3, 4, 0])]


def test_an_absent_phenotype_leaves_its_place_to_a_gene(make_tokenizer: Make, make_adata: Make) -> None:
    tokenizer = make_tokenizer(max_length=5)
    full = rows(tokenizer(make_adata(LONG, obs=LABELS)))[0]
    absent = rows(tokenizer(make_adata(LONG, obs={"sex": [None], "cell_type": ["B cell"]})))[0]
    assert full == ([0, 7, 4, 9, 1], [0, 2, 1, 3, 0])
    assert absent == ([0, 4, 9, 9, 1], [0, 1, 3, 4, 0])


def test_a_cell_of_exactly_max_length_is_whole(make_tokenizer: Make, make_adata: Make) -> None:
    assert len(rows(make_tokenizer(max_length=6, included_phenotypes=())(make_adata(LONG)))[0][0]) == 6


@pytest.mark.parametrize(("max_length", "phenotypes", "least"), [(4, ("sex", "cell_type"), 5), (2, (), 3)])
def test_a_max_length_without_room_for_a_gene_is_refused(
    make_tokenizer: Make, max_length: int, phenotypes: tuple[str, ...], least: int
) -> None:
    with pytest.raises(InputError, match=f"max_length {max_length} leaves no room.* at least {least}"):
        make_tokenizer(max_length=max_length, included_phenotypes=phenotypes)


# -- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, "", "nan", "NA", "unknown", "something else"])
def test_a_label_that_is_missing_or_unknown_leaves_the_sequence(
    four_gene_tokenizer: GeneTokenizer, make_adata: Make, label: Any
) -> None:
    adata = make_adata(CELL, obs={"sex": pd.Series([label], dtype=object).to_numpy(), "cell_type": ["B cell"]})
    assert rows(four_gene_tokenizer(adata)) == [([0, 4, 9, 11, 10, 1], [0, 1, 3, 5, 6, 0])]


# -- one matrix, many forms ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pbmc_rows(pbmc_cells: ad.AnnData) -> tuple[GeneTokenizer, list[tuple[list[int], list[int]]]]:
    cells = pbmc_cells[:60].copy()
    labels = cells.obs["cell_type"].cat.categories.tolist()
    tokenizer = GeneTokenizer(
        genes=cells.var_names, phenotypes={"cell_type": labels}, bin_edges=[0.5, 1.5, 2.5],
        included_phenotypes=["cell_type"], max_length=64,
    )  # fmt: skip
    return tokenizer, rows(tokenizer(cells))


@pytest.mark.parametrize("where", ["memory", "file", "backed"])
@pytest.mark.parametrize(
    "kind", [sparse.csr_matrix, sparse.csc_matrix, lambda matrix: matrix.toarray()], ids=["csr", "csc", "dense"]
)
def test_real_cells_have_the_same_tokens_however_they_are_stored(
    pbmc: ad.AnnData, pbmc_rows: Any, write_h5ad: Make, where: str, kind: Any
) -> None:
    tokenizer, expected = pbmc_rows
    pbmc.X = kind(pbmc.X)
    if where == "memory":
        assert rows(tokenizer(pbmc)) == expected
    elif where == "file":
        assert rows_of_file(tokenizer, write_h5ad(pbmc)) == expected
    else:
        assert rows(tokenizer(ad.read_h5ad(write_h5ad(pbmc), backed="r"))) == expected


def test_a_batch_is_its_cells_one_at_a_time(pbmc: ad.AnnData, pbmc_rows: Any) -> None:
    tokenizer, expected = pbmc_rows
    assert [rows(tokenizer(pbmc[[row]]))[0] for row in range(12)] == expected[:12]


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "uint64", "float32", "float64", ">f4", ">i4"]
)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_counts_of_any_dtype_have_the_same_tokens(
    make_tokenizer: Make, make_adata: Make, write_h5ad: Make, where: str, dtype: str
) -> None:
    tokenizer = make_tokenizer(normalization="auto", bin_edges=[1.0, 8.0, 8.5])
    adata = make_adata([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    adata.X = np.asarray(adata.X.toarray(), dtype=dtype)
    got = rows(tokenizer(adata)) if where == "memory" else rows_of_file(tokenizer, write_h5ad(adata))
    assert got == [([0, 11, 11, 1], [0, 3, 5, 0]), ([0, 1], [0, 0]), ([0, 10, 10, 10, 1], [0, 3, 4, 5, 0])]


def test_half_precision_log_values_are_read(make_tokenizer: Make, make_adata: Make, write_h5ad: Make) -> None:
    adata = make_adata(CELL)
    adata.X = np.array(CELL, dtype=np.float16)
    assert rows_of_file(make_tokenizer(normalization="auto"), write_h5ad(adata)) == [
        ([0, 9, 11, 10, 1], [0, 3, 5, 6, 0])
    ]


def test_unsorted_indices_give_the_same_tokens(pbmc: ad.AnnData, pbmc_rows: Any) -> None:
    tokenizer, expected = pbmc_rows
    matrix = pbmc.X
    for row in range(matrix.shape[0]):
        span = slice(matrix.indptr[row], matrix.indptr[row + 1])
        matrix.indices[span], matrix.data[span] = matrix.indices[span][::-1].copy(), matrix.data[span][::-1].copy()
    matrix.has_sorted_indices = False
    assert rows(tokenizer(pbmc)) == expected


@pytest.mark.parametrize("normalization", ["none", "log1p_cp10k"])
def test_explicit_zeros_are_absent(make_tokenizer: Make, make_adata: Make, normalization: str) -> None:
    stored = sparse.csr_matrix((np.array([0.0, 5.0, 0.0, 0.0]), [0, 1, 2, 0], [0, 3, 4]), shape=(2, 4))
    tokenizer = make_tokenizer(normalization=normalization)
    assert rows(tokenizer(make_adata(stored))) == [([0, 11, 1], [0, 4, 0]), ([0, 1], [0, 0])]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_counts_have_the_tokens_of_their_own_log1p_cp10k(dtype: type) -> None:
    counts_ng = np.random.default_rng(0).negative_binomial(1, 0.2, size=(80, 30))
    counts = ad.AnnData(sparse.csr_matrix(counts_ng.astype(dtype)))
    logs = ad.AnnData(sparse.csr_matrix(counts_ng.astype(np.float32)))
    scanpy.pp.normalize_total(logs, target_sum=1e4)
    scanpy.pp.log1p(logs)
    tokenizer = GeneTokenizer(genes=counts.var_names, phenotypes={}, bin_edges=[4.5, 5.1, 6.3], max_length=20)
    assert rows(tokenizer(counts)) == rows(tokenizer(logs))


# -- bad values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-0.3, "negative")],
    ids=["NaN", "infinite", "negative"],
)
@pytest.mark.parametrize("column", [0, 4], ids=["in a panel gene", "in another column"])
def test_a_bad_value_is_refused_with_the_matrix_named(
    make_tokenizer: Make, make_adata: Make, value: float, message: str, column: int
) -> None:
    values = np.array([[0.7, 0.1, 2.5, 1.2, 0.2]])
    values[0, column] = value
    adata = make_adata(values, genes=["CD3E", "MS4A1", "NKG7", "LYZ", "other"])
    with pytest.raises(InputError, match=rf"AnnData \(X\) holds .*{message}"):
        make_tokenizer(normalization="auto")(adata)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN"), (np.inf, "an infinite value"), (-0.3, "a negative value")]
)
def test_a_bad_value_beyond_the_sample_is_refused_with_its_cell(
    make_tokenizer: Make, write_h5ad: Make, value: float, message: str
) -> None:
    values = np.tile(np.array(CELL), (2_000, 1))
    values[1_850, 2] = value
    with pytest.raises(InputError, match=f"cell 1850 has {message} in column 2"):
        rows_of_file(make_tokenizer(normalization="none"), write_h5ad(values))


@pytest.mark.parametrize("column", [-1, 4, 999], ids=["negative", "one beyond the last", "far beyond"])
def test_a_column_index_outside_the_matrix_is_refused(
    four_gene_tokenizer: GeneTokenizer, write_h5ad: Make, column: int
) -> None:
    path = write_h5ad([*CELL, *CELL])
    with h5py.File(path, "r+") as file:
        file["X/indices"][4] = column
    with pytest.raises(InputError, match=f"cell 1 has a column index outside the matrix in column {column}"):
        rows_of_file(four_gene_tokenizer, path)


def test_a_column_that_occurs_twice_in_a_cell_is_refused(four_gene_tokenizer: GeneTokenizer, write_h5ad: Make) -> None:
    path = write_h5ad([*CELL, *CELL])
    with h5py.File(path, "r+") as file:
        file["X/indices"][4] = 0
    with pytest.raises(InputError, match="cell 1 has a second value in column 0"):
        rows_of_file(four_gene_tokenizer, path)


def test_tokenising_leaves_the_cells_as_they_were(pbmc: ad.AnnData, pbmc_rows: Any) -> None:
    before = pbmc.copy()
    pbmc_rows[0](pbmc)
    assert (pbmc.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(pbmc.obs, before.obs)


# -- names, masks, text --------------------------------------------------------------------------------------------


def test_tokens_and_ids_lead_to_each_other(four_gene_tokenizer: GeneTokenizer) -> None:
    tokens = [
        "[CLS]",
        "[EOS]",
        "[MASK]",
        "[PAD]",
        "[B_cell]",
        "[T_cell]",
        "[female]",
        "[male]",
        "bin_0",
        "bin_1",
        "bin_2",
        "bin_3",
    ]
    assert four_gene_tokenizer.convert_ids_to_tokens([*range(12)]) == tokens
    assert four_gene_tokenizer.convert_tokens_to_ids(tokens) == [*range(12)]


def test_one_token_and_one_id_convert_alone(four_gene_tokenizer: GeneTokenizer) -> None:
    assert four_gene_tokenizer.convert_ids_to_tokens(5) == "[T_cell]"
    assert four_gene_tokenizer.convert_ids_to_tokens(np.int64(5)) == "[T_cell]"
    assert four_gene_tokenizer.convert_tokens_to_ids("T cell") == 5
    assert four_gene_tokenizer.convert_tokens_to_ids(("sex", "male")) == 7


@pytest.mark.parametrize("id_", [-1, -100, 12])
def test_an_id_outside_the_vocabulary_is_refused(four_gene_tokenizer: GeneTokenizer, id_: int) -> None:
    with pytest.raises(InputError, match=f"input id {id_} is outside the vocabulary of 12"):
        four_gene_tokenizer.convert_ids_to_tokens([id_])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("[NK_cell]", "is not in the vocabulary"),
        (("sex", "T cell"), "is not in the vocabulary"),
        (("tissue", "blood"), "'tissue' is not in the vocabulary. Choose one of"),
    ],
    ids=["unknown token", "label of another category", "unknown category"],
)
def test_an_unknown_token_is_refused(four_gene_tokenizer: GeneTokenizer, token: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        four_gene_tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    ("phenotypes", "token"),
    [
        pytest.param({"a": ["other"], "b": ["other"]}, "[other]", id="label of two categories"),
        pytest.param({"a": ["MASK"]}, "[MASK]", id="label named like a special token"),
        pytest.param({"a": ["bin_1"]}, "bin_1", id="label named like a bin"),
    ],
)
def test_an_ambiguous_token_is_refused(make_tokenizer: Make, phenotypes: Any, token: str) -> None:
    tokenizer = make_tokenizer(phenotypes=phenotypes, included_phenotypes=())
    with pytest.raises(InputError, match="has several meanings"):
        tokenizer.convert_tokens_to_ids(token)


def test_an_ambiguous_label_is_found_with_its_category(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(phenotypes={"a": ["MASK"], "b": ["MASK"]}, included_phenotypes=())
    assert tokenizer.convert_tokens_to_ids([("a", "MASK"), ("b", "[MASK]")]) == [4, 5]


# -- settings and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "log"}, "normalization 'log' is unknown"),
        ({"included_phenotypes": ("tissue",)}, "'tissue' is not in the vocabulary"),
        ({"included_phenotypes": ("sex", "sex")}, "repeat a name"),
    ],
    ids=["normalization", "unknown phenotype", "phenotype twice"],
)
def test_settings_that_mean_nothing_are_refused(make_tokenizer: Make, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tokenizer(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="shared edges"),
        pytest.param({"bin_edges": PER_GENE}, id="edges per gene"),
        pytest.param(
            {"gene_symbols": ["a", "", "c", "d"], "phenotypes": {}, "included_phenotypes": ()}, id="symbols only"
        ),
    ],
)
def test_a_saved_tokenizer_is_the_one_loaded(
    make_tokenizer: Make, make_adata: Make, tmp_path: Path, changes: Any
) -> None:
    tokenizer = make_tokenizer(**changes)
    tokenizer.save_pretrained(tmp_path)
    loaded = GeneTokenizer.from_pretrained(tmp_path)
    assert loaded == tokenizer
    assert loaded.fingerprint == tokenizer.fingerprint
    assert rows(loaded(make_adata(CELL, obs=LABELS))) == rows(tokenizer(make_adata(CELL, obs=LABELS)))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_saved_tokenizer_is_readable_text(four_gene_tokenizer: GeneTokenizer, tmp_path: Path) -> None:
    four_gene_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["format_version"] == 1
    assert content["phenotypes"] == {"cell_type": ["B cell", "T cell"], "sex": ["female", "male"]}
    assert content["genes"] == ["CD3E", "MS4A1", "NKG7", "LYZ"]


AWKWARD = [
    "αβ T cell",
    "[B]",
    '"quoted", with comma',
    "{brace}",
    "[[x]]",
    "[MASK]",
    "bin_1",
    "=1+1",
    "😀",
    "a/b\\c",
    "<i>",
]
LABEL = st.one_of(
    st.sampled_from(AWKWARD), st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=9)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(LABEL.filter(lambda text: token_text(text) != "[]"), min_size=1, max_size=6, unique_by=token_text))
def test_any_label_survives_saving_and_loading(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = GeneTokenizer(genes=["A"], phenotypes={"cell_type": labels}, bin_edges=[1.0])
    tokenizer.save_pretrained(folder)
    loaded = GeneTokenizer.from_pretrained(folder)
    ids = loaded.convert_tokens_to_ids([("cell_type", label) for label in labels])
    assert loaded == tokenizer
    assert ids == [*range(4, 4 + len(labels))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, but .* reads formats up to 1. Update perturbgene"),
        ({"colour": "red"}, "unknown keys: 'colour'"),
        ({"genes": None}, "lacks 'genes'"),
    ],
    ids=["a version of the future", "an unknown key", "a missing key"],
)
def test_a_tokenizer_file_of_another_form_is_refused(
    four_gene_tokenizer: GeneTokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = {**four_gene_tokenizer.to_dict(), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps({k: v for k, v in content.items() if k != "genes" or v}))
    with pytest.raises(InputError, match=message):
        GeneTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["no file", "broken JSON", "a list"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="Point to a run or corpus folder"):
        GeneTokenizer.from_pretrained(tmp_path)


def test_the_fingerprint_tells_meaning_and_not_layout(four_gene_tokenizer: GeneTokenizer, make_tokenizer: Make) -> None:
    assert make_tokenizer(max_length=6).fingerprint == four_gene_tokenizer.fingerprint
    assert make_tokenizer(bin_edges=[0.5, 1.0, 2.1]).fingerprint != four_gene_tokenizer.fingerprint


def test_other_settings_keep_the_ids(four_gene_tokenizer: GeneTokenizer) -> None:
    shorter = four_gene_tokenizer.with_settings(max_length=5, included=["cell_type"])
    assert (shorter.max_length, shorter.included_phenotypes) == (5, ("cell_type",))
    assert shorter.fingerprint == four_gene_tokenizer.fingerprint


def test_a_copy_that_reads_fewer_phenotypes_keeps_the_genes_of_a_long_cell(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(max_length=6)
    bare = tokenizer.reading([])
    assert (tokenizer.most_genes, bare.included_phenotypes, bare.max_length, bare.most_genes) == (2, (), 4, 2)
    whole = tokenizer.reading(["sex"], is_whole=True)
    assert (whole.max_length, whole.most_genes) == (7, len(tokenizer.panel))


def test_cutting_tokens_equals_tokenizing_with_less_room(make_tokenizer: Make, make_adata: Make) -> None:
    long, short = make_tokenizer(included_phenotypes=()), make_tokenizer(max_length=4, included_phenotypes=())
    shard = long.open(MemoryFile(make_adata([LONG[0], [0, 1, 0, 0], LONG[0]])))
    whole, cut = (one.tokenize_block(shard.read(np.arange(3))) for one in (long, short))
    found = whole.cut(4)
    assert [tokens.tolist() for tokens in (found.input_ids_l, found.token_type_ids_l, found.offsets_n1)] == [
        tokens.tolist() for tokens in (cut.input_ids_l, cut.token_type_ids_l, cut.offsets_n1)
    ]
    assert whole.cut(6) is whole


@pytest.mark.parametrize("truncation", ["variable", "random"])
def test_a_tokenizer_with_the_former_setting_of_truncation_loads_if_it_means_the_same(
    four_gene_tokenizer: GeneTokenizer, truncation: str
) -> None:
    content = {**four_gene_tokenizer.to_dict(), "truncation": truncation}
    if truncation == "variable":
        assert GeneTokenizer.from_dict(content, source="x") == four_gene_tokenizer
    else:
        with pytest.raises(InputError, match="unknown keys: 'truncation'"):
            GeneTokenizer.from_dict(content, source="x")
