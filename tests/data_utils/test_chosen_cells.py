"""`where`: which cells a command is about, the same in every verb, and what becomes of the others."""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import perturbgene as pg
from perturbgene.cli.options import conditions
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.sources import H5adFile, MemoryFile
from perturbgene.errors import InputError
from perturbgene.main import main

B_CELLS = {"cell_type": "B cell"}
TINY = "--model_arch tiny --num_hidden_layers 1 --max_steps 2 --max_length 40 --no_bf16 --use_cpu --report_to none"


@pytest.fixture(scope="module")
def cells(small_folder: Path) -> ad.AnnData:
    """255 cells of three types, two tissues and four donors."""
    return ad.read_h5ad(small_folder / "cells.h5ad")


@pytest.fixture(scope="module")
def b_cells(cells: ad.AnnData) -> ad.AnnData:
    """Only the 95 or so B cells, as a user would cut them out."""
    return cells[cells.obs["cell_type"] == "B cell"].copy()


# -- the conditions -----------------------------------------------------------------------------------------------


def test_a_column_may_have_several_values_and_values_may_have_commas() -> None:
    entries = ["cell_type=T, CD4+", "cell_type = B", "a=b=c"]
    assert conditions(entries) == {"cell_type": ["T, CD4+", "B"], "a": ["b=c"]}
    assert conditions({"cell_type": ["T, CD4+", "B"], "age": 3}) == {"cell_type": ["T, CD4+", "B"], "age": ["3"]}


@pytest.mark.parametrize("entry", ["cell_type", "=B", "cell_type="])
def test_a_condition_must_name_a_column_and_a_value(entry: str) -> None:
    with pytest.raises(InputError, match="where has .*must be COLUMN=VALUE"):
        conditions([entry])


@pytest.fixture(params=["memory", "csr", "csc", "dense"])
def view(request: pytest.FixtureRequest, tmp_path: Path) -> ChosenCells:
    """300 cells in four forms; chosen are those of age 3 or 4 that are tumor, about one in six."""
    random = np.random.default_rng(0)
    values = random.integers(1, 9, (300, 5)) * (random.random((300, 5)) < 0.5).astype(np.float32)
    kinds = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "memory": sparse.csr_matrix, "dense": np.asarray}
    obs = pd.DataFrame({"age": random.integers(0, 6, 300).astype(float), "is_tumor": random.random(300) < 0.5})
    obs.loc[:9, "age"] = np.nan
    obs.index = [f"cell_{at}" for at in range(300)]
    adata = ad.AnnData(kinds[request.param](values), obs=obs)
    where = {"age": ["3", "4"], "is_tumor": ["True"]}
    if request.param == "memory":
        return ChosenCells(MemoryFile(adata), where)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return ChosenCells(H5adFile(str(tmp_path / "cells.h5ad")), where)


def test_a_view_has_the_chosen_cells_and_no_others(view: ChosenCells) -> None:
    age_n, is_tumor_n = (view.base.obs_column(name).to_numpy() for name in ("age", "is_tumor"))
    rows_n = np.flatnonzero(np.isin(age_n, [3, 4]) & is_tumor_n)
    assert 20 < len(rows_n) < 100
    np.testing.assert_array_equal(view.rows_n, rows_n)
    assert view.shape == (len(rows_n), 5)
    assert list(view.obs_names) == [f"cell_{row}" for row in rows_n]
    np.testing.assert_array_equal(view.obs_column("age"), age_n[rows_n])
    whole = sparse.csr_matrix(view.base.read_rows(0, 300), shape=(300, 5)).toarray()
    for start, stop in ((0, len(rows_n)), (3, 9)):
        found = sparse.csr_matrix(view.read_rows(start, stop), shape=(stop - start, 5)).toarray()
        np.testing.assert_array_equal(found, whole[rows_n[start:stop]])
    scattered = np.array([1, 5, 18])
    found = sparse.csr_matrix(view.read(scattered), shape=(3, 5)).toarray()
    np.testing.assert_array_equal(found, whole[rows_n[scattered]])


def test_the_tokens_of_chosen_cells_are_those_of_a_file_that_has_only_them(
    small_folder: Path, cells: ad.AnnData, b_cells: ad.AnnData
) -> None:
    tokenizer = pg.load_run(small_folder / "runs/mlm").tokenizer
    for source in (cells, str(small_folder / "cells.h5ad")):
        chosen = IterableAnnDataset(source, tokenizer, where=B_CELLS)
        assert chosen.num_cells == len(chosen) == b_cells.n_obs
        for one, other in zip(chosen, IterableAnnDataset(b_cells, tokenizer), strict=True):
            assert all(one[name].equal(other[name]) for name in other)


def test_batches_under_a_budget_of_tokens_are_those_of_a_file_that_has_only_the_cells(
    small_folder: Path, b_cells: ad.AnnData, tmp_path: Path
) -> None:
    tokenizer = pg.load_run(small_folder / "runs/mlm").tokenizer
    b_cells.write_h5ad(tmp_path / "b.h5ad")
    options: dict[str, Any] = {"shuffle": True, "tokens_per_batch": tokenizer.max_length}
    chosen = IterableAnnDataset(str(small_folder / "cells.h5ad"), tokenizer, where=B_CELLS, **options)
    alone = IterableAnnDataset(str(tmp_path / "b.h5ad"), tokenizer, **options)
    for one, other in zip(chosen.blocks(), alone.blocks(), strict=True):
        np.testing.assert_array_equal(one.input_ids_l, other.input_ids_l)
        np.testing.assert_array_equal(one.cells_n, other.cells_n)


# -- refusals -----------------------------------------------------------------------------------------------------

VERBS = {
    "predict": "predict runs/mlm cells.h5ad --output out.h5ad --ask cell_type",
    "embed": "embed runs/mlm cells.h5ad --output out.h5ad",
    "genes": "embed runs/mlm cells.h5ad --output out.h5ad --groupby cell_type",
    "perturb": "perturb runs/mlm cells.h5ad --output out.csv --genes CD79A",
    "attribute": "attribute runs/mlm cells.h5ad --output out.csv --ask cell_type",
    "counterfactual": "counterfactual runs/mlm cells.h5ad --output out.h5ad --set tissue=lung --num_null 0 --force",
    "evaluate": "evaluate runs/mlm --eval_data_paths cells.h5ad --no_baselines --output out",
    "prepare": "prepare cells.h5ad --output out --phenotypes cell_type",
    "mlm": f"mlm --corpus corpus --output_dir out {TINY}",
    "cls": f"cls --corpus corpus --output_dir out --phenotype_category cell_type {TINY}",
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_column_or_value_is_refused_with_the_nearest_name(
    verb: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(in_folder.iterdir())
    for where, message in {
        "celltype=B cell": "has no obs column 'celltype'. Did you mean 'cell_type'? Change --where.",
        "cell_type=B cel": "has cell_type=B cel. Did you mean 'B cell'? Change --where.",
    }.items():
        assert main([*VERBS[verb].split(), "--where", "cell_type=B cell", where]) == 2
        assert message in capsys.readouterr().err
    assert sorted(in_folder.iterdir()) == before


def test_several_values_behind_one_column_are_refused_with_the_right_form(
    cells: ad.AnnData, small_folder: Path
) -> None:
    with pytest.raises(InputError, match="repeat the column: cell_type='B cell' cell_type='NK cell'. Change --where"):
        pg.predict(cells, small_folder / "runs/mlm", where="cell_type=B cell, NK cell")


def test_conditions_that_no_cell_meets_are_refused(cells: ad.AnnData, small_folder: Path) -> None:
    some = cells[~((cells.obs["cell_type"] == "B cell") & (cells.obs["tissue"] == "lung"))].copy()
    with pytest.raises(InputError, match="no cell of 'AnnData' has cell_type=B cell and tissue=lung, so none is left"):
        pg.predict(some, small_folder / "runs/mlm", where={"cell_type": "B cell", "tissue": "lung"})


# -- the verbs ----------------------------------------------------------------------------------------------------


def test_predict_writes_all_cells_and_answers_the_chosen_ones(
    in_folder: Path, cells: ad.AnnData, b_cells: ad.AnnData, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    with caplog.at_level("INFO", logger="perturbgene"):
        assert main([*VERBS["predict"].split(), "--where", "cell_type=B cell", "tissue=blood", "--audit"]) == 0
    is_chosen_n = ((cells.obs["cell_type"] == "B cell") & (cells.obs["tissue"] == "blood")).to_numpy()
    number = int(is_chosen_n.sum())
    assert f"--where cell_type=B cell and tissue=blood: {number} of 255 cells" in caplog.text
    out = capsys.readouterr().out
    assert f"{number} cells predicted" in out and "no gene of the run" not in out
    written = ad.read_h5ad("out.h5ad")
    assert written.n_obs == 255 and list(written.obs_names) == list(cells.obs_names)
    np.testing.assert_array_equal(written.obs["predicted_cell_type"].notna(), is_chosen_n)
    np.testing.assert_array_equal(written.obs["predicted_cell_type_probability"].notna(), is_chosen_n)
    np.testing.assert_array_equal(written.obs["audit_cell_type_rank"] > 0, is_chosen_n)
    assert json.loads(written.uns["perturbgene"]["where"]) == {"cell_type": ["B cell"], "tissue": ["blood"]}
    alone = pg.predict(cells[is_chosen_n].copy(), "runs/mlm", ask="cell_type", audit=True)
    for name in ("predicted_cell_type_probability", "audit_cell_type_probability"):
        np.testing.assert_allclose(written.obs[name][is_chosen_n], alone.obs[name], atol=1e-6)
    again = pg.predict(cells, "runs/mlm", ask="cell_type", where={"cell_type": ["B cell"], "tissue": "blood"})
    np.testing.assert_array_equal(again.obs["predicted_cell_type"].notna(), is_chosen_n)


def test_embed_leaves_the_other_cells_missing(in_folder: Path, cells: ad.AnnData, b_cells: ad.AnnData) -> None:
    assert main([*VERBS["embed"].split(), "--genes", "CD79A", "--where", "cell_type=B cell"]) == 0
    written, is_b_n = ad.read_h5ad("out.h5ad"), (cells.obs["cell_type"] == "B cell").to_numpy()
    np.testing.assert_array_equal(np.isfinite(written.obsm["X_perturbgene"]).all(axis=1), is_b_n)
    np.testing.assert_array_equal(written.obs["perturbgene_has_CD79A"].isna(), ~is_b_n)
    alone = pg.embed(b_cells, "runs/mlm", genes="CD79A")
    np.testing.assert_allclose(written.obsm["X_perturbgene"][is_b_n], alone.obsm["X_perturbgene"], atol=1e-6)
    has_gene_n = written.obs["perturbgene_has_CD79A"][is_b_n].to_numpy(dtype=bool)
    np.testing.assert_array_equal(has_gene_n, alone.obs["perturbgene_has_CD79A"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perturb", {"genes": ["CD79A"], "towards": "cell_type=NK cell", "min_cells": 1}),
        ("perturb", {"towards": "cell_type=NK cell", "groupby": "cell_type", "top_k": 3, "num_controls": 3}),
        ("attribute", {"ask": "tissue", "num_check_cells": 5}),
        ("counterfactual", {"set": {"tissue": "lung"}, "num_null": 0, "force": True, "groupby": "cell_type"}),
    ],
    ids=["perturb", "perturb groups", "attribute", "counterfactual"],
)
def test_tables_are_those_of_a_file_that_has_only_the_chosen_cells(
    name: str, options: dict[str, Any], in_folder: Path, cells: ad.AnnData, b_cells: ad.AnnData
) -> None:
    function = getattr(pg, name)
    found = function("cells.h5ad", "runs/mlm", where=B_CELLS, device="cpu", **options)
    expected = function(b_cells, "runs/mlm", device="cpu", **options)
    pd.testing.assert_frame_equal(found, expected, atol=1e-6)
    assert found.equals(function(cells, "runs/mlm", where=["cell_type=B cell"], device="cpu", **options))


def test_mean_embeddings_of_genes_are_those_of_the_chosen_cells(in_folder: Path, b_cells: ad.AnnData) -> None:
    found = pg.gene_embeddings("cells.h5ad", "runs/mlm", groupby="tissue", where=B_CELLS)
    expected = pg.gene_embeddings(b_cells, "runs/mlm", groupby="tissue")
    assert found.obs["n_cells"].tolist() == expected.obs["n_cells"].tolist()
    np.testing.assert_allclose(found.X, expected.X, atol=1e-6)
    assert main([*VERBS["genes"].split(), "--where", "cell_type=B cell"]) == 0
    assert ad.read_h5ad("out.h5ad").obs["group"].unique().tolist() == ["B cell"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perturb", {"genes": ["CD79A", "LYZ"], "towards": "tissue=lung", "min_cells": 1, "given": "cell_type"}),
        ("attribute", {"ask": "tissue", "num_check_cells": 5, "given": "cell_type"}),
        ("counterfactual", {"set": {"cell_type": "B cell"}, "num_null": 0, "force": True, "num_passes": 1}),
        ("predict_table", {"ask": "tissue", "given": "cell_type"}),
    ],
)
def test_an_odd_file_is_read_alike_by_every_verb(
    name: str, options: dict[str, Any], in_folder: Path, cells: ad.AnnData
) -> None:
    """Counts in a layer, scaled on request; probes in a column of var; a label that means "not known"."""
    counts = np.random.default_rng(0).poisson(np.expm1(cells.X[:60].toarray()))
    plain = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=cells.obs[:60].copy(), var=cells.var)
    odd = ad.AnnData(
        sparse.csr_matrix(counts * 0.5), obs=plain.obs.copy(), var=pd.DataFrame(index=map(str, range(cells.n_vars)))
    )
    odd.var["id"] = [f"probe {number}" for number in range(odd.n_vars)]
    Path("probes.csv").write_text("".join(f"probe {i},{name}\n" for i, name in enumerate(cells.var_names)))
    odd.layers["half"], odd.X = odd.X, None
    plain.obs["cell_type"] = plain.obs["cell_type"].astype(object).where(plain.obs["cell_type"] != "monocyte", None)
    reading = {"layer": "half", "gene_id_column": "id", "normalization": "log1p_cp10k", "missing_labels": ["monocyte"]}
    reading["gene_map"] = "probes.csv"
    odd.write_h5ad("odd.h5ad")
    function = getattr(pg, name)
    expected = function(plain, "runs/mlm", **options)
    for source in ("odd.h5ad", odd):
        pd.testing.assert_frame_equal(function(source, "runs/mlm", **reading, **options), expected, atol=1e-5)
    with pytest.raises(InputError, match="gene"):
        function(odd, "runs/mlm", **{**reading, "gene_id_column": None}, **options)


def test_evaluate_scores_the_chosen_cells_and_leaves_the_runs_calibration_alone(
    in_folder: Path, b_cells: ad.AnnData
) -> None:
    options: dict[str, Any] = {"ask": ["tissue"], "train_paths": str(in_folder / "cells.h5ad")}
    found = pg.evaluate("runs/mlm", "cells.h5ad", where=B_CELLS, **options)["tissue"]
    expected = pg.evaluate("runs/mlm", b_cells, **options)["tissue"]
    assert found == expected and found["alone"]["n"] == b_cells.n_obs
    assert found["logistic_regression"]["n_train"] == 255
    assert not Path("runs/mlm/calibration.json").exists()


def test_prepare_makes_the_corpus_of_the_chosen_cells(in_folder: Path, cells: ad.AnnData, tmp_path: Path) -> None:
    command = VERBS["prepare"].split()
    assert main([*command, "--where", "cell_type=B cell", "cell_type=NK cell", "--num_top_genes", "50"]) == 0
    wanted = cells[cells.obs["cell_type"].isin(["B cell", "NK cell"])]
    wanted.copy().write_h5ad("wanted.h5ad")
    command[1], command[3] = "wanted.h5ad", "expected"
    assert main([*command, "--num_top_genes", "50"]) == 0
    for split in ("train", "eval"):
        for one, other in zip(Corpus.open("out").paths(split), Corpus.open("expected").paths(split), strict=True):
            assert Path(one).read_bytes() == Path(other).read_bytes()
    pg.prepare(cells, "third", phenotypes="cell_type", num_top_genes=50, where={"cell_type": ("B cell", "NK cell")})
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["tokenizer_fingerprint"] == Corpus.open("third").manifest["tokenizer_fingerprint"]
    assert manifest["where"] == ["cell_type=B cell", "cell_type=NK cell"]
    assert manifest["phenotypes"]["cell_type"]["train"].keys() == {"B cell", "NK cell"}


def test_training_sees_the_chosen_cells_and_evaluation_of_the_run_too(in_folder: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="perturbgene"):
        assert main([*VERBS["mlm"].split(), "--where", "cell_type=B cell", "cell_type=monocyte"]) == 0
        assert "--where cell_type=B cell or monocyte" in caplog.text
        caplog.clear()
        assert main(["evaluate", "out", "--no_baselines", "--device", "cpu"]) == 0
    assert "--where cell_type=B cell or monocyte" in caplog.text


def test_a_donor_of_one_split_can_be_named_in_training(in_folder: Path) -> None:
    donors = [f"donor_id=D{number}" for number in range(4)]
    assert main([*VERBS["cls"].split(), "--where", *donors]) == 0
