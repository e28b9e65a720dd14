"""Files of several sources: what they lack, mix or name otherwise is handled and reported, or refused."""

from pathlib import Path

import numpy as np
import pytest

from perturbgene.corpus.audit import near_duplicates
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from tests.corpus.test_prepare import GENES, audit, cells, corpus_tokens, counts, split


def test_a_phenotype_column_that_one_file_lacks_is_missing_in_its_cells(tmp_path: Path) -> None:
    first, second = cells(counts(40), prefix="x"), cells(counts(40, seed=1), prefix="y")
    second.obs["tissue"] = np.resize(["blood", "lung"], 40)
    made = prepare([first, second], tmp_path / "corpus", phenotypes=["cell_type", "tissue"])
    for name in ("train", "eval"):
        obs = split(made, name).obs
        assert (obs["tissue"].isna() == obs.index.str.startswith("x")).all()
    assert "obs['tissue'] is not in 'AnnData', so for these 40 cells their labels are absent" in audit(made)


def test_cells_of_a_file_without_the_donor_column_stay_together(tmp_path: Path) -> None:
    first, second = cells(counts(60), prefix="x"), cells(counts(20, seed=1), prefix="y")
    del second.obs["donor_id"]
    made = prepare([first, second], tmp_path / "corpus")
    sides = [split(made, name).obs["donor_id"].isna().sum() for name in ("train", "eval")]
    assert sorted(sides) == [0, 20]
    assert "obs['donor_id'] is not in 'AnnData', so for these 20 cells they are kept together" in audit(made)


def test_a_column_that_no_file_has_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no obs column 'tisue'.*'tissue'"):
        prepare(cells(counts(40), tissue="lung"), tmp_path / "corpus", phenotypes=["cell_type", "tisue"])


def test_labels_of_two_files_that_differ_in_spelling_only_are_reported(tmp_path: Path) -> None:
    other = cells(counts(60, seed=1), prefix="y")
    other.obs["cell_type"] = other.obs["cell_type"].replace(
        {"B cell": "B cells", "T cell": "T-cell", "NK cell": "nk cell"}
    )
    found = audit(prepare([cells(counts(60), prefix="x"), other], tmp_path / "corpus", phenotypes=["cell_type"]))
    for pair in ("'B cell', 'B cells'", "'T cell', 'T-cell'", "'NK cell', 'nk cell'"):
        assert f"cell_type: {pair} differ in case, plural or punctuation only" in found


@pytest.mark.parametrize(
    "labels", [["CD4+ T", "CD4- T"], ["stage 1", "stage 11"], ["-1", "1"], ["1.5", "15"], ["a1 1", "a11"]]
)
def test_labels_that_mean_something_else_are_no_duplicates(labels: list[str]) -> None:
    assert near_duplicates(labels) == []


def test_numbers_in_one_file_and_names_in_another_are_reported(tmp_path: Path) -> None:
    other = cells(counts(60, seed=1), prefix="y", cell_type=np.resize([0, 1, 2], 60))
    found = audit(prepare([cells(counts(60), prefix="x"), other], tmp_path / "corpus", phenotypes=["cell_type"]))
    assert "cell_type: labels are numbers in 'AnnData' and names in 'AnnData'" in found


def test_a_phenotype_of_one_label_is_reported(tmp_path: Path) -> None:
    found = audit(prepare(cells(counts(60), tissue="lung"), tmp_path / "corpus", phenotypes=["cell_type", "tissue"]))
    assert "tissue: every labeled training cell is 'lung'" in found
    assert "cell_type: every" not in found


def test_labels_that_no_held_out_cell_has_are_reported(tmp_path: Path) -> None:
    adata = cells(counts(60), donors="abcdef")
    adata.obs.loc[adata.obs["donor_id"].isin(["a", "b"]), "cell_type"] = "rare"
    found = audit(prepare(adata, tmp_path / "corpus", phenotypes=["cell_type"], eval_donors=["f"]))
    assert "cell_type: 'rare' occur in training cells only" in found


def test_the_panel_starts_with_genes_that_most_cells_measure(tmp_path: Path) -> None:
    """A small file with wild genes of its own does not fill the panel with genes that no other cell knows."""
    small = cells(
        counts(12, 8) * np.array([1, 1, 1, 1, 50, 50, 50, 50]), genes=[*GENES[:4], "W", "X", "Y", "Z"], prefix="y"
    )
    made = prepare([cells(counts(60), prefix="x"), small], tmp_path / "corpus", num_top_genes=8)
    assert sorted(GeneTokenizer.from_pretrained(made).genes) == GENES


def test_a_file_with_few_of_the_panels_genes_is_reported(tmp_path: Path) -> None:
    parts = [cells(counts(60), prefix="x"), cells(counts(12, 2, seed=1), prefix="y")]
    assert "'AnnData': 2 of 8 panel genes are measured (25.0%)" in audit(prepare(parts, tmp_path / "corpus"))


def test_tokens_without_a_column_equal_those_with_an_empty_one(tmp_path: Path) -> None:
    second = cells(counts(40, seed=1), prefix="y", tissue=np.resize(["blood", "lung"], 40))
    made = []
    for number, first in enumerate([cells(counts(40), prefix="x"), cells(counts(40), prefix="x", tissue=np.nan)]):
        options = {"phenotypes": ["cell_type", "tissue"], "eval_donors": ["a"]}
        made.append(corpus_tokens(prepare([first, second], tmp_path / f"corpus{number}", **options)))
    assert made[0] == made[1]


def test_a_similar_column_of_the_file_is_suggested(tmp_path: Path) -> None:
    second = cells(counts(40, seed=1), prefix="y", CellType="B cell", patient="p")
    second.obs = second.obs.drop(columns=["cell_type", "donor_id"])
    found = audit(prepare([cells(counts(60)), second], tmp_path / "corpus", phenotypes=["cell_type"]))
    assert "they do not teach it; rename obs['CellType'] if it is the same" in found
    assert "as if they were one; rename obs['patient'] if it is the same" in found


def test_repeated_columns_of_obs_are_refused(tmp_path: Path) -> None:
    adata = cells(counts(40), tissue="lung")
    adata.obs.columns = ["cell_type", "donor_id", "cell_type"]
    with pytest.raises(InputError, match=r"obs has more than one column 'cell_type'. Rename all but one"):
        prepare(adata, tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_donors_that_differ_in_spelling_only_and_are_split_are_reported(tmp_path: Path) -> None:
    parts = [
        cells(counts(40), donors=["d 1", "d 2"], prefix="x"),
        cells(counts(40, seed=1), donors=["D_1", "D3"], prefix="y"),
    ]
    found = audit(prepare(parts, tmp_path / "corpus", eval_donors=["D_1"]))
    assert "donor_id: 'D_1', 'd 1' differ in case, plural or punctuation only and are on both sides" in found
    assert "on both sides" not in audit(prepare(parts, tmp_path / "other", eval_donors=["d 2"]))


MOUSE = [f"ENSMUSG{i:011d}" for i in range(8)]
HUMAN = [f"ENSG{i:011d}" for i in range(8)]


@pytest.mark.parametrize(
    ("genes", "other", "reason"),
    [
        pytest.param(GENES, HUMAN, "One has Ensembl ids, the other has symbols.*--gene_id_column", id="ids"),
        pytest.param(MOUSE, HUMAN, "different species .*ENS.*orthologs", id="species"),
        pytest.param(GENES, [gene.lower() for gene in GENES], "upper and lower case only, as mouse", id="case"),
        pytest.param(GENES, [f"rat_{gene}" for gene in GENES], "begin with 'rat_': remove it", id="prefix"),
        pytest.param(GENES, [f"cell{i}" for i in range(8)], "are swapped: transpose it", id="transposed"),
        pytest.param(GENES, [f"Z{i}" for i in range(8)], "bring the files to one naming first", id="unknown"),
    ],
)
def test_the_reason_is_named_why_files_share_no_gene(
    tmp_path: Path, genes: list[str], other: list[str], reason: str
) -> None:
    second = cells(counts(30, seed=1), genes=other, prefix="y")
    if reason.startswith("are swapped"):
        second = cells(counts(8, seed=1), genes=other)
        second.obs_names = GENES
    with pytest.raises(InputError, match=f"shares no gene with the other files.*{reason}"):
        prepare([cells(counts(60), genes=genes), second], tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_two_pairs_of_files_that_share_no_gene_are_refused(tmp_path: Path) -> None:
    """Each file shares genes with one other, but the corpus falls into two halves."""
    names = [GENES, GENES[:7], HUMAN, HUMAN[:7]]
    parts = [cells(counts(30, len(genes), seed=i), genes=genes, prefix=f"c{i}_") for i, genes in enumerate(names)]
    with pytest.raises(InputError, match="shares no gene with the other files"):
        prepare(parts, tmp_path / "corpus")


def test_files_that_share_genes_through_a_third_one_are_one_corpus(tmp_path: Path) -> None:
    names = [GENES[:4], GENES[4:], GENES]
    parts = [cells(counts(30, len(g), seed=i), genes=g, prefix=f"c{i}_") for i, g in enumerate(names)]
    assert sorted(GeneTokenizer.from_pretrained(prepare(parts, tmp_path / "corpus")).genes) == GENES


def test_genes_are_ranked_by_how_they_vary_in_cells_that_measure_them(tmp_path: Path) -> None:
    """The steady gene S would vary most if it counted as zero in the second file's cells, where it is unknown."""
    generator = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(30)] + ["S"]
    values_ng = generator.poisson(generator.gamma(0.5, 40.0, (100, 31)))
    values_ng[:, 30] = 200
    other_ng = generator.poisson(generator.gamma(0.5, 40.0, (40, 30)))
    parts = [cells(values_ng, genes=genes, prefix="x"), cells(other_ng, genes=genes[:30], prefix="y")]
    made = prepare(parts, tmp_path / "corpus", hvg_flavor="seurat_v3", eval_donors=["a"])
    assert GeneTokenizer.from_pretrained(made).genes[-1] == "S"


def test_the_audit_names_the_matrix_that_has_the_missing_genes(tmp_path: Path) -> None:
    cut = cells(counts(60, seed=1), prefix="y")
    cut.raw = cut.copy()
    cut = cut[:, :3].copy()
    found = audit(prepare([cells(counts(90), prefix="x"), cut], tmp_path / "corpus"))
    assert "3 of 8 panel genes are measured (37.5%)" in found
    assert ".raw has 100.0% of the panel: give --layer raw." in found


@pytest.mark.parametrize("name", ["corpus{1}", "corpus[1]", "corpus{a,b}", "corpus*"])
def test_the_shards_of_a_manifest_are_no_patterns(tmp_path: Path, name: str) -> None:
    made = prepare(cells(counts(60)), tmp_path / name, phenotypes=["cell_type"])
    assert len(corpus_tokens(made)) == 60
