"""Files of several sources: what they lack, mix or name otherwise is handled and reported, or refused."""

from pathlib import Path

import numpy as np
import pytest

from perturbgene.corpus.audit import near_duplicates
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from tests.corpus.test_prepare import GENES, audit, cells, counts, split


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


@pytest.mark.parametrize("names", [[f"ENSG{i:011d}" for i in range(8)], [f"hg_{gene}" for gene in GENES]])
def test_files_that_share_no_gene_are_refused(tmp_path: Path, names: list[str]) -> None:
    parts = [cells(counts(30), prefix="x"), cells(counts(30), genes=names, prefix="y")]
    with pytest.raises(InputError, match=r"shares no gene with the other files.*--gene_id_column"):
        prepare(parts, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


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
