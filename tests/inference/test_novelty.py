"""How unusual a cell is: new types score higher than known ones, shallow cells do not, and statistics come back."""

import numpy as np
import pytest
from scipy import sparse

from perturbgene.inference.novelty import NOVELTY_FILE, TrainingCells, Usual, log_doubt

NUM_GENES = 30


def cells_of(profile_kg: np.ndarray, label_n: np.ndarray, *, seed: int) -> sparse.csr_matrix:
    """Log counts per 10,000 of cells whose genes are drawn from the profile of their label; their depth varies."""
    rng = np.random.default_rng(seed)
    depth_n = rng.integers(200, 2000, size=len(label_n))
    counts_ng = np.stack(
        [rng.multinomial(depth, profile_kg[label]) for depth, label in zip(depth_n, label_n, strict=True)]
    )
    return sparse.csr_matrix(np.log1p(1e4 * counts_ng / depth_n[:, None]), dtype=np.float32)


@pytest.fixture(scope="module")
def profiles() -> np.ndarray:
    """Three types, of which the third is never learned, and each has ten genes of its own."""
    profile_kg = np.ones((3, NUM_GENES))
    for label in range(3):
        profile_kg[label, 10 * label : 10 * label + 10] = 6
    return profile_kg / profile_kg.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def training(profiles: np.ndarray) -> TrainingCells:
    """Statistics of 200 cells of the first two types; no cell has the third label of the vocabulary."""
    label_n = np.arange(200) % 2
    return TrainingCells.fit(cells_of(profiles, label_n, seed=0), {"type": label_n}, {"type": 3})


def logits_of(expression_ng: sparse.csr_matrix) -> np.ndarray:
    """What a classifier of the first two types says that knows nothing of the third: always quite sure."""
    sums_n2 = np.stack([np.asarray(expression_ng[:, at : at + 10].sum(axis=1)).ravel() for at in (0, 10)], axis=1)
    return np.concatenate([sums_n2, np.full((expression_ng.shape[0], 1), -9.0)], axis=1)


def parts_of(training: TrainingCells, expression_ng: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """The parts of the score, and the number of genes, of each cell."""
    parts_np = training.parts("type", training.locate(expression_ng), logits_of(expression_ng))
    return parts_np, np.diff(expression_ng.indptr)


def test_cells_of_a_new_type_score_above_all_known_ones(training, profiles):
    usual = Usual.fit(*parts_of(training, cells_of(profiles, np.arange(100) % 2, seed=1)))
    assert usual is not None
    known_n = usual.score(*parts_of(training, cells_of(profiles, np.arange(100) % 2, seed=2)))
    new_n = usual.score(*parts_of(training, cells_of(profiles, np.full(100, 2), seed=3)))
    assert new_n.min() > np.quantile(known_n, 0.95) and abs(known_n.mean()) < 0.3


def test_the_score_does_not_follow_the_number_of_genes_of_known_cells(training, profiles):
    parts_np, num_genes_n = parts_of(training, cells_of(profiles, np.arange(200) % 2, seed=1))
    usual = Usual.fit(parts_np, num_genes_n)
    assert usual is not None
    assert abs(np.corrcoef(usual.score(parts_np, num_genes_n), np.log(num_genes_n))[0, 1]) < 0.1
    # Beyond the depths that were seen, the score compares with the nearest one.
    few, fewer = (usual.score(parts_np[:1], np.array([count])) for count in (num_genes_n.min(), 1))
    assert few == pytest.approx(fewer)


def test_the_distance_is_that_of_the_covariance_within_labels():
    points_n2 = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2], [9, 0], [7, 0], [8, 2], [8, -2]])
    label_n = np.array([0] * 4 + [1] * 4)
    found = TrainingCells.fit(sparse.csr_matrix(points_n2 @ np.eye(2, 6)), {"type": label_n}, {"type": 2})
    cells_nt = sparse.csr_matrix(np.eye(2, 6) * [[1], [2]])
    found_n2 = found.parts("type", found.locate(cells_nt), np.eye(2))
    # Variances within labels: 4 / (8 - 2) and 16 / (8 - 2). The first cell is at (1, 0), the second at (0, 2).
    expected_n = [1 / (4 / 6), 64 / (4 / 6) + 4 / (16 / 6)]
    np.testing.assert_allclose(np.exp(found_n2[:, 0]), expected_n, rtol=2e-3)


def test_a_label_without_training_cells_is_as_far_as_the_nearest_other(training, profiles):
    points_nr = training.locate(cells_of(profiles, np.zeros(5, dtype=int), seed=4))
    as_first_np, as_third_np = (training.parts("type", points_nr, np.eye(3)[[label] * 5]) for label in (0, 2))
    np.testing.assert_allclose(as_third_np, as_first_np)


def test_a_certain_answer_leaves_a_finite_doubt():
    found_n = log_doubt(np.array([[2000.0, 0, 0], [0, 0, 0]], dtype=np.float32))
    np.testing.assert_allclose(found_n, [-50, np.log(2 / 3)], atol=1e-6)
    assert log_doubt(np.zeros((2, 1))).tolist() == [-50, -50]


def test_few_cells_say_nothing_of_what_is_usual():
    assert Usual.fit(np.zeros((30, 2)), np.array([5] * 19 + [0] * 11)) is None


def test_the_statistics_come_back_from_the_run_and_a_damaged_file_is_as_none(training, tmp_path):
    assert TrainingCells.read(tmp_path) is None
    training.save(tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / NOVELTY_FILE).stat().st_mode == (tmp_path / "other").stat().st_mode  # what the umask allows
    found = TrainingCells.read(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.axes_tr, training.axes_tr)
    np.testing.assert_array_equal(found.means_kr["type"], training.means_kr["type"])
    np.testing.assert_array_equal(found.precision_rr["type"], training.precision_rr["type"])
    (tmp_path / NOVELTY_FILE).write_bytes(b"damaged")
    assert TrainingCells.read(tmp_path) is None
