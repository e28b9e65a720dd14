"""Perturbations edit token sequences exactly as if the cell had been tokenised so."""

import numpy as np
import pytest

from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.perturbation.edits import changed_pairs, edit, perturbations_of
from perturbgene.perturbation.readouts import StateReadout, sequences
from tests.nine_genes import a_tokenizer

# Ids bin_1 and bin_2 are 10 and 11; gene i has token type 3 + i.
TOKENIZER = a_tokenizer()


def block_of_values(adata, tokenizer: GeneTokenizer) -> TokenBlock:
    """Tokenise an AnnData without phenotypes, as a state is read."""
    from perturbgene.data_utils.sources import MemoryFile

    bare = tokenizer.with_settings(included=[])
    shard = bare.open(MemoryFile(adata))
    return sequences(bare.tokenize_block(shard.read(np.arange(adata.n_obs))), tokenizer, StateReadout())


@pytest.fixture
def block(make_adata) -> TokenBlock:
    """Two cells: G0 at bin 1, G2 at bin 2, G4 at bin 1; and G2 at bin 1, G8 at bin 2."""
    values = [[1, 0, 4, 0, 1, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0, 0, 0, 9]]
    return block_of_values(make_adata(values, genes=TOKENIZER.genes), TOKENIZER)


def edited(block: TokenBlock, genes: list[str], tokenizer: GeneTokenizer = TOKENIZER, **options):
    """Return ids, types and own tokens of every sequence that the perturbations change, and which these are."""
    perturbations = perturbations_of(genes, tokenizer, **options)
    pairs = changed_pairs(block, perturbations, tokenizer)
    room = tokenizer.most_genes
    out, is_own_l = edit(block, perturbations, tokenizer, pairs=pairs, most_genes=room)
    rows = [
        [part.tolist() for part in (*out.cell(row), is_own_l[out.offsets_n1[row] : out.offsets_n1[row + 1]])]
        for row in range(len(out))
    ]
    return rows, [part.tolist() for part in pairs]


def test_a_knock_out_removes_the_token_and_nothing_else(block):
    rows, pairs = edited(block, ["G2"])
    assert pairs == [[0, 1], [0, 0]]
    assert rows[0] == [[0, 10, 10, 1], [0, 3, 7, 0], [False] * 4]
    assert rows[1] == [[0, 11, 1], [0, 11, 0], [False] * 3]


def test_a_knock_out_of_a_gene_that_no_cell_expresses_is_never_run(block):
    assert edited(block, ["G1", "G1+G3"]) == ([], [[], []])


def test_a_combination_removes_what_is_there(block):
    rows, pairs = edited(block, ["G4+G0", "G8+G1"])
    assert pairs == [[0, 1], [0, 1]]
    assert [row[1] for row in rows] == [[0, 5, 0], [0, 5, 0]]


def test_over_expression_sets_the_top_bin_and_inserts_at_the_genes_place(block):
    rows, pairs = edited(block, ["G2"], kind="over_express")
    assert pairs == [[1], [0]]  # cell 0 has G2 in the top bin already
    assert rows[0] == [[0, 11, 11, 1], [0, 5, 11, 0], [False, True, False, False]]
    rows, _ = edited(block, ["G3+G8"], kind="over_express")
    assert rows[0] == [
        [0, 10, 11, 11, 10, 11, 1],
        [0, 3, 5, 6, 7, 11, 0],
        [False, False, False, True, False, True, False],
    ]
    assert rows[1][1] == [0, 5, 6, 11, 0]


def test_a_bin_is_set_where_it_differs(block):
    rows, pairs = edited(block, ["G0"], kind="set_bin", level=1)
    assert pairs == [[1], [0]]
    assert rows[0][:2] == [[0, 10, 10, 11, 1], [0, 3, 5, 11, 0]]


def test_all_means_the_genes_that_a_cell_expresses(block):
    assert edited(block, ["all"])[1] == [[0, 0, 0, 1, 1], [0, 2, 4, 2, 8]]
    assert edited(block, ["all"], kind="over_express")[1] == [[0, 0, 1], [0, 4, 2]]


def test_a_full_cell_gives_up_its_last_genes_for_those_that_come_in(make_adata):
    tokenizer = a_tokenizer(max_length=7, included_phenotypes=["cell_type", "tissue"])  # room for three genes
    full = block_of_values(make_adata([[0, 1, 4, 0, 1, 0, 0, 0, 0]], genes=tokenizer.genes), tokenizer)
    rows, _ = edited(full, ["G0", "G8", "G4+G5"], tokenizer, kind="over_express")
    assert [row[1] for row in rows] == [[0, 3, 4, 5, 0], [0, 4, 5, 11, 0], [0, 4, 7, 8, 0]]


def test_removing_a_token_equals_tokenising_the_cell_without_the_gene(pbmc):
    """Bit for bit, on real cells that fit."""
    tokenizer = GeneTokenizer(genes=list(pbmc.var_names), phenotypes={}, bin_edges=[0.5, 1.0, 2.0], max_length=900)
    block = block_of_values(pbmc, tokenizer)
    for gene in ("CD79A", "LYZ"):
        without = pbmc.copy()
        without.X[:, list(pbmc.var_names).index(gene)] = 0
        without.X.eliminate_zeros()
        expected = block_of_values(without, tokenizer)
        perturbations = perturbations_of([gene], tokenizer)
        cells, rows = changed_pairs(block, perturbations, tokenizer)
        assert 0 < len(cells) < len(block)
        out, _ = edit(block, perturbations, tokenizer, pairs=(cells, rows), most_genes=900)
        wanted = expected.take(cells)
        assert np.array_equal(out.input_ids_l, wanted.input_ids_l)
        assert np.array_equal(out.token_type_ids_l, wanted.token_type_ids_l)
        assert np.array_equal(out.offsets_n1, wanted.offsets_n1)
        untouched = np.setdiff1d(np.arange(len(block)), cells)
        assert np.array_equal(block.take(untouched).input_ids_l, expected.take(untouched).input_ids_l)


def test_a_knock_out_in_a_cut_cell_lets_no_other_gene_in(pbmc):
    """It equals tokenising the cell without the gene and with room for one token less."""
    settings = {"genes": list(pbmc.var_names), "phenotypes": {}, "bin_edges": [0.5, 1.0, 2.0]}
    tokenizer = GeneTokenizer(**settings, max_length=60)
    block = block_of_values(pbmc, tokenizer)
    assert (np.diff(block.offsets_n1) == 60).all()
    kept = [tokenizer.type_name(int(type_)) for type_ in block.cell(0)[1][1:-1]]
    without = pbmc[:1].copy()
    without.X[:, list(pbmc.var_names).index(kept[20])] = 0
    without.X.eliminate_zeros()
    expected = block_of_values(without, GeneTokenizer(**settings, max_length=59))
    rows, _ = edited(block.take(np.array([0])), [kept[20]], tokenizer)
    assert rows[0][:2] == [part.tolist() for part in expected.cell(0)]


@pytest.mark.parametrize(
    ("genes", "options", "message"),
    [
        (["G10"], {}, "gene 'G10' is not among the 9 genes of the run's panel. Did you mean 'G1'"),
        (["G1+G1"], {}, "'G1\\+G1', which names a gene twice"),
        (["G1+G2", "G2+G1"], {}, "name a perturbation twice"),
        ([], {}, "no gene is named"),
        (["G1"], {"kind": "set_bin"}, "kind is set_bin and bin is None, but set_bin needs a bin"),
        (["G1"], {"kind": "set_bin", "level": 3}, "--bin is 3, but the run's bins go from 1 to 2"),
        (["G1"], {"kind": "knockout"}, "Did you mean 'knock_out'"),
    ],
)
def test_what_cannot_be_done_is_refused(genes, options, message):
    with pytest.raises(InputError, match=message):
        perturbations_of(genes, TOKENIZER, **options)


def test_genes_are_found_by_symbol_and_named_by_it():
    tokenizer = a_tokenizer(gene_symbols=["CD3E", "", *"BCDEFG", "B"])
    perturbations = perturbations_of(["CD3E+G1", "G8"], tokenizer)
    assert perturbations.types_j.tolist() == [3, 4, 11]
    assert perturbations.names == ("CD3E+G1", "B")
    assert perturbations_of(["all"], tokenizer).names[-1] == "G8"  # two genes share the symbol B


@pytest.mark.parametrize(("name", "meant"), [("cd3e", "CD3E"), ("CD20+CD3E", "MS4A1"), ("CD3E+cd20", "MS4A1")])
def test_a_gene_in_another_case_or_by_a_synonym_is_suggested(name, meant):
    tokenizer = a_tokenizer(gene_symbols=["CD3E", "MS4A1", *"ABCDEFG"])
    with pytest.raises(InputError, match=f"is not among the 9 genes .*Did you mean '{meant}'\\? Change --genes"):
        perturbations_of([name], tokenizer)
