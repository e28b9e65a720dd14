"""The verb `evaluate`: score a run on held-out cells next to its baselines, and calibrate it.

Owns which cells and questions are scored and what is reported; leaves counting to `eval_utils`, temperatures and
sets of labels to `calibration` and `conformal`, and the baselines to `baselines`. Letters: n cells.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.options import conditions
from perturbgene.cli.verbs import EvaluateConfig, MlmConfig
from perturbgene.configs import check_question
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, donors_of
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import (
    GIVEN,
    METRICS_FILE,
    AnswerCollector,
    ClassEvaluator,
    Confusion,
    Evaluator,
    LogitCollector,
    MlmEvaluator,
    Question,
    content_hash,
    further_questions,
    gene_log_likelihood,
    standard_questions,
    write_results,
)
from perturbgene.files import check_new, claimed, renewed_sums
from perturbgene.hub import is_hub_name
from perturbgene.inference.baselines import NAMES, Answers, baselines, classes_of, compare_with_regression, mark_best
from perturbgene.inference.calibration import (
    LEAST_CELLS,
    MOST_CELLS,
    Calibration,
    Temperature,
    fit,
    quantiles,
    split_halves,
    weights_hash,
)
from perturbgene.inference.conformal import coverage_by_donor, floor_at
from perturbgene.inference.embedding_scores import CellEmbeddings, score_table
from perturbgene.inference.evaluated_cells import CELLS_FILE, evaluated_cells, write_cells
from perturbgene.inference.given_baselines import GIVEN_NAMES
from perturbgene.inference.markers import marker_table
from perturbgene.inference.novelty import NOVELTY_FILE, TrainingCells, Usual, fit_training_cells
from perturbgene.inference.ontology import LabelTerms, is_installed, term_ids
from perturbgene.inference.predict import questions_of
from perturbgene.inference.run import Run, load_run
from perturbgene.inference.starts import start_answers
from perturbgene.inference.streaming import FEW_GENES, Ranks, stream_batches
from perturbgene.training.card import refresh_scores
from perturbgene.training.data_files import DataFiles
from perturbgene.training.transfer import quiet
from perturbgene.training.votes import READING, expression_of

logger = logging.getLogger(__name__)

#: What the table on the terminal calls each row.
ROW_NAMES = {
    "alone": "nothing given",
    "given_others": "all others given",
    "together": "all asked at once",
    "asked": "as asked",
    "masked": "bins of masked genes",
    **{name: f"(baseline) {text.removeprefix('the ')}" for name, text in NAMES.items()},
}
#: Baselines that are given the same phenotypes, in the table.
SHORT_NAMES = {"majority": "frequencies", "logistic_regression": "regression"}
#: Most cells that are asked about with some, but not all other phenotypes given: an accuracy of theirs has a standard
#: error of at most 0.007.
MOST_FURTHER = 5_000
#: Coverage of sets of labels for each donor, and the genes that speak for each label, in the output.
COVERAGE_FILE, MARKERS_FILE = "coverage.csv", "markers.csv"
#: Levels whose coverage is written there, and the one that is printed.
COVERAGE_LEVELS, SHOWN_LEVEL = (0.8, 0.9, 0.95, 0.99), 0.9
LEGEND = (
    "n: cells with a known label, or masked genes. log_loss: mean negative log-probability of the true label; lower is "
    "better.\ngiven_same: accuracy of the better baseline that is given the same phenotypes: the most frequent label, "
    "or a regression\nweighted by frequencies. With some, but not all others given, at most "
    f"{MOST_FURTHER:,} cells are asked about.\n"
    "temperature: `predict` divides the logits by it; above 1, the run was too confident.\n"
    "ece: calibration error before and after that, of cells that it was not fitted on.\n"
    "sets: share of cells whose 90 % set (`predict --conformal 0.9`) holds the true label, mean of the donors that "
    "fitted nothing (lowest donor; mean number of labels); " + COVERAGE_FILE + " has each donor.\n"
    "best: right in most cells, of the run with nothing given and the baselines."
)
ONTOLOGY_LEGEND = (
    "finer, coarser: share of cells whose answer is a descendant or an ancestor of the true label in the ontology. "
    "right_or_finer: what\nscTab counts as right, and macro_f1_or_finer the macro F1 with that."
)
EMBEDDING_LEGEND = (
    "purity: mean share of a cell's 15 nearest cells that have its label (fewer, where a label is rarer). silhouette: "
    "from -1\nto 1, how much nearer cells of one label are than others. mixing: how often near cells of one label are "
    "of another\ndonor; 1: as often as by chance. best: higher purity."
)


# -- what is scored -----------------------------------------------------------------------------------------------


def _evaluator(run: Run, ask: Sequence[str], given: Sequence[str], mask_rates: Mapping[str, float]) -> Evaluator:
    """Return what counts the scores of the standard questions, or of the one that `ask` and `given` describe.

    Genes are masked as in the run's own evaluation, except for the given rates.
    """
    if run.is_classifier:
        if mask_rates:
            raise InputError(f"{run.path} is a classifier, which masks nothing. Remove {listed(mask_rates)}.")
        questions_of(run, ask, given, joint=True)  # raises
        return ClassEvaluator(run.class_labels, tokenizer=run.tokenizer, category=run.category)
    known = run.tokenizer.included_phenotypes
    for name in [*ask, *given]:
        if name not in known:
            choice = f"Choose from: {listed(known, most=12)}." if known else "It knows none."
            raise InputError(f"{name!r} is no phenotype of {run.path}. {choice}")
    check_question(ask, given)
    questions = [question for question in standard_questions(known) if not ask or set(question.asked) <= set(ask)]
    if given:
        questions = questions_of(run, ask, given, joint=True)
    seed = run.settings.seed if isinstance(run.settings, MlmConfig) else 0
    rates = {**run.mask_rates, **mask_rates}
    collator = DataCollatorForPhenotypicMLM(run.tokenizer, packed=True, seed=seed, **rates)  # type: ignore[arg-type]
    return MlmEvaluator(run.tokenizer, collator=collator, questions=questions)


def _further_questions(dataset: IterableAnnDataset, evaluator: Evaluator) -> list[Question]:
    """Return the questions of an evaluator, and those in which some of the other phenotypes with labels are given.

    The latter are asked about at most `MOST_FURTHER` cells, at equal distances.
    """
    known, asked = dataset.tokenizer.included_phenotypes, {question.asked for question in evaluator.questions}
    labeled = _with_labels(dataset)
    num_cells = sum(dataset.sizes)
    stride = -(-num_cells // MOST_CELLS)
    stride *= -(-num_cells // (stride * MOST_FURTHER))
    further = further_questions([name for name in known if (name,) in asked], labeled, stride=stride)
    if further and stride > 1:
        logger.info("with some, but not all other phenotypes given, only one cell in %d is asked about", stride)
    questions = [*evaluator.questions, *further]
    return sorted(questions, key=lambda one: (len(one.asked), known.index(one.asked[0]), len(one.given)))


def _paths(cells: Any) -> list[str]:
    """Return the files that an argument names; none if it holds cells in memory."""
    listed_cells = cells if isinstance(cells, list | tuple) else [cells]
    return [str(path) for path in listed_cells if isinstance(path, str | Path)]


def _changes(run: Run, cells: Any) -> list[str]:
    """Return which files of an argument changed since the run read them, and how."""
    return DataFiles(run.path, _paths(cells), None).changes()


def _is_own(run: Run, eval_paths: Any, *, changes: Sequence[str]) -> bool:
    """Whether all files are among the run's own evaluation cells, as they were when it was trained: see `_changes`."""
    names = {os.path.realpath(path) for path in _paths(eval_paths)}
    if not names or changes:
        return False
    corpus, patterns = (getattr(run.settings, name, None) for name in ("corpus", "eval_data_paths"))
    if not patterns:
        folders = {name if os.path.isdir(name) else os.path.dirname(name) for name in names}
        return bool(corpus) and folders == {os.path.realpath(f"{corpus}/eval")}
    with suppress(InputError):
        return names <= {os.path.realpath(path) for path in expand_paths(patterns)}
    return False


def _open_training_cells(
    run: Run, tokenizer: GeneTokenizer, train_paths: Any = None, *, classes: Mapping[str, Any] | None = None,
    **reading: Any,
) -> IterableAnnDataset:  # fmt: skip
    """Open what a run was trained on, read as in training; `classes` says what a classifier tells apart.

    Raises:
        InputError: The cells are not there.
    """
    try:
        trained = run.own_files("train")
        names = [one.name for one in dataclasses.fields(ReadingConfig)]
        if getattr(run.settings, "corpus", None):
            names = ["where"]
        as_trained = {name: getattr(run.settings, name) for name in names} | {"has_all_values": False}
    except InputError:
        if train_paths is None:
            raise
        trained, as_trained = train_paths, {**reading, "where": ()}
    return IterableAnnDataset(
        trained, tokenizer, **{**as_trained, **(classes or {}), "batch_size": EvaluateConfig.batch_size}
    )


def training_cells(run: Run, eval_paths: Any, train_paths: Any = None, **reading: Any) -> np.ndarray:
    """Find cells that the run was trained on: those with the bins of a training cell, in all genes that they measure.

    Cells with fewer than `FEW_GENES` genes of the run do not count, since different cells may look the same.

    Args:
        run: Its `run.yaml` says what it was trained on.
        eval_paths: Files (or AnnData) to look at.
        train_paths: The training files where `run.yaml` does not say, or they were moved.
        reading: How to read both; the run's own files are read as in training.

    Returns:
        True for training cells, shape (n,).

    Raises:
        InputError: The training cells are not there.
    """
    tokenizer, size = run.tokenizer.reading([]), EvaluateConfig.batch_size
    cells = IterableAnnDataset(eval_paths, tokenizer, batch_size=size, **reading)
    training = _open_training_cells(run, tokenizer, train_paths, **reading)
    is_counted_g = np.all([cells.shards[index].alignment.is_measured_g for index in range(len(cells.shards))], axis=0)
    found = []
    for dataset, text in ((cells, "cells"), (training, "training cells")):
        parts = [
            (content_hash(block, tokenizer, is_counted_g=is_counted_g), tokenizer.num_genes(block) >= FEW_GENES)
            for block in stream_batches(dataset, text=f"evaluate: hash {text}")
        ]
        found.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
    (hash_n, has_many_n), (hash_of_training_n, _) = found
    return np.isin(hash_n, hash_of_training_n) & has_many_n


def _seen_in_training(run: Run, eval_paths: Any, train_paths: Any, *, calibrates: bool, **reading: Any) -> np.ndarray:
    """Return which cells the run was trained on and report them, shape (n,); False where that is not known.

    Raises:
        InputError: Temperatures are to be fitted, but there is no other cell.
    """
    try:
        is_seen_n = training_cells(run, eval_paths, train_paths, **reading)
    except InputError as error:
        logger.warning("whether the run was trained on these cells is not known: %s", error)
        return np.zeros(1, dtype=bool)
    if num_seen := int(is_seen_n.sum()):
        logger.warning(
            "%s of %s cells are training cells of %s: their scores are too good, and no temperature is fitted on them",
            f"{num_seen:,}", f"{len(is_seen_n):,}", run.path,
        )  # fmt: skip
    if calibrates and is_seen_n.all():
        raise InputError("all cells are training cells, so no temperature can be fitted. Pass --no_calibrate.")
    return is_seen_n


def _labeled_phenotypes(dataset: IterableAnnDataset, evaluator: Evaluator, *, is_named: bool) -> list[str]:
    """Return those phenotypes to score that have a known label, if that is not all; a warning names the others.

    Raises:
        InputError: No cell has a known label, or `is_named` says that the user named a phenotype without any.
    """
    asked = list(dict.fromkeys(name for question in evaluator.questions for name in question.asked))
    if dataset.phenotype_category or not asked:  # a data set of a classifier has checked its labels
        return []
    known = _with_labels(dataset)
    without = [name for name in asked if name not in known]
    for name in without:
        if not is_named and set(known) & set(asked):
            logger.warning("no cell has a %s that the run knows, so it is not scored", name)
            continue
        raise dataset.shards[0].no_known_label(name)
    return [name for name in asked if name in known] if without else []


def _for_cells(
    dataset: IterableAnnDataset, evaluator: Evaluator, run: Run, ask: Sequence[str], given: Sequence[str],
    mask_rates: Mapping[str, float],
) -> Evaluator:  # fmt: skip
    """Return an evaluator without questions about phenotypes that have no label, and with further questions.

    Raises:
        InputError: There is no label at all, or not of a phenotype in `ask`.
    """
    if labeled := _labeled_phenotypes(dataset, evaluator, is_named=bool(ask)):
        evaluator = _evaluator(run, labeled, given, mask_rates)
    if not given and not run.is_classifier:
        evaluator.questions = _further_questions(dataset, evaluator)
        evaluator.reset()
    described = [question.describe() for question in evaluator.questions]
    questions = "; ".join(described[:12]) + (f"; and {len(described) - 12} more" if len(described) > 12 else "")
    logger.info("asking %s about %s cells: %s", run.path, f"{dataset.num_cells:,}", questions)
    return evaluator


def _with_labels(dataset: IterableAnnDataset) -> list[str]:
    """Return the phenotypes of which some cell has a known label."""
    shards = [dataset.shards[index] for index in range(len(dataset.shards))]
    is_known_p = np.any([(shard.label_ids_np != ABSENT).any(axis=0) for shard in shards], axis=0)
    names = dataset.tokenizer.included_phenotypes
    return [name for name, is_known in zip(names, is_known_p, strict=True) if is_known]


# -- calibration --------------------------------------------------------------------------------------------------


class _Unusual:
    """Keeps of every evaluation cell what says how unusual it is, besides its logits.

    Training cells that are not there are warned of, and then nothing is kept of genes' expression.
    """

    def __init__(self, run: Run, dataset: IterableAnnDataset, train_paths: Any, **reading: Any) -> None:
        classes = {"phenotype_category": run.category or None, "binary_label": run.binary_label}
        self.training: TrainingCells | None = None
        try:
            with quiet(READING):
                cells = _open_training_cells(run, dataset.tokenizer, train_paths, classes=classes, **reading)
                self.training = fit_training_cells(run, cells)
        except InputError as error:
            logger.warning("`predict --ood` cannot say how unusual a cell is: %s", error)
        num_cells, num_axes = sum(dataset.sizes), self.training.axes_tr.shape[1] if self.training else 0
        self.points_nr = np.zeros((num_cells, num_axes), dtype=np.float32)
        self.num_genes_n = np.zeros(num_cells, dtype=np.int64)
        self.gene_scores: list[np.ndarray] = []

    def add(self, run: Run, block: TokenBlock) -> None:
        """Keep a batch."""
        if self.training is not None:
            self.points_nr[block.cells_n] = self.training.locate(expression_of(block, run.model.config))
        self.num_genes_n[block.cells_n] = run.tokenizer.num_genes(block)
        if not run.is_classifier:
            scores_n = gene_log_likelihood(run.model, block, run.tokenizer, mask_rates=run.mask_rates)
            self.gene_scores.append(scores_n)

    def added_to(self, entry: Temperature, cells_n: np.ndarray, logits_nk: np.ndarray) -> Temperature:
        """Return an entry of the calibration with what is usual for these cells."""
        if self.training is None:
            return entry
        parts_np = self.training.parts(entry.phenotype, self.points_nr[cells_n], logits_nk)
        num_genes_n = self.num_genes_n[cells_n]
        if (usual := Usual.fit(parts_np, num_genes_n)) is None:
            return entry
        score_n = usual.score(parts_np, num_genes_n)[num_genes_n > 0]
        return dataclasses.replace(entry, usual=usual, novelty_quantiles=quantiles(score_n))


def _coverage(entry: Temperature, logits_nk: np.ndarray, true_n: np.ndarray, donors_n: np.ndarray) -> pd.DataFrame:
    """Return how often sets of labels hold the true one, at `COVERAGE_LEVELS` and for each donor."""
    probability_nk = softmax(logits_nk / entry.temperature, axis=-1)
    parts = [
        coverage_by_donor(probability_nk, true_n, donors_n, floor_at(entry.floors, level)).assign(level=level)
        for level in COVERAGE_LEVELS
    ]
    return pd.concat(parts, ignore_index=True)


def _calibrate(
    run: Run, collector: LogitCollector, dataset: IterableAnnDataset, results: dict[str, Any], *,
    donors_n: np.ndarray | None, unusual: _Unusual, is_seen_n: np.ndarray,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Fit a temperature for each question on half of the donors, add it to the results and store it in the run.

    All held-out cells say what is usual.

    Cells that were seen in training do not take part, and a question with too few labels keeps its temperature.

    Returns:
        The coverage of sets of labels by phenotype, question, level and donor, of the other half, by its file name.
    """
    fitted, split, tables, too_few = [], "cells", [pd.DataFrame()], dict[int, list[str]]()
    for category, question, *answers in collector.joined():
        is_new_n = ~is_seen_n[answers[0]]
        cells_n, logits_nk, true_n = (values_n[is_new_n] for values_n in answers)
        of_donor_n = np.full(len(cells_n), "") if donors_n is None else donors_n[cells_n]
        is_fitted_n, split = split_halves(of_donor_n, num_cells=len(cells_n))
        entry = fit(
            logits_nk, true_n, is_fitted_n, phenotype=category, asked=question.asked, given=question.given,
            donors_n=of_donor_n if split == "donors" else None,
        )  # fmt: skip
        if entry.num_cells < LEAST_CELLS:
            too_few.setdefault(entry.num_cells, []).append(question.describe())
            continue
        fitted.append(unusual.added_to(entry, cells_n, logits_nk))
        facts = {"temperature": entry.temperature, "is_at_limit": entry.is_at_limit, "n_fitted": entry.num_cells}
        rows_n = np.flatnonzero(~is_fitted_n & (true_n >= 0))
        table = _coverage(entry, logits_nk[rows_n], true_n[rows_n], of_donor_n[rows_n])
        tables.append(table.assign(phenotype=category, question=question.name, num_fitted=entry.num_units))
        shown = table[table["level"] == SHOWN_LEVEL]
        facts |= {"coverage": shown["coverage"].mean(), "lowest_coverage": shown["coverage"].min()}
        facts |= {"mean_set_size": shown["mean_set_size"].mean(), "coverage_level": SHOWN_LEVEL}
        results[category][question.name]["calibration"] = {**facts, "split_by": split, **entry.scores}
    for num_cells, described in too_few.items():
        logger.warning(
            "%s: only %d labeled cells to fit on, of at least %d; no temperature is fitted",
            listed(described), num_cells, LEAST_CELLS,
        )  # fmt: skip
    if split == "cells":
        logger.warning(
            "The evaluation cells name fewer than two donors, so temperatures are fitted on half of the cells and "
            "scored on the other half, from the same donors."
        )
    gene_scores = unusual.gene_scores
    gene_quantiles = quantiles(np.concatenate(gene_scores)[~is_seen_n]) if gene_scores else ()
    with renewed_sums(Path(run.path) / NOVELTY_FILE):
        if unusual.training is not None:
            unusual.training.save(run.path)
        path = Calibration(tuple(fitted), gene_quantiles, split, weights_hash(run.path)).save(run.path)
    logger.info("%d temperatures were fitted and stored in %s, which `predict` reads", len(fitted), path)
    coverage = pd.concat(tables, ignore_index=True)
    return {COVERAGE_FILE: coverage} if len(coverage) else {}


def _add_baselines(
    run: Run, results: dict[str, Any], evaluator: Evaluator, answers: AnswerCollector, *,
    cells: tuple[IterableAnnDataset, IterableAnnDataset], donor_column: str | None, batch_tokens: int,
) -> dict[str, dict[str, Answers]]:  # fmt: skip
    """Add the scores of the baselines, fitted on the first of `cells`, mark the best, and return their answers."""
    asked = [name for name in results if name != "genes"]
    found = baselines(*cells, asked, questions=evaluator.questions, donor_column=donor_column)
    donors_n = donors_of(cells[1], donor_column)
    starts = start_answers(run, cells, evaluator.questions, batch_tokens=batch_tokens)
    for category, others in found.items():
        others |= starts.get(category, {})
        results[category] |= {name: other.scores for name, other in others.items()}
        for question in evaluator.questions:
            if question.asked == (category,) and not question.given:
                of_run = answers.joined(category, question.name)
                mark_best(results[category], others, of_run, category=category, run=question.name)
                if donors_n is not None and "logistic_regression" in others:
                    regression = others["logistic_regression"]
                    if difference := compare_with_regression(regression, of_run, donors_n, category=category):
                        results[category][question.name]["difference"] = difference
            if question.asked == (category,) and question.given:
                cells_m, true_m, _ = answers.joined(category, question.name)
                results[category][question.name]["baselines"] = given = {}
                for name, other in others.items():
                    if question.name in other.given:
                        confusion = Confusion(evaluator.labels[category])
                        confusion.add(true_m, other.given[question.name][cells_m])
                        given[name] = confusion.scores()
        given_of = [one for one in evaluator.questions if "baselines" in results[category].get(one.name, {})]
        _warn_of_given(results[category], [one for one in given_of if one.asked == (category,)])
    return found


def _warn_of_given(scores_of: Mapping[str, Any], questions: Sequence[Question]) -> None:
    """Say of the question in which the run is furthest behind a baseline that is given the same that it is.

    It is behind from two standard errors of the difference of independent shares, and only if what is given helps: the
    baseline must be better than all answers of which nothing is given.
    """
    plain = max((one["accuracy"] for one in scores_of.values() if "baselines" not in one), default=0)
    furthest, line = 0.0, ""
    for question in questions:
        own = scores_of[question.name]
        for name, other in own["baselines"].items():
            shares = np.array([own["accuracy"], other["accuracy"]])
            margin = shares[1] - shares[0] - 2 * np.sqrt((shares * (1 - shares)).sum() / max(own["n"], 1))
            if margin > furthest and shares[1] > plain:
                furthest = float(margin)
                line = f"{question.describe()}: accuracy {shares[0]:.3f}, but {GIVEN_NAMES[name]} has {shares[1]:.3f}"
    if line:
        logger.warning("%s: the run makes too little of what is given", line)


def _add_ontology(
    results: dict[str, Any], evaluator: Evaluator, dataset: IterableAnnDataset,
    baselines: Mapping[str, Mapping[str, Answers]],
) -> None:  # fmt: skip
    """Count answers that are an ancestor or a descendant of the true label apart, where labels are such terms."""
    for category in dict.fromkeys(name for question in evaluator.questions for name in question.asked):
        ids = term_ids(dataset, category)
        if not is_installed():
            if ids:
                logger.info("%s: obs has term ids; pip install 'perturbgene[ontology]' to score ancestors", category)
            continue
        terms = LabelTerms.of(evaluator.labels[category], ids)
        if not terms.term_of:
            continue
        logger.info("%s%s", terms.describe(category), "" if terms.relation_kk.any() else "; none is another's ancestor")
        confusions = {name: tally.confusion for (one, name), tally in evaluator.tallies.items() if one == category}
        for name, other in baselines.get(category, {}).items():
            confusions[name] = Confusion(evaluator.labels[category])
            confusions[name].add(classes_of(dataset, category), other.predicted_n)
        for name, confusion in confusions.items() if terms.relation_kk.any() else ():
            results[category][name]["ontology"] = terms.scores(confusion)


def _add_embedding(
    results: dict[str, Any], embedded: CellEmbeddings, dataset: IterableAnnDataset, *, donor_column: str | None,
    has_scib: bool,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Add the scores of the embedding, if there are any; return them and the markers of labels by their file names."""
    asked, tables, cells_m = [name for name in results if name != "genes"], {}, embedded.joined()[0]
    if len(cells_m):
        expression_mg = embedded.expression(dataset)
        labels = dataset.tokenizer.phenotypes
        of_each = [
            marker_table(embedded.run, name, labels[name], expression_mg, classes_of(dataset, name)[cells_m])
            for name in asked
        ]
        tables = {MARKERS_FILE: pd.concat(of_each, ignore_index=True)}
    if scores := embedded.scores(dataset, asked, donor_column=donor_column, has_scib=has_scib):
        results["embedding"] = scores
        tables["embedding.csv"] = score_table(scores)
    return {name: table for name, table in tables.items() if len(table)}


# -- the function and the verb ------------------------------------------------------------------------------------


def _check_files(run: Run, output: Path | None, *, changes: Sequence[str], calibrates: bool) -> None:
    """Refuse a run that cannot keep its temperatures, and an output that is a file or has folders in place of files.

    Cells that changed since the run was trained are warned of.
    """
    if calibrates and not os.access(run.path, os.W_OK):
        raise InputError(
            f"{run.path} cannot be written, but temperatures are stored in it. Copy the run to a folder that you may "
            "write, or pass --no_calibrate."
        )
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"{output} cannot be written (it is a file, not a folder). Choose another --output.")
    if output is not None:
        check_new(output / METRICS_FILE, output / CELLS_FILE, overwrite=True)
    for change in changes:
        logger.warning("%s, so scores and baselines may be of other cells than the run's", change)


def evaluate(
    run: str | Path | Run, eval_paths: Any = None, *, train_paths: Any = None, ask: Sequence[str] = (),
    given: Sequence[str] = (), mask_rates: Mapping[str, float] | None = None,
    calibrate: bool | None = EvaluateConfig.calibrate, donor_column: str | None = "donor_id",
    batch_size: int = EvaluateConfig.batch_size, batch_tokens: int = EvaluateConfig.batch_tokens,
    scib: bool = EvaluateConfig.scib, output: str | Path | None = None, **reading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score a run on labeled cells, next to its baselines.

    Args:
        run: Run folder, or a loaded run.
        eval_paths: Files (or AnnData) to score; None takes the run's own held-out cells, and its training cells for
            baselines and the column of donors of its corpus.
        train_paths: The training files, on which the baselines are fitted; None leaves these out, if `eval_paths` are
            given.
        ask, given: One question instead of the standard ones.
        mask_rates: `gene_mask_prob`, `phenotype_mask_prob`, `absent_prob` or `unexpressed_ratio` instead of the run's
            own, for the scores of masked genes.
        calibrate: True fits temperatures, adds them to each question's scores and stores them in the run; None does so
            only if `eval_paths` are the run's own evaluation cells, and all of them.
        donor_column: Column of obs whose values are not split between fitting and scoring temperatures.
        batch_size, batch_tokens: Most cells and tokens in a batch.
        scib: Also compute the scIB metrics of the embedding, which takes minutes; needs scib-metrics.
        output: Folder for `metrics.json`, `embedding.csv`, `cells.h5ad` (each cell's answers), confusion matrices (CSV,
            PNG) and per-class scores; None writes nothing.
        reading: `layer`, `gene_id_column`, `min_gene_coverage`, ... of `IterableAnnDataset`.

    Returns:
        Phenotype -> question or baseline -> scores; `genes` -> scores of masked genes; `embedding` -> phenotype ->
        `run` or `pca` -> scores of at most 2,000 cells' embedding, see `embedding_scores.compare`. Of the question in
        which nothing is given and the baselines, the one that is right most often has `best`.

    Example:
        >>> import perturbgene as pg
        >>> scores = pg.evaluate(pg.load_run("runs/mlm"), "cells.h5ad", ask=["cell_type"])
        >>> scores["cell_type"]["alone"]["n"], scores["cell_type"]["alone"]["accuracy"] > 0.9
        (255, True)
    """
    run, output = load_run(run), None if output is None else Path(output)
    if eval_paths is None:
        eval_paths, train_paths, donor_column, reading = _own_cells(run, train_paths, donor_column, reading)
    is_own = _is_own(run, eval_paths, changes=(changes := _changes(run, eval_paths)))
    as_trained = conditions(reading.get("where", ())) == conditions(getattr(run.settings, "where", ()))
    calibrates = is_own and as_trained if calibrate is None else calibrate
    _check_files(run, output, changes=[*changes, *_changes(run, train_paths)], calibrates=calibrates)
    evaluator = _evaluator(run, ask, given, mask_rates or {})
    with nullcontext() if output is None else claimed(output, flag="output", is_inside=True):
        options = {"batch_size": batch_size, **reading}
        tokenizer = run.tokenizer.reading(run.tokenizer.included_phenotypes, is_whole=True)
        dataset = IterableAnnDataset(
            eval_paths, tokenizer, phenotype_category=run.category or None, binary_label=run.binary_label, **options
        )
        evaluator = _for_cells(dataset, evaluator, run, ask, given, mask_rates or {})
        is_seen_n = np.zeros(sum(dataset.sizes), dtype=bool)
        if not is_own:  # their copies among the training cells are a finding of `prepare`
            is_seen_n |= _seen_in_training(run, eval_paths, train_paths, calibrates=calibrates, **reading)
        unusual = _Unusual(run, dataset, train_paths, **reading) if calibrates else None
        answers, logits = AnswerCollector(), LogitCollector(-(-dataset.num_cells // MOST_CELLS))
        evaluator.collectors = [answers, logits]
        embedded = CellEmbeddings.of(run, ~is_seen_n)
        for block in stream_batches(dataset, text="evaluate", most_tokens=batch_tokens):
            evaluator.add(run.model, block)
            embedded.add(block)
            if unusual is not None:
                unusual.add(run, block)
        results, tables, others = evaluator.results(), {}, {}
        seen: dict[str, Any] = {"donors_n": donors_of(dataset, donor_column), "is_seen_n": is_seen_n}
        if unusual is not None:
            tables = _calibrate(run, logits, dataset, results, unusual=unusual, **seen)
        else:
            logger.info("temperatures in %s stay as they are; --calibrate fits them on these cells", run.path)
        for scores in [scores for one in results.values() for scores in one.values()] if is_seen_n.any() else ():
            scores["n_training_cells"] = int(is_seen_n.sum())
        if train_paths is not None and run.binary_label is None:
            cells = IterableAnnDataset(train_paths, tokenizer, **{**options, "where": ()}), dataset
            asked: dict[str, Any] = {"donor_column": donor_column, "batch_tokens": batch_tokens}
            others = _add_baselines(run, results, evaluator, answers, cells=cells, **asked)
        _add_ontology(results, evaluator, dataset, others)
        tables |= _add_embedding(results, embedded, dataset, donor_column=donor_column, has_scib=scib)
        if output is not None:
            write_cells(evaluated_cells(run, dataset, evaluator, logits, embedded, others, **seen), output)
            drawn = {title: one for title, one in evaluator.confusions().items() if f".{GIVEN}+" not in title}
            write_results(results, drawn, output, text="held-out cells", tables=tables)
    return results


def row_name(name: str) -> str:
    """Return what tables call a question or a baseline.

    Example:
        >>> row_name("given+sex+tissue")
        'given sex, tissue'
    """
    if name.startswith(f"{GIVEN}+"):
        return f"{GIVEN} {', '.join(name.split('+')[1:])}"
    return ROW_NAMES.get(name, name)


def _table(results: Mapping[str, Any]) -> str:
    rows = []
    for category, scores_of in results.items():
        for name, scores in scores_of.items() if category != "embedding" else ():
            genes = f", {scores['n_genes']:,} genes" if "n_genes" in scores else ""
            row = {"phenotype": category, "question": row_name(name) + genes, "n": scores["n"]}
            row |= {key: scores.get(key, np.nan) for key in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")}
            same = {SHORT_NAMES[other]: of["accuracy"] for other, of in scores.get("baselines", {}).items()}
            best = max(same, key=lambda other: same[other], default="")
            row["given_same"] = f"{same[best]:.3f} ({best})" if best else ""
            fitted = scores.get("calibration", {})
            limit = " (limit)" if fitted.get("is_at_limit") else ""
            row["temperature"] = f"{fitted['temperature']:.3f}{limit}" if fitted else ""
            row["ece"] = "{ece_before:.3f} -> {ece_after:.3f}".format(**fitted) if "ece_after" in fitted else ""
            text = "{coverage:.3f} ({lowest_coverage:.3f}; {mean_set_size:.1f})"
            row["sets"] = text.format(**fitted) if "ece_after" in fitted else ""
            rows.append({**row, "best": "best" if scores.get("best") else ""})
    return _text(pd.DataFrame(rows))


def _ontology_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Return the scores that know an ontology; empty if labels are no related terms."""
    return pd.DataFrame(
        {"phenotype": category, "question": row_name(name), "n": scores["n"], "accuracy": scores["accuracy"]}
        | scores["ontology"]
        for category, scores_of in results.items()
        for name, scores in (scores_of.items() if category != "embedding" else ())
        if "ontology" in scores
    )


def _text(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")


def _cells_of(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Return the cells to score, if they are the run's own, those for the baselines, the column of donors, how to read.

    The cells are those of a corpus, of files, or the run's own.
    """
    trained = run.settings
    folder = config.corpus or (getattr(trained, "corpus", None) if not config.eval_data_paths else None)
    corpus = Corpus.open(folder) if folder and Path(folder).exists() else None
    if corpus:
        eval_paths = corpus.paths("eval")
    else:
        eval_paths = expand_paths(config.eval_data_paths) if config.eval_data_paths else run.own_files("eval")
    patterns = config.train_data_paths or ([] if corpus else getattr(trained, "train_data_paths", []))
    train_paths = None
    if config.baselines and (patterns or corpus):
        train_paths = corpus.paths("train") if corpus and not patterns else expand_paths(patterns)
    is_own, reading = _is_own(run, eval_paths, changes=_changes(run, eval_paths)), {}
    for declared in dataclasses.fields(ReadingConfig):  # those of training, unless given or the corpus has its own
        name, value = declared.name, getattr(config, declared.name)
        if value in (declared.default, []) and (is_own if name == "where" else not corpus):
            value = getattr(trained, name, value)
        reading[name] = value
    donor_column = (corpus.split_by if corpus else None) or "donor_id"
    cells = {"eval_paths": eval_paths, "train_paths": train_paths, "donor_column": donor_column}
    return {**cells, "reading": reading, "is_own": is_own}


def _own_cells(run: Run, train_paths: Any, donor_column: str | None, reading: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the run's own held-out cells, training cells and column of donors, unless given, and how to read them."""
    own = _cells_of(EvaluateConfig(run=str(run.path)), run)
    train_paths = own["train_paths"] if train_paths is None else train_paths
    donor_column = own["donor_column"] if donor_column == "donor_id" else donor_column
    return own["eval_paths"], train_paths, donor_column, {**own["reading"], **reading}


def run_evaluate(config: EvaluateConfig) -> str | None:
    """Run the verb `evaluate` on a corpus, on files, or on the run's own evaluation cells.

    Of several processes the first does it all.
    """
    if not Ranks.join(config.device).is_main:
        return None
    if is_hub_name(config.run) and not config.output:
        raise InputError(f"{config.run} is on the Hugging Face Hub, so scores have no place next to it. Give --output.")
    output = Path(config.output or Path(config.run) / "evaluation")
    run = load_run(config.run, device=config.device)
    cells = _cells_of(config, run)
    reading, is_own = cells.pop("reading"), cells.pop("is_own")
    results = evaluate(
        run, ask=config.ask, given=config.given, mask_rates=config.mask_rates, calibrate=config.calibrate,
        batch_size=config.batch_size, batch_tokens=config.batch_tokens, scib=config.scib, output=output,
        **cells, **reading,
    )  # fmt: skip
    if is_own and not (config.ask or config.given or config.where or config.mask_rates):
        names = {name: row_name(name) for scores_of in results.values() for name in scores_of}
        refresh_scores(Path(run.path), results, names)
    text = f"{_table(results)}\n{LEGEND}"
    if len(ontology := _ontology_table(results)):
        text += f"\n\n{_text(ontology)}\n{ONTOLOGY_LEGEND}"
    if "embedding" in results:
        text += f"\n\n{_text(score_table(results['embedding']))}\n{EMBEDDING_LEGEND}"
    return f"{text}\nwritten to {output}"
