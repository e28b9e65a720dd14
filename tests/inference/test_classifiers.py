"""Each classifier learns what it should, equals scikit-learn where that has it, and stays within its bounds."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import RidgeClassifier

from perturbgene.errors import InputError
from perturbgene.inference import classifiers
from perturbgene.inference.classifiers import (
    celltypist,
    dense_products,
    logistic_regression,
    majority_class,
    nearest_neighbors,
    principal_components,
    ridge,
    sample,
)


def two_blobs(num_cells: int, *, seed: int, num_genes: int = 6) -> tuple[csr_matrix, np.ndarray]:
    """Make cells of two classes of which class 1 expresses gene 0 more, shape (n, g)."""
    generator = np.random.default_rng(seed)
    labels_n = np.arange(num_cells) % 2
    values_ng = generator.random((num_cells, num_genes)) * (generator.random((num_cells, num_genes)) < 0.7)
    values_ng[:, 0] += 3.0 * labels_n
    return csr_matrix(values_ng.astype(np.float32)), labels_n


def three_classes(num_cells: int, *, num_genes: int, seed: int = 0) -> tuple[csr_matrix, np.ndarray]:
    """Make cells of classes 0, 2 and 5, hard to tell apart, whose values are far from centered."""
    generator = np.random.default_rng(seed)
    labels_n = np.array([0, 2, 5])[np.arange(num_cells) % 3]
    values_ng = generator.random((num_cells, num_genes)) * (generator.random((num_cells, num_genes)) < 0.5)
    values_ng[:, 1] += 4
    values_ng[:, 0] += labels_n / 8
    return csr_matrix(values_ng.astype(np.float32)), labels_n


@pytest.mark.parametrize(
    ("labels_n", "expected"), [([1, 1, 0, -1, -1, -1], 1), ([2, 0, 0, 2], 0), ([-1], 0), ([], 0)],
    ids=["most frequent", "first of equals", "nothing known", "no cell"],
)  # fmt: skip
def test_the_majority_is_the_most_frequent_known_class(labels_n: list[int], expected: int) -> None:
    assert majority_class(labels_n) == expected


def test_logistic_regression_learns_a_gene_and_is_repeatable() -> None:
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, eval_n = two_blobs(30, seed=1)
    predicted_n = logistic_regression(train_ng, train_n, seed=0)(eval_ng)
    assert (predicted_n == eval_n).mean() > 0.95
    assert np.array_equal(logistic_regression(train_ng, train_n, seed=0)(eval_ng), predicted_n)


def test_logistic_regression_keeps_class_numbers_when_a_class_has_no_training_cells() -> None:
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, _ = two_blobs(30, seed=1)
    assert set(logistic_regression(train_ng, train_n * 2, seed=0)(eval_ng).tolist()) == {0, 2}


def test_a_probability_of_zero_is_minus_infinity_without_a_warning() -> None:
    model = logistic_regression(*two_blobs(40, seed=0), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_probability_nk = model.log_probability(csr_matrix(np.full((1, 6), 1e6)), num_classes=2)
    assert log_probability_nk.min() == -np.inf


def test_logistic_regression_takes_single_cells_of_every_class() -> None:
    train_ng, train_n = two_blobs(2, seed=0)
    assert logistic_regression(train_ng, train_n, seed=0)(train_ng).tolist() == train_n.tolist()


@pytest.mark.parametrize("num_genes", [7, 90], ids=["fewer genes than cells", "fewer cells than genes"])
@pytest.mark.parametrize("penalty", [1.0, 100.0])
def test_ridge_answers_as_scikit_learn_does(num_genes, penalty, monkeypatch):
    monkeypatch.setattr(classifiers, "PENALTIES", (penalty,))
    train_ng, train_n = three_classes(60, num_genes=num_genes)
    eval_ng, _ = three_classes(200, num_genes=num_genes, seed=1)
    answer, facts = ridge(train_ng, train_n, seed=0)
    expected_n = RidgeClassifier(alpha=penalty).fit(train_ng.toarray(), train_n).predict(eval_ng.toarray())
    assert facts == {"n_train": 60, "penalty": penalty}
    assert answer(eval_ng).tolist() == expected_n.tolist()
    assert len(set(expected_n)) > 1


@pytest.mark.parametrize("num_genes", [7, 90], ids=["fewer genes than cells", "fewer cells than genes"])
def test_ridge_chooses_the_penalty_that_predicts_best_of_donors_that_it_has_not_seen(num_genes, monkeypatch):
    train_ng, train_n = three_classes(60, num_genes=num_genes)
    groups_n = np.array(["a", "b", "c"])[np.arange(60) // 20]
    right = []
    for penalty in classifiers.PENALTIES:
        model = RidgeClassifier(alpha=penalty)
        right.append(0)
        for group in "abc":
            is_out_n = groups_n == group
            model.fit(train_ng[~is_out_n].toarray(), train_n[~is_out_n])
            right[-1] += int((model.predict(train_ng[is_out_n].toarray()) == train_n[is_out_n]).sum())
    _, facts = ridge(train_ng, train_n, groups_n=groups_n, seed=0)
    assert right[classifiers.PENALTIES.index(facts["penalty"])] == max(right)


def test_ridge_divides_cells_of_one_donor_by_chance():
    train_ng, train_n = three_classes(60, num_genes=7)
    eval_ng, _ = three_classes(30, num_genes=7, seed=1)
    one, of_one = ridge(train_ng, train_n, groups_n=np.full(60, "a"), seed=0)
    none, of_none = ridge(train_ng, train_n, seed=0)
    assert of_one == of_none and one(eval_ng).tolist() == none(eval_ng).tolist()


def test_ridge_of_many_cells_and_genes_is_fitted_on_a_sample(monkeypatch):
    monkeypatch.setattr(classifiers, "MOST_ROWS", 20)
    train_ng, train_n = two_blobs(60, seed=0, num_genes=30)
    answer, facts = ridge(train_ng, train_n, groups_n=np.arange(60) % 4, seed=0)
    assert facts["n_train"] == 20
    assert (answer(train_ng) == train_n).mean() > 0.9


def test_ridge_takes_one_cell_of_each_class():
    train_ng, train_n = two_blobs(2, seed=0)
    answer, _ = ridge(train_ng, train_n, groups_n=np.array(["a", "b"]), seed=0)
    assert answer(train_ng).tolist() == [0, 1]


def test_products_of_columns_do_not_depend_on_the_parts(monkeypatch):
    values_ng, _ = two_blobs(11, seed=0)
    whole_gg = dense_products(values_ng)
    monkeypatch.setattr(classifiers, "MOST_DENSE_VALUES", 12)
    np.testing.assert_allclose(dense_products(values_ng), whole_gg, rtol=1e-5)
    np.testing.assert_allclose(whole_gg, (values_ng.T @ values_ng).toarray(), rtol=1e-5)


def test_nearest_neighbors_answer_by_their_commonest_class():
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, eval_n = two_blobs(30, seed=1)
    components = principal_components(train_ng, seed=0)
    assert components is not None and components.transform(eval_ng).shape == (30, 5)
    answer = nearest_neighbors(components.transform(train_ng), 3 * train_n)
    assert answer(components.transform(eval_ng)).tolist() == (3 * eval_n).tolist()


def test_fewer_cells_than_neighbors_vote_all():
    answer = nearest_neighbors(np.array([[0.0], [1.0], [9.0]]), np.array([0, 0, 1]))
    assert answer(np.array([[9.0]])).tolist() == [0]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)], ids=["one cell", "one gene"])
def test_one_cell_or_gene_has_no_components(shape):
    assert principal_components(csr_matrix(np.ones(shape)), seed=0) is None


def test_a_sample_is_in_order_without_repeats_and_the_same_again():
    rows_m = sample(100, most=30, seed=1)
    assert len(set(rows_m.tolist())) == 30 and (np.diff(rows_m) > 0).all()
    assert np.array_equal(sample(100, most=30, seed=1), rows_m)
    assert sample(5, most=30, seed=1).tolist() == [0, 1, 2, 3, 4]


# -- CellTypist ---------------------------------------------------------------------------------------------------

#: Its interface as it documents it: `train(X, labels, genes, check_expression)` and `annotate(AnnData, model)`, which
#: answers with a table `predicted_labels` that has the column of the same name. It learns the mean of each class.
FAKE = """
import types, warnings
import numpy as np, pandas as pd
warnings.simplefilter("ignore")
seen = []

def train(X=None, labels=None, genes=None, check_expression=True):
    assert not check_expression and len(genes) == len(set(genes)) == X.shape[1] and labels.dtype.kind == "U"
    seen.append(X.shape)
    means = {label: np.asarray(X[labels == label].mean(axis=0)).ravel() for label in np.unique(labels)}
    return types.SimpleNamespace(means=means, genes=list(genes))

def annotate(filename="", model=None):
    assert filename.var_names.tolist() == model.genes and filename.X.min() >= 0 and filename.X.max() <= 9.22
    seen.append(filename.shape)
    far = {label: ((filename.X.toarray() - mean) ** 2).sum(axis=1) for label, mean in model.means.items()}
    labels = pd.DataFrame({"predicted_labels": pd.DataFrame(far).idxmin(axis=1).to_numpy()}, index=filename.obs_names)
    return types.SimpleNamespace(predicted_labels=labels.astype("category"))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `celltypist` that can be imported."""
    (tmp_path / "celltypist.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "celltypist", raising=False)
    yield tmp_path / "celltypist.py"
    sys.modules.pop("celltypist", None)


def test_celltypist_is_trained_and_asked_by_its_documented_interface(fake, monkeypatch):
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, eval_n = two_blobs(30, seed=1)
    answer, facts = celltypist(train_ng, 11 * train_n, seed=0)
    assert facts == {"n_train": 60}
    assert answer(eval_ng).tolist() == (11 * eval_n).tolist()


def test_celltypist_makes_few_cells_dense_at_a_time(fake, monkeypatch):
    monkeypatch.setattr(classifiers, "MOST_CELLTYPIST_VALUES", 6 * 40)
    monkeypatch.setattr(classifiers, "MOST_DENSE_VALUES", 6 * 20)
    train_ng, train_n = two_blobs(60, seed=0)
    answer, facts = celltypist(train_ng, train_n, seed=0)
    assert facts == {"n_train": 40} and (answer(train_ng[:50]) == train_n[:50]).all()
    assert sys.modules["celltypist"].seen == [(40, 6), (20, 6), (20, 6), (10, 6)]


def test_a_celltypist_that_does_not_work_here_is_a_plain_error(fake):
    fake.write_text("def train(*_, **__): raise TypeError('unexpected keyword multi_class')")
    with pytest.raises(
        InputError, match="CellTypist cannot be trained here .TypeError: unexpected keyword multi_class"
    ):
        celltypist(*two_blobs(6, seed=0), seed=0)
