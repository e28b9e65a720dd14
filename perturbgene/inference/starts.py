"""What a run started from, next to its score: its start, frozen, and the same run from scratch.

Owns finding both and asking them about the evaluated cells; leaves comparing and other baselines to `baselines`, and
training from scratch to `training`. Letters: n cells, m cells of a part, h hidden size.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.order import in_budget, split_rows
from perturbgene.data_utils.shards import ShardCache
from perturbgene.errors import InputError
from perturbgene.eval_utils import AnswerCollector, ClassEvaluator, Evaluator, IntArray, MlmEvaluator, Question
from perturbgene.inference.baselines import NAMES, Answers, classes_of, scored
from perturbgene.inference.classifiers import logistic_regression, sample
from perturbgene.inference.run import Run, load_run
from perturbgene.inference.streaming import stream_batches
from perturbgene.training.transfer import LOADING, SCRATCH_FOLDER, quiet
from perturbgene.training.votes import READING

logger = logging.getLogger(__name__)

#: Most training cells that a start embeds.
MOST_CELLS = 2_000
#: Cells that are tokenized at a time.
CELLS_AT_ONCE = 256


def start_answers(
    run: Run,
    cells: tuple[IterableAnnDataset, IterableAnnDataset],
    questions: Sequence[Question],
    *,
    batch_tokens: int,
) -> dict[str, dict[str, Answers]]:
    """Score what a run started from on the same cells as the run; what is gone is left out, with a warning.

    Args:
        run: Its `run.yaml` says where its start is.
        cells: Data sets of the training and evaluation cells, as the run reads them.
        questions: What the run was asked, of which those with nothing given count.
        batch_tokens: Most tokens in a batch.

    Returns:
        Phenotype -> `start` and `scratch`, as far as there are such -> the answers.
    """
    alone = [one for one in questions if len(one.asked) == 1 and (run.is_classifier or not one.given)]
    found: dict[str, dict[str, Answers]] = {one.asked[0]: {} for one in alone}
    path, folder = getattr(run.settings, "pretrained_model_path", None), Path(run.path) / SCRATCH_FOLDER
    start = None if path is None else _load(path, run, name="start")
    scratch = _load(folder, run, name="scratch") if folder.is_dir() else None
    if start is not None:
        for category, answers in _frozen(start, *cells, list(found), batch_tokens=batch_tokens).items():
            found[category]["start"] = answers
    if scratch is not None and scratch.tokenizer.fingerprint == run.tokenizer.fingerprint:
        for category, answers in _asked(scratch, cells[1], alone, batch_tokens=batch_tokens).items():
            found[category]["scratch"] = answers
    return found


def _load(path: str | Path, run: Run, *, name: str) -> Run | None:
    """Load what a run is compared with, on its device; None, with a warning, if that cannot be."""
    try:
        with quiet(LOADING):
            return load_run(path, device=str(run.model.device))
    except InputError as error:
        logger.warning("no score of %s is shown: %s", NAMES[name], error)
        return None


def _frozen(
    start: Run, train: IterableAnnDataset, evaluation: IterableAnnDataset, categories: Sequence[str], *,
    batch_tokens: int,
) -> dict[str, Answers]:  # fmt: skip
    """Fit a logistic regression for each phenotype to a start's embedding of labeled training cells, and score it."""
    class_of = {category: classes_of(train, category) for category in categories}
    labeled_n = np.flatnonzero(np.any([class_n >= 0 for class_n in class_of.values()], axis=0))
    rows_n = labeled_n[sample(len(labeled_n), most=MOST_CELLS, seed=0)]
    labels_of = {category: class_n[rows_n] for category, class_n in class_of.items()}
    labels_of = {category: label_n for category, label_n in labels_of.items() if len(set(label_n) - {ABSENT}) > 1}
    if not labels_of:
        return {}
    logger.info("embedding %s training cells and the evaluated ones by %s", f"{len(rows_n):,}", start.path)
    try:
        points_nh = embedding_of(start, train, rows_n, batch_tokens=batch_tokens)
        asked_nh = embedding_of(start, evaluation, np.arange(sum(evaluation.sizes)), batch_tokens=batch_tokens)
    except InputError as error:  # a gene that the start knows and the run does not may be ambiguous
        logger.warning("no score of %s is shown: %s", NAMES["start"], error)
        return {}
    points, asked, found = sparse.csr_matrix(points_nh), sparse.csr_matrix(asked_nh), {}
    for category, label_n in labels_of.items():
        known = np.flatnonzero(label_n >= 0)
        predict = logistic_regression(points[known], label_n[known], seed=0)
        found[category] = scored(evaluation, category, predict(asked), {"n_train": len(known)})
    return found


def embedding_of(run: Run, cells: IterableAnnDataset, rows_n: IntArray, *, batch_tokens: int) -> np.ndarray:
    """Embed some cells of a data set as `embed` does when nothing is given, read with the genes and bins of a run.

    Args:
        run: The run that embeds, which need not be the one that the data set was opened for.
        cells: The data set.
        rows_n: Ascending numbers of the cells.
        batch_tokens: Most tokens in a batch.

    Returns:
        Float32 of shape (n, h); 0 for a cell that expresses no gene of the run.
    """
    tokenizer, shards = run.tokenizer.reading([], is_whole=True), cells.shards
    options = {name: value for name, value in shards.options.items() if name not in ("alignments", "measured")}
    files = ShardCache(
        shards.sources, layer=shards.layer, where=shards.where, **{**options, **tokenizer.shard_options()}
    )
    starts_f, parts = np.concatenate([[0], np.cumsum(cells.sizes)])[:-1], []
    with quiet(READING):
        for file, rows_m in split_rows(rows_n, starts_f=starts_f):
            for at in range(0, len(rows_m), CELLS_AT_ONCE):
                block = tokenizer.tokenize_block(files[file].read(rows_m[at : at + CELLS_AT_ONCE]))
                for piece in in_budget(np.diff(block.offsets_n1), budget=batch_tokens):
                    batch = block.take(np.arange(piece.start, piece.stop))
                    parts.append(np.nan_to_num(run.embed(batch, pooling=run.default_pooling())))
    return np.concatenate(parts)


def _asked(
    scratch: Run, evaluation: IterableAnnDataset, questions: Sequence[Question], *, batch_tokens: int
) -> dict[str, Answers]:
    """Ask a run about the evaluated cells as the one that it is compared with was asked."""
    if scratch.is_classifier:
        evaluator: Evaluator = ClassEvaluator(
            scratch.class_labels, tokenizer=scratch.tokenizer, category=scratch.category
        )
    else:
        evaluator = MlmEvaluator(scratch.tokenizer, collator=None, questions=questions)
    answers, found = AnswerCollector(), {}
    evaluator.collectors = [answers]
    for block in stream_batches(evaluation, text="evaluate: from scratch", most_tokens=batch_tokens):
        evaluator.add(scratch.model, block)
    for category, scores_of in evaluator.results().items():
        [(name, scores)] = scores_of.items()
        cells_m, _, predicted_m = answers.joined(category, name)
        predicted_n = np.full(sum(evaluation.sizes), ABSENT)
        predicted_n[cells_m] = predicted_m
        found[category] = Answers(scores, predicted_n)
    return found
