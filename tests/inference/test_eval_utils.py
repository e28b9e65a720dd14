"""Questions put to a model and the counts of its answers, on an untrained model and four-gene or PBMC cells."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, block_of
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.errors import InputError
from perturbgene.eval_utils import (
    ClassEvaluator,
    Confusion,
    MlmEvaluator,
    Question,
    Tally,
    gene_log_likelihood,
    inference_mode,
    question_logits,
    run_evaluator,
    standard_questions,
    true_labels,
    write_results,
)
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM, load_preset
from perturbgene.training.train import tokenizer_facts

CELLS = [[1.0, 2.0, 0, 0.6], [0, 0.5, 0, 3.0], [0.7, 0, 1.5, 0], [0, 2.0, 0.9, 0], [3.0, 0, 0, 0.8], [0, 0, 1.1, 1.2]]
TYPES = ["B cell", "T cell", None, "B cell", "unheard of", "T cell"]
SEXES = ["male", "female", "male", None, "female", "male"]


def untrained(kind, tokenizer, **changes):
    torch.manual_seed(0)
    return kind(GeneBertConfig(**load_preset("tiny"), **tokenizer_facts(tokenizer), **changes)).eval()


def answer(model, block, tokenizer, question):
    """The probabilities of each asked phenotype's labels."""
    logits = question_logits(model, block, tokenizer, question)
    return {name: softmax(logits_nk, axis=-1) for name, logits_nk in logits.items()}


@pytest.fixture
def model(four_gene_tokenizer):
    return untrained(GeneBertForPhenotypicMLM, four_gene_tokenizer)


@pytest.fixture
def adata(make_adata):
    return make_adata(CELLS, obs={"cell_type": TYPES, "sex": SEXES})


@pytest.fixture
def cells(adata, four_gene_tokenizer):
    """Six cells; two have no known cell type, one no sex."""
    return list(IterableAnnDataset(adata, four_gene_tokenizer))


@pytest.fixture
def evaluator(four_gene_tokenizer):
    collator = DataCollatorForPhenotypicMLM(four_gene_tokenizer, gene_mask_prob=0.5, packed=True)
    return MlmEvaluator(four_gene_tokenizer, collator=collator, questions=standard_questions(["cell_type", "sex"]))


# -- questions ----------------------------------------------------------------------------------------------------


def test_three_phenotypes_make_seven_questions():
    questions = standard_questions(["a", "b", "c"])
    assert [(question.name, question.asked, question.given) for question in questions] == [
        ("alone", ("a",), ()),
        ("given_others", ("a",), ("b", "c")),
        ("alone", ("b",), ()),
        ("given_others", ("b",), ("a", "c")),
        ("alone", ("c",), ()),
        ("given_others", ("c",), ("a", "b")),
        ("together", ("a", "b", "c"), ()),
    ]


def test_one_phenotype_is_asked_alone_only():
    assert standard_questions(["a"]) == [Question("alone", ("a",))]


def test_no_phenotype_makes_no_question():
    assert standard_questions([]) == []


def test_an_answer_is_a_softmax_over_the_labels_of_its_phenotype(model, cells, four_gene_tokenizer):
    block = block_of(cells[:1])  # [CLS] male, B cell, CD3E bin 2, MS4A1 bin 3, LYZ bin 1 [EOS]
    ids = torch.tensor([[0, 2, 10, 11, 9, 1]])
    types = torch.tensor([[0, 1, 3, 4, 6, 0]])
    with torch.no_grad():
        logits_v = model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits[0, 1]
    odds = np.exp(logits_v[4:6].double().numpy())
    given = answer(model, block, four_gene_tokenizer, Question("alone", ("cell_type",)))
    np.testing.assert_allclose(given["cell_type"], [odds / odds.sum()], atol=1e-5)


def test_the_true_label_does_not_leak_into_the_answer(model, adata, four_gene_tokenizer):
    answers = []
    for label in ("B cell", "T cell"):
        adata.obs["cell_type"] = label
        block = block_of(list(IterableAnnDataset(adata, four_gene_tokenizer)))
        answers.append(answer(model, block, four_gene_tokenizer, Question("alone", ("cell_type",)))["cell_type"])
    np.testing.assert_array_equal(*answers)


def test_a_given_label_changes_the_answer(model, adata, four_gene_tokenizer):
    answers = []
    for sex in ("male", "female"):
        adata.obs["sex"] = sex
        block = block_of(list(IterableAnnDataset(adata, four_gene_tokenizer)))
        answers.append(answer(model, block, four_gene_tokenizer, Question("q", ("cell_type",), ("sex",)))["cell_type"])
    assert not np.allclose(*answers, atol=1e-6)


def test_phenotypes_asked_together_are_kept_apart(model, cells, four_gene_tokenizer):
    block = block_of(cells)
    one_way, other_way = (
        answer(model, block, four_gene_tokenizer, Question("together", asked))
        for asked in (("cell_type", "sex"), ("sex", "cell_type"))
    )
    np.testing.assert_allclose(one_way["sex"], other_way["sex"], atol=1e-6)


def test_true_labels_are_read_off_the_cells_own_tokens(cells, four_gene_tokenizer):
    block = block_of(cells)
    assert true_labels(block, four_gene_tokenizer, "cell_type").tolist() == [0, 1, -1, 0, -1, 1]
    assert true_labels(block, four_gene_tokenizer, "sex").tolist() == [1, 0, 1, -1, 0, 1]


def test_a_model_in_training_returns_to_training(model):
    model.train()
    with inference_mode(model):
        assert not model.training
    assert model.training


# -- how well hidden genes are predicted -------------------------------------------------------------------------------


def test_hidden_genes_are_scored_by_the_log_probability_of_their_bins(model, make_adata, four_gene_tokenizer):
    """A cell of one gene hides that gene and, in some draws, one that it does not express."""
    cell = make_adata([[0, 2.5, 0, 0]], obs={"sex": ["male"]})
    block = block_of(list(IterableAnnDataset(cell, four_gene_tokenizer)))
    possible = []
    for extra in (None, 3, 5, 6):  # types of the other genes
        types = torch.tensor([[0, 4, extra, 0] if extra else [0, 4, 0]])
        ids = torch.tensor([[0, 2, 2, 1] if extra else [0, 2, 1]])
        with torch.no_grad():
            logits_lv = model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits[0]
        log_probability_lv = torch.log_softmax(logits_lv, dim=1)
        hidden = [log_probability_lv[1, 11], *([log_probability_lv[2, 8]] if extra else [])]  # bin_3, bin_0
        possible.append(float(torch.stack(hidden).mean()))
    found = gene_log_likelihood(model, block, four_gene_tokenizer, mask_rates={})[0]
    assert min(abs(found - value) for value in possible) < 1e-5


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_genes_are_hidden_at_the_rate_of_the_run_s_training(rate, model, cells, four_gene_tokenizer, monkeypatch):
    """At rate 1 all three genes of a cell are hidden and none is left to add, so the score has no chance in it."""
    shown = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: shown.append(batch["input_ids"]) or forward(**batch))
    gene_log_likelihood(model, block_of(cells), four_gene_tokenizer, mask_rates={"gene_mask_prob": rate})
    bins = sum(int((ids >= four_gene_tokenizer.first_bin_id).sum()) for ids in shown)
    assert (bins == 0) == (rate == 1.0)


def test_a_cell_without_genes_has_no_score(model, make_adata, four_gene_tokenizer):
    cells = list(IterableAnnDataset(make_adata([[0, 0, 0, 0], [0, 1.0, 0, 0]]), four_gene_tokenizer))
    assert np.isnan(gene_log_likelihood(model, block_of(cells), four_gene_tokenizer, mask_rates={})).tolist() == [
        True,
        False,
    ]


# -- counts -------------------------------------------------------------------------------------------------------


def test_log_loss_is_the_mean_negative_logarithm_of_the_true_label():
    tally = Tally(Confusion(["a", "b"]))
    tally.add(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([0, 1]))
    assert tally.scores()["log_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)


def test_log_loss_of_an_impossible_label_is_finite():
    tally = Tally(Confusion(["a", "b"]))
    tally.add(np.array([[1.0, 0.0]]), np.array([1]))
    assert tally.scores()["log_loss"] == pytest.approx(-np.log(1e-12))


def test_a_cell_without_label_adds_no_loss():
    tally = Tally(Confusion(["a", "b"]))
    tally.add(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([0, -1]))
    assert (tally.scores()["n"], tally.scores()["log_loss"]) == (1, pytest.approx(np.log(2)))


def test_masked_losses_are_means_over_their_own_tokens(evaluator):
    """Token 5 is a label, tokens 8 to 11 are the bins."""
    probability_mv = torch.full((3, 12), 0.01)
    probability_mv[[0, 1, 2], [5, 9, 10]] = 0.89
    evaluator.add_masked(torch.log(probability_mv), torch.tensor([5, 9, 8]))
    flat = evaluator.flat_metrics(loss_weights=(1.0, 1.0))
    assert flat["loss_phenotypes"] == pytest.approx(-np.log(0.89), abs=1e-6)
    assert flat["loss_genes"] == pytest.approx(-(np.log(0.89) + np.log(0.01)) / 2, abs=1e-6)


def test_a_masked_gene_is_answered_by_a_bin(evaluator):
    logits_mv = torch.zeros(1, 12)
    logits_mv[0, [0, 10]] = torch.tensor([9.0, 2.0])
    evaluator.add_masked(logits_mv, torch.tensor([11]))
    assert evaluator.confusions()["gene_bins"].table().loc["bin_3", "bin_2"] == 1


def test_cells_without_label_are_not_scored(model, cells, evaluator):
    run_evaluator(evaluator, model, [cells])
    counts = {name: scores["alone"]["n"] for name, scores in evaluator.results().items() if name != "genes"}
    assert (counts, evaluator.num_cells) == ({"cell_type": 4, "sex": 5}, 6)


def _sums_close(left, right):
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


def test_sums_over_two_halves_are_the_sums_over_all(model, cells, evaluator):
    halves = []
    for half in (cells[:2], cells[2:]):
        halves.append(run_evaluator(evaluator, model, [half]).sums())
    added = [left + right for left, right in zip(*halves, strict=True)]
    assert _sums_close(added, run_evaluator(evaluator, model, [cells]).sums())


def test_sums_that_are_set_give_the_results_of_all(model, cells, evaluator, four_gene_tokenizer):
    expected = run_evaluator(evaluator, model, [cells]).results()
    sums = evaluator.sums()
    other = MlmEvaluator(four_gene_tokenizer, collator=evaluator.collator, questions=evaluator.questions)
    other.set_sums([array.astype(np.float64) for array in sums])
    assert other.results() == expected


def test_results_do_not_depend_on_the_batches(model, cells, evaluator):
    whole = run_evaluator(evaluator, model, [cells]).sums()
    assert _sums_close(run_evaluator(evaluator, model, [[cell] for cell in cells]).sums(), whole)


def test_a_second_evaluation_starts_from_zero(model, cells, evaluator):
    first = run_evaluator(evaluator, model, [cells]).results()
    assert run_evaluator(evaluator, model, [cells]).results() == first


def test_without_a_collator_no_masked_gene_is_scored(model, cells, four_gene_tokenizer):
    evaluator = MlmEvaluator(four_gene_tokenizer, collator=None, questions=standard_questions(["sex"]))
    assert set(run_evaluator(evaluator, model, [cells]).results()) == {"sex"}


def test_no_cell_is_refused(model, evaluator):
    with pytest.raises(InputError, match="no cell to evaluate on"):
        run_evaluator(evaluator, model, [])


def test_flat_metrics_weigh_the_two_losses(model, cells, evaluator):
    flat = run_evaluator(evaluator, model, [cells]).flat_metrics(loss_weights=(1.0, 0.25))
    assert flat["loss"] == pytest.approx(flat["loss_phenotypes"] + 0.25 * flat["loss_genes"])


def test_flat_metrics_name_each_phenotype(model, cells, evaluator):
    flat = run_evaluator(evaluator, model, [cells]).flat_metrics(loss_weights=(1.0, 1.0))
    assert flat["sex_accuracy"] == evaluator.results()["sex"]["alone"]["accuracy"]


# -- classifiers --------------------------------------------------------------------------------------------------


@pytest.fixture
def classified(adata, make_tokenizer):
    """A classifier of the cell type, its evaluator and the four labelled cells."""
    tokenizer = make_tokenizer(included_phenotypes=())
    labels = tokenizer.phenotypes["cell_type"]
    model = untrained(GeneBertForClassification, tokenizer, id2label=dict(enumerate(labels)))
    evaluator = ClassEvaluator(labels, tokenizer=tokenizer, category="cell_type")
    return model, evaluator, list(IterableAnnDataset(adata, tokenizer, phenotype_category="cell_type"))


def test_a_classifier_is_scored_on_labelled_cells(classified):
    model, evaluator, cells = classified
    assert run_evaluator(evaluator, model, [cells]).results()["cell_type"]["classifier"]["n"] == 4


def test_the_loss_of_a_classifier_is_its_cross_entropy(classified):
    model, evaluator, cells = classified
    labels_n = torch.stack([cell["labels"] for cell in cells])
    with torch.no_grad():
        logits = torch.cat(
            [
                model(input_ids=cell["input_ids"][None], token_type_ids=cell["token_type_ids"][None]).logits
                for cell in cells
            ]
        )
    expected = torch.nn.functional.cross_entropy(logits, labels_n).item()
    loss = run_evaluator(evaluator, model, [cells]).flat_metrics()["loss"]
    assert loss == pytest.approx(expected, abs=1e-5)


def test_sums_of_a_classifier_over_two_halves_are_the_sums_over_all(classified):
    model, evaluator, cells = classified
    halves = [run_evaluator(evaluator, model, [half]).sums() for half in (cells[:1], cells[1:])]
    whole = run_evaluator(evaluator, model, [cells]).results()["cell_type"]["classifier"]
    evaluator.set_sums([left + right for left, right in zip(*halves, strict=True)])
    assert evaluator.results()["cell_type"]["classifier"] == pytest.approx(whole, abs=1e-6)


# -- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def confusion():
    confusion = Confusion(["a", "b"])
    confusion.add([0, 0, 1], [0, 1, 1])
    return confusion


def test_a_confusion_is_written_with_true_classes_as_rows(confusion, tmp_path):
    write_results({}, {"sex.alone": confusion}, tmp_path, text="cells")
    table = pd.read_csv(tmp_path / "confusion.sex.alone.csv", index_col="true")
    assert table.loc["a"].tolist() == [1, 1]


def test_every_confusion_gets_a_table_its_scores_and_a_picture(confusion, tmp_path):
    write_results({}, {"sex.alone": confusion}, tmp_path / "new", text="cells")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "confusion.sex.alone.csv",
        "confusion.sex.alone.png",
        "metrics.json",
        "per_class.sex.alone.csv",
    ]


def test_a_phenotype_with_a_slash_in_its_name_is_written(confusion, tmp_path):
    write_results({}, {"cell/type.alone": confusion}, tmp_path, text="cells")
    assert (tmp_path / "confusion.cell_type.alone.csv").exists()


def test_a_score_of_no_cell_is_null(tmp_path):
    write_results({"sex": {"alone": Confusion(["a"]).scores()}}, {}, tmp_path, text="cells")
    assert json.loads((tmp_path / "metrics.json").read_text())["sex"]["alone"]["accuracy"] is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        write_results({}, {}, tmp_path / "file", text="cells")
