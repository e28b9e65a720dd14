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
