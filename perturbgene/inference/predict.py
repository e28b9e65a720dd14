"""A trained run put to use: `predict` fills phenotypes into new cells, `evaluate` scores a run beside its baselines.

Owns the two verbs; leaves loading a run to `runs`, questions to `asking`, counting to `eval_utils`, temperatures to
`calibration`, and what all verbs share to `parts`.
Letters: n cells, k classes, g genes.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbgene.configs import MlmConfig, check_question, load_config
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.order import split_rows
from perturbgene.data_utils.scale import log_matrix
from perturbgene.data_utils.shards import write_h5ad_copy
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import (
    ClassEvaluator,
    Evaluator,
    LabeledLogits,
    LogitCollector,
    MlmEvaluator,
    Question,
    gene_log_likelihood,
    run_evaluator,
    standard_questions,
    write_results,
)
from perturbgene.inference.asking import AnswerOptions, Columns, Given, Predictor, question_of_classifier
from perturbgene.inference.calibration import (
    MOST_CELLS,
    Calibration,
    fit,
    quantiles,
    read_calibration,
    split_halves,
    weights_hash,
)
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    BATCH_CELLS,
    BATCH_TOKENS,
    CellResults,
    Ranks,
    cell_results,
    check_target,
    collect_results,
    read_cells,
    reading_options,
    stream_batches,
)
from perturbgene.metrics import logistic_regression_baseline, majority_baseline

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.configs import BaseConfig, EvaluateConfig, PredictConfig

logger = logging.getLogger(__name__)

#: Training cells that the logistic regression sees at most; more cost minutes and hardly change it.
MOST_BASELINE_CELLS = 20_000


# -- predict ------------------------------------------------------------------------------------------------------


def _ask_all(
    predictor: Predictor, dataset: IterableAnnDataset, parts: CellResults, *, ranks: Ranks, most_tokens: int
) -> Columns:
    """Answer every cell of this rank; rank 0 gets the columns of all, the others nothing."""
    merged = collect_results(
        parts, stream_batches(dataset, text="predict", ranks=ranks, most_tokens=most_tokens), predictor.answer
    )
    return predictor.columns(merged) if ranks.is_main else {}


def predict_table(
    data: Any, run: Run, *, ask: Sequence[str] = (), given: Given | None = None,
    options: AnswerOptions | None = None, batch_tokens: int = BATCH_TOKENS, **reading: Any,
) -> pd.DataFrame:  # fmt: skip
    """Predict phenotypes of cells as a table.

    Args:
        data: Path or URL of an h5ad file, or an AnnData.
        run: A loaded run.
        ask: Phenotypes to predict; none named means all that are not given.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        options: What is told of each answer; see `AnswerOptions`.
        batch_tokens: Tokens per batch at most.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        For each asked phenotype X, a row per cell in the order of the input: `predicted_X` (category),
        `predicted_X_probability` (float32), `predicted_X_entropy` (nats), and for the next labels `predicted_X_2`,
        `predicted_X_2_probability`, ... A cell that expresses no gene of the panel has no prediction (missing).
        `AnswerOptions` says what else may come.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.predict_table("cells.h5ad", pg.load_run("runs/mlm"), ask=["cell_type"])
        >>> table.shape, list(table.columns[:3])
        ((255, 7), ['predicted_cell_type', 'predicted_cell_type_probability', 'predicted_cell_type_entropy'])
    """
    return _predict(data, run, ask, given, options, batch_tokens, reading)[0]


def _predict(
    data: Any, run: Run, ask: Sequence[str], given: Given | None, options: AnswerOptions | None,
    batch_tokens: int, reading: Mapping[str, Any],
) -> tuple[pd.DataFrame, dict[str, Any]]:  # fmt: skip
    """Return the table and where it came from."""
    predictor = Predictor(run, ask, given, options or AnswerOptions())
    dataset = predictor.open(data, **{"batch_size": BATCH_CELLS, **reading})
    columns = _ask_all(predictor, dataset, CellResults(dataset.num_cells), ranks=Ranks(), most_tokens=batch_tokens)
    table = pd.DataFrame({name: values() for name, values in columns.items()})
    return table, provenance(run, predictor.facts(dataset), coverage=dataset.coverage)


def predict(
    adata: "AnnData | str | Path", model: str | Path | Run, *, ask: Sequence[str] = (),
    given: Given | None = None, top_k: int = 3, joint: bool = False, abstain: float = 0.0,
    ood: bool = False, audit: bool = False, calibrate: bool = True, device: str = "auto",
    batch_tokens: int = BATCH_TOKENS, **reading: Any,
) -> "AnnData":  # fmt: skip
    """Return a copy of the cells with the answers in `obs` and where they came from in `uns["perturbgene"]`.

    Args:
        adata: Cells, in memory or backed, or the path or URL of an h5ad file; no label column is needed.
        model: Run folder, or a loaded run.
        ask, given, batch_tokens, reading: See `predict_table`.
        top_k, joint, abstain, ood, audit, calibrate: See `AnswerOptions`.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: The run cannot answer this question, or the cells cannot be read.

    Example:
        >>> import perturbgene as pg
        >>> cells = pg.predict("cells.h5ad", "runs/mlm", ask=["cell_type"])
        >>> cells.obs["predicted_cell_type"].head(3).tolist()
        ['monocyte', 'NK cell', 'B cell']
    """
    run = model if isinstance(model, Run) else load_run(model, device=device)
    options = AnswerOptions(top_k=top_k, joint=joint, abstain=abstain, ood=ood, audit=audit, calibrate=calibrate)
    cells = read_cells(adata) if isinstance(adata, str | Path) else adata
    table, facts = _predict(cells, run, ask, given, options, batch_tokens, reading)
    result = cells.to_memory() if cells.isbacked else cells.copy()
    for name in table:
        result.obs[name] = table[name].array
    result.uns["perturbgene"] = facts
    return result


def run_predict(config: "PredictConfig") -> str | None:
    """Run the `predict` verb: copy the file and fill its `obs`; of several processes, the first reports."""
    path, target = check_target(config.input, config.output, overwrite=config.overwrite, verb="predict")
    ranks = Ranks.join(config.device)
    run = load_run(config.run, device=ranks.device(config.device))
    predictor = Predictor(run, config.ask, config.given_labels, AnswerOptions(**config.options))
    dataset = predictor.open(path, rank=ranks.rank, world_size=ranks.size, **reading_options(config))
    with cell_results(target, num_cells=dataset.num_cells, ranks=ranks) as parts:
        columns = _ask_all(predictor, dataset, parts, ranks=ranks, most_tokens=config.batch_tokens)
        if not ranks.is_main:
            return None
        facts = provenance(run, predictor.facts(dataset), coverage=dataset.coverage)
        write_h5ad_copy(path, target, obs=columns, uns=facts)
        lines = [f"{dataset.num_cells:,} cells predicted by {config.run}, written to {target}"]
        return "\n".join([*lines, *(_summary(name, columns, predictor) for name in predictor.asked)])


def _summary(phenotype: str, columns: Columns, predictor: Predictor) -> str:
    """Say in one line what was answered about a phenotype."""
    answers = pd.Series(columns[f"predicted_{phenotype}"]())
    probability_n = columns[f"predicted_{phenotype}_probability"]()
    counts = answers.value_counts().head(5)
    shown = ", ".join(f"{label} {count:,}" for label, count in counts.items() if count)
    mean = np.nanmean(probability_n) if answers.notna().any() else np.nan
    how = predictor.describe_calibration()[phenotype]
    return (
        f"predicted_{phenotype}: {shown} (mean probability {mean:.2f}, {how}; "
        f"{int(answers.isna().sum())} cells without genes)"
    )


# -- evaluate -----------------------------------------------------------------------------------------------------


def _evaluator(run: Run, questions: Sequence[Question], mask_rates: Mapping[str, float]) -> Evaluator:
    """Return what counts the scores; genes are masked as in the run's own evaluation, but for rates given here."""
    if run.is_classifier:
        if mask_rates:
            raise InputError(f"{run.path} is a classifier, which hides nothing. Remove {listed(mask_rates)}.")
        return ClassEvaluator(run.class_labels, tokenizer=run.tokenizer, category=run.category)
    trained = _settings_of(run)
    own = {**trained.mask_rates, "seed": trained.seed} if isinstance(trained, MlmConfig) else {}
    collator = DataCollatorForPhenotypicMLM(run.tokenizer, packed=True, **{**own, **mask_rates})  # type: ignore[arg-type]
    return MlmEvaluator(run.tokenizer, collator=collator, questions=questions)


def _own_questions(run: Run, ask: Sequence[str], given: Sequence[str]) -> list[Question]:
    check_question(list(ask), list(given))
    if run.is_classifier:
        return [question_of_classifier(run, ask, given)]
    known = run.tokenizer.included_phenotypes
    for name in [*ask, *given]:
        if name not in known:
            raise InputError(f"{name!r} is no phenotype of {run.path}. Choose from: {listed(known, most=12)}.")
    if given:
        asked = tuple(ask or [name for name in known if name not in given])
        if not asked:
            raise InputError("nothing is asked: every phenotype of the run is given. Name one with --ask.")
        return [Question("asked", asked, tuple(given))]
    return [question for question in standard_questions(known) if not ask or set(question.asked) <= set(ask)]


def _labels_and_matrix(
    dataset: IterableAnnDataset, category: str, *, most: int, seed: int
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Read labels (n,) and log expression (n, g) of at most `most` cells, drawn evenly."""
    num_cells = sum(dataset.sizes)
    rows_n = np.arange(num_cells)
    if num_cells > most:
        rows_n = np.sort(np.random.default_rng(seed).choice(num_cells, size=most, replace=False))
    starts_f = np.concatenate([[0], np.cumsum(dataset.sizes)])[:-1]
    matrices, labels = [], []
    for file, rows in split_rows(rows_n, starts_f=starts_f):
        matrices.append(log_matrix(dataset.shards[file].read(rows)))
        labels.append(dataset.shards[file].label_ids(category)[rows])
    start, _ = dataset.tokenizer.vocabulary.id_range(category)
    ids_n = np.concatenate(labels)
    return np.where(ids_n == ABSENT, ABSENT, ids_n - start), sparse.vstack(matrices, format="csr")


def baselines(
    train: IterableAnnDataset, evaluation: IterableAnnDataset, category: str, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Score the majority class and a logistic regression on the same cells as the model.

    Args:
        train, evaluation: Data sets of the training and evaluation cells; labels and expression are read from them.
        category: The phenotype.
        seed: Of the subsample, when there are more than `MOST_BASELINE_CELLS` training cells.
    """
    labels_n, matrix_ng = _labels_and_matrix(train, category, most=MOST_BASELINE_CELLS, seed=seed)
    eval_labels_n, eval_matrix_ng = _labels_and_matrix(evaluation, category, most=sum(evaluation.sizes), seed=seed)
    num_classes = len(train.tokenizer.phenotypes[category])
    scores, _ = logistic_regression_baseline(
        matrix_ng, labels_n, eval_matrix_ng, eval_labels_n, num_classes=num_classes, seed=seed
    )
    return {
        "majority": majority_baseline(labels_n, eval_labels_n, num_classes=num_classes),
        "logistic_regression": {**scores, "n_train": int((labels_n >= 0).sum())},
    }


def _table_of(results: Mapping[str, Any]) -> str:
    rows = [
        {"phenotype": category, "question": name, "cells": scores["n"],
         **{key: scores.get(key, np.nan) for key in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")},
         "temperature": scores.get("calibration", {}).get("temperature", np.nan)}
        for category, questions in results.items() for name, scores in questions.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")


def _units(dataset: IterableAnnDataset, column: str | None) -> np.ndarray | None:
    """Return the donor of every cell, shape (n,), None where the files do not say."""
    shards = [dataset.shards[index].source for index in range(len(dataset.shards))]
    if column is None or any(column not in shard.columns_of("obs") for shard in shards):
        return None
    return np.concatenate([shard.obs_column(column).astype(str).to_numpy(dtype=object) for shard in shards])


def _calibrate(
    run: Run,
    keeper: LogitCollector,
    dataset: IterableAnnDataset,
    *,
    donor_column: str | None,
    genes_n: Sequence[np.ndarray],
) -> Calibration:
    """Fit the temperatures of all questions on half of the donors, and the quantiles of strangeness on all cells."""
    units_n, fitted, how = _units(dataset, donor_column), [], "cells"
    for (category, question), pieces in keeper.pieces.items():
        kept = LabeledLogits.join(pieces)
        of_cells = None if units_n is None else units_n[kept.cells_n]
        is_fitted_n, how = split_halves(of_cells, num_cells=len(kept.cells_n))
        fitted.append(
            fit(
                kept.logits_nk, kept.true_n, is_fitted_n, phenotype=category, asked=question.asked, given=question.given
            )
        )
    if how == "cells":
        logger.warning(
            "the evaluation cells name fewer than two donors: temperatures are fitted on half of the cells and scored "
            "on the other half, whose donors they share"
        )
    return Calibration(
        tuple(fitted), quantiles(np.concatenate(genes_n)) if genes_n else (), how, weights_hash(run.path)
    )


def _add_calibration(results: dict[str, Any], calibration: Calibration, questions: Sequence[Question]) -> None:
    """Put what was fitted beside the scores of its question."""
    names = {(question.asked, question.given): question.name for question in questions}
    for entry in calibration.temperatures:
        scores = results[entry.phenotype][names[entry.asked, entry.given]]
        split = {"temperature": entry.temperature, "n_fitted": entry.num_cells, "split_by": calibration.split}
        scores["calibration"] = {**split, **entry.scores}


def evaluate(
    run: Run, eval_paths: Any, *, train_paths: Any = None, ask: Sequence[str] = (), given: Sequence[str] = (),
    mask_rates: Mapping[str, float] | None = None, calibrate: bool = False, donor_column: str | None = "donor_id",
    batch_size: int = BATCH_CELLS, batch_tokens: int = BATCH_TOKENS, output: Path | None = None, **reading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score a run on labelled cells, beside its baselines.

    Args:
        run: A loaded run.
        eval_paths: Files (or AnnData) to score on.
        train_paths: The training files, for majority class and logistic regression; None leaves these out.
        ask, given: One question in place of the standard ones.
        mask_rates: `gene_mask_prob`, `phenotype_mask_prob`, `absent_prob` or `unexpressed_ratio` in place of the run's
            own, by which cells are masked to score genes.
        calibrate: True fits temperatures, adds what they do to each question's scores, and stores them in the run.
        donor_column: Column of obs whose values are not split between fitting and scoring temperatures.
        batch_size, batch_tokens: Cells and tokens per batch at most.
        output: Folder for `metrics.json`, confusion matrices (CSV, PNG) and per-class scores; None writes nothing.
        reading: `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        Phenotype -> question or baseline -> scores; `genes` -> scores of masked genes.

    Example:
        >>> import perturbgene as pg
        >>> scores = pg.evaluate(pg.load_run("runs/mlm"), "cells.h5ad", ask=["cell_type"])
        >>> scores["cell_type"]["alone"]["n"], scores["cell_type"]["alone"]["accuracy"] > 0.9
        (255, True)
    """
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise InputError(f"{output} cannot be written (it is a file, not a folder). Choose another --output.")
    if calibrate and not os.access(run.path, os.W_OK):
        raise InputError(
            f"{run.path} cannot be written, but what calibrates a run is stored in it. Copy the run to where you may "
            "write, or pass --no_calibrate."
        )
    evaluator = _evaluator(run, _own_questions(run, ask, given), mask_rates or {})
    options = {"batch_size": batch_size, **reading}
    dataset = IterableAnnDataset(
        eval_paths, run.tokenizer, phenotype_category=run.category or None, binary_label=run.binary_label, **options
    )
    blocks = stream_batches(dataset, text="evaluate", ranks=Ranks(), most_tokens=batch_tokens)
    genes_n: list[np.ndarray] = []
    if calibrate:
        evaluator.keeper = LogitCollector(-(-dataset.num_cells // MOST_CELLS))
        blocks = _with_gene_scores(blocks, run, genes_n)
    run_evaluator(evaluator, run.model, blocks)
    results = evaluator.results()
    if evaluator.keeper is not None:
        calibration = _calibrate(run, evaluator.keeper, dataset, donor_column=donor_column, genes_n=genes_n)
        _add_calibration(results, calibration, evaluator.all_questions)
        (read_calibration(run.path) or Calibration()).joined(calibration).save(run.path)
    if train_paths is not None:
        train = IterableAnnDataset(train_paths, run.tokenizer, **options)
        for name in [name for name in results if name != "genes" and run.binary_label is None]:
            results[name] |= baselines(train, dataset, name)
    if output is not None:
        write_results(results, evaluator.confusions(), output, text="held-out cells")
    return results


def _with_gene_scores(blocks: Iterator[TokenBlock], run: Run, genes_n: list[np.ndarray]) -> Iterator[TokenBlock]:
    """Pass blocks on and note how well a masked model tells their hidden genes."""
    for block in blocks:
        if not run.is_classifier:
            genes_n.append(gene_log_likelihood(run.model, block, run.tokenizer))
        yield block


def _settings_of(run: Run) -> "BaseConfig | None":
    """Return the settings that a run was trained with; None where only weights and tokenizer are left."""
    path = Path(run.path) / "run.yaml"
    return load_config(path) if path.exists() else None


def _train_paths(config: "EvaluateConfig", trained: "BaseConfig | None", corpus: Corpus | None) -> list[str]:
    """Return the files that the baselines are fitted on; none when neither they nor the run name any."""
    if corpus and not config.train_data_paths:
        return corpus.paths("train")
    given = config.train_data_paths or getattr(trained, "train_data_paths", [])
    return expand_paths(given) if given else []


def run_evaluate(config: "EvaluateConfig") -> str | None:
    """Run the `evaluate` verb on a corpus, on files, or on the data that the run was trained with.

    Of several processes the first does it all.
    """
    if not Ranks.join(config.device).is_main:
        return None
    run = load_run(config.run, device=config.device)
    trained = _settings_of(run)
    folder = config.corpus or (getattr(trained, "corpus", None) if not config.eval_data_paths else None)
    corpus = Corpus.open(folder) if folder else None
    if corpus:
        eval_paths = corpus.paths("eval")
    else:
        eval_paths = expand_paths(config.eval_data_paths or getattr(trained, "eval_data_paths", []))
    train_paths = _train_paths(config, trained, corpus) if config.baselines else []
    reading = {
        name: getattr(trained, name) for name in ("layer", "gene_id_column") if trained is not None and not corpus
    }
    output = Path(config.output) if config.output else Path(config.run) / "evaluation"
    donor_column = (corpus.split_by if corpus else None) or "donor_id"
    results = evaluate(
        run, eval_paths, train_paths=train_paths or None, ask=config.ask, given=config.given,
        mask_rates=config.mask_rates, calibrate=config.calibrate, donor_column=donor_column,
        batch_size=config.batch_size, batch_tokens=config.batch_tokens, output=output, **reading,
    )  # fmt: skip
    return f"{_table_of(results)}\nwritten to {output}"
