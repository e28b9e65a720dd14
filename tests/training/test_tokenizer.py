"""The tokenizer of a new run: what a configuration names, and what cannot be chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbgene.configs import parse_args
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.training.tokenizer import tokenizer_of

Make = Callable[..., Any]


CELL = [[0.7, 0.0, 2.5, 1.2]]


def chosen(config: Any) -> GeneTokenizer:
    """Return the tokenizer of a configuration and its files."""
    return tokenizer_of(config, expand_paths(config.train_data_paths))


def config(write_h5ad: Make, *flags: Any, var: dict[str, Any]) -> Any:
    """Configure `mlm` on a one-cell file with some columns of var."""
    return parse_args(["mlm", "--output_dir", "run", "--train_data_paths", write_h5ad(CELL, var=var), *map(str, flags)])


def test_a_configuration_names_vocabulary_edges_and_the_ranked_genes_of_a_file(
    write_h5ad: Make, tmp_path: Path
) -> None:
    var = {"highly_variable_rank": [2.0, np.nan, 0.0, 1.0], "feature_name": ["c", "m", None, "l"]}
    (tmp_path / "vocab.json").write_text('{"sex": ["[male]"]}')
    (tmp_path / "edges.json").write_text('{"NKG7": [1.0], "LYZ": [2.0]}')
    files = ("--vocab_path", tmp_path / "vocab.json", "--bin_edges_path", tmp_path / "edges.json")
    tokenizer = chosen(config(write_h5ad, "--num_top_genes", 2, *files, var=var))
    assert tokenizer.genes == ("NKG7", "LYZ")
    assert tokenizer.gene_symbols == ("", "l")
    assert tokenizer.bin_edges.edges_ge.tolist() == [[1.0], [2.0]]
    assert tokenizer.included_phenotypes == ("sex",)


@pytest.mark.parametrize(
    ("var", "top", "message"),
    [
        ({"highly_variable_rank": [0.0, 0.0, 1.0, 2.0]}, 2, "has ties"),
        ({}, 2, "no var column 'highly_variable_rank'"),
        ({"highly_variable_rank": [0.0, np.nan, 1.0, 2.0]}, 4, "num_top_genes 4 exceeds the 3 genes"),
    ],
    ids=["ties", "no rank", "too many"],
)
def test_genes_that_cannot_be_ranked_are_refused(
    write_h5ad: Make, tmp_path: Path, var: Any, top: int, message: str
) -> None:
    (tmp_path / "vocab.json").write_text('{"sex": ["male"]}')
    flags = ("--num_top_genes", top, "--vocab_path", tmp_path / "vocab.json", "--bin_edges", 0.5)
    with pytest.raises(InputError, match=message):
        chosen(config(write_h5ad, *flags, var=var))


@pytest.fixture
def run(make_tokenizer: Make, tmp_path: Path) -> Path:
    """The tokenizer of a run that knows B and T cells, female and male, and includes the cell type only."""
    make_tokenizer(included_phenotypes=["cell_type"]).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def continued(write_h5ad: Make, run: Path, obs: dict[str, Any], *flags: Any, verb: str = "mlm") -> GeneTokenizer:
    """Return the tokenizer of training on a file of cells with these labels that starts from the run."""
    path = write_h5ad(CELL * len(next(iter(obs.values()))), obs=obs, name="more.h5ad")
    paths = ["--output_dir", "new", "--train_data_paths", path, "--pretrained_model_path", run]
    return chosen(parse_args([verb, *map(str, [*paths, *flags])]))


def test_labels_of_the_files_that_the_run_lacks_follow_behind_its_own(write_h5ad: Make, run: Path) -> None:
    obs = {"cell_type": ["platelet", "B_cell", "A cell", "unknown", None], "note": list("abcde")}
    tokenizer = continued(write_h5ad, run, obs)
    assert tokenizer.phenotypes == {
        "cell_type": ("B cell", "T cell", "A cell", "platelet"),
        "sex": ("female", "male"),
    }
    assert tokenizer.included_phenotypes == ("cell_type",)


@pytest.mark.parametrize(
    ("verb", "flags"), [("mlm", ["--included_phenotypes", "dose"]), ("cls", ["--phenotype_category", "dose"])]
)
def test_a_phenotype_that_the_run_lacks_is_learned_if_it_is_named(
    write_h5ad: Make, run: Path, verb: str, flags: list[str]
) -> None:
    obs = {"stim": ["high", "low", "none"]}
    more = ["--phenotypes", "dose=stim", "--missing_labels", "none"]
    tokenizer = continued(write_h5ad, run, obs, *flags, *more, verb=verb)
    assert tokenizer.phenotypes["dose"] == ("high", "low")


def test_only_labels_of_the_chosen_cells_are_learned(write_h5ad: Make, run: Path) -> None:
    obs = {"cell_type": ["platelet", "neuron"], "tissue": ["blood", "brain"]}
    tokenizer = continued(write_h5ad, run, obs, "--where", "tissue=blood")
    assert tokenizer.phenotypes["cell_type"] == ("B cell", "T cell", "platelet")


def test_a_label_that_differs_in_spelling_only_is_warned_of(
    write_h5ad: Make, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    continued(write_h5ad, run, {"cell_type": ["b-cell", "T cell"]})
    assert "cell_type 'b-cell' is new, though 'B cell' is known" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x", "y"], r"no obs column 'dose'. Did you mean 'dosis'.*--phenotypes dose=COLUMN"),
        ([None, "unknown"], "no training cell has a 'dose'"),
        (list(np.linspace(0, 1, 60)), "60 different numbers, too many to be labels of 'dose'"),
    ],
    ids=["no column", "no label", "measurements"],
)
def test_a_new_phenotype_without_labels_is_refused(
    write_h5ad: Make, run: Path, values: list[Any], message: str
) -> None:
    column = "dosis" if values[0] == "x" else "dose"
    with pytest.raises(InputError, match=message):
        continued(write_h5ad, run, {column: values}, "--phenotype_category", "dose", verb="cls")


def test_a_table_of_names_names_the_genes_of_a_file(write_h5ad: Make, tmp_path: Path) -> None:
    """Two columns of one gene are one, where the first is ranked; its symbols are those of other genes."""
    (tmp_path / "names.csv").write_text("CD3E,ONE\nLYZ,ONE\nNKG7,TWO\n")
    var = {"highly_variable_rank": [2.0, 3.0, 0.0, 1.0], "feature_name": ["c", "m", "n", "l"]}
    flags = ("--bin_edges", 0.5, "--gene_map", tmp_path / "names.csv", "--vocab_path", tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text('{"sex": ["male"]}')
    tokenizer = chosen(config(write_h5ad, *flags, var=var))
    assert tokenizer.genes == ("TWO", "ONE", "MS4A1") and not any(tokenizer.gene_symbols)
