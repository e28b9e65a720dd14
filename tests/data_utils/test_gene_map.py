"""`--gene_map`: columns of a file are renamed by a table of the user, and what it did is counted."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from perturbgene.data_utils.gene_map import GeneMap, read_gene_map
from perturbgene.data_utils.genes import GeneNames, GenePanel
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import Vocabulary
from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError

MOUSE = {"Cd3e": "CD3E", "Ms4a1": "MS4A1", "Nkg7": "NKG7", "Lyz1": "LYZ", "Lyz2": "LYZ"}
COUNTS = [[1, 0, 2, 3, 4], [0, 5, 0, 1, 0]]


def table(path: Path, text: str) -> Mapping[str, str]:
    path.write_text(text, encoding="utf-8")
    found = read_gene_map(path)
    assert found is not None
    return found.target_of


def renamed(target_of: dict[str, str], own: list[str], **more: Any) -> tuple[list[str], str]:
    arrays = {name: tuple(np.array(column, dtype=object) for column in columns) for name, columns in more.items()}
    names = GeneNames(np.array(own, dtype=object), arrays.get("ids", ()), arrays.get("symbols", ()))
    renaming = GeneMap("table.csv", target_of).rename(names)
    return renaming.names.own_c.tolist(), renaming.text


@pytest.mark.parametrize(
    "text",
    [
        "Cd3e,CD3E\nLyz2,LYZ\n",
        "\ufeffCd3e\tCD3E\nLyz2\tLYZ",
        '# of Ensembl 110\nCd3e,CD3E\n"Lyz2","LYZ"\r\n\nLyz2,LYZ\nGm1,\n,XIST\n',
        " Cd3e , CD3E\nLyz2,GRCh38_LYZ\n",
    ],
    ids=["commas", "tabs and a byte order mark", "comments, quotes, blank and repeated rows", "blanks and genomes"],
)
def test_a_table_is_read_however_it_is_written(text: str, tmp_path: Path) -> None:
    assert table(tmp_path / "names.csv", text) == {"Cd3e": "CD3E", "Lyz2": "LYZ"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Cd3e\nLyz2\n", r"has a row of 1 columns \('Cd3e'\)"),
        (b"a,b,c\nCd3e,CD3E,x\n", "has a row of 3 columns"),
        (b"Cd3e;CD3E\n", "has a row of 1 columns"),
        (b"", "has no row with two names"),
        (b"Cd3e,\n,CD3E\n", "has no row with two names"),
        (b"\x89HDF\r\n\x1a\n\xff\xfe\x00", "cannot be read"),
        (b"Cd3e,CD3E\x00\n\x00\x00,\x01\n", "is no text"),
        (b'"Cd3e,CD3E\nLyz2,LYZ\n', "has a row of 1 columns"),
    ],
    ids=["one column", "three", "semicolons", "empty", "no pair", "HDF5", "zero bytes", "an open quote"],
)
def test_what_is_no_table_of_two_columns_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"gene_map .*names.csv.* {message}.*Give a .csv or .tsv of two columns"):
        read_gene_map(path)


def test_a_missing_table_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(InputError, match="gene_map .* cannot be read"):
            read_gene_map(path)


def test_a_table_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    assert table(path, "a,b\n") == {"a": "b"}
    assert table(path, "a,ccc\n") == {"a": "ccc"}


def test_names_are_replaced_once_and_at_the_same_time() -> None:
    assert renamed({"A": "B", "B": "A", "C": "D", "D": "E"}, ["A", "B", "C", "D", "X"])[0] == ["B", "A", "D", "E", "X"]


def test_a_chain_or_circle_of_names_is_warned_of(
    make_adata: Callable[..., ad.AnnData], caplog: pytest.LogCaptureFixture
) -> None:
    circle = GeneMap("table.csv", {"CD3E": "LYZ", "LYZ": "CD3E", "NKG7": "NKG7"})
    panel = GenePanel(("CD3E", "MS4A1", "NKG7", "LYZ"))
    with caplog.at_level(logging.WARNING, logger="perturbgene"):
        Shard(open_source(make_adata(COUNTS[0][:4])), panel, Vocabulary({}), gene_map=circle).check_genes(0.5)
    assert "new names that the table renames, too (each column is renamed once): 2" in caplog.text


def test_a_column_is_known_by_its_name_or_id_or_symbol() -> None:
    own, text = renamed(
        {"Cd3e": "CD3E", "ENSMUSG00000000002": "LYZ"},
        ["one", "two", "three"],
        ids=[["ENSMUSG00000000001.4", "ENSMUSG00000000002.1", ""]],
        symbols=[["Cd3e", "Lyz2", "Nkg7"]],
    )
    assert own == ["CD3E", "LYZ", "three"]
    assert text == "2 columns renamed by --gene_map"


def test_the_line_counts_what_shares_a_gene_what_the_file_lacks_and_what_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text(
        "mouse,human\nLyz1,LYZ\nLyz2,LYZ\nCd3e,CD3E\nH2-Q1,HLA-A\nH2-Q1,HLA-B\nGm1,GM1\n"
    )
    found = read_gene_map(tmp_path / "names.csv")
    assert found is not None
    renaming = found.rename(GeneNames(np.array(["Cd3e", "Lyz1", "Lyz2", "H2-Q1"], dtype=object), (), ()))
    assert renaming.names.own_c.tolist() == ["CD3E", "LYZ", "LYZ", "H2-Q1"]
    assert renaming.text == (
        "3 columns renamed by --gene_map, those that share a gene with another one: 1, names that the file lacks: 2, "
        "names of several genes, which rename nothing ('H2-Q1'): 1"
    )


def test_a_table_of_other_names_is_refused() -> None:
    with pytest.raises(InputError, match=r"renames nothing: the file's genes are 'Cd3e', the first column .* 'a'\."):
        renamed({"a": "b"}, ["Cd3e"])


def test_columns_of_one_gene_are_summed_like_the_same_cells_under_its_names(
    make_adata: Callable[..., ad.AnnData], make_tokenizer: Callable[..., GeneTokenizer], tmp_path: Path
) -> None:
    (tmp_path / "names.tsv").write_text("".join(f"{name}\t{target}\n" for name, target in MOUSE.items()))
    mouse = make_adata(COUNTS, genes=list(MOUSE))
    human = make_adata([[1, 0, 2, 7], [0, 5, 0, 1]])
    tokenizer = make_tokenizer(normalization="auto", included_phenotypes=())
    dataset = IterableAnnDataset(mouse, tokenizer, gene_map=tmp_path / "names.tsv")
    for ours, theirs in zip(dataset, IterableAnnDataset(human, tokenizer), strict=True):
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert ours["token_type_ids"].tolist() == theirs["token_type_ids"].tolist()
    assert dataset.coverage == 1


def test_a_table_with_swapped_columns_says_so(
    make_adata: Callable[..., ad.AnnData], caplog: pytest.LogCaptureFixture
) -> None:
    swapped = GeneMap("table.csv", {target: name for name, target in MOUSE.items()})
    shard = Shard(
        open_source(make_adata(COUNTS, genes=list(MOUSE))), GenePanel(("CD3E", "LYZ")), Vocabulary({}), gene_map=swapped
    )
    with (
        caplog.at_level(logging.WARNING, logger="perturbgene"),
        pytest.raises(InputError, match="0 of 2 .* or the columns were swapped.*Correct the table of"),
    ):
        shard.check_genes(0.5)
