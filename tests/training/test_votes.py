"""The genes' votes: a regression that is solved, its penalty, and what the transformer may add to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from perturbgene import evaluate, load_run, mlm, prepare
from perturbgene.errors import InputError
from perturbgene.training import votes
from perturbgene.training.votes import PENALTIES, Regression, choose, earned_share, solve

NUM_GENES, LABELS = 40, ["B", "NK", "T"]


def zero(num_labels: int = 3) -> Regression:
    return Regression(np.zeros((NUM_GENES, num_labels)), np.zeros(num_labels))


def planted(num_cells: int = 300, *, strength: float = 1.0, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Cells of three labels, each of which has more of its own gene, among sparse noise."""
    draw = np.random.default_rng(seed)
    label_n = draw.integers(0, 3, num_cells)
    expression_ng = draw.gamma(1.0, size=(num_cells, NUM_GENES)) * (draw.random((num_cells, NUM_GENES)) < 0.4)
    expression_ng[np.arange(num_cells), label_n] += strength
    return sparse.csr_matrix(expression_ng), label_n


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_solution_is_that_of_scikit_learn(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expression_ng, label_n = planted()
    penalty = 1e-2
    found = solve(expression_ng, label_n, penalty=penalty, prior=zero(), power=power)
    scale_g = expression_ng.toarray().std(axis=0) ** power
    scaled_ng = expression_ng.toarray() / scale_g
    strength = penalty * scaled_ng.var(axis=0).sum()
    mean_g = scaled_ng.mean(axis=0) / np.linalg.norm(scaled_ng.mean(axis=0))
    scaled_ng -= np.outer(scaled_ng @ mean_g, mean_g)
    reference = LogisticRegression(C=1 / (strength * len(label_n)), tol=1e-8, max_iter=5000).fit(scaled_ng, label_n)
    np.testing.assert_allclose(found.votes_gk.T, reference.coef_ / scale_g, atol=2e-3)
    wanted_nk = reference.predict_log_proba(scaled_ng)
    found_nk = torch.from_numpy(found.logits(expression_ng)).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(found_nk, wanted_nk, atol=5e-3)
    monkeypatch.setattr(votes, "MOST_CHOOSING", 10)  # gene by gene, as from many cells
    by_gene = solve(expression_ng, label_n, penalty=penalty, prior=zero(), power=power)
    np.testing.assert_allclose(by_gene.votes_gk, found.votes_gk, atol=2e-3)


@pytest.mark.parametrize("most", [10, 2000])
def test_votes_do_not_know_how_much_a_cell_expresses(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expression_ng, label_n = planted(strength=3.0)
    depth_n = 1.0 + label_n  # tells the labels apart, but not those of another technology
    monkeypatch.setattr(votes, "MOST_CHOOSING", most)  # fewer cells in their axes, more gene by gene
    found = solve(sparse.csr_matrix(expression_ng.multiply(depth_n[:, None])), label_n, penalty=1e-4, prior=zero())
    mean_1g = sparse.csr_matrix(expression_ng.multiply(depth_n[:, None])).mean(axis=0).reshape(1, -1)
    np.testing.assert_allclose(mean_1g @ found.votes_gk, 0.0, atol=1e-6)
    others_ng, label_n = planted(seed=1, strength=3.0)
    assert (found.logits(others_ng).argmax(axis=1) == label_n).mean() > 0.9


def test_of_penalties_that_cells_cannot_tell_apart_the_weakest_is_chosen() -> None:
    draw = np.random.default_rng(0)
    label_n = np.arange(150) % 3
    clear_ng = sparse.csr_matrix(draw.random((150, NUM_GENES)) * 0.1 + 10.0 * np.eye(3, NUM_GENES)[label_n])
    assert choose(clear_ng, label_n, group_n=None, prior=zero()).penalty == PENALTIES[-1]
    known = Regression(50.0 * np.eye(NUM_GENES, 3), np.zeros(3))  # of another run, and nothing is wrong with it
    assert choose(clear_ng, label_n, group_n=None, prior=known).penalty > PENALTIES[-1]


def test_the_same_cells_get_the_same_penalty_and_losses() -> None:
    """In other files of tests, `choose` is called once per set of cells."""
    expression_ng, label_n = planted(60, strength=0.5)
    first, second = (choose(expression_ng, label_n, group_n=None, prior=zero()) for _ in range(2))
    assert (first.penalty, first.power, first.loss) == (second.penalty, second.power, second.loss)
    np.testing.assert_array_equal(first.losses_n, second.losses_n)


def test_a_strong_penalty_keeps_the_votes_of_another_run() -> None:
    expression_ng, label_n = planted()
    prior = Regression(np.random.default_rng(1).normal(size=(NUM_GENES, 3)), np.zeros(3))
    kept = solve(expression_ng, label_n, penalty=1e4, prior=prior)
    np.testing.assert_allclose(kept.votes_gk, prior.votes_gk, atol=1e-3)
    moved = solve(expression_ng, label_n, penalty=1e-6, prior=prior)
    assert np.abs(moved.votes_gk - prior.votes_gk).max() > 0.5


def test_weights_of_labels_shift_the_answers_towards_the_heavier() -> None:
    expression_ng, label_n = planted(strength=0.2)
    even, heavy = (
        solve(expression_ng, label_n, penalty=1e-3, prior=zero(), weight_n=np.array(weight_k)[label_n])
        for weight_k in ([1.0, 1.0, 1.0], [1.0, 1.0, 20.0])
    )
    shares = [(one.logits(expression_ng).argmax(axis=1) == 2).mean() for one in (even, heavy)]
    assert shares[1] > 0.9 > 0.6 > shares[0]


def test_labels_that_genes_do_not_show_get_a_stronger_penalty_than_labels_that_they_do() -> None:
    expression_ng, label_n = planted(strength=3.0)
    noise_n = np.random.default_rng(5).permutation(label_n)
    clear, noise = (choose(expression_ng, one, group_n=None, prior=zero()) for one in (label_n, noise_n))
    assert clear.penalty < noise.penalty and clear.losses_n.mean() < 0.3 < 1.0 < noise.losses_n.mean()


def test_folds_keep_donors_whole() -> None:
    expression_ng, label_n = planted(strength=0.0)
    donor_n = np.arange(300) % 6  # each donor has a gene and a label of its own, which helps with no other donor
    marked = expression_ng.tolil()
    for donor in range(6):
        marked[donor_n == donor, 10 + donor] = 5.0
    label_n = donor_n % 3
    by_cell, by_donor = (choose(marked.tocsr(), label_n, group_n=one, prior=zero()) for one in (None, donor_n))
    assert by_cell.losses_n.mean() < 0.1 < 1.0 < by_donor.losses_n.mean()


def test_genes_of_little_variance_count_as_much_as_others_only_where_that_is_better() -> None:
    draw = np.random.default_rng(0)
    label_n = draw.integers(0, 3, 600)
    quiet_ng = draw.normal(size=(600, NUM_GENES)) * np.where(np.arange(NUM_GENES) < 9, 0.05, 3.0)
    quiet_ng[np.arange(600), label_n] += 0.1  # what tells the labels apart is in the genes that vary least
    quiet = choose(sparse.csr_matrix(quiet_ng), label_n, group_n=None, prior=zero())
    loud_ng, label_n = planted(600, strength=3.0)
    assert quiet.power > 0 and choose(loud_ng, label_n, group_n=None, prior=zero()).power == 0.0


def test_the_transformer_earns_a_share_only_where_it_helps() -> None:
    draw = np.random.default_rng(0)
    label_n = draw.integers(0, 3, 400)
    votes_nk = 2.0 * np.eye(3)[label_n] + draw.normal(size=(400, 3))
    helpful_nk = 2.0 * np.eye(3)[label_n] + draw.normal(size=(400, 3))
    assert earned_share(helpful_nk, votes_nk, label_n) >= 0.5
    assert earned_share(draw.normal(size=(400, 3)), votes_nk, label_n) == 0.0
    assert earned_share(-helpful_nk, votes_nk, label_n) == 0.0


def cells(num_cells: int, *, seed: int, depth: float = 1.0) -> ad.AnnData:
    """Counts of three cell types in four donors; a sex that no gene shows."""
    draw = np.random.default_rng(seed)
    rate_ng = np.full((num_cells, NUM_GENES), 2.0 * depth)
    label_n = draw.integers(0, 3, num_cells)
    for label in range(3):
        rate_ng[np.ix_(label_n == label, range(4 * label, 4 * label + 4))] *= 4
    obs = pd.DataFrame(
        {
            "cell_type": np.array(LABELS)[label_n],
            "sex": draw.choice(["f", "m"], num_cells),
            "donor_id": draw.choice(["a", "b", "c", "d"], num_cells),
        },
        index=[f"{seed}_{number}" for number in range(num_cells)],
    )
    var = pd.DataFrame(index=[f"G{number}" for number in range(NUM_GENES)])
    return ad.AnnData(sparse.csr_matrix(draw.poisson(rate_ng).astype(np.float32)), obs, var)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("votes")
    cells(400, seed=0).write_h5ad(folder / "cells.h5ad")
    return Path(prepare(folder / "cells.h5ad", folder / "corpus", phenotypes=["cell_type", "sex"], split_by="donor_id",
                        eval_donors=["d"], num_top_genes=NUM_GENES))  # fmt: skip


SETTINGS: dict[str, Any] = {"model_arch": "tiny", "report_to": "none", "use_cpu": True}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of training, so that nearly all of what it knows is the regression."""
    folder = tmp_path_factory.mktemp("votes_run") / "run"
    return mlm(corpus=corpus, output_dir=folder, max_steps=1, **SETTINGS)


def test_a_run_is_as_right_as_a_regression_after_one_step(run: Path) -> None:
    scores = evaluate(run, cells(200, seed=1), calibrate=False)["cell_type"]
    assert scores["alone"]["accuracy"] > 0.95


def test_a_run_answers_cells_that_were_read_four_times_as_deep(run: Path) -> None:
    scores = evaluate(run, cells(200, seed=2, depth=4.0), calibrate=False)["cell_type"]
    assert scores["alone"]["accuracy"] > 0.95


def test_what_genes_do_not_show_is_answered_near_chance_and_not_with_false_confidence(run: Path) -> None:
    scores = evaluate(run, cells(300, seed=3), calibrate=False)["sex"]["alone"]
    assert scores["log_loss"] < 0.72  # ln 2 = 0.69


def test_votes_and_shares_are_saved_with_the_weights(run: Path) -> None:
    path = votes.direct_path(load_run(run).model)
    assert path is not None and path.votes_tk.abs().max() > 0.1
    assert path.share_p2.shape == (2, 2) and path.share_p2[0, 0] in votes.SHARES
    assert votes.describe_shares(load_run(run).model, load_run(run).tokenizer)[0].startswith(
        "cell_type: the genes' vot"
    )


def test_the_transformer_adds_nothing_unless_enough_held_out_cells_say_so(
    corpus: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells(20, seed=4).write_h5ad(tmp_path / "few.h5ad")
    for name, held_out in (("few", tmp_path / "few.h5ad"), ("none", None)):
        files: dict[str, Any] = {"corpus": corpus, "eval_data_paths": held_out}
        if held_out is None:
            files = {"train_data_paths": corpus / "train", "pretrained_model_path": run}
        folder = mlm(**files, output_dir=tmp_path / name, max_steps=1, **SETTINGS)
        path = votes.direct_path(load_run(folder).model)
        assert path is not None and not path.share_p2.any()
    assert "no evaluation cells say how much the transformer may add" in caplog.text


def test_votes_of_a_run_are_a_start_only_for_cells_that_it_has_not_read(
    corpus: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells(20, seed=4).write_h5ad(tmp_path / "others.h5ad")
    for name, files in (("same", {"corpus": corpus}), ("others", {"train_data_paths": tmp_path / "others.h5ad"})):
        caplog.clear()
        with caplog.at_level("INFO", logger="perturbgene"):
            mlm(
                **files, output_dir=tmp_path / name, pretrained_model_path=run, train_only="votes",
                per_device_train_batch_size=16, eval_strategy="no", **SETTINGS,
            )  # fmt: skip
        assert ("the genes' votes are solved anew" in caplog.text) == (name == "same")
    first, again, more = (
        votes.direct_path(load_run(folder).model) for folder in (run, tmp_path / "same", tmp_path / "others")
    )
    assert first is not None and again is not None and more is not None
    assert torch.equal(first.votes_tk, again.votes_tk)
    assert not torch.equal(first.votes_tk, more.votes_tk)


def test_while_it_is_trained_the_transformer_is_scored_alone(corpus: Path, tmp_path: Path) -> None:
    """Otherwise the votes decide which weights are the best: those of the first steps are as good as any."""
    folder = mlm(corpus=corpus, output_dir=tmp_path / "run", max_steps=2, eval_steps=1, save_steps=1, **SETTINGS)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    alone = [entry["eval_cell_type_accuracy"] for entry in history if "eval_loss" in entry]
    delivered = json.loads((folder / "metrics.json").read_text())["cell_type"]["alone"]["accuracy"]
    assert len(alone) == 2 and max(alone) < 0.8 < 0.95 < delivered


def test_a_run_of_before_votes_were_solved_is_refused_with_the_reason(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    settings = json.loads((old / "config.json").read_text())
    assert settings.pop("run_format") == 2
    (old / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="was trained before genes' votes were solved.*Train it again"):
        load_run(old)
    (old / "config.json").write_text(json.dumps(settings | {"run_format": 3}))
    with pytest.raises(InputError, match="config.json has format 3, but .* Update perturbgene"):
        load_run(old)


@pytest.mark.parametrize(("most", "penalty"), [(2000, "1e-09"), (60, "0.001")])
def test_more_cells_than_choose_the_penalty_do_not_get_the_weakest(
    most: int, penalty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clear = cells(200, seed=0)
    clear.X = sparse.csr_matrix(clear.X.toarray() + 50 * np.eye(3, NUM_GENES)[clear.obs["cell_type"].map(LABELS.index)])
    clear.write_h5ad(tmp_path / "clear.h5ad")
    corpus = prepare(tmp_path / "clear.h5ad", tmp_path / "corpus", phenotypes=["cell_type"], split_by="donor_id")
    monkeypatch.setattr(votes, "MOST_CHOOSING", most)
    monkeypatch.setattr(votes, "LEAST_OF_MANY", 1e-3)
    with caplog.at_level("INFO", logger="perturbgene"):
        mlm(corpus=corpus, output_dir=tmp_path / "run", train_only="votes", **SETTINGS)
    assert f"penalty {penalty}" in caplog.text


def test_large_data_are_thinned_evenly(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(votes, "MOST_VALUES", 3000)
    folder = mlm(corpus=corpus, output_dir=tmp_path / "run", max_steps=1, **SETTINGS)
    scores = evaluate(folder, cells(200, seed=1), calibrate=False)["cell_type"]
    assert scores["alone"]["accuracy"] > 0.8
