"""Columns are found by name only: ids, versions, symbols, duplicates, each on a panel of a few genes."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbgene.data_utils.genes import GenePanel, clean_gene, names_of, read_panel
from perturbgene.data_utils.labels import Vocabulary
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.sources import MemoryFile
from perturbgene.errors import InputError

CD3E, MS4A1, LYZ = "ENSG00000198851", "ENSG00000156738", "ENSG00000090382"


@pytest.fixture
def panel() -> GenePanel:
    return GenePanel((CD3E, MS4A1, LYZ), ("CD3E", "MS4A1", "LYZ"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("ENSG00000156738.18", "ENSG00000156738", id="version"),
        pytest.param("ENSMUSG00000024673.4", "ENSMUSG00000024673", id="version of a mouse gene"),
        pytest.param("ENSG00000182378.15_PAR_Y", "ENSG00000182378_PAR_Y", id="the Y copy stays another gene"),
        pytest.param(" MS4A1 ", "MS4A1", id="blanks"),
        pytest.param("RP11-34P13.7", "RP11-34P13.7", id="a symbol with a point"),
        pytest.param("cd3e", "cd3e", id="case is not guessed"),
        pytest.param(float("nan"), "", id="NaN is no name"),
        pytest.param(pd.NA, "", id="NA is no name"),
        pytest.param(None, "", id="None is no name"),
    ],
)
def test_names_are_cleaned_without_guessing(given: object, expected: str) -> None:
    assert clean_gene(given) == expected


def test_columns_are_found_in_any_order_and_extra_ones_are_set_aside(panel: GenePanel) -> None:
    alignment = panel.align([LYZ, "ENSG00000000001", CD3E])
    assert alignment.gene_of_column_c.tolist() == [2, -1, 0]
    assert alignment.is_measured_g.tolist() == [True, False, True]
    assert alignment.unknown == ("ENSG00000000001",)


def test_versions_do_not_matter_on_either_side() -> None:
    panel = GenePanel((f"{CD3E}.3", MS4A1))
    assert panel.genes == (CD3E, MS4A1)
    assert panel.align([f"{MS4A1}.18", f"{CD3E}.11"]).gene_of_column_c.tolist() == [1, 0]


def test_symbols_of_the_file_are_found_through_the_symbols_of_the_panel(panel: GenePanel) -> None:
    alignment = panel.align(["LYZ", "CD3E", "XYZ"])
    assert alignment.gene_of_column_c.tolist() == [2, 0, -1]
    assert alignment.by_symbol == ("LYZ", "CD3E")


def test_ids_of_the_file_are_found_through_its_feature_name() -> None:
    panel = GenePanel(("CD3E", "MS4A1"))
    alignment = panel.align([MS4A1, CD3E], other_names_c=[["MS4A1", "CD3E"]])
    assert alignment.gene_of_column_c.tolist() == [1, 0]


def test_a_symbol_never_overrules_an_ensembl_name_of_the_column(panel: GenePanel) -> None:
    alignment = panel.align(["ENSG00000000001"], other_names_c=[["CD3E"]])
    assert alignment.gene_of_column_c.tolist() == [-1]


def test_the_ensembl_id_beside_a_symbol_decides(panel: GenePanel) -> None:
    other_gene_of_that_symbol = "ENSG00000000001"
    alignment = panel.align(["CD3E", "MS4A1"], other_names_c=[[other_gene_of_that_symbol, MS4A1]])
    assert alignment.gene_of_column_c.tolist() == [-1, 1]


@pytest.mark.parametrize("blank", ["", float("nan"), None], ids=["empty text", "NaN", "None"])
def test_a_column_without_a_symbol_is_not_the_panel_gene_without_a_symbol(blank: object) -> None:
    panel = GenePanel(("A", "B"), ("alpha", ""))
    assert panel.align(["X"], other_names_c=[[blank]]).gene_of_column_c.tolist() == [-1]


def test_a_symbol_of_two_panel_genes_finds_neither() -> None:
    panel = GenePanel(("A", "B"), ("same", "same"))
    assert panel.align(["same"]).gene_of_column_c.tolist() == [-1]


def test_columns_of_one_gene_are_named_as_duplicated(panel: GenePanel) -> None:
    alignment = panel.align([CD3E, f"{CD3E}.2", LYZ])
    assert alignment.duplicated == ("CD3E",)
    assert alignment.is_measured_g.tolist() == [True, False, True]


def test_the_coverage_line_counts_every_kind_of_column(panel: GenePanel) -> None:
    line = panel.align([CD3E, f"{CD3E}.2", "LYZ", "other"]).describe()
    assert line == (
        "2 of 3 panel genes found (66.7%), 1 by symbol, 1 summed from several columns ('CD3E'), "
        "1 columns not in the panel"
    )


def check_genes(panel: GenePanel, names: list[str], minimum: float) -> None:
    """Check a file of one cell with genes of these names."""
    adata = ad.AnnData(np.ones((1, len(names))), var=pd.DataFrame(index=names))
    Shard(MemoryFile(adata, path="a.h5ad"), panel, Vocabulary({})).check_genes(minimum)


def test_names_in_another_case_are_not_taken_but_told(panel: GenePanel) -> None:
    names = [name.lower() for name in panel.genes]
    with pytest.raises(InputError, match=f"0 of 3 .*3 more differ in upper and lower case only .'{names[0]}'"):
        check_genes(panel, names, 0.0)


def test_coverage_under_the_minimum_stops_with_the_flags_to_use(panel: GenePanel) -> None:
    with pytest.raises(
        InputError, match=r"a.h5ad: 1 of 3 .* under --min_gene_coverage 0.5; its first names are 'x', 'y'"
    ):
        check_genes(panel, ["LYZ", "x", "y"], 0.5)


def test_a_file_without_any_gene_of_the_panel_stops_even_at_minimum_zero(panel: GenePanel) -> None:
    with pytest.raises(InputError, match="0 of 3 panel genes"):
        check_genes(panel, ["x"], 0.0)


@pytest.mark.parametrize(
    ("genes", "symbols", "message"),
    [
        pytest.param((), (), "panel is empty", id="no gene"),
        pytest.param(("A", "A"), (), "'A' more than once", id="twice the same"),
        pytest.param((f"{CD3E}.1", f"{CD3E}.2"), (), "more than once", id="two versions of one gene"),
        pytest.param(("A", "B"), ("a",), "1 gene symbols were given for 2 genes", id="too few symbols"),
        pytest.param(("A", " "), (), "blank", id="a blank name"),
    ],
)
def test_a_panel_that_is_ambiguous_is_refused(genes: tuple[str, ...], symbols: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenePanel(genes, symbols)


def test_genes_show_their_symbol_where_they_have_one() -> None:
    panel = GenePanel((CD3E, LYZ), ("CD3E", ""))
    assert [panel.display_name(0), panel.display_name(1)] == ["CD3E", LYZ]


@pytest.mark.parametrize(("name", "index"), [(f"{LYZ}.7", 2), ("MS4A1", 1), ("ms4a1", -1)])
def test_a_gene_is_found_by_id_or_symbol(panel: GenePanel, name: str, index: int) -> None:
    assert panel.find(name) == index


def test_genes_that_a_user_names_are_found_together(panel: GenePanel) -> None:
    assert panel.find_all(["MS4A1", f"{LYZ}.7"], flag="genes").tolist() == [1, 2]
    with pytest.raises(InputError, match="'MS4A2' is not among the 3 genes .* Did you mean 'MS4A1'.*--marker_genes"):
        panel.find_all(["LYZ", "MS4A2"], flag="marker_genes")


def test_a_file_names_its_genes_by_columns_of_var_in_the_order_of_habit(make_adata: Any) -> None:
    var = {"gene_symbols": [*"abcd"], "feature_name": [*"efgh"], "gene_ids": [*"1234"], "other": [*"5678"]}
    names = names_of(MemoryFile(make_adata([[1, 0, 0, 0]], var=var)))
    assert names.own_c.tolist() == ["CD3E", "MS4A1", "NKG7", "LYZ"]
    assert [[*column] for column in names.ids] == [[*"1234"]]
    assert [[*column] for column in names.symbols] == [[*"efgh"], [*"abcd"]]
    assert names_of(MemoryFile(make_adata([[1, 0, 0, 0]], var=var)), "other").own_c.tolist() == [*"5678"]


def test_two_thousand_shuffled_columns_keep_their_genes() -> None:
    panel = GenePanel(tuple(f"G{index}" for index in range(2_000)))
    order = np.random.default_rng(0).permutation(2_000)
    assert panel.align([f"G{index}" for index in order]).gene_of_column_c.tolist() == order.tolist()


def test_a_panel_file_has_one_gene_per_line_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "panel.txt"
    path.write_text("# ranked\nCD3E\n\nLYZ\tlysozyme  # marker\n", encoding="utf-8")
    assert read_panel(path) == ("CD3E", "LYZ")


def test_a_missing_panel_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.txt cannot be read"):
        read_panel(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ms4a1", "MS4A1"),
        ("Ms4a1", "MS4A1"),
        ("CD20", "MS4A1"),
        ("cd-20", "MS4A1"),
        ("p53", "TP53"),
        ("TP35", "TP53"),
        ("ensg00000090382", "ENSG00000090382"),
        ("HLA DRA", "HLA-DRA"),
    ],
)
def test_a_gene_in_another_case_or_by_a_synonym_is_suggested(name: str, meant: str) -> None:
    panel = GenePanel(
        ("ENSG00000156738", "ENSG00000141510", "ENSG00000090382", "ENSG00000204287"),
        ("MS4A1", "TP53", "LYZ", "HLA-DRA"),
    )
    with pytest.raises(InputError, match=f"gene '{name}' is not among .*Did you mean '{meant}'\\? Change --genes"):
        panel.find_all([name], flag="genes")


def test_a_synonym_that_the_panel_lacks_is_not_suggested() -> None:
    with pytest.raises(InputError, match="gene 'CD20' is not among .*Did you mean 'CD2'"):
        GenePanel(("CD2", "LYZ")).find_all(["CD20"], flag="genes")
