"""The baselines next to every score: simple classifiers fitted on the training cells, and which answers are best.

Owns reading expression and labels for them, scoring them and comparing them with a run; leaves fitting to
`classifiers`, what the run started from to `starts` and the arithmetic of scores to `eval_utils`. Letters: n cells,
m cells of a part, g genes.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.special import stdtrit

from perturbgene.data_utils.genes import GenePanel, clean_gene
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, donors_of
from perturbgene.data_utils.labels import ABSENT, is_missing
from perturbgene.data_utils.order import split_rows
from perturbgene.data_utils.scale import log_matrix
from perturbgene.data_utils.shards import ShardCache
from perturbgene.errors import InputError
from perturbgene.eval_utils import Confusion, IntArray, Question, Scores
from perturbgene.inference.classifiers import (
    Classifier,
    celltypist,
    logistic_regression,
    majority_class,
    nearest_neighbors,
    principal_components,
    ridge,
    sample,
)
from perturbgene.inference.given_baselines import GIVEN_NAMES, GivenLabels

logger = logging.getLogger(__name__)

#: Most training cells that baselines see; more cost minutes and hardly change them.
MOST_BASELINE_CELLS = 20_000
#: Evaluated cells that are read at a time.
CELLS_AT_ONCE = 4096

#: Fewer donors do not show how much scores differ between donors.
LEAST_DONORS = 3

#: What texts call each baseline.
NAMES = {
    "majority": "the most frequent label",
    "logistic_regression": "logistic regression",
    "ridge": "ridge",
    "nearest_neighbors": "nearest neighbors",
    "celltypist": "CellTypist",
    "start": "logistic regression on the start's embedding",
    "scratch": "the same run from scratch",
}
#: What it means that one of these is right as often as the run.
_LESSONS = {"start": "training has not improved on its start", "scratch": "its start has not paid"}


@dataclass(frozen=True)
class Answers:
    """What a baseline answers.

    Args:
        scores: Its scores, and `n_train` cells and `n_genes` genes that it was fitted on.
        predicted_n: The class of each evaluated cell, with a known label or not, shape (n,).
        given: Name of a question in which other phenotypes are given -> the same, from a baseline that is given them.
    """

    scores: Scores
    predicted_n: IntArray
    given: Mapping[str, IntArray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fitted:
    """A baseline that was fitted for one phenotype: its name, what answers, and what else its scores should say.

    Logistic regression also has log-probabilities of all classes, (n, k), and those of training cells that were left
    out, with their numbers.
    """

    name: str
    predict: Classifier
    facts: Scores
    log_probability: Callable[[sparse.csr_matrix], np.ndarray] | None = None
    left_out: Sequence[tuple[IntArray, np.ndarray]] = ()


# -- reading ------------------------------------------------------------------------------------------------------


def _with_all_genes(
    train: IterableAnnDataset, evaluation: IterableAnnDataset
) -> tuple[ShardCache, ShardCache, np.ndarray]:
    """Return the files of both, read with the run's genes and behind them the others of the first training file.

    A prepared shard has no genes but the run's.

    Returns:
        The training and the evaluated files, and which of the genes all of their cells were measured with.
    """
    own, first = train.tokenizer.panel, train.shards[0]
    names_c, _, symbols = first.renaming.names
    symbols_c = symbols[0] if symbols else np.full(len(names_c), "")
    known, taken = set(own.genes), set(own.symbols)
    others: dict[str, str] = {}
    for column in np.flatnonzero(first.alignment.gene_of_column_c < 0):
        name, symbol = clean_gene(names_c[column]), clean_gene(symbols_c[column])
        if name and name not in known:
            others.setdefault(name, "" if symbol in taken else symbol)
    own_symbols = own.symbols or ("",) * len(own)
    wide = GenePanel((*own.genes, *others), (*own_symbols, *others.values()))
    files = []
    for shards in (train.shards, evaluation.shards):
        options = {name: value for name, value in shards.options.items() if name not in ("alignments", "measured")}
        options["panel"] = wide
        files.append(ShardCache(shards.sources, layer=shards.layer, where=shards.where, **options))
    try:
        measured = [shard.is_measured_g for shards in files for shard in shards]
    except InputError as error:  # an ambiguous gene that the run does not need
        logger.info("baselines use the genes of the run alone: %s", error)
        files = [train.shards, evaluation.shards]
        measured = [shard.is_measured_g for shards in files for shard in shards]
    return files[0], files[1], np.all(measured, axis=0)


def read_expression(shards: ShardCache, rows_n: IntArray, *, sizes: Sequence[int]) -> sparse.csr_matrix:
    """Return log1p counts per 10,000 of some cells of all files, CSR of shape (n, g)."""
    starts_f = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    parts = [log_matrix(shards[file].read(rows_m)) for file, rows_m in split_rows(rows_n, starts_f=starts_f)]
    return sparse.vstack(parts, format="csr")


def classes_of(dataset: IterableAnnDataset, category: str) -> IntArray:
    """Return the class of each cell of all files, shape (n,), -1 where it is not known."""
    start, _ = dataset.tokenizer.vocabulary.id_range(category)
    ids_n = np.concatenate([shard.label_ids(category) for shard in dataset.shards]).astype(np.int64)
    return np.where(ids_n == ABSENT, ABSENT, ids_n - start)


# -- fitting and scoring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainingCells:
    """What baselines are fitted on.

    Args:
        values_ng: Log1p counts per 10,000 of the run's genes and the further ones of the files.
        donors_n: Donor of each cell, or None.
        num_panel_genes: Number of the run's genes.
        shared_g: Numbers of the genes that all cells, evaluated ones too, were measured with.
    """

    values_ng: sparse.csr_matrix
    donors_n: np.ndarray | None
    num_panel_genes: int
    shared_g: IntArray
    seed: int

    @cached_property
    def project(self) -> Classifier | None:
        """What projects cells on the principal components of their shared genes."""
        components = principal_components(self.values_ng[:, self.shared_g], seed=self.seed)
        return None if components is None else components.transform

    def fit(self, labels_n: IntArray, *, num_classes: int) -> Iterator[_Fitted]:
        """Fit one baseline after the other to the cells with a known label; only the majority if they have one label.

        All answer about cells with the same genes.
        """
        known_n, seed, shared_g = np.flatnonzero(labels_n >= 0), self.seed, self.shared_g
        majority, labels_n = majority_class(labels_n), labels_n[known_n]
        yield _Fitted("majority", lambda cells_ng: np.full(cells_ng.shape[0], majority), {"n_train": len(known_n)})
        if np.unique(labels_n).size < 2:
            return
        known_ng, panel_g = self.values_ng[known_n], shared_g[shared_g < self.num_panel_genes]
        if not len(panel_g):
            logger.warning("training and evaluated cells share no gene of the run: most baselines are left out")
            return
        by_panel = logistic_regression(known_ng[:, panel_g], labels_n, seed=seed)
        facts: Scores = {"n_train": len(known_n), "n_genes": len(panel_g)}
        yield _Fitted(
            "logistic_regression", lambda cells_ng: by_panel(cells_ng[:, panel_g]), facts,
            lambda cells_ng: by_panel.log_probability(cells_ng[:, panel_g], num_classes=num_classes),
            [(known_n[rows_m], values_mk) for rows_m, values_mk in by_panel.left_out(num_classes=num_classes)],
        )  # fmt: skip
        known_ng, donors_n = known_ng[:, shared_g], None if self.donors_n is None else self.donors_n[known_n]
        facts = {"n_train": len(known_n), "n_genes": len(shared_g)}
        by_ridge, chosen = ridge(known_ng, labels_n, groups_n=donors_n, seed=seed)
        yield _Fitted("ridge", lambda cells_ng: by_ridge(cells_ng[:, shared_g]), facts | chosen)
        if (project := self.project) is not None:
            by_neighbors = nearest_neighbors(project(known_ng), labels_n)
            yield _Fitted("nearest_neighbors", lambda cells_ng: by_neighbors(project(cells_ng[:, shared_g])), facts)
        if importlib.util.find_spec("celltypist") is not None:
            try:
                by_celltypist, chosen = celltypist(known_ng, labels_n, seed=seed)
            except InputError as error:
                logger.warning("%s; it is left out", error)
                return
            yield _Fitted("celltypist", lambda cells_ng: by_celltypist(cells_ng[:, shared_g]), facts | chosen)


def baselines(
    train: IterableAnnDataset,
    evaluation: IterableAnnDataset,
    categories: Sequence[str],
    *,
    questions: Sequence[Question] = (),
    donor_column: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Answers]]:
    """Fit the baselines to the training cells and score them on the same cells as the model.

    Args:
        train, evaluation: Data sets of the training and evaluation cells; labels and expression are read from them.
        categories: The phenotypes.
        questions: Those of one phenotype in which others are given have baselines of their own.
        donor_column: Column of obs by which ridge divides the training cells when it chooses its penalty.
        seed: Of the sample of `MOST_BASELINE_CELLS`, if there are more training cells, and of the baselines.

    Returns:
        Phenotype -> name of the baseline -> its answers.
    """
    train_files, files, is_shared_g = _with_all_genes(train, evaluation)
    rows_n = sample(sum(train.sizes), most=MOST_BASELINE_CELLS, seed=seed)
    logger.info(
        "fitting the baselines to %s of %s training cells and the %s genes that all cells were measured with",
        f"{len(rows_n):,}", f"{sum(train.sizes):,}", f"{is_shared_g.sum():,}",
    )  # fmt: skip
    donors_n = donors_of(train, donor_column)
    cells = _TrainingCells(
        read_expression(train_files, rows_n, sizes=train.sizes),
        None if donors_n is None else donors_n[rows_n],
        num_panel_genes=len(train.tokenizer.panel), shared_g=np.flatnonzero(is_shared_g), seed=seed,
    )  # fmt: skip
    num_classes = {category: len(evaluation.tokenizer.phenotypes[category]) for category in categories}
    fitted = {
        category: list(cells.fit(classes_of(train, category)[rows_n], num_classes=num_classes[category]))
        for category in categories
    }
    left_out = {category: [fold for one in fitted[category] for fold in one.left_out] for category in categories}
    given = _given_labels(train, evaluation, questions, rows_n, num_classes=num_classes, left_out=left_out)
    num_cells = sum(evaluation.sizes)
    predicted: dict[tuple[str, str, str], list[IntArray]] = {}
    for start in range(0, num_cells, CELLS_AT_ONCE):
        cells_m = np.arange(start, min(num_cells, start + CELLS_AT_ONCE))
        part_mg = read_expression(files, cells_m, sizes=evaluation.sizes)
        for category in categories:
            of_questions = given.get(category, {})
            for one in fitted[category]:
                predicted.setdefault((category, one.name, ""), []).append(one.predict(part_mg))
                if one.name not in GIVEN_NAMES or not of_questions:
                    continue
                log_probability_mk = one.log_probability(part_mg) if one.log_probability else None
                for question, labels in of_questions.items():
                    answer_m = labels.answers(cells_m, log_probability_mk)
                    predicted.setdefault((category, one.name, question), []).append(answer_m)
    found: dict[str, dict[str, Answers]] = {}
    for category in categories:
        found[category] = {}
        for one in fitted[category]:
            answers = scored(evaluation, category, np.concatenate(predicted.pop((category, one.name, ""))), one.facts)
            names = [key[2] for key in predicted if key[:2] == (category, one.name)]
            answers_given = {name: np.concatenate(predicted[category, one.name, name]) for name in names}
            found[category][one.name] = replace(answers, given=answers_given)
    return found


def _given_labels(
    train: IterableAnnDataset,
    evaluation: IterableAnnDataset,
    questions: Sequence[Question],
    rows_n: IntArray,
    *,
    num_classes: Mapping[str, int],
    left_out: Mapping[str, Sequence[tuple[IntArray, np.ndarray]]],
) -> dict[str, dict[str, GivenLabels]]:
    """Count the labels of some training cells for each question of one phenotype in which others are given.

    Returns:
        Phenotype -> name of the question -> the counts.
    """
    kept = [question for question in questions if len(question.asked) == 1 and question.given]
    names = dict.fromkeys(name for question in kept for name in (*question.asked, *question.given))
    train_classes = {name: classes_of(train, name)[rows_n] for name in names}
    classes = {name: classes_of(evaluation, name) for name in names}
    found: dict[str, dict[str, GivenLabels]] = {}
    for question in kept:
        [category] = question.asked
        given_ns, given_ms = (
            np.stack([by_name[name] for name in question.given], axis=1) for by_name in (train_classes, classes)
        )
        counts = GivenLabels.fit(
            train_classes[category], given_ns, given_ms, num_classes=num_classes[category], left_out=left_out[category]
        )
        found.setdefault(category, {})[question.name] = counts
    return found


def scored(evaluation: IterableAnnDataset, category: str, predicted_n: IntArray, facts: Scores) -> Answers:
    """Score the class that each evaluated cell was given; `facts` join the scores."""
    confusion = Confusion(evaluation.tokenizer.phenotypes[category])
    confusion.add(classes_of(evaluation, category), predicted_n)
    return Answers({**confusion.scores(), **facts}, predicted_n)


# -- comparing ----------------------------------------------------------------------------------------------------


def paired_difference(is_right_n: np.ndarray, other_is_right_n: np.ndarray) -> tuple[float, float]:
    """Return how much more often the first is right on the same cells, and the standard error of that.

    Example:
        >>> paired_difference(np.array([True, True, True, False]), np.array([True, False, True, False]))
        (0.25, 0.25)
    """
    difference_n = is_right_n.astype(np.float64) - other_is_right_n
    error = difference_n.std(ddof=1) / np.sqrt(len(difference_n)) if len(difference_n) > 1 else np.inf
    return float(difference_n.mean()), float(error)


def difference_over_donors(
    is_right_n: np.ndarray, other_is_right_n: np.ndarray, donors_n: np.ndarray
) -> tuple[float, float, int]:
    """Return how much more often the first is right in a donor's cells, half of the 95 % interval, and how many donors.

    Donors count alike; the interval is Student's t over their differences, infinite for fewer than two.

    Example:
        >>> right, other = np.array([True, True, True, False]), np.array([False, True, True, False])
        >>> difference_over_donors(right, other, np.array(["a", "a", "b", "b"]))[::2]
        (0.25, 2)
    """
    donors_d, of_donor_n = np.unique(donors_n, return_inverse=True)
    difference_n = is_right_n.astype(np.float64) - other_is_right_n
    difference_d = np.bincount(of_donor_n, weights=difference_n) / np.bincount(of_donor_n)
    free = len(donors_d) - 1
    error = difference_d.std(ddof=1) / np.sqrt(len(donors_d)) if free else np.inf
    return float(difference_d.mean()), float(stdtrit(free, 0.975) * error if free else np.inf), len(donors_d)


def compare_with_regression(
    regression: Answers, answers: tuple[IntArray, ...], donors_n: np.ndarray, *, category: str
) -> dict[str, float]:
    """Return how much more often than logistic regression the run is right, over donors, and print it.

    Args:
        regression: Its answers.
        answers: Those of the run, as in `mark_best`.
        donors_n: Donor of every evaluated cell.
        category: The phenotype.

    Returns:
        `mean`, `low` and `high` of the difference of accuracy and `num_donors`; empty if these are fewer than
        `LEAST_DONORS`, which a warning says.
    """
    cells_m, true_m, predicted_m = (values_n[answers[1] >= 0] for values_n in answers)
    is_right_m, other_is_right_m = predicted_m == true_m, regression.predicted_n[cells_m] == true_m
    unnamed = [donor for donor in set(donors_n[cells_m]) if is_missing(donor, ["None"])]
    is_named_m = ~np.isin(donors_n[cells_m], unnamed)
    if not is_named_m.any():
        return {}
    donors_m = donors_n[cells_m][is_named_m]
    mean, half, num_donors = difference_over_donors(is_right_m[is_named_m], other_is_right_m[is_named_m], donors_m)
    if num_donors < LEAST_DONORS:
        logger.warning(
            "%s: the cells are of %d donor%s, which does not show whether the run or logistic regression is better for "
            "others: hold out %d donors or more (`prepare --eval_donors`)",
            category, num_donors, "" if num_donors == 1 else "s", LEAST_DONORS,
        )  # fmt: skip
        return {}
    interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}" if half else "the same for each of them"
    num_unnamed = int((~is_named_m).sum())
    logger.info(
        "%s: accuracy of the run minus that of logistic regression, mean of %d donors: %+.3f (%s)%s",
        category, num_donors, mean, interval,
        f"; without {num_unnamed:,} cells of no known donor" if num_unnamed else "",
    )  # fmt: skip
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_donors": num_donors}


def mark_best(
    scores_of: dict[str, Scores],
    others: Mapping[str, Answers],
    answers: tuple[IntArray, ...],
    *,
    category: str,
    run: str,
) -> None:
    """Add `best` to the scores of the one that is right most often, run or baseline; warn if the run is clearly not it.

    Of equals, the one with the larger macro F1 is best; if that is equal too, the run. A warning also says so if the
    run is no better than its start, or than the same run from scratch, by more than the standard error.

    Args:
        scores_of: Scores of one phenotype by question and baseline; changed.
        others: The answers of the baselines.
        answers: Those of the run: numbers of the cells, their true classes (-1: none) and the predicted ones.
        category: The phenotype.
        run: The run's question, in which nothing was given.
    """
    best = max([run, *others], key=lambda name: (scores_of[name]["accuracy"], scores_of[name]["macro_f1"]))
    scores_of[best]["best"] = True
    cells_m, true_m, predicted_m = (values_n[answers[1] >= 0] for values_n in answers)
    is_right_m = predicted_m == true_m
    for name in _LESSONS if len(cells_m) else ():
        if name in others:
            _warn_of_start(name, is_right_m, others[name].predicted_n[cells_m] == true_m, category=category)
    if best in (run, *_LESSONS) or not len(cells_m):
        return
    other_is_right_m = others[best].predicted_n[cells_m] == true_m
    difference, error = paired_difference(other_is_right_m, is_right_m)
    if difference > error:
        logger.warning(
            "%s: %s is right in %.1f %% of these %s cells, the run in %.1f %%: use %s, or train the run better",
            category, NAMES[best], 100 * other_is_right_m.mean(), f"{len(cells_m):,}", 100 * is_right_m.mean(),
            NAMES[best],
        )  # fmt: skip


def _warn_of_start(name: str, is_right_n: np.ndarray, other_is_right_n: np.ndarray, *, category: str) -> None:
    """Warn if a run is not right more often than its start, or than itself from scratch."""
    difference, error = paired_difference(is_right_n, other_is_right_n)
    if difference <= error:
        logger.warning(
            "%s: the run is right in %.1f %% of these %s cells, %s in %.1f %%: %s, as far as these cells show",
            category, 100 * is_right_n.mean(), f"{len(is_right_n):,}", NAMES[name], 100 * other_is_right_n.mean(),
            _LESSONS[name],
        )  # fmt: skip
