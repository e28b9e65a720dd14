"""Weights carry over by name: genes, labels, phenotypes, bins and heads that mean the same keep what was learned."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.inference.predict import predict
from perturbgene.inference.run import Run
from perturbgene.model import GeneBertForClassification, GeneBertForPhenotypicMLM
from perturbgene.training.train import tokenizer_facts
from perturbgene.training.transfer import name_map, run_config, start_from
from tests.nine_genes import GENES, LABELS, a_tokenizer
from tests.untrained import a_run, save, some_cells

WORDS, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"


def started(
    run: Run, folder: Path, tokenizer: GeneTokenizer, kind: type = GeneBertForPhenotypicMLM, **more: Any
) -> Any:
    """Write a run and start a model for another tokenizer from it; returns the model and the report as one text."""
    config: Any = SimpleNamespace(pretrained_model_path=save(run, folder / "old"), attn_implementation="sdpa")
    start = start_from(kind, config, tokenizer, seed=0, **{**tokenizer_facts(tokenizer), **more})
    return start.model.eval(), "\n".join(start.lines)


def logits(model: Any, tokenizer: GeneTokenizer) -> torch.Tensor:
    """Ask for the cell type of some cells, with the tissue given; logits of the labels, shape (n, k)."""
    run = Run(model, tokenizer, "started")
    asked = tokenizer.vocabulary
    first, last = asked.id_range("cell_type")
    rows = []
    for cell in tokenizer.with_settings(included=["cell_type", "tissue"])(some_cells()):
        ids = cell["input_ids"].clone()
        ids[cell["token_type_ids"] == asked.token_type("cell_type")] = 2
        with torch.no_grad():
            out = run.model(input_ids=ids[None], token_type_ids=cell["token_type_ids"][None])
        rows.append(out.logits.reshape(-1, out.logits.shape[-1])[1, first:last])
    return torch.stack(rows)


def shuffled(kind: str) -> dict[str, Any]:
    """Return genes and labels of the nine-gene tokenizer in another order."""
    labels = {"tissue": ["spleen", "blood"], "cell_type": ["T cell", "B cell", "NK cell"]}
    order = [GENES[at] for at in (4, 0, 8, 2, 6, 1, 7, 3, 5)]
    return {"genes": order, "phenotypes": labels, "included_phenotypes": ["tissue"] if kind == "cls" else [*labels]}


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_genes_and_labels_in_another_order_change_no_answer(kind: str, tmp_path: Path) -> None:
    """For trained votes, too, and through `predict`, which reads cells for each tokenizer itself."""
    run, other = a_run(kind), a_tokenizer(**shuffled(kind))
    torch.nn.init.normal_((run.model.direct_classes if kind == "cls" else run.model.direct_labels).votes_tk)  # type: ignore[union-attr, arg-type]
    names = dict(enumerate(other.phenotypes["cell_type"]))
    head = {"id2label": names, "label2id": {name: at for at, name in names.items()}, "phenotype_category": "cell_type"}
    model, report = started(run, tmp_path, other, type(run.model), **(head if kind == "cls" else {}))
    assert "9 kept, 0 fresh, 0 dropped; labels: 5 kept, 0 fresh" in report.replace("\n", "; ")
    cells = some_cells()
    given = {"tissue": "spleen"}
    before, after = (
        predict(cells, one, ask="cell_type", given=given, top_k=3) for one in (run, Run(model, other, "started"))
    )
    key = "predicted_cell_type_probabilities"
    columns = [other.phenotypes["cell_type"].index(label) for label in run.tokenizer.phenotypes["cell_type"]]
    np.testing.assert_allclose(after.obsm[key][:, columns], before.obsm[key], atol=1e-6)
    assert after.obs["predicted_cell_type"].tolist() == before.obs["predicted_cell_type"].tolist()


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_the_same_tokenizer_gives_the_same_weights_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run = a_run(kind)
    head = {name: getattr(run.model.config, name) for name in ("id2label", "label2id", "phenotype_category")}
    model, report = started(run, tmp_path, run.tokenizer, type(run.model), **(head if kind == "cls" else {}))
    before, after = run.model.state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "9 kept, 0 fresh, 0 dropped" in report and "bins: kept" in report and "head: kept" in report


def test_a_panel_in_another_order_with_other_genes_keeps_each_gene_by_its_name(tmp_path: Path) -> None:
    run = a_run()
    other = a_tokenizer(genes=[*GENES[::-1][:7], "NEW1", "NEW2"])
    model, report = started(run, tmp_path, other)
    old, new = (m.genebert.state_dict()[TYPES] for m in (run.model, model))
    for index, gene in enumerate(other.genes[:7]):
        assert torch.equal(new[other.first_gene_type + index], old[run.tokenizer.first_gene_type + GENES.index(gene)])
    fresh, learnt = new[-2:], old[run.tokenizer.first_gene_type :]
    assert 0.2 < fresh.std() / learnt.std() < 5
    assert "genes: 7 kept, 2 fresh, 2 dropped" in report


def test_labels_in_another_order_are_answered_as_before(tmp_path: Path) -> None:
    """A label that sorts first moves every other id; the logits of the old labels stay the same."""
    run = a_run()
    labels = {**LABELS, "cell_type": ["A cell", *LABELS["cell_type"]]}
    other = a_tokenizer(phenotypes=labels)
    model, report = started(run, tmp_path, other)
    torch.testing.assert_close(logits(model, other)[:, 1:], logits(run.model, run.tokenizer), atol=1e-5, rtol=1e-5)
    assert "5 kept, 1 fresh ('cell_type A cell')" in report


def test_a_new_label_starts_from_the_mean_of_its_phenotype(tmp_path: Path) -> None:
    run = a_run()
    other = a_tokenizer(phenotypes={**LABELS, "cell_type": [*LABELS["cell_type"], "Z cell"]})
    model, _ = started(run, tmp_path, other)
    old, new = (m.genebert.state_dict()[WORDS] for m in (run.model, model))
    torch.testing.assert_close(new[other.vocabulary.label_id("cell_type", "Z cell")], old[4:7].mean(dim=0))


def test_a_phenotype_that_is_new_and_one_that_is_gone_are_reported(tmp_path: Path) -> None:
    other = a_tokenizer(
        phenotypes={"cell_type": LABELS["cell_type"], "sex": ["f", "m"]}, included_phenotypes=["cell_type", "sex"]
    )
    _, report = started(a_run(), tmp_path, other)
    assert "3 kept, 2 fresh (sex f, sex m), 2 dropped (tissue blood, tissue spleen)" in report.replace("'", "")


@pytest.mark.parametrize(("edges", "shares"), [([1.0, 3.0], "kept"), ([1.0, 2.0, 3.0], "3 carried over from 2")])
def test_bins_are_carried_over_by_the_expression_of_each(edges: list[float], shares: str) -> None:
    old, new = a_tokenizer(), a_tokenizer(bin_edges=edges)
    names = name_map(old, new, source="old")
    rows = names.ids_vo[new.first_bin_id :].toarray()
    assert shares in names.lines[-1]
    assert rows.sum(axis=1) == pytest.approx(1)
    assert rows[0, old.first_bin_id] == 1  # not expressed stays not expressed


def test_a_classifier_of_another_phenotype_starts_with_a_fresh_head_and_says_so(tmp_path: Path) -> None:
    run = a_run("cls")
    other = a_tokenizer(included_phenotypes=[])
    names = dict(enumerate(LABELS["tissue"]))
    model, report = started(
        run, tmp_path, other, GeneBertForClassification, phenotype_category="tissue", id2label=names,
        label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    assert model.config.num_labels == 2
    assert "head: fresh (the run predicts cell_type)" in report
    old, new = run.model.genebert.state_dict(), model.genebert.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_run_without_a_gene_in_common_is_refused(tmp_path: Path) -> None:
    other = a_tokenizer(genes=[f"X{number}" for number in range(9)])
    with pytest.raises(InputError, match=r"knows none of the 9 genes.*--gene_id_column"):
        started(a_run(), tmp_path, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [("cells.h5ad", "is a file, not a folder"), ("nowhere", "does not exist"), ("empty", "holds no GeneBERT weights")],
)
def test_what_is_no_run_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/tokenizer.json").touch()
    (tmp_path / "cells.h5ad").touch()
    with pytest.raises(InputError, match=f"pretrained_model_path .*{name} {message}.*Give a run folder"):
        run_config(str(tmp_path / name))


def test_a_run_of_another_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--normalization none"):
        started(a_run(), tmp_path, a_tokenizer(normalization="auto"))


def test_a_smaller_panel_gives_the_same_answers_for_cells_of_its_genes(tmp_path: Path) -> None:
    run, tokenizer = a_run(), a_tokenizer(genes=["G7", "G2", "G4"])
    torch.nn.init.normal_(run.model.direct_labels.votes_tk)  # type: ignore[union-attr, arg-type]
    model, report = started(run, tmp_path, tokenizer)
    assert "genes: 3 kept, 0 fresh, 6 dropped" in report
    cells = some_cells()[:, ["G2", "G4", "G7"]].copy()
    question = run.tokenizer.vocabulary
    for big, small in zip(run.tokenizer(cells), tokenizer(cells), strict=True):
        answers = []
        for model_of, cell in ((run.model, big), (model, small)):
            ids = torch.where(cell["token_type_ids"] == question.token_type("cell_type"), 2, cell["input_ids"])
            with torch.no_grad():
                answers.append(model_of(input_ids=ids[None], token_type_ids=cell["token_type_ids"][None]).logits[0, 1])
        torch.testing.assert_close(answers[1], answers[0], atol=1e-6, rtol=1e-6)


def test_genes_match_by_symbol_but_never_two_to_one() -> None:
    old = a_tokenizer(genes=["CD3E", "MS4A1", "LYZ"])
    new = a_tokenizer(
        genes=["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"], gene_symbols=["LYZ", "CD3E", "CD3E"]
    )
    types = name_map(old, new, source="run").types_to.toarray()[new.first_gene_type :, old.first_gene_type :]
    assert types.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
