"""Questions and what becomes of their answers, on four genes, two phenotypes and an untrained model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from perturbgene.cli.verbs import AnswerOptions
from perturbgene.errors import InputError
from perturbgene.inference.calibration import Calibration, Temperature
from perturbgene.inference.predict import Predictor, questions_of
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import GENES_COLUMN, answered
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM, load_preset
from perturbgene.training.train import tokenizer_facts

CELLS = [[1.0, 2.0, 0, 0.6], [0, 0.5, 0, 3.0], [0, 0, 0, 0], [0, 2.0, 0.9, 0]]


@pytest.fixture
def run(four_gene_tokenizer) -> Run:
    torch.manual_seed(0)
    config = GeneBertConfig(**load_preset("tiny"), **tokenizer_facts(four_gene_tokenizer))
    return Run(GeneBertForPhenotypicMLM(config).eval(), four_gene_tokenizer, "untrained")


def asked(run: Run, data, *, ask=(), given=None, **options) -> pd.DataFrame:
    """Return all columns of an answer."""
    predictor = Predictor(run, ask, given or {}, AnswerOptions(**options))
    dataset = predictor.open(data, batch_size=3)
    with answered(dataset, predictor.answer, text="test") as merged:
        return pd.DataFrame(predictor.columns(merged))


def row_arrays(answers: dict[str, list]) -> dict[str, np.ndarray]:
    """Return answers as arrays, with the number of genes of each cell."""
    num_genes_n = np.full(len(next(iter(answers.values()))), 20)
    return {GENES_COLUMN: num_genes_n} | {
        name: np.array(values, dtype=np.int32 if "code" in name else np.float32) for name, values in answers.items()
    }


# -- questions ----------------------------------------------------------------------------------------------------


def test_phenotypes_are_asked_one_by_one_or_jointly(run):
    one_by_one = questions_of(run, ["sex", "cell_type"], [], joint=False)
    assert [question.asked for question in one_by_one] == [("sex",), ("cell_type",)]
    (joint,) = questions_of(run, ["sex", "cell_type"], [], joint=True)
    assert joint.asked == ("sex", "cell_type")


def test_nothing_named_asks_what_is_not_given(run):
    (question,) = questions_of(run, [], ["sex"], joint=False)
    assert (question.asked, question.given) == (("cell_type",), ("sex",))


def test_only_labels_that_are_used_are_read_and_the_genes_of_a_long_cell_stay_the_same(run):
    """Of 8 tokens, [CLS], [EOS] and two phenotype slots leave room for four genes, whatever is read."""
    for given, options, read in (({}, AnswerOptions(), ()), ({"sex": None}, AnswerOptions(), ("sex",)),
                                 ({}, AnswerOptions(audit=True), ("cell_type", "sex"))):  # fmt: skip
        tokenizer = Predictor(run, ["cell_type"] if given else [], given, options).tokenizer
        assert set(tokenizer.included_phenotypes) == set(read)
        assert tokenizer.max_length - 2 - len(read) == 4


def test_values_that_the_vocabulary_lacks_are_counted_by_phenotype(run, make_adata):
    cells = make_adata(CELLS, obs={"sex": ["male", "?", "f", "?"]})
    predictor = Predictor(run, ["cell_type"], {"sex": None}, AnswerOptions())
    dataset = predictor.open(cells)
    assert json.loads(predictor.facts(dataset)["unknown_labels_count_as_absent"]) == {"sex": {"?": 2, "f": 1}}


# -- columns ------------------------------------------------------------------------------------------------------


def test_columns_say_label_probability_entropy_and_the_next_labels(run, make_adata):
    table = asked(run, make_adata(CELLS), ask=["sex"])
    assert list(table) == [
        "predicted_sex", "predicted_sex_probability", "predicted_sex_entropy",
        "predicted_sex_2", "predicted_sex_2_probability", GENES_COLUMN,
    ]  # fmt: skip
    probability_nt = table[["predicted_sex_probability", "predicted_sex_2_probability"]].to_numpy()
    np.testing.assert_allclose(probability_nt.sum(axis=1), [1, 1, np.nan, 1], atol=1e-6)
    np.testing.assert_allclose(
        -(probability_nt * np.log(probability_nt)).sum(1), table["predicted_sex_entropy"], rtol=1e-4
    )
    assert table["predicted_sex"].isna().tolist() == table["predicted_sex_2"].isna().tolist() == [0, 0, 1, 0]
    assert (table["predicted_sex"].astype(str) != table["predicted_sex_2"].astype(str))[[0, 1, 3]].all()


def test_unsure_answers_become_unknown_and_cells_without_genes_stay_missing(run):
    predictor = Predictor(run, ["sex"], {}, AnswerOptions(abstain=0.7))
    answers = row_arrays({"code:sex": [[1, 0], [0, 1], [-1, -1]], "entropy:sex": [0.5, 0.6, np.nan],
                  "probability:sex": [[0.7, 0.3], [0.69, 0.31], [np.nan, np.nan]]})  # fmt: skip
    columns = {name: list(values) for name, values in predictor.columns(answers).items()}
    assert columns["predicted_sex"][:2] == ["male", "unknown"] and pd.isna(columns["predicted_sex"][2])
    assert columns["predicted_sex_1"][:2] == ["male", "female"]
    assert list(predictor.columns(answers)["predicted_sex"].categories) == ["female", "male", "unknown"]


def test_ranks_of_an_audit_begin_with_the_least_probable_label(run):
    predictor = Predictor(run, ["sex"], {}, AnswerOptions(audit=True, top_k=1))
    answers = row_arrays({"code:sex": [[0]] * 4, "probability:sex": [[1.0]] * 4, "entropy:sex": [0.0] * 4,
                  "audit:sex": [0.9, 0.2, np.nan, 0.5]})  # fmt: skip
    assert predictor.columns(answers)["audit_sex_rank"].tolist() == [3, 1, 0, 2]


def test_a_low_log_likelihood_is_as_strange_as_a_high_score(run):
    predictor = Predictor(run, ["sex"], {}, AnswerOptions(top_k=1))
    predictor.options = AnswerOptions(ood=True, top_k=1)
    entry = Temperature("sex", ("sex",), (), 2.0, 50, novelty_quantiles=(-1.0, 1.0, 3.0))
    predictor.calibration = Calibration((entry,), gene_quantiles=(-3.0, -2.0, -1.0))
    answers = row_arrays({"code:sex": [[0]] * 2, "probability:sex": [[1.0]] * 2, "entropy:sex": [0.0] * 2,
                  "novelty:sex": [-1.0, 2.0], "genes": [-1.0, -2.5]})  # fmt: skip
    columns = {
        name: values.tolist() for name, values in predictor.columns(answers).items() if name.endswith("percentile")
    }
    assert columns == {"ood_sex_score_percentile": [0, 75], "ood_gene_log_likelihood_percentile": [0, 75]}


def test_a_run_that_was_not_evaluated_says_so_instead_of_scoring_cells(run):
    with pytest.raises(InputError, match="does not hold statistics of its training cells, which --ood needs.*evaluate"):
        Predictor(run, ["sex"], {}, AnswerOptions(ood=True))


def test_an_audit_reads_the_other_phenotypes_of_each_cell(run, make_adata):
    obs = {"sex": ["male", "female", "male", "male"], "cell_type": ["B cell", "T cell", "B cell", None]}
    with_others = asked(run, make_adata(CELLS, obs=obs), ask=["sex"], audit=True)["audit_sex_probability"]
    del obs["cell_type"]
    without = asked(run, make_adata(CELLS, obs=obs), ask=["sex"], audit=True)["audit_sex_probability"]
    is_same = np.isclose(with_others, without, atol=1e-7, equal_nan=True)
    assert is_same.tolist() == [False, False, True, True]  # cell 2 has no genes, cell 3 no cell type


def test_the_temperature_softens_probabilities_and_keeps_answers(run, make_adata, monkeypatch):
    before = asked(run, make_adata(CELLS), ask=["sex"])
    entry = Temperature("sex", ("sex",), (), 4.0, 50)
    monkeypatch.setattr("perturbgene.inference.predict.read_calibration", lambda path: Calibration((entry,)))
    after = asked(run, make_adata(CELLS), ask=["sex"])
    odds = before["predicted_sex_probability"] / before["predicted_sex_2_probability"]
    np.testing.assert_allclose(
        after["predicted_sex_probability"] / after["predicted_sex_2_probability"], odds**0.25, rtol=1e-4
    )
    pd.testing.assert_series_equal(after["predicted_sex"], before["predicted_sex"])


def test_options_check_their_ranges():
    with pytest.raises(InputError, match=r"abstain is 2, but it must .* \[0, 1\]. Change --abstain"):
        AnswerOptions(abstain=2)


def test_a_run_without_phenotypes_predicts_nothing_and_says_what_to_use(run):
    nameless = Run(run.model, run.tokenizer.with_settings(included=[]), run.path)
    with pytest.raises(
        InputError, match="knows no phenotypes, so there is nothing to predict. Use `perturbgene embed`"
    ):
        questions_of(nameless, [], [], joint=False)
