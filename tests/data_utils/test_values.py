"""Odd files of the same cells give the same tokens: other scales, features, names, and files that were cut."""

import logging
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.sources import H5adFile, MemoryFile
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.data_utils.values import CellValues
from perturbgene.errors import InputError
from tests.data_utils.test_recognition import CP10K_NG, FORMS, NUM_CELLS, NUM_GENES, SIZE_N1

NAMES = [f"GENE{g}" for g in range(NUM_GENES)]
COUNTS_NG = FORMS["counts"][0]
EDGES = [0.0001, 2.1012, 3.3017, 4.0531, 5.2019]


def adata_of(values_ng: np.ndarray, names: list[str] = NAMES, **obs: Any) -> ad.AnnData:
    """Return cells in CSR and float32, as files have them."""
    table = pd.DataFrame(obs, index=[f"cell{n}" for n in range(len(values_ng))])
    matrix = sparse.csr_matrix(values_ng.astype(np.float32))
    return ad.AnnData(matrix, obs=table, var=pd.DataFrame(index=pd.Index(names, dtype=str)))


@pytest.fixture
def tokenizer() -> GeneTokenizer:
    return GeneTokenizer(genes=NAMES[::-1], phenotypes={}, bin_edges=EDGES)


def tokens(tokenizer: GeneTokenizer, adata: ad.AnnData, **options: Any) -> list[list[int]]:
    """Return input ids and token types of every cell, as every verb reads them."""
    blocks = IterableAnnDataset(adata, tokenizer, min_gene_coverage=0.0, **options).blocks()
    return [np.concatenate(block.cell(n)).tolist() for block in blocks for n in range(len(block))]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "counts minus 0.1"])
def test_every_scale_gives_the_tokens_of_the_counts(tokenizer: GeneTokenizer, form: str) -> None:
    # Values are within 3e-6 of those of the counts (test_recognition), and none is so near an edge.
    logs_l = CP10K_NG[COUNTS_NG > 0]
    assert np.abs(logs_l[:, None] / EDGES - 1).min() > 1e-5
    # A file of few genes leaves open what the factors of its cells were; a whole transcriptome does not.
    silent = np.zeros((NUM_CELLS, 10_000))
    names = NAMES + [f"SILENT{g}" for g in range(10_000)]
    odd = adata_of(np.hstack([FORMS[form][0], silent]), names)
    assert tokens(tokenizer, odd) == tokens(tokenizer, adata_of(COUNTS_NG))


@pytest.mark.parametrize("form", ["log1p CP10k", "log1p CPM", "log1p of the median", "log2 CPM", "CPM"])
def test_values_that_were_cut_after_normalizing_keep_the_tokens_of_the_whole_cells(form: str) -> None:
    tokenizer = GeneTokenizer(genes=NAMES[::3], phenotypes={}, bin_edges=EDGES)
    cut = adata_of(FORMS[form][0][:, ::3], NAMES[::3])
    assert tokens(tokenizer, cut) == tokens(tokenizer, adata_of(COUNTS_NG))


def test_counts_that_were_cut_take_their_library_size_from_obs(
    tokenizer: GeneTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = GeneTokenizer(genes=NAMES[::3], phenotypes={}, bin_edges=EDGES)
    cut = adata_of(COUNTS_NG[:, ::3], NAMES[::3], nCount_RNA=SIZE_N1[:, 0])
    assert tokens(tokenizer, cut) == tokens(tokenizer, adata_of(COUNTS_NG))
    assert r"AnnData: it was cut to 100 genes: library sizes are those of obs['nCount_RNA']" in caplog.text


@pytest.mark.parametrize(
    "totals_n",
    [
        pytest.param(SIZE_N1[:, 0] * 0.5, id="smaller than the sums"),
        pytest.param(np.full(NUM_CELLS, np.nan), id="missing"),
        pytest.param(np.array(["many"] * NUM_CELLS), id="text"),
    ],
)
def test_totals_that_cannot_be_library_sizes_are_left_alone(
    tokenizer: GeneTokenizer, totals_n: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    assert tokens(tokenizer, adata_of(COUNTS_NG, total_counts=totals_n)) == tokens(tokenizer, adata_of(COUNTS_NG))
    assert "it has few genes (300), and library sizes are sums over them" in caplog.text


def test_totals_of_a_whole_transcriptome_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    whole = adata_of(np.hstack([COUNTS_NG, np.zeros((NUM_CELLS, 10_000))]), [f"G{g}" for g in range(10_300)])
    whole.obs["total_counts"] = 2 * SIZE_N1[:, 0]  # before ambient RNA was taken away, for instance
    assert CellValues(MemoryFile(whole)).notes == []


@pytest.mark.parametrize("kind", ["Peaks", "Antibody Capture", "CRISPR Guide Capture"])
def test_columns_that_are_not_gene_expression_change_no_token(
    tokenizer: GeneTokenizer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    others = np.random.default_rng(1).poisson(50.0, (NUM_CELLS, 2)) - 1.5  # as transformed antibodies may be
    multiome = adata_of(np.hstack([COUNTS_NG, others]), [*NAMES, "GENE7", "chr1:1-500"])
    multiome.var["feature_types"] = ["GENE EXPRESSION"] * NUM_GENES + [kind] * 2
    assert tokens(tokenizer, multiome) == tokens(tokenizer, adata_of(COUNTS_NG))
    assert f"2 columns whose var['feature_types'] is not gene expression ('2 {kind}') are left out" in caplog.text


def test_a_file_without_gene_expression_is_refused(tokenizer: GeneTokenizer) -> None:
    peaks = adata_of(COUNTS_NG)
    peaks.var["feature_types"] = "Peaks"
    with pytest.raises(InputError, match="AnnData has no genes: 300 columns whose .* is not gene expression"):
        tokens(tokenizer, peaks)


def test_other_words_for_genes_leave_no_column_out(tokenizer: GeneTokenizer) -> None:
    adata = adata_of(COUNTS_NG)
    adata.var["feature_type"] = ["protein_coding", "lncRNA"] * (NUM_GENES // 2)
    assert tokens(tokenizer, adata) == tokens(tokenizer, adata_of(COUNTS_NG))


@pytest.mark.parametrize("prefix", ["GRCh38_", "hg38_", "GRCh38______", "hg19_", "GRCh38-2020-A_"])
def test_a_genome_in_front_of_names_changes_no_token(
    tokenizer: GeneTokenizer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    odd = adata_of(COUNTS_NG, [prefix + name for name in NAMES])
    assert tokens(tokenizer, odd) == tokens(tokenizer, adata_of(COUNTS_NG))
    assert "300 of 300 panel genes found (100.0%), 300 without the genome in front of their name" in caplog.text


@pytest.mark.parametrize("copy", ["GENE7-1", "GENE7.1"])
@pytest.mark.parametrize("form", ["counts", "log1p CP10k", "log1p CPM"])
def test_columns_that_were_made_unique_are_summed_whatever_the_scale(
    tokenizer: GeneTokenizer, copy: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    half_ng = np.floor(COUNTS_NG[:, 7] / 2)
    counts_ng = np.hstack([COUNTS_NG, half_ng[:, None]])
    counts_ng[:, 7] -= half_ng
    values_ng = {
        "counts": counts_ng,
        "log1p CP10k": np.log1p(counts_ng / SIZE_N1 * 1e4),
        "log1p CPM": np.log1p(counts_ng / SIZE_N1 * 1e6),
    }[form]
    assert tokens(tokenizer, adata_of(values_ng, [*NAMES, copy])) == tokens(tokenizer, adata_of(COUNTS_NG))
    assert "1 without a number that made their name unique, 1 summed from several columns ('GENE7')" in caplog.text


def test_a_matrix_that_is_refused_names_those_that_are_known(tokenizer: GeneTokenizer, tmp_path: Path) -> None:
    adata = adata_of(COUNTS_NG - COUNTS_NG.mean(axis=0))
    adata.layers["counts"] = sparse.csr_matrix(COUNTS_NG)
    adata.raw = adata_of(CP10K_NG)
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    for source in (MemoryFile(adata), H5adFile(str(tmp_path / "scaled.h5ad"))):
        with pytest.raises(
            InputError, match=r"negative.*'--layer raw \(log1p of counts per 10,000\)', '--layer counts"
        ):
            _ = CellValues(source).scale


def test_a_file_whose_raw_matrix_has_more_of_the_panel_is_read_with_the_remedy(
    tokenizer: GeneTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    adata = adata_of(COUNTS_NG[:, :200], NAMES[:200])
    adata.raw = adata_of(COUNTS_NG)
    tokens(tokenizer, adata)
    assert "200 of 300 panel genes found (66.7%). .raw has 100.0% of the panel: give --layer raw." in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda a: a.T.copy(), r"Its obs_names are genes of the panel.*adata\.T", id="transposed"),
        pytest.param(
            lambda a: ad.AnnData(a.X, var=pd.DataFrame({"name": NAMES}, index=[f"x{g}" for g in range(NUM_GENES)])),
            r"var\['name'\] names 100.0% of the panel: give --gene_id_column name", id="names in another column",
        ),
        pytest.param(
            lambda a: adata_of(COUNTS_NG, [name.capitalize() for name in NAMES]),
            "300 more differ in upper and lower case only .* as mouse symbols", id="mouse symbols",
        ),
    ],
)  # fmt: skip
def test_a_file_without_the_panels_genes_is_refused_with_the_reason(
    tokenizer: GeneTokenizer, make: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"0 of 300 panel genes found.*{message}"):
        tokens(tokenizer, make(adata_of(COUNTS_NG)))


def test_ids_of_another_species_are_named() -> None:
    tokenizer = GeneTokenizer(genes=[f"ENSG{g:011d}" for g in range(300)], phenotypes={}, bin_edges=EDGES)
    with pytest.raises(InputError, match=r"another species \(ENSMUSG\) than the panel's \(ENSG\): give orthologs"):
        tokens(tokenizer, adata_of(COUNTS_NG, [f"ENSMUSG{g:011d}" for g in range(300)]))


@pytest.mark.parametrize("name", ["ENSG00000000007_GENE7", "GENE7_ENSG00000000007.3", "ENSG00000000007.2|GENE7"])
def test_an_id_within_a_name_is_found(name: str) -> None:
    tokenizer = GeneTokenizer(genes=[f"ENSG{g:011d}" for g in range(300)], phenotypes={}, bin_edges=EDGES)
    assert tokenizer.panel.align([name]).gene_of_column_c.tolist() == [7]


def test_normalization_on_a_verb_overrides_what_is_recognized(tokenizer: GeneTokenizer) -> None:
    soup = adata_of(np.minimum(COUNTS_NG, 2) * np.random.default_rng(3).uniform(0.7, 1.0, COUNTS_NG.shape))
    with pytest.raises(InputError, match="scale is not known"):
        tokens(tokenizer, soup)
    by_hand = adata_of(np.log1p(soup.X.toarray() / soup.X.sum(axis=1).A1[:, None] * 1e4))
    expected = tokens(tokenizer, by_hand, normalization="none")
    assert tokens(tokenizer, soup, normalization="log1p_cp10k") == expected


def test_logarithms_that_are_taken_for_counts_on_request_are_named() -> None:
    notes = CellValues(MemoryFile(adata_of(FORMS["log1p CPM"][0])), normalization="log1p_cp10k").notes
    assert "X looks like log1p of counts per 1,000,000, but is taken for counts" in notes[0]
    assert not any("looks like" in note for note in CellValues(MemoryFile(adata_of(COUNTS_NG)), "log1p_cp10k").notes)
