"""Labels that are terms of the Cell Ontology: what counts as finer or coarser, and the finest answer that is sure."""

import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.errors import InputError
from perturbgene.eval_utils import Confusion
from perturbgene.inference import ontology as module
from perturbgene.inference.evaluate import _ontology_table, evaluate
from perturbgene.inference.ontology import LabelTerms, term_ids
from perturbgene.inference.predict import predict
from perturbgene.main import main
from perturbgene.reports.report import report
from tests.untrained import a_run, save, some_cells

pytest.importorskip(module.PACKAGE)

CD4, CD8 = "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"
LABELS = ["B cell", CD4, CD8, "T cell", "doublet"]


@pytest.fixture(scope="module")
def terms() -> LabelTerms:
    return LabelTerms.of(LABELS)


# -- labels and terms ---------------------------------------------------------------------------------------------


def test_labels_are_found_by_name_by_id_and_by_the_id_next_to_them() -> None:
    found = LabelTerms.of(["t CELL", "CL:0000236", "helpers", "doublet", "CL:9999999"], {"helpers": "CL:0000624"})
    assert found.term_of == {"t CELL": "CL:0000084", "CL:0000236": "CL:0000236", "helpers": "CL:0000624"}
    assert found.without_term == ["doublet", "CL:9999999"]
    assert found.describe("cell_type") == (
        "cell_type: 3 of 5 labels are terms of an ontology, not 'doublet', 'CL:9999999'"
    )


def test_an_ancestor_need_not_be_a_parent(terms: LabelTerms) -> None:
    relation = {
        (true, said): terms.relation_kk[LABELS.index(true), LABELS.index(said)] for true in LABELS for said in LABELS
    }
    assert relation[CD4, "T cell"] == 1 and relation["T cell", CD4] == -1
    assert not any(relation[pair] for pair in ((CD4, CD8), ("B cell", "T cell"), (CD4, CD4), ("doublet", "T cell")))


def test_ids_are_read_from_the_column_next_to_the_labels_unless_they_differ(make_adata, make_tokenizer) -> None:
    obs = {"type": ["Th", "B", "B"], "type_ontology_term_id": ["CL:0000624", "CL:0000236", "CL:0000788"]}
    cells = IterableAnnDataset(
        make_adata(np.ones((3, 4)), obs=obs), make_tokenizer(included_phenotypes=[]), phenotypes={"cell_type": "type"}
    )
    assert term_ids(cells, "cell_type") == {"Th": "CL:0000624"} and term_ids(cells, "sex") == {}


# -- scores -------------------------------------------------------------------------------------------------------


def test_ancestors_and_descendants_are_counted_apart(terms: LabelTerms) -> None:
    confusion = Confusion(LABELS)
    true = [CD4, CD4, CD4, CD4, "T cell", "T cell", "B cell", "doublet"]
    said = [CD4, "T cell", CD8, "B cell", CD8, "T cell", "B cell", "T cell"]
    confusion.add([LABELS.index(label) for label in true], [LABELS.index(label) for label in said])
    found = terms.scores(confusion)
    assert (found["coarser"], found["finer"], found["right_or_finer"]) == (1 / 8, 1 / 8, 4 / 8)
    assert found["n_without_term"] == 1
    # Of T cells both are right now; CD4 1 of 4 (precision 1), CD8 none of 0 (said once), B cell 1 of 1 (said twice).
    assert found["macro_f1_or_finer"] == pytest.approx(np.mean([2 / 3, 2 / 5, 0, 2 * 2 / (2 + 4), 0]))


# -- coarse answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "answer", "probability"),
    [
        ({CD4: 0.95, CD8: 0.05}, CD4, 0.95),  # a label that is sure stays
        ({CD4: 0.5, CD8: 0.46, "B cell": 0.04}, "mature alpha-beta T cell", 0.96),  # the nearest ancestor of the two
        ({CD4: 0.5, CD8: 0.2, "T cell": 0.25, "B cell": 0.05}, "T cell", 0.95),  # a label that is an ancestor
        ({CD4: 0.5, "B cell": 0.5}, "lymphocyte", 1.0),
        ({"T cell": 0.5, "B cell": 0.3, "doublet": 0.2}, None, np.nan),  # a label that is no term has no ancestor
        ({"doublet": 0.92, "B cell": 0.08}, "doublet", 0.92),
    ],
)
def test_the_finest_term_that_is_probable_enough_is_the_answer(terms, probabilities, answer, probability) -> None:
    probability_nk = np.array([[probabilities.get(label, 0) for label in LABELS]], dtype=np.float32)
    [code], [sure] = terms.coarse(probability_nk, least=0.9)
    assert (terms.answers[0][code] if code >= 0 else None) == answer
    assert sure == pytest.approx(probability, nan_ok=True)


def test_of_terms_with_the_same_labels_the_most_special_one_is_the_answer() -> None:
    found = LabelTerms.of([CD4, CD8, "B cell"])
    [code], _ = found.coarse(np.array([[0.5, 0.45, 0.05]]), least=0.9)
    assert found.answers[0][code] == "mature alpha-beta T cell" and found.answer_ids[code] == "CL:0000791"


def test_that_a_cell_is_a_cell_is_no_answer() -> None:
    found = LabelTerms.of(["T cell", "neuron"])
    assert found.coarse(np.array([[0.5, 0.5]]), least=0.9)[0].tolist() == [-1]


# -- verbs --------------------------------------------------------------------------------------------------------

PHENOTYPES = {"cell_type": LABELS, "tissue": ["blood", "spleen"]}
SAYS = {"B cell": 0.03, CD4: 0.5, CD8: 0.44, "T cell": 0.02, "doublet": 0.01}


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    cells = some_cells(60)
    cells.obs["cell_type"] = np.random.default_rng(0).choice(LABELS, cells.n_obs)
    cells.obs["donor_id"] = cells.obs.pop("donor")
    return cells


@pytest.fixture(scope="module")
def folder(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that gives every cell the probabilities above, cells, and what `evaluate` says of them."""
    folder, run = tmp_path_factory.mktemp("ontology"), a_run(phenotypes=PHENOTYPES)
    start, stop = run.tokenizer.vocabulary.id_range("cell_type")
    with torch.no_grad():
        run.model.mlm_projection.weight.zero_()
        run.model.mlm_projection.bias[start:stop] = torch.log(torch.tensor([SAYS[label] for label in LABELS]))
    cells.write_h5ad(folder / "cells.h5ad")
    save(run, folder / "run")
    evaluate(folder / "run", cells, train_paths=cells, calibrate=False, output=folder / "scores")
    return folder


def answers(folder: Path, cells: ad.AnnData, abstain: float, **options: Any) -> ad.AnnData:
    return predict(cells, folder / "run", coarse=True, abstain=abstain, device="cpu", **options)


def test_predict_answers_with_the_finest_term_that_is_sure(folder: Path, cells: ad.AnnData) -> None:
    found = answers(folder, cells, 0.95)
    has_genes_n = np.arange(cells.n_obs) != 2
    first = found.obs[has_genes_n].filter(like="predicted_cell_type").iloc[0]
    assert first["predicted_cell_type"] == "T cell" and first["predicted_cell_type_probability"] == pytest.approx(0.96)
    assert first["predicted_cell_type_1"] == CD4 and first["predicted_cell_type_1_probability"] == pytest.approx(0.5)
    assert first["predicted_cell_type_ontology_term_id"] == "CL:0000084"
    assert found.obs["predicted_cell_type"].isna().tolist() == (~has_genes_n).tolist()
    facts = json.loads(found.uns["perturbgene"]["coarse"])
    assert facts == {"cell_type": "cell_type: 4 of 5 labels are terms of an ontology, not 'doublet'"}


@pytest.mark.parametrize(
    ("abstain", "answer"), [(0.5, CD4), (0.9, "mature alpha-beta T cell"), (0.97, "lymphocyte"), (0.995, "unknown")]
)
def test_how_fine_an_answer_is_depends_on_the_threshold(folder: Path, cells: ad.AnnData, abstain, answer) -> None:
    found = answers(folder, cells[:2].copy(), abstain, ask=["cell_type"]).obs
    assert found["predicted_cell_type"].tolist() == [answer] * 2
    assert (found["predicted_cell_type_probability"] >= (0.5 if answer == "unknown" else abstain) - 1e-6).all()


def test_the_command_says_how_many_answers_are_coarser_and_writes_a_report(
    folder: Path, tmp_path: Path, capsys
) -> None:
    flags = ["--ask", "cell_type", "--coarse", "--abstain", "0.97", "--output", str(tmp_path / "out.h5ad")]
    assert main(["predict", str(folder / "run"), str(folder / "cells.h5ad"), *flags]) == 0
    assert "of these 59 with a coarser term (cell_type: 4 of 5 labels are terms" in capsys.readouterr().out
    page = report(tmp_path / "out.h5ad", device="cpu").read_text()
    assert "lymphocyte" in page


def test_evaluate_counts_ancestors_and_descendants_apart(folder: Path, cells: ad.AnnData) -> None:
    metrics = json.loads((folder / "scores/metrics.json").read_text())
    share = cells.obs["cell_type"].value_counts(normalize=True)
    found = metrics["cell_type"]["alone"]["ontology"]
    assert (found["finer"], found["coarser"]) == (pytest.approx(share["T cell"]), 0)
    assert found["right_or_finer"] == pytest.approx(share["T cell"] + share[CD4])
    assert found["n_without_term"] == (cells.obs["cell_type"] == "doublet").sum()
    assert {"majority", "ridge", "given_others"} <= {
        name for name, of in metrics["cell_type"].items() if "ontology" in of
    }
    assert not any("ontology" in scores for scores in metrics["tissue"].values())


def test_the_printed_table_and_the_report_have_them(folder: Path) -> None:
    results = json.loads((folder / "scores/metrics.json").read_text())
    table = _ontology_table(results)
    assert {"finer", "coarser", "right_or_finer", "macro_f1_or_finer"} <= set(table.columns)
    assert "Finer and coarser are wrong answers that are a descendant" in report(folder / "scores").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ask cell_type --coarse", "coarse answers need a probability to reach, but abstain is 0"),
        ("--ask cell_type --coarse --abstain 0.4", "Give --abstain 0.9"),
        ("--ask tissue --coarse --abstain 0.9", "no label of 'tissue' is a term of an ontology (the first labels are"),
    ],
)
def test_coarse_answers_that_cannot_be_are_refused(
    folder: Path, tmp_path: Path, capsys, flags: str, message: str
) -> None:
    output = ["--output", str(tmp_path / "out.h5ad")]
    assert main(["predict", str(folder / "run"), str(folder / "cells.h5ad"), *flags.split(), *output]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_coarse_needs_a_threshold_in_python_too(folder: Path, cells: ad.AnnData) -> None:
    with pytest.raises(InputError, match="abstain is 0"):
        predict(cells, folder / "run", coarse=True)


def test_without_the_package_coarse_is_refused_and_evaluate_does_without(folder, cells, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("Run: pip install 'perturbgene[ontology]'")):
        answers(folder, cells, 0.9)
    with_ids = cells.copy()
    with_ids.obs["cell_type_ontology_term_id"] = "CL:0000084"
    with caplog.at_level("INFO"):
        scores = evaluate(folder / "run", with_ids, calibrate=False)
    assert "ontology" not in scores["cell_type"]["alone"] and "pip install 'perturbgene[ontology]'" in caplog.text
