"""What `embed` reads off a cell: states of the right tokens, no label but those given, NaN where nothing is known."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from perturbgene.data_utils.data_collators import ask, block_of
from perturbgene.embedding.cells import KEY, embed, label_embeddings
from perturbgene.embedding.genes import gene_embeddings
from perturbgene.errors import InputError
from perturbgene.inference.run import Run
from perturbgene.main import main
from tests.nine_genes import GENES
from tests.untrained import HIDDEN, a_run, save, some_cells


@pytest.fixture(scope="module")
def run() -> Run:
    return a_run()


@pytest.fixture
def cells() -> ad.AnnData:
    return some_cells()


def states_of(run: Run, cells: ad.AnnData, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Token types and final states of one cell without phenotypes, padded and without packing."""
    tokens = run.tokenizer.with_settings(included=[])(cells[[row]])
    with torch.inference_mode():
        output = run.model.genebert(**{name: values[None] for name, values in tokens.items()})
    return tokens["token_type_ids"].numpy(), output.last_hidden_state[0].numpy()


# -- cells --------------------------------------------------------------------------------------------------------


def test_the_embedding_of_a_cell_is_the_mean_of_what_its_loss_has_trained(run: Run, cells: ad.AnnData) -> None:
    block = block_of(run.tokenizer.with_settings(included=[])(cells[4:7]))
    batch = ask(block, run.tokenizer, asked=run.tokenizer.included_phenotypes)
    states_nph = run.hidden_at(batch, batch.pop("label_positions").numpy()).reshape(3, 2, -1)
    found = embed(cells, run)
    np.testing.assert_allclose(found.obsm[KEY][4:7], states_nph.mean(axis=1), atol=1e-6)
    given = embed(cells, run, given={"tissue": "blood"}, phenotype=["cell_type"]).obsm
    np.testing.assert_allclose(given[KEY], given[f"{KEY}_cell_type"], atol=1e-6)  # one phenotype is left to ask
    assert found.uns["perturbgene"]["pooling"] == "asked"
    classifier = a_run("cls")
    np.testing.assert_array_equal(embed(cells, classifier).obsm[KEY], embed(cells, classifier, pooling="cls").obsm[KEY])


def test_cls_is_the_final_state_of_the_first_token(run: Run, cells: ad.AnnData) -> None:
    found = embed(cells, run, pooling="cls").obsm[KEY]
    np.testing.assert_allclose(found[5], states_of(run, cells, 5)[1][0], atol=1e-6)


def test_pooled_genes_are_the_mean_of_their_final_states(run: Run, cells: ad.AnnData) -> None:
    types, states = states_of(run, cells, 5)
    expected = states[types >= run.tokenizer.first_gene_type].mean(axis=0)
    np.testing.assert_allclose(embed(cells, run, pooling="genes").obsm[KEY][5], expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["asked", "cls", "genes"])
def test_batches_of_64_equal_one_cell_at_a_time(run: Run, pooling: str) -> None:
    cells = some_cells(100, seed=1)
    options = {"pooling": pooling, "phenotype": ["tissue"], "genes": ["G3"], "given": {"cell_type": None}}
    together, single = (embed(cells, run, batch_size=size, **options).obsm for size in (64, 1))
    for key in together:
        np.testing.assert_allclose(together[key], single[key], atol=1e-5)


def test_labels_do_not_leak_unless_they_are_given(run: Run, cells: ad.AnnData) -> None:
    other = cells.copy()
    other.obs["cell_type"], other.obs["tissue"] = "B cell", "blood"
    np.testing.assert_array_equal(embed(cells, run).obsm[KEY], embed(other, run).obsm[KEY])
    given = {"tissue": None}
    own, changed = (embed(some, run, given=given).obsm[KEY] for some in (cells, other))
    assert not np.allclose(own, changed, equal_nan=True)


def test_a_label_said_of_all_cells_is_the_label_read_from_obs(run: Run, cells: ad.AnnData) -> None:
    cells.obs["tissue"] = "spleen"
    said, read = (embed(cells, run, given={"tissue": label}).obsm[KEY] for label in ("spleen", None))
    np.testing.assert_array_equal(said, read)


def test_a_cell_without_genes_is_nan_throughout(run: Run, cells: ad.AnnData) -> None:
    for pooling in ("asked", "cls", "genes"):
        found = embed(cells, run, pooling=pooling, phenotype=["cell_type"]).obsm
        for key in (KEY, f"{KEY}_cell_type"):
            assert np.flatnonzero(np.isnan(found[key]).all(axis=1)).tolist() == [2]
            assert np.isfinite(np.delete(found[key], 2, axis=0)).all()


def test_embeddings_are_float32_rows_in_the_order_of_the_cells(run: Run, cells: ad.AnnData) -> None:
    found = embed(cells, run, batch_size=5)
    assert found.obsm[KEY].dtype == np.float32 and found.obsm[KEY].shape == (12, HIDDEN)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_allclose(embed(cells[order], run, batch_size=5).obsm[KEY], found.obsm[KEY][order], atol=1e-6)


def test_the_cells_themselves_stay_as_they_were(run: Run, cells: ad.AnnData) -> None:
    embed(cells, run)
    assert not cells.obsm and "perturbgene" not in cells.uns


def test_a_path_may_stand_for_the_cells(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    np.testing.assert_array_equal(embed(tmp_path / "in.h5ad", run).obsm[KEY], embed(cells, run).obsm[KEY])
    by_path, by_cells = (gene_embeddings(some, run, groupby="donor") for some in (tmp_path / "in.h5ad", cells))
    np.testing.assert_array_equal(by_path.X, by_cells.X)


def test_a_long_cell_keeps_the_same_genes_whatever_is_given(cells: ad.AnnData) -> None:
    run = a_run(max_length=6)  # room for two genes and both phenotypes
    found = embed(cells, run, genes=GENES, given={"cell_type": None})
    free = embed(cells, run, genes=GENES)
    columns = [f"perturbgene_has_{gene}" for gene in GENES]
    np.testing.assert_array_equal(found.obs[columns], free.obs[columns])
    assert free.obs[columns].sum(axis=1).max() == 2


def test_a_classifier_embeds_cells_too(cells: ad.AnnData) -> None:
    run = a_run("cls")
    np.testing.assert_allclose(embed(cells, run).obsm[KEY][5], states_of(run, cells, 5)[1][0], atol=1e-6)


# -- phenotypes and genes -----------------------------------------------------------------------------------------


def test_a_phenotype_is_the_final_state_of_its_mask(run: Run, cells: ad.AnnData) -> None:
    tokens = run.tokenizer.with_settings(included=[])(cells[[5]])
    ids = torch.cat([torch.tensor([0, 2]), tokens["input_ids"][1:]])  # [CLS] [MASK] genes [EOS]
    types = torch.cat([torch.tensor([0, 1]), tokens["token_type_ids"][1:]])
    with torch.inference_mode():
        expected = run.model.genebert(ids[None], types[None]).last_hidden_state[0, 1].numpy()
    found = embed(cells, run, phenotype=["cell_type"]).obsm[f"{KEY}_cell_type"][5]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_phenotypes_asked_together_are_asked_one_by_one(run: Run, cells: ad.AnnData) -> None:
    both = embed(cells, run, phenotype=["cell_type", "tissue"]).obsm
    alone = embed(cells, run, phenotype=["tissue"]).obsm
    np.testing.assert_allclose(both[f"{KEY}_tissue"], alone[f"{KEY}_tissue"], atol=1e-6)


def test_static_embeddings_of_labels_stand_in_the_provenance(run: Run, cells: ad.AnnData) -> None:
    table = embed(cells, run, phenotype=["tissue"]).uns["perturbgene"]["label_embeddings"]["tissue"]
    assert table.index.tolist() == ["blood", "spleen"]
    weights = run.model.genebert.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(table.to_numpy(), weights[7:9])
    assert table.equals(label_embeddings(run, "tissue"))


@pytest.mark.parametrize("pooling", ["asked", "cls", "genes"])
def test_a_named_gene_is_its_final_state_where_the_cell_has_it_and_nan_elsewhere(
    run: Run, cells: ad.AnnData, pooling: str
) -> None:
    found = embed(cells, run, genes=["G4"], pooling=pooling)
    has_it = cells.X.toarray()[:, 4] > 0
    np.testing.assert_array_equal(found.obs["perturbgene_has_G4"], has_it)
    np.testing.assert_array_equal(np.isfinite(found.obsm[f"{KEY}_gene_G4"]).all(axis=1), has_it)
    row = int(np.flatnonzero(has_it)[1])
    types, states = states_of(run, cells, row)
    place = np.flatnonzero(types == run.tokenizer.first_gene_type + 4)
    np.testing.assert_allclose(found.obsm[f"{KEY}_gene_G4"][[row]], states[place], atol=1e-6)


def test_a_gene_that_no_cell_has_is_nan_everywhere(run: Run, cells: ad.AnnData) -> None:
    cells.X = cells.X.multiply(np.arange(9) != 7).tocsr()
    found = embed(cells, run, genes=["G7"])
    assert np.isnan(found.obsm[f"{KEY}_gene_G7"]).all() and not found.obs["perturbgene_has_G7"].any()


def test_genes_are_found_by_id_version_and_symbol() -> None:
    ids = [f"ENSG0000000000{at}" for at in range(9)]
    tokenizer = a_run(genes=ids, gene_symbols=[*"ABCDEFGHI"]).tokenizer
    assert tokenizer.panel.find_all(["C", ids[7], f"{ids[1]}.5"], flag="genes").tolist() == [2, 7, 1]


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"genes": ["g3"]}, "'g3' is not among the 9 genes of the run's panel. Did you mean 'G3'"),
        ({"phenotype": ["age"]}, "phenotype 'age' is not in the vocabulary"),
        ({"given": {"age": None}}, "phenotype 'age' is not in the vocabulary"),
        (
            {"given": {"tissue": "splen"}},
            "tissue=splen is not in the run's vocabulary. Choose one of: 'blood', 'spleen'",
        ),
        ({"given": {"tissue": None}, "phenotype": ["tissue"]}, "both asked and given. Remove it from --phenotype"),
    ],
)
def test_what_the_run_does_not_know_is_refused(run: Run, cells: ad.AnnData, question: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed(cells, run, **question)


def test_a_given_phenotype_needs_its_column(run: Run, cells: ad.AnnData) -> None:
    del cells.obs["tissue"]
    with pytest.raises(InputError, match="tissue"):
        embed(cells, run, given={"tissue": None})


def test_a_classifier_cannot_be_asked_a_phenotype(cells: ad.AnnData) -> None:
    with pytest.raises(InputError, match="is a classifier, which cannot be asked for phenotypes. Give an mlm run"):
        embed(cells, a_run("cls"), phenotype=["cell_type"])


# -- the command line ---------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_function_returns(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    line = f"embed {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad --device cpu"
    flags = "--pooling genes --phenotype cell_type --genes G3 G4 --given tissue=blood --batch_size 5 --batch_tokens 20"
    assert main([*line.split(), *flags.split()]) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    options = {"pooling": "genes", "phenotype": ["cell_type"], "genes": ["G3", "G4"], "given": {"tissue": "blood"}}
    expected = embed(cells, run, **options)
    assert list(written.obsm) == sorted(expected.obsm)
    for key, rows in expected.obsm.items():
        np.testing.assert_allclose(written.obsm[key], rows, atol=1e-5)
    np.testing.assert_array_equal(written.obs["perturbgene_has_G3"], expected.obs["perturbgene_has_G3"])
    np.testing.assert_array_equal(written.X.toarray(), cells.X.toarray())
    assert not list(tmp_path.glob(".*"))


def test_provenance_says_what_was_asked_of_which_run(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    folder = save(run, tmp_path / "run")
    assert main(f"embed {folder} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad --device cpu".split()) == 0
    facts = ad.read_h5ad(tmp_path / "out.h5ad").uns["perturbgene"]
    shown = {name: facts[name] for name in ("verb", "run", "pooling", "given", "gene_coverage")}
    assert shown == {"verb": "embed", "run": folder, "pooling": "asked", "given": "{}", "gene_coverage": 1.0}


NONSENSE = {
    "--genes g3": "'g3' is not among",
    "--genes G1 G1": "more than once",
    "--phenotype age": "'age' is not in the vocabulary",
    "--phenotype tissue --given tissue": "cannot be both asked and given",
    "--given tissue=nowhere": "tissue=nowhere",
    "--groupby nothing": "'nothing'",
    "--groupby tissue --genes G1": "Remove --genes",
    "--pooling mean": "pooling",
    "--pooling asked --given tissue cell_type": "nothing is left to ask",
    "--network --top_k 0": "top_k",
}


@pytest.mark.parametrize("flags", NONSENSE)
def test_nonsense_ends_with_code_2_and_leaves_nothing(
    flags: str, run: Run, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    line = f"embed {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad --device cpu {flags}"
    assert main(line.split()) == 2
    assert NONSENSE[flags] in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "run"]


def test_an_output_that_exists_is_kept(
    run: Run, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "out.h5ad").write_text("mine")
    line = f"embed {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad"
    assert main(line.split()) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "out.h5ad").read_text() == "mine"


def test_a_gene_in_another_case_is_suggested(small_folder: Path) -> None:
    with pytest.raises(InputError, match=r"gene 'cd79a' is not among .* Did you mean 'CD79A'\? Change --genes"):
        embed(small_folder / "cells.h5ad", small_folder / "runs/mlm", genes=["cd79a"])
