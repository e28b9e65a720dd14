"""A corpus means what its sources mean: the same tokens, genes, labels and donors; its audit says what is wrong."""

import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from torch.utils.data import DataLoader

from perturbgene.cli.verbs import PrepareConfig
from perturbgene.corpus.manifest import MANIFEST_FILE, Corpus
from perturbgene.corpus.prepare import prepare
from perturbgene.corpus.survey import CellTable, open_files, survey_file
from perturbgene.corpus.workers import Journal, Workers
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.shards import MEASURED_KEY, SOURCE_COLUMN
from perturbgene.data_utils.sources import H5adFile
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.data_utils.values import LIBRARY_SIZE_COLUMN
from perturbgene.errors import InputError
from perturbgene.main import main
from tests.forked import needs_fork, start

GENES = [f"G{i}" for i in range(8)]


def counts(num_cells: int, num_genes: int = 8, *, seed: int = 0) -> np.ndarray:
    """Draw counts in which every gene has its own level, shape (n, g)."""
    generator = np.random.default_rng(seed)
    return generator.poisson(generator.gamma(1.0, 3.0, (num_cells, num_genes)) * (1 + np.arange(num_genes)))


def cells(
    values_ng: np.ndarray,
    *,
    genes: Sequence[str] = GENES,
    donors: Sequence[str] = "abcde",
    prefix: str = "cell",
    **obs: Any,
) -> ad.AnnData:
    """Make cells with a label and a donor each, in turn."""
    num_cells = len(values_ng)
    columns = {
        "cell_type": np.resize(["B cell", "T cell", "NK cell"], num_cells),
        "donor_id": np.resize([*donors], num_cells),
    }
    frame = pd.DataFrame({**columns, **obs}, index=[f"{prefix}{i}" for i in range(num_cells)])
    matrix = sparse.csr_matrix(values_ng.astype(np.float32))
    return ad.AnnData(matrix, obs=frame, var=pd.DataFrame(index=list(genes)[: values_ng.shape[1]]))


def split(corpus: Path, name: str) -> ad.AnnData:
    """Read all shards of one split with anndata."""
    return ad.concat([ad.read_h5ad(path) for path in Corpus.open(corpus).paths(name)], merge="same")


def audit(corpus: Path) -> str:
    """Return the findings as one text."""
    return "\n".join(Corpus.open(corpus).manifest["audit"])


def log1p_cp10k(values_ng: np.ndarray) -> np.ndarray:
    """Normalise counts as every package does."""
    return np.log1p(values_ng / values_ng.sum(axis=1, keepdims=True) * 1e4)


def tokens_by_name(sources: Any, tokenizer: GeneTokenizer, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return ids and types of every cell, by its name."""
    stream = IterableAnnDataset(sources, tokenizer)
    return {names[c.index]: (c["input_ids"].tolist(), c["token_type_ids"].tolist()) for c in stream}


def corpus_tokens(corpus: Path) -> dict[str, tuple[Any, ...]]:
    """Return the tokens of all cells of both splits, by name."""
    tokenizer, found = GeneTokenizer.from_pretrained(corpus), {}
    for name in ("train", "eval"):
        found.update(tokens_by_name(Corpus.open(corpus).paths(name), tokenizer, split(corpus, name).obs_names))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 100 cells of five donors, in shards of 30."""
    folder = tmp_path_factory.mktemp("corpus") / "made"
    return prepare(cells(counts(100)), folder, phenotypes=["cell_type"], shard_size=30, num_bins=4)


# -- the cells inside scanpy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    """Log-normalised cells, scaled ones in X."""
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def pbmc_corpus(pbmc: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their corpus, split by cell."""
    folder = tmp_path_factory.mktemp("pbmc") / "corpus"
    return prepare(pbmc, folder, layer="raw", phenotypes=["cell_type=bulk_labels", "phase"], shard_size=300)


def test_the_panel_is_ranked_like_scanpys_highly_variable_genes_of_the_training_cells(
    pbmc: ad.AnnData, pbmc_corpus: Path
) -> None:
    train = pbmc.raw.to_adata()[split(pbmc_corpus, "train").obs_names].copy()
    train.X = train.X.astype(np.float64)
    frame = sc.pp.highly_variable_genes(train, flavor="seurat", inplace=False)
    dispersion_of = dict(zip(train.var_names, frame["dispersions_norm"].to_numpy(), strict=True))
    ours = [dispersion_of[gene] for gene in GeneTokenizer.from_pretrained(pbmc_corpus).genes]
    ranked = np.sort([value for value in dispersion_of.values() if np.isfinite(value)])[::-1]
    np.testing.assert_allclose(ours[: len(ranked)], ranked, atol=1e-4)


def test_quantile_bins_hold_about_equally_many_training_values(pbmc_corpus: Path) -> None:
    tokenizer = GeneTokenizer.from_pretrained(pbmc_corpus)
    ids = np.concatenate([cell["input_ids"].numpy() for cell in IterableAnnDataset(pbmc_corpus / "train", tokenizer)])
    per_bin = np.bincount(ids[ids >= tokenizer.first_bin_id] - tokenizer.first_bin_id, minlength=9)
    assert per_bin[0] == 0
    per_bin = np.append(per_bin[1:8], per_bin[8:].sum())  # bins of equal width cut the highest eighth
    assert np.abs(per_bin / per_bin.sum() - 1 / 8).max() < 0.02


def test_log_values_of_a_raw_layer_keep_their_tokens(pbmc: ad.AnnData, pbmc_corpus: Path) -> None:
    tokenizer = GeneTokenizer.from_pretrained(pbmc_corpus)
    source = pbmc.raw.to_adata()
    source.obs["cell_type"] = source.obs["bulk_labels"]
    assert corpus_tokens(pbmc_corpus) == tokens_by_name(source, tokenizer, source.obs_names)


def test_z_scored_values_are_refused_by_name(pbmc: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"AnnData \(X\) holds negative .* scaled or z-scored.*--layer raw"):
        prepare(pbmc, tmp_path / "corpus")


# -- splits -------------------------------------------------------------------------------------------------------


def test_donors_are_on_one_side_only_and_all_cells_on_one(corpus: Path) -> None:
    sides = [set(split(corpus, name).obs["donor_id"]) for name in ("train", "eval")]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set("abcde")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "donors",
    ["abcdefghij", "a" * 9 + "b", "a" * 6 + "bcde" * 2, "aaaabbbccd"],
    ids=["ten alike", "one of nine tenths", "one of three sevenths", "all different"],
)
def test_held_out_donors_hold_about_the_asked_share_of_the_cells(tmp_path: Path, donors: str, seed: int) -> None:
    made = prepare(cells(counts(140), donors=donors), tmp_path / "corpus", eval_fraction=0.2, seed=seed)
    assert 0.1 <= split(made, "eval").n_obs / 140 <= 0.3


def test_named_donors_are_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="perturbgene")
    made = prepare(cells(counts(50)), tmp_path / "corpus", eval_donors=["b", "d"])
    assert set(split(made, "eval").obs["donor_id"]) == {"b", "d"}
    assert Corpus.open(made).manifest["split"]["eval"] == ["b", "d"]
    said = "held out for evaluation: 2 of 5 values of obs['donor_id'] ('b', 'd'), 20 of 50 cells"
    assert said in caplog.messages


def test_unknown_donors_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"eval_donors 'z' are not in obs\['donor_id'\]. Known: 'a', 'b'"):
        prepare(cells(counts(50)), tmp_path / "corpus", eval_donors=["z"])


def test_holding_out_every_donor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_donors name every donor_id"):
        prepare(cells(counts(50)), tmp_path / "corpus", eval_donors=[*"abcde"])


def test_naming_donors_without_a_donor_column_is_refused(tmp_path: Path) -> None:
    adata = cells(counts(50))
    del adata.obs["donor_id"]
    with pytest.raises(InputError, match="eval_donors 'a' need a split by donor"):
        prepare(adata, tmp_path / "corpus", eval_donors=["a"])


def test_a_single_donor_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"obs\['donor_id'\] holds one value \('a'\), so nothing can be held out"):
        prepare(cells(counts(50), donors="a"), tmp_path / "corpus", split_by="donor_id")


def test_without_donors_cells_are_split_with_a_warning(tmp_path: Path) -> None:
    adata = cells(counts(50))
    del adata.obs["donor_id"]
    made = prepare(adata, tmp_path / "corpus", eval_fraction=0.3)
    assert (split(made, "train").n_obs, split(made, "eval").n_obs) == (35, 15)
    assert "the split is by cell: cells of one donor are on both sides" in audit(made)


def test_a_split_by_cell_depends_on_names_and_not_on_the_order_of_the_files(tmp_path: Path) -> None:
    parts = [cells(counts(30), prefix="x"), cells(counts(30, seed=1), prefix="y")]
    sides = [
        set(split(prepare(given, tmp_path / str(at), split_by="cell"), "eval").obs_names)
        for at, given in enumerate([parts, parts[::-1]])
    ]
    assert sides[0] == sides[1]


def test_another_seed_holds_out_other_cells(tmp_path: Path) -> None:
    sides = [
        set(split(prepare(cells(counts(60)), tmp_path / str(seed), split_by="cell", seed=seed), "eval").obs_names)
        for seed in (0, 1)
    ]
    assert sides[0] != sides[1]


def test_cells_without_a_donor_stay_together_and_are_reported(tmp_path: Path) -> None:
    adata = cells(counts(60), donors="abcdef")
    adata.obs["donor_id"] = adata.obs["donor_id"].replace("f", np.nan)
    made = prepare(adata, tmp_path / "corpus")
    sides = [split(made, name).obs["donor_id"].isna().sum() for name in ("train", "eval")]
    assert sorted(sides) == [0, 10]
    assert "10 cells have no donor_id: they stay together" in audit(made)


# -- shards -------------------------------------------------------------------------------------------------------


def test_shards_hold_every_cell_once_in_files_of_shard_size(corpus: Path) -> None:
    sizes = {
        name: [entry["cells"] for entry in Corpus.open(corpus).manifest["shards"][name]] for name in ("train", "eval")
    }
    assert sizes == {"train": [30, 30, 20], "eval": [20]}
    names = [*split(corpus, "train").obs_names, *split(corpus, "eval").obs_names]
    assert sorted(names) == sorted(f"cell{i}" for i in range(100))


def test_shards_are_shuffled(corpus: Path) -> None:
    names = split(corpus, "train").obs_names.tolist()
    assert names != sorted(names, key=lambda name: int(name[4:]))


def test_shards_open_with_scanpy_as_counts_in_panel_order(corpus: Path) -> None:
    shard = sc.read_h5ad(Corpus.open(corpus).paths("train")[0])
    assert shard.X.dtype.kind == "u"
    assert shard.var_names.tolist() == list(GeneTokenizer.from_pretrained(corpus).genes)
    assert shard.var["highly_variable_rank"].tolist() == list(range(8))
    sc.pp.normalize_total(shard)


def test_tokens_of_the_shards_are_those_of_the_source(corpus: Path) -> None:
    source = cells(counts(100))
    assert corpus_tokens(corpus) == tokens_by_name(source, GeneTokenizer.from_pretrained(corpus), source.obs_names)


def test_cutting_genes_keeps_the_library_size_and_so_the_tokens(tmp_path: Path) -> None:
    source = cells(counts(60))
    made = prepare(source, tmp_path / "corpus", num_top_genes=3, phenotypes=["cell_type"])
    tokenizer = GeneTokenizer.from_pretrained(made)
    assert len(tokenizer.genes) == 3
    shard = split(made, "train")
    assert shard.obs[LIBRARY_SIZE_COLUMN].tolist() == source[shard.obs_names].X.sum(axis=1).A1.tolist()
    whole, cut = tokens_by_name(source, tokenizer, source.obs_names), corpus_tokens(made)
    assert cut == {name: whole[name] for name in cut}


def test_the_same_inputs_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    made = [prepare(cells(counts(60)), tmp_path / name, phenotypes=["cell_type"]) for name in "ab"]
    assert Corpus.open(made[0]).manifest["shards"] == Corpus.open(made[1]).manifest["shards"]


@pytest.mark.parametrize("matrix", [sparse.csc_matrix, lambda x: x.toarray()], ids=["csc", "dense"])
def test_csc_and_dense_files_become_the_same_shards(tmp_path: Path, matrix: Any) -> None:
    adata = cells(counts(40))
    expected = prepare(adata, tmp_path / "csr")
    ad.AnnData(matrix(adata.X), obs=adata.obs, var=adata.var).write_h5ad(tmp_path / "other.h5ad")
    made = prepare(tmp_path / "other.h5ad", tmp_path / "other")
    assert Corpus.open(made).manifest["shards"] == Corpus.open(expected).manifest["shards"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_stores_become_the_same_shards(tmp_path: Path, version: int) -> None:
    first, second = cells(counts(40)), cells(counts(30, seed=1), prefix="other")
    expected = prepare([first, second], tmp_path / "memory", phenotypes=["cell_type"])
    with ad.settings.override(zarr_write_format=version):
        first.write_zarr(tmp_path / "stores" / "first.zarr")
    second.write_h5ad(tmp_path / "stores" / "second.h5ad")
    made = prepare(tmp_path / "stores", tmp_path / "stored", phenotypes=["cell_type"], num_processes=2)
    assert Corpus.open(made).manifest["shards"] == Corpus.open(expected).manifest["shards"]


@pytest.mark.parametrize("values", [[0.1, 0.3, 0.7], [1e-3, 2.2, 5.5]])
def test_log_values_on_an_edge_stay_in_their_bin(tmp_path: Path, values: list[float]) -> None:
    adata = cells(np.array([values] * 10))
    adata.X = sparse.csr_matrix(np.array([values] * 10, dtype=np.float64))
    made = prepare(adata, tmp_path / "corpus", bin_edges=values, split_by="cell")
    tokens = corpus_tokens(made)
    assert tokens == tokens_by_name(adata, GeneTokenizer.from_pretrained(made), adata.obs_names)


def test_cells_with_too_few_genes_are_dropped_and_counted(tmp_path: Path) -> None:
    values_ng = counts(50)
    values_ng[:10, 1:] = 0
    values_ng[:10, 0] = 1
    made = prepare(cells(values_ng), tmp_path / "corpus", min_genes=2, eval_donors=["a"])
    assert split(made, "train").n_obs + split(made, "eval").n_obs == 40
    assert "8 train cells express fewer than 2 panel genes and were dropped" in audit(made)


def test_repeated_cell_names_are_made_unique(tmp_path: Path) -> None:
    made = prepare([cells(counts(20)), cells(counts(20, seed=1))], tmp_path / "corpus")
    assert split(made, "train").n_obs + split(made, "eval").n_obs == 40


# -- files of several kinds ---------------------------------------------------------------------------------------


def test_files_of_counts_and_of_logs_become_one_scale(tmp_path: Path) -> None:
    values_ng = counts(30)
    log = cells(values_ng, prefix="log")
    log.X = sparse.csr_matrix(log1p_cp10k(values_ng).astype(np.float32))
    made = prepare([cells(values_ng, prefix="raw"), log], tmp_path / "corpus", bin_edges=[5.0, 6.5, 7.5])
    assert Corpus.open(made).manifest["values"] == "log1p_cp10k"
    tokens = corpus_tokens(made)
    assert len(tokens) == 60
    assert [tokens[f"raw{i}"] for i in range(30)] == [tokens[f"log{i}"] for i in range(30)]


def test_fractional_counts_that_are_normalised_on_request_keep_their_tokens(tmp_path: Path) -> None:
    adata = cells(counts(40) * 0.37)
    made = prepare(adata, tmp_path / "corpus", normalization="log1p_cp10k", split_by="cell")
    tokenizer = GeneTokenizer.from_pretrained(made)
    assert corpus_tokens(made) == tokens_by_name(adata, tokenizer, adata.obs_names)


def test_values_taken_as_they_are_stay_as_they_are(tmp_path: Path) -> None:
    adata = cells(counts(40) * 1000)
    made = prepare(adata, tmp_path / "corpus", normalization="none", bin_edges=[1000.0, 9000.0], split_by="cell")
    train = split(made, "train")
    assert np.array_equal(train.X.toarray(), adata[train.obs_names, train.var_names].X.toarray())
    varies_g = log_dispersion(adata[train.obs_names].X.toarray())
    assert train.var_names.tolist()[0] in {GENES[i] for i in np.argsort(-varies_g)[:8]}


def log_dispersion(values_ng: np.ndarray) -> np.ndarray:
    """Variance over mean, logged, shape (g,)."""
    return np.log(values_ng.var(axis=0, ddof=1) / values_ng.mean(axis=0))


def test_values_taken_as_they_are_need_edges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--normalization none needs --bin_edges"):
        prepare(cells(counts(40)), tmp_path / "corpus", normalization="none")


def test_genes_of_all_files_join_and_those_missing_somewhere_are_reported(tmp_path: Path) -> None:
    parts = [cells(counts(30, 6), prefix="x"), cells(counts(30, 6), genes=GENES[2:], prefix="y")]
    made = prepare(parts, tmp_path / "corpus")
    assert sorted(GeneTokenizer.from_pretrained(made).genes) == GENES
    assert "4 of 8 panel genes are not measured in all files" in audit(made)


ENSEMBL = [f"ENSG{number:011d}" for number in range(8)]


def named(kind: str, prefix: str) -> ad.AnnData:
    """Make the same forty cells, whose genes are named in this way."""
    adata = cells(counts(40), prefix=prefix)
    if kind.startswith("ids"):
        adata.var_names = [f"{gene}.{i}" for i, gene in enumerate(ENSEMBL)]
    if kind == "ids and symbols":
        adata.var["feature_name"] = GENES
    if kind == "symbols and ids":
        adata.var["gene_ids"] = ENSEMBL
    return adata


@pytest.mark.parametrize(
    "kinds",
    [
        ("ids and symbols", "symbols"),
        ("symbols", "ids and symbols"),
        ("symbols and ids", "ids"),
        ("ids", "symbols and ids"),
        ("symbols and ids", "symbols"),
        ("ids", "symbols", "ids and symbols"),
    ],
    ids=" + ".join,
)
def test_a_gene_known_by_id_and_by_symbol_is_one_gene_in_any_order_of_files(
    tmp_path: Path, kinds: Sequence[str]
) -> None:
    made = prepare([named(kind, f"{kind}:") for kind in kinds], tmp_path / "corpus")
    tokenizer = GeneTokenizer.from_pretrained(made)
    assert sorted(tokenizer.genes) == ENSEMBL
    assert sorted(tokenizer.gene_symbols) == GENES
    tokens = corpus_tokens(made)
    assert len({str(tokens[f"{kind}:7"]) for kind in kinds}) == 1


def test_a_symbol_beside_an_id_of_that_symbol_in_one_file_stays_its_own_gene(tmp_path: Path) -> None:
    adata = cells(counts(40))
    adata.var["feature_name"] = [*GENES[:7], "G0"]
    adata.var_names = [*GENES[:7], ENSEMBL[7]]
    made = prepare(adata, tmp_path / "corpus")
    assert sorted(GeneTokenizer.from_pretrained(made).genes) == [ENSEMBL[7], *GENES[:7]]


def test_columns_of_the_same_gene_are_summed_before_anything_is_fitted(tmp_path: Path) -> None:
    values_ng = counts(60)
    halves = np.concatenate([values_ng // 2, values_ng - values_ng // 2], axis=1)
    twice = cells(halves, genes=[f"{gene}.{part}" for part in (1, 2) for gene in ENSEMBL])
    once = cells(values_ng, genes=ENSEMBL)
    made = [prepare(adata, tmp_path / str(at), phenotypes=["cell_type"]) for at, adata in enumerate([once, twice])]
    assert (
        GeneTokenizer.from_pretrained(made[0]).to_dict()["genes"]
        == GeneTokenizer.from_pretrained(made[1]).to_dict()["genes"]
    )
    assert corpus_tokens(made[0]) == corpus_tokens(made[1])


def test_columns_of_the_same_gene_are_summed_before_the_logarithm(tmp_path: Path) -> None:
    values_ng = counts(30)
    halves = np.concatenate([values_ng // 2, values_ng - values_ng // 2], axis=1)
    log = cells(values_ng, genes=ENSEMBL, prefix="log")
    log.X = sparse.csr_matrix(log1p_cp10k(values_ng).astype(np.float32))
    twice = cells(halves, genes=[f"{gene}.{part}" for part in (1, 2) for gene in ENSEMBL], prefix="raw")
    tokens = corpus_tokens(prepare([log, twice], tmp_path / "corpus", bin_edges=[5.0, 6.5, 7.5]))
    assert [tokens[f"raw{i}"] for i in range(30)] == [tokens[f"log{i}"] for i in range(30)]


def test_a_file_without_cells_changes_nothing(tmp_path: Path) -> None:
    alone = prepare(cells(counts(40)), tmp_path / "a", phenotypes=["cell_type"])
    next_to_empty = prepare([cells(counts(40)[:0]), cells(counts(40))], tmp_path / "b", phenotypes=["cell_type"])
    assert Corpus.open(alone).manifest["shards"] == Corpus.open(next_to_empty).manifest["shards"]


# -- panel and bins -----------------------------------------------------------------------------------------------


def test_the_panel_keeps_the_most_variable_genes(tmp_path: Path) -> None:
    made = [prepare(cells(counts(60)), tmp_path / str(top), num_top_genes=top) for top in (8, 3)]
    whole, cut = (GeneTokenizer.from_pretrained(folder).genes for folder in made)
    assert cut == whole[:3]


def test_more_top_genes_than_are_expressed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_top_genes 9 exceeds the 8 expressed genes"):
        prepare(cells(counts(40)), tmp_path / "corpus", num_top_genes=9)


def test_a_panel_file_fixes_genes_and_their_order(tmp_path: Path) -> None:
    (tmp_path / "panel.txt").write_text("G5\nG1  # a note\n\nG7\n")
    made = prepare(cells(counts(40)), tmp_path / "corpus", panel=str(tmp_path / "panel.txt"))
    assert GeneTokenizer.from_pretrained(made).genes == ("G5", "G1", "G7")


def test_the_panel_of_another_corpus_fixes_the_genes(tmp_path: Path, corpus: Path) -> None:
    made = prepare(cells(counts(40, seed=9)), tmp_path / "corpus", panel=str(corpus))
    assert GeneTokenizer.from_pretrained(made).genes == GeneTokenizer.from_pretrained(corpus).genes


def test_a_corpus_like_another_has_its_genes_bins_and_labels(tmp_path: Path, corpus: Path) -> None:
    again = cells(counts(40, seed=9), prefix="new", cell_type=np.resize(["T cell", "B cell"], 40))[:, ::-1].copy()
    made = prepare(again, tmp_path / "corpus", phenotypes=["cell_type"], like=str(corpus))
    ours, theirs = GeneTokenizer.from_pretrained(made), GeneTokenizer.from_pretrained(corpus)
    assert ours.fingerprint == theirs.fingerprint


def test_what_another_corpus_lacks_follows_behind_what_it_has(tmp_path: Path, corpus: Path) -> None:
    more = cells(counts(40, 10, seed=9), genes=[*GENES, "N1", "N2"], cell_type=np.resize(["platelet", "B cell"], 40))
    more.obs["tissue"] = np.resize(["lung", "blood"], 40)
    made = prepare(more, tmp_path / "corpus", phenotypes=["cell_type", "tissue"], like=str(corpus), num_top_genes=9)
    ours, theirs = GeneTokenizer.from_pretrained(made), GeneTokenizer.from_pretrained(corpus)
    assert ours.genes[:8] == theirs.genes and len(ours.genes) == 9 and ours.genes[8] in ("N1", "N2")
    assert ours.phenotypes == {"cell_type": ("B cell", "NK cell", "T cell", "platelet"), "tissue": ("blood", "lung")}
    assert ours.bin_edges.edges_ge.tolist() == theirs.bin_edges.edges_ge.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "none"}, "--normalization auto"),
        ({"num_bins": 5}, "Remove --num_bins or --like"),
        ({"bin_edges": [1.0]}, "Remove --like or --bin_edges"),
    ],
    ids=["other scale", "other number of bins", "other edges"],
)
def test_options_against_the_corpus_to_be_like_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, corpus: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(cells(counts(40)), tmp_path / "corpus", like=str(corpus), **options)
    assert not list(tmp_path.iterdir())


def test_genes_that_no_file_shares_with_the_corpus_to_be_like_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match="like .*8 of 8 genes are in no file.*leave --like out"):
        prepare(cells(counts(40), genes=[f"X{i}" for i in range(8)]), tmp_path / "corpus", like=str(corpus))


def test_panel_genes_of_no_file_are_left_out_and_reported(tmp_path: Path) -> None:
    (tmp_path / "panel.txt").write_text("G5\nG1\nZ1\n")
    made = prepare(cells(counts(40)), tmp_path / "corpus", panel=str(tmp_path / "panel.txt"))
    assert "1 of 3 genes of panel" in audit(made)


@pytest.mark.parametrize(
    ("text", "message"),
    [("Z1\nZ2\nG1\n", "2 of 3 genes are in no file"), ("", "0 of 0 genes"), (None, "cannot be read")],
    ids=["mostly unknown", "empty", "no such file"],
)
def test_a_useless_panel_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "panel.txt").write_text(text)
    with pytest.raises(InputError, match=f"panel .*{message}"):
        prepare(cells(counts(40)), tmp_path / "corpus", panel=str(tmp_path / "panel.txt"))


def test_given_edges_are_used(tmp_path: Path) -> None:
    made = prepare(cells(counts(40)), tmp_path / "corpus", bin_edges=[0.5, 2.0])
    assert Corpus.open(made).manifest["bin_edges"] == [0.5, 2.0]


def test_a_panel_of_unexpressed_genes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training cell expresses any gene"):
        prepare(cells(counts(20) * 0), tmp_path / "corpus")


# -- phenotypes ---------------------------------------------------------------------------------------------------


def test_the_vocabulary_comes_from_training_cells_and_labels_of_eval_cells_alone_are_reported(tmp_path: Path) -> None:
    adata = cells(counts(50))
    adata.obs.loc[adata.obs["donor_id"] == "a", "cell_type"] = "Monocyte"
    made = prepare(adata, tmp_path / "corpus", phenotypes=["cell_type"], eval_donors=["a"])
    assert GeneTokenizer.from_pretrained(made).phenotypes == {"cell_type": ("B cell", "NK cell", "T cell")}
    assert "cell_type: 'Monocyte' occur in eval cells only and cannot be predicted" in audit(made)


def test_phenotypes_may_be_renamed_but_not_to_nothing() -> None:
    columns = PrepareConfig(inputs=["a"], output="c", phenotypes=["cell_type=bulk_labels", "phase"]).column_of_phenotype
    assert columns == {"cell_type": "bulk_labels", "phase": "phase"}
    with pytest.raises(InputError, match="must be NAME or NAME=VALUE"):
        _ = PrepareConfig(inputs=["a"], output="c", phenotypes=["cell_type="]).column_of_phenotype


def test_phenotypes_are_named_apart_from_their_columns(tmp_path: Path) -> None:
    made = prepare(cells(counts(40), louvain="x"), tmp_path / "corpus", phenotypes=["cluster=louvain"])
    assert GeneTokenizer.from_pretrained(made).phenotypes == {"cluster": ("x",)}
    assert set(split(made, "train").obs["cluster"]) == {"x"}


@pytest.mark.parametrize("name", ["name", "unit", "file", "row"])
def test_a_phenotype_may_have_any_name(tmp_path: Path, name: str) -> None:
    adata = cells(counts(40), **{name: "x"})
    made = prepare(adata, tmp_path / "corpus", phenotypes=[name])
    assert set(split(made, "train").obs[name]) == {"x"}
    assert set(split(made, "train").obs_names) < set(adata.obs_names)
    assert Corpus.open(made).manifest["split"]["by"] == "donor_id"
    assert len(Corpus.open(made).manifest["split"]["train"]) == 4


def test_missing_labels_are_counted_and_stay_missing(tmp_path: Path) -> None:
    adata = cells(counts(50))
    adata.obs["cell_type"] = pd.Categorical(np.resize(["B cell", None, "unknown", " B cell", "T cell"], 50))
    made = prepare(adata, tmp_path / "corpus", phenotypes=["cell_type"], split_by="cell")
    found = Corpus.open(made).manifest["phenotypes"]["cell_type"]
    assert {label: found["train"][label] + found["eval"][label] for label in found["train"]} == {
        "(missing)": 20, "B cell": 20, "T cell": 10,
    }  # fmt: skip
    assert split(made, "train").obs["cell_type"].isna().sum() == found["train"]["(missing)"]


def test_controls_called_none_keep_their_label_and_every_missing_spelling_is_counted(tmp_path: Path) -> None:
    adata = cells(counts(60), treatment=np.resize(["none", "IFNb", "null", "Unknown", ""], 60))
    made = prepare(adata, tmp_path / "corpus", phenotypes=["treatment"], split_by="cell")
    assert GeneTokenizer.from_pretrained(made).phenotypes == {"treatment": ("IFNb", "none", "null")}
    assert Corpus.open(made).manifest["missing_labels"] == {"treatment": {"Unknown": 12, "": 12}}
    assert "treatment: 24 of 60 cells have a missing label (12 'empty', 12 'Unknown')" in audit(made)


def test_labels_that_are_named_as_missing_are_missing_and_counted(tmp_path: Path, caplog: Any) -> None:
    adata = cells(counts(60), treatment=np.resize(["none", "IFNb", "TNF"], 60))
    made = prepare(adata, tmp_path / "corpus", phenotypes=["treatment"], split_by="cell", missing_labels=["None"])
    assert GeneTokenizer.from_pretrained(made).phenotypes == {"treatment": ("IFNb", "TNF")}
    assert Corpus.open(made).manifest["missing_labels"] == {"treatment": {"none": 20}}
    assert "20 of 60 cells have a missing label (20 'none')" in caplog.text


@pytest.mark.parametrize("kind", [float, "category"])
def test_a_measurement_is_no_phenotype(tmp_path: Path, kind: Any) -> None:
    adata = cells(counts(60), score=np.arange(60) / 7)
    adata.obs["score"] = adata.obs["score"].astype(kind)
    with pytest.raises(InputError, match=r"obs\['score'\] holds 60 different numbers, too many to be labels"):
        prepare(adata, tmp_path / "corpus", phenotypes=["score"])


def test_few_whole_numbers_are_labels_without_a_point(tmp_path: Path) -> None:
    made = prepare(cells(counts(60), stage=np.resize([1.0, 2.0], 60)), tmp_path / "corpus", phenotypes=["stage"])
    assert GeneTokenizer.from_pretrained(made).phenotypes == {"stage": ("1", "2")}


@pytest.mark.parametrize(
    "option", [{"phenotypes": ["cell_typ"]}, {"split_by": "cell_typ"}], ids=lambda option: next(iter(option))
)
def test_a_missing_column_is_refused_with_the_nearest_name(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no obs column 'cell_typ'. Did you mean 'cell_type'"):
        prepare(cells(counts(40)), tmp_path / "corpus", **option)


def test_a_phenotype_that_no_training_cell_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training cell has a 'stage'"):
        prepare(cells(counts(40), stage="unknown"), tmp_path / "corpus", phenotypes=["stage"])


# -- audit --------------------------------------------------------------------------------------------------------


def test_copies_of_cells_are_found_within_and_across_the_splits(tmp_path: Path) -> None:
    values_ng = counts(50)
    values_ng[[1, 2, 5]] = values_ng[0]  # cells 0 and 5 are of donor a, 1 of b, 2 of c
    found = audit(prepare(cells(values_ng), tmp_path / "corpus", eval_donors=["a"]))
    assert "1 of 40 train cells are exact copies of another train cell" in found
    assert "1 of 10 eval cells are exact copies of another eval cell" in found
    assert "2 of 10 eval cells are exact copies of a training cell" in found


def test_cells_that_differ_outside_the_panel_are_no_copies(tmp_path: Path) -> None:
    values_ng = counts(50)
    values_ng[:, 0] = np.arange(50) % 2 * 40  # so few values that panel rows repeat
    made = prepare(cells(values_ng), tmp_path / "corpus", num_top_genes=1, min_genes=0)
    assert "copies" not in audit(made)


def test_labels_of_one_donor_are_reported_as_confounded(tmp_path: Path) -> None:
    adata = cells(counts(50))
    adata.obs["cell_type"] = np.where(adata.obs["donor_id"] == "b", "Monocyte", adata.obs["cell_type"])
    made = prepare(adata, tmp_path / "corpus", phenotypes=["cell_type"], eval_donors=["a"])
    assert "cell_type: 'Monocyte' come from one donor_id only (confounded)" in audit(made)


def test_an_honest_corpus_has_no_findings(corpus: Path) -> None:
    assert audit(corpus) == ""


def test_a_survey_holds_no_name_of_a_cell(tmp_path: Path) -> None:
    """A worker reads files of a million cells, whose names take 70 bytes each."""
    num_cells, path = 50_000, tmp_path / "cells.h5ad"
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.resize(["B", "T"], num_cells))})
    obs.index = [f"a cell with a name, {number}" for number in range(num_cells)]
    matrix = sparse.eye(8, format="csr", dtype=np.float32)[np.arange(num_cells) % 8]
    ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(path)
    config = PrepareConfig(inputs=[str(path)], output="corpus", phenotypes=["cell_type"])
    tracemalloc.start()
    try:
        with closing(open_files([str(path)], config)) as cache:
            shard = cache[0]
            survey_file(str(path), shard, config, "cell_type")
            assert tracemalloc.get_traced_memory()[1] < 70 * num_cells
            before = tracemalloc.get_traced_memory()[0]
            table = CellTable.of(shard, config, "cell_type")
            assert tracemalloc.get_traced_memory()[0] - before < 4 * num_cells
    finally:
        tracemalloc.stop()
    assert table.units.counts() == table.labels["cell_type"].counts() == {"B": 25_000, "T": 25_000}


# -- bad matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "message"), [(-3, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_a_bad_value_is_refused_also_in_rows_that_no_sample_saw(tmp_path: Path, value: float, message: str) -> None:
    values_ng = counts(700).astype(float)
    values_ng[100, 2] = value
    with pytest.raises(InputError, match=f"holds .*{message}"):
        prepare(cells(values_ng), tmp_path / "corpus")


@pytest.mark.parametrize("column", [99, -1])
def test_a_column_outside_the_matrix_is_refused(tmp_path: Path, column: int) -> None:
    adata = cells(counts(20))
    adata.X.indices[3] = column
    with pytest.raises(InputError, match="column"):
        prepare(adata, tmp_path / "corpus")


# -- the folder ---------------------------------------------------------------------------------------------------


def test_a_folder_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"exists and is not empty. Choose another --output, or pass --overwrite"):
        prepare(cells(counts(20)), tmp_path / "corpus")


def test_overwrite_never_replaces_what_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not a corpus .* so --overwrite leaves it alone"):
        prepare(cells(counts(20)), tmp_path / "corpus", overwrite=True)
    assert (tmp_path / "corpus" / "thesis.txt").read_text() == "mine"


def test_overwrite_leaves_the_folder_of_another_program_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / MANIFEST_FILE).write_text('{"name": "my web page"}')
    with pytest.raises(InputError, match=r"is not a corpus .* so --overwrite leaves it alone"):
        prepare(cells(counts(20)), tmp_path / "corpus", overwrite=True)
    assert (tmp_path / "corpus" / MANIFEST_FILE).exists()


def test_overwrite_leaves_a_corpus_alone_that_holds_files_of_somebody_else(tmp_path: Path) -> None:
    made = prepare(cells(counts(20)), tmp_path / "corpus")
    (made / "train" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"files that prepare did not write \('train/notes.txt'\).*Move them away"):
        prepare(cells(counts(20)), made, overwrite=True)
    assert (made / "train" / "notes.txt").read_text() == "mine"


def test_an_overwrite_that_is_killed_while_it_deletes_the_old_corpus_leaves_the_new_one_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    made, unlink = prepare(cells(counts(60)), tmp_path / "corpus", shard_size=10), Path.unlink

    def killed(self: Path, **options: Any) -> None:
        if self.name == "shard_00001.h5ad":
            raise KeyboardInterrupt
        unlink(self, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        prepare(cells(counts(20)), made, overwrite=True)
    assert len(list(made.rglob("*.h5ad"))) == 2
    prepare(cells(counts(20)), made, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_overwrite_that_is_killed_between_its_two_renames_keeps_the_old_corpus_until_it_is_repeated(
    tmp_path: Path,
) -> None:
    made, rename = prepare(cells(counts(60)), tmp_path / "corpus", shard_size=10), Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "corpus" and self.parent.name == "corpus.part":
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        prepare(cells(counts(20)), made, overwrite=True)
    with pytest.raises(InputError, match="exists and is not empty"):
        prepare(cells(counts(20)), made)
    assert len(Corpus.open(made).paths("train")) > 2
    prepare(cells(counts(20)), made, overwrite=True)
    assert len(list(made.rglob("*.h5ad"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_overwrite_replaces_a_corpus_whole(tmp_path: Path) -> None:
    prepare(cells(counts(60)), tmp_path / "corpus", shard_size=10)
    made = prepare(cells(counts(20)), tmp_path / "corpus", overwrite=True)
    assert len(list(made.rglob("*.h5ad"))) == 2


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    assert (prepare(cells(counts(20)), tmp_path / "corpus") / MANIFEST_FILE).exists()


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    values_ng = counts(20)
    with pytest.raises(InputError, match="num_top_genes"):
        prepare(cells(values_ng), tmp_path / "corpus", num_top_genes=100)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_overwrite_keeps_the_old_corpus(tmp_path: Path) -> None:
    made = prepare(cells(counts(20)), tmp_path / "corpus")
    before = (made / MANIFEST_FILE).read_bytes()
    with pytest.raises(InputError, match="num_top_genes"):
        prepare(cells(counts(20)), tmp_path / "corpus", num_top_genes=100, overwrite=True)
    assert (made / MANIFEST_FILE).read_bytes() == before


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(cells(counts(20)), tmp_path / "file" / "corpus")


# -- the manifest -------------------------------------------------------------------------------------------------


def test_the_manifest_names_inputs_shards_and_split(corpus: Path) -> None:
    manifest = Corpus.open(corpus).manifest
    assert manifest["inputs"][0]["cells"] == 100
    assert manifest["values"] == "counts"
    assert manifest["split"]["by"] == "donor_id"
    assert manifest["tokenizer_fingerprint"] == GeneTokenizer.from_pretrained(corpus).fingerprint
    assert set(manifest["phenotypes"]["cell_type"]["train"]) == {"B cell", "NK cell", "T cell"}


def test_a_corpus_on_disk_names_its_shards_their_sums_and_its_labels(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    sums = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in opened.paths("train")]
    assert [shard["sha256"] for shard in opened.manifest["shards"]["train"]] == sums
    assert opened.paths("train").sizes == (30, 30, 20)
    assert [*opened.manifest["phenotypes"]["cell_type"]["train"]] == ["B cell", "NK cell", "T cell"]
    assert opened.split_by == "donor_id"


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a corpus"):
        Corpus.open(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"manifest_version": 99}))
    with pytest.raises(InputError, match=r"manifest.json has format 99, but .* reads formats up to 1. Update"):
        Corpus.open(tmp_path)


def test_more_files_than_may_be_open_are_prepared_with_few_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        cells(counts(10, seed=number), prefix=f"{number}:").write_h5ad(tmp_path / f"{number}.h5ad")
    monkeypatch.setattr("perturbgene.data_utils.shards.MOST_OPEN_FILES", 2)
    opened: set[int] = set()
    most, open_, close = [0], H5adFile.file.fget, H5adFile.close

    def counted(self: H5adFile) -> Any:
        opened.add(id(self))
        most[0] = max(most[0], len(opened))
        return open_(self)  # type: ignore[misc]

    monkeypatch.setattr(H5adFile, "file", property(counted))
    monkeypatch.setattr(H5adFile, "close", lambda self: (opened.discard(id(self)), close(self)))
    prepare(tmp_path / "*.h5ad", tmp_path / "corpus")
    assert most[0] <= 4  # two to find the genes, two to read the cells


# -- any order, any number of processes, any interruption ---------------------------------------------------------


def checksums(corpus: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard, from the files themselves."""
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in corpus.rglob("*.h5ad")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve files of forty cells, some with other genes, some cells in two files."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(12):
        genes = GENES if number % 3 else GENES[::-1]
        cells(counts(40, seed=number % 11), genes=genes, prefix=f"{number % 11}:").write_h5ad(folder / f"{number}.h5ad")
    return [folder / f"{number}.h5ad" for number in range(12)]


OPTIONS: dict[str, Any] = {"phenotypes": ["cell_type"], "shard_size": 30}


@pytest.fixture(scope="module")
def undisturbed(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their corpus, made in this process."""
    return prepare(files, tmp_path_factory.mktemp("undisturbed") / "corpus", **OPTIONS)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_have_the_same_bytes_in_any_order_of_files_and_on_any_number_of_processes(
    tmp_path: Path, files: list[Path], undisturbed: Path, num_processes: int
) -> None:
    made = prepare([*files[5:], *files[:5]][::-1], tmp_path / "corpus", num_processes=num_processes, **OPTIONS)
    assert len(checksums(made)) == 17
    assert checksums(made) == checksums(undisturbed)
    assert (
        Corpus.open(made).manifest["tokenizer_fingerprint"]
        == Corpus.open(undisturbed).manifest["tokenizer_fingerprint"]
    )


def test_names_of_files_change_nothing(tmp_path: Path, files: list[Path], undisturbed: Path) -> None:
    renamed = [shutil.copy(path, tmp_path / f"{len(files) - number}.h5ad") for number, path in enumerate(files)]
    assert checksums(prepare(renamed, tmp_path / "corpus", **OPTIONS)) == checksums(undisturbed)


def test_files_larger_than_a_part_are_dealt_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbgene.corpus.survey.PART_ROWS", 7)
    made = prepare(cells(counts(100)), tmp_path / "corpus", shard_size=30, phenotypes=["cell_type"])
    names = [*split(made, "train").obs_names, *split(made, "eval").obs_names]
    assert sorted(names) == sorted(f"cell{i}" for i in range(100))
    source = cells(counts(100))
    assert corpus_tokens(made) == tokens_by_name(source, GeneTokenizer.from_pretrained(made), source.obs_names)


def slow_prepare(target: Path, files: Sequence[Path], *, num_lines: int) -> BaseProcess:
    """Start a prepare in another process, as on a slow disk; return when it has finished a number of files."""
    add = Journal.add

    def add_slowly(self: Journal, entry: dict[str, Any]) -> None:
        add(self, entry)
        time.sleep(0.05)

    def run() -> None:
        Journal.add = add_slowly  # type: ignore[method-assign]
        prepare(files, target, **OPTIONS)

    child = start(run)
    journal, deadline = target.with_name(target.name + ".part") / "journal.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") > num_lines):
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return child


@needs_fork
def test_a_second_prepare_into_the_same_folder_is_refused_and_the_first_one_finishes(
    tmp_path: Path, files: list[Path], undisturbed: Path
) -> None:
    child = slow_prepare(tmp_path / "corpus", files, num_lines=14)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"corpus is being written by another process .* choose another --output"):
            prepare(files, tmp_path / "corpus", overwrite=overwrite, **OPTIONS)
    child.join()
    assert child.exitcode == 0
    assert checksums(tmp_path / "corpus") == checksums(undisturbed)


@needs_fork
@pytest.mark.parametrize("num_lines", [5, 18, 30], ids=["counting", "dealing", "writing"])
def test_a_killed_run_continues_to_the_same_bytes(
    tmp_path: Path, files: list[Path], undisturbed: Path, num_lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "corpus"
    journal = tmp_path / "corpus.part" / "journal.jsonl"
    child = slow_prepare(target, files, num_lines=num_lines)
    child.kill()
    child.join()
    for folder in ("spool", "corpus/train"):
        (tmp_path / "corpus.part" / folder / "shard_00000.h5ad.0f.tmp").write_bytes(b"torn")
    with journal.open("a") as stream:
        stream.write('{"file": "spool/')
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus.part" / "statistics").iterdir()}
    assert len(kept) >= min(num_lines, 12)
    with caplog.at_level("INFO"):
        made = prepare(files, target, **OPTIONS)
    assert "finished files are kept" in caplog.text
    assert checksums(made) == checksums(undisturbed)
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (made, undisturbed)]
    assert names[0] == names[1]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@needs_fork
def test_a_disk_that_takes_no_more_ends_in_one_line_and_the_same_command_continues(
    tmp_path: Path, files: list[Path], undisturbed: Path
) -> None:
    """A limit on the size of a file fails like a full disk, in the midst of a shard."""
    largest = max(path.stat().st_size for path in undisturbed.rglob("*.h5ad"))
    words = ["prepare", *map(str, files), "--output", str(tmp_path / "corpus"), "--phenotypes", "cell_type"]

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))
        sys.exit(main([*words, "--shard_size", "30", "--num_processes", "1"]))

    child = start(run, output=tmp_path / "log")
    child.join()
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert child.exitcode == 3
    assert re.match(r"error: prepare stopped: File too large while writing .*/shard_\d+\.h5ad\. Allow larger", last)
    assert not [path for path in (tmp_path / "corpus.part").rglob("*") if path.suffix in (".tmp", ".partial")]
    assert checksums(prepare(files, tmp_path / "corpus", **OPTIONS)) == checksums(undisturbed)


def test_a_finished_part_that_was_changed_is_made_again(tmp_path: Path, files: list[Path], undisturbed: Path) -> None:
    part = stopped(files, tmp_path, after="dealing cells")
    spooled = sorted((part / "spool").iterdir())
    spooled[0].write_bytes(spooled[0].read_bytes()[:-1] + b"\7")
    spooled[1].write_bytes(spooled[1].read_bytes()[:100])
    spooled[2].unlink()
    assert checksums(prepare(files, tmp_path / "corpus", **OPTIONS)) == checksums(undisturbed)


def stopped(files: Sequence[Path], folder: Path, *, after: str) -> Path:
    """Interrupt a run, as by Ctrl-C, once a step is done; return the folder of the unfinished work."""
    run, write_files = None, Workers.write_files

    def interrupted(self: Workers, *args: Any, text: str, **options: Any) -> Any:
        entries = write_files(self, *args, text=text, **options)
        if text == after:
            raise KeyboardInterrupt
        return entries

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workers, "write_files", interrupted)
        run = prepare(files, folder / "corpus", **OPTIONS)
    assert run is None
    return folder / "corpus.part"


def test_unfinished_work_of_other_settings_starts_again_and_says_so(
    tmp_path: Path, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    stopped(files, tmp_path, after="genes and bins")
    made = prepare(files, tmp_path / "corpus", **{**OPTIONS, "num_bins": 3})
    assert "was begun with other inputs or settings: starting again" in caplog.text
    plain = prepare(files, tmp_path / "plain", **{**OPTIONS, "num_bins": 3})
    assert Corpus.open(made).manifest["bin_edges"] == Corpus.open(plain).manifest["bin_edges"]


def test_a_folder_of_somebody_else_in_the_place_of_unfinished_work_is_left_alone(
    tmp_path: Path, files: list[Path]
) -> None:
    (tmp_path / "corpus.part").mkdir()
    (tmp_path / "corpus.part" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"corpus.part is where unfinished work goes, but it holds something else"):
        prepare(files, tmp_path / "corpus", **OPTIONS)
    assert (tmp_path / "corpus.part" / "thesis.txt").read_text() == "mine"


def test_a_changed_input_is_not_continued_with(tmp_path: Path, files: list[Path]) -> None:
    mine = [Path(shutil.copy(path, tmp_path / path.name)) for path in files]
    stopped(mine, tmp_path, after="dealing cells")
    cells(counts(40, seed=77), prefix="new").write_h5ad(mine[3])
    made = prepare(mine, tmp_path / "corpus", **OPTIONS)
    assert checksums(made) == checksums(prepare(mine, tmp_path / "fresh", **OPTIONS))


# -- on a cluster -------------------------------------------------------------------------------------------------


def test_a_scheduler_that_does_not_answer_is_refused(tmp_path: Path, files: list[Path]) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="no Dask scheduler answers at nonsense://x"):
        prepare(files, tmp_path / "corpus", scheduler="nonsense://x", **OPTIONS)


@needs_fork
def test_a_cluster_that_loses_a_worker_loses_no_cell(tmp_path: Path, files: list[Path], undisturbed: Path) -> None:
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    killed: list[int] = []
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "fork"}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
    ):
        add = Journal.add

        def add_and_kill(self: Journal, entry: dict[str, Any]) -> None:
            add(self, entry)
            if len(self.done) == 15 and not killed:  # in the middle of dealing
                nanny = next(iter(cluster.workers.values()))
                nanny.auto_restart = False
                killed.append(nanny.pid)
                os.kill(killed[0], signal.SIGKILL)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "add", add_and_kill)
            made = prepare(files, tmp_path / "corpus", scheduler=cluster.scheduler_address, **OPTIONS)
    assert killed
    assert checksums(made) == checksums(undisturbed)


# -- genes of the sources -----------------------------------------------------------------------------------------


def measured_genes(path: str) -> np.ndarray:
    """Return which genes each source of a shard measured, bool of shape (t, g)."""
    return ad.read_h5ad(path).varm[MEASURED_KEY].T.astype(bool)


def test_every_cell_knows_which_genes_its_source_measured(tmp_path: Path) -> None:
    parts = [cells(counts(30, 6), prefix="x"), cells(counts(30, 6), genes=GENES[2:], prefix="y")]
    made = prepare(parts, tmp_path / "corpus", shard_size=20)
    genes = GeneTokenizer.from_pretrained(made).genes
    measured_tg = measured_genes(Corpus.open(made).paths("train")[0])
    for name, table in split(made, "train").obs[SOURCE_COLUMN].items():
        expected = GENES[:6] if name.startswith("x") else GENES[2:]
        assert {gene for gene, is_measured in zip(genes, measured_tg[table], strict=True) if is_measured} == set(
            expected
        )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two files: cells x lack genes G6 and G7, cells y lack G0 and G1; zeros are plenty in both."""
    values = np.random.default_rng(0).poisson(0.4, (60, 6)) + np.eye(6, dtype=int)[np.arange(60) % 6]
    parts = [cells(values, prefix="x"), cells(values, genes=GENES[2:], prefix="y")]
    return prepare(parts, tmp_path_factory.mktemp("mixed") / "corpus", shard_size=20)


@pytest.mark.parametrize("path", ["blocks", "cells"])
def test_a_gene_that_its_source_did_not_measure_is_never_shown_as_unexpressed(mixed: Path, path: str) -> None:
    tokenizer = GeneTokenizer.from_pretrained(mixed)
    collator = DataCollatorForPhenotypicMLM(tokenizer, gene_mask_prob=1, unexpressed_ratio=9)
    dataset = IterableAnnDataset(Corpus.open(mixed).paths("train"), tokenizer, batch_size=7)
    names, shown = split(mixed, "train").obs_names, {"x": set[str](), "y": set[str]()}
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batches = dataset.batches(collator) if path == "blocks" else DataLoader(dataset, 7, collate_fn=collator)
        rows = [row for batch in batches for row in zip(batch["labels"], batch["token_type_ids"], strict=True)]
        for name, (labels_l, types_l) in zip(names, rows, strict=True):
            types = types_l[labels_l == tokenizer.first_bin_id].tolist()
            shown[name[0]] |= {tokenizer.type_name(type_) for type_ in types}
    assert shown == {"x": {*GENES[:6]}, "y": {*GENES[2:]}}


def test_coverage_is_what_the_file_of_a_cell_measured(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = IterableAnnDataset(Corpus.open(mixed).paths("train"), GeneTokenizer.from_pretrained(mixed))
    assert dataset.coverage == 6 / 8
    assert "some of its cells come from files that measure only 75.0% of the panel" in caplog.text


def test_cells_of_all_shards_share_one_mask_per_source(mixed: Path) -> None:
    paths = Corpus.open(mixed).paths("train")
    stream = list(IterableAnnDataset(paths, GeneTokenizer.from_pretrained(mixed), shuffle=True))
    assert len(paths) > 1
    assert len({cell.is_measured_g.tobytes() for cell in stream}) == 2
    blocks = IterableAnnDataset(paths, GeneTokenizer.from_pretrained(mixed), shuffle=True, batch_size=9).blocks()
    assert {len(block.measured_tg) for block in blocks} == {3}, "all genes, and one table for each source"


def test_cells_of_a_shard_in_memory_know_what_their_source_measured(mixed: Path) -> None:
    path, tokenizer = Corpus.open(mixed).paths("train")[0], GeneTokenizer.from_pretrained(mixed)
    from_file, in_memory = (list(IterableAnnDataset(given, tokenizer)) for given in (path, ad.read_h5ad(path)))
    masks = [(a.is_measured_g, b.is_measured_g) for a, b in zip(from_file, in_memory, strict=True)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in masks)


def test_cells_of_a_corpus_in_which_all_files_measure_all_carry_no_mask(corpus: Path) -> None:
    stream = IterableAnnDataset(Corpus.open(corpus).paths("train"), GeneTokenizer.from_pretrained(corpus))
    assert all(cell.is_measured_g is None for cell in stream)


def test_what_was_measured_follows_columns_that_are_taken_out_or_moved(mixed: Path) -> None:
    tokenizer, whole = GeneTokenizer.from_pretrained(mixed), ad.read_h5ad(Corpus.open(mixed).paths("train")[0])
    generator = np.random.default_rng(0)
    moved = whole[:, generator.permutation(whole.n_vars)].copy()
    for ours, theirs in zip(IterableAnnDataset(whole, tokenizer), IterableAnnDataset(moved, tokenizer), strict=True):
        assert np.array_equal(ours.is_measured_g, theirs.is_measured_g)
    fewer = whole[:, 1:].copy()
    for ours, theirs in zip(IterableAnnDataset(whole, tokenizer), IterableAnnDataset(fewer, tokenizer), strict=True):
        kept_g = np.isin(tokenizer.genes, fewer.var_names)
        assert np.array_equal(ours.is_measured_g & kept_g, theirs.is_measured_g)


def test_a_damaged_table_of_measured_genes_is_refused(mixed: Path) -> None:
    odd = ad.read_h5ad(Corpus.open(mixed).paths("train")[0])
    odd.varm[MEASURED_KEY] = np.zeros((odd.n_vars, 2))
    with pytest.raises(InputError, match=r"does not say which of 8 columns were measured"):
        next(iter(IterableAnnDataset(odd, tokenizer=GeneTokenizer.from_pretrained(mixed))))


def test_a_shard_that_names_an_unknown_table_of_genes_is_refused(mixed: Path) -> None:
    odd = ad.read_h5ad(Corpus.open(mixed).paths("train")[0])
    odd.obs[SOURCE_COLUMN] = 2
    with pytest.raises(InputError, match=r"names table 2 of 2 tables of genes"):
        next(iter(IterableAnnDataset(odd, GeneTokenizer.from_pretrained(mixed))))


def test_the_words_of_a_gene_report_are_explained_where_they_are_printed(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        prepare(named("symbols and ids", "x"), tmp_path / "corpus", num_top_genes=5)
    assert "mapped: 5 columns are in the panel under another name of their gene" in caplog.text
    assert "dropped: 3 columns are genes outside the panel" in caplog.text


def test_the_manifest_says_what_became_of_every_column(tmp_path: Path) -> None:
    first = cells(counts(30), genes=ENSEMBL, prefix="x")
    first.var["feature_name"] = GENES
    second = cells(counts(30), genes=[*GENES[:5], ENSEMBL[4] + ".2", "7", ""], prefix="y")
    (tmp_path / "panel.txt").write_text("\n".join([*ENSEMBL[:5], "G6", "Z1"]))
    made = prepare([first, second], tmp_path / "corpus", panel=str(tmp_path / "panel.txt"), split_by="cell")
    reports = {report["mapped"]["count"]: report for report in Corpus.open(made).manifest["gene_tables"]}
    counted = [{kind: report["count"] for kind, report in reports[mapped].items()} for mapped in (0, 5)]
    assert counted[0] == {"kept": 6, "mapped": 0, "summed": 0, "dropped": 2, "unknown": 0, "unmeasured": 1}
    assert counted[1] == {"kept": 1, "mapped": 5, "summed": 1, "dropped": 0, "unknown": 2, "unmeasured": 2}
    assert reports[5]["mapped"]["examples"] == GENES[:5]
    assert reports[5]["summed"]["examples"] == ["G4"]
    assert reports[5]["unknown"]["examples"] == ["7", ""]
    assert reports[0]["unmeasured"]["examples"] == ["Z1"]


def test_a_given_panel_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "panel.txt").write_text("G5\nZ1\nG1\n")
    made = prepare(cells(counts(40)), tmp_path / "corpus", panel=str(tmp_path / "panel.txt"))
    assert GeneTokenizer.from_pretrained(made).genes == ("G5", "Z1", "G1")
    assert measured_genes(Corpus.open(made).paths("train")[0]).tolist() == [[True, False, True]]


def test_numbers_are_not_taken_for_genes_where_a_symbol_stands_beside(tmp_path: Path) -> None:
    adata = cells(counts(40), genes=[str(i) for i in range(8)])
    adata.var["feature_name"] = GENES
    assert sorted(GeneTokenizer.from_pretrained(prepare(adata, tmp_path / "corpus")).genes) == GENES


def test_numbers_alone_name_no_genes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numbers for names. Name the column of var .* --gene_id_column"):
        prepare(cells(counts(40), genes=[str(i) for i in range(8)]), tmp_path / "corpus")
