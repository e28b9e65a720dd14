"""A trained run put to use: `predict` fills phenotypes into new cells, `evaluate` scores a run beside its baselines.

Owns streaming cells through a run; leaves loading it to `runs`, questions and counting to `eval_utils`.
Letters: n cells, k classes, g genes.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from perturbgene import __version__
from perturbgene.configs import MlmConfig, check_question, load_config
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, block_of, collate_fn_wrapper
from perturbgene.data_utils.expression import log_matrix
from perturbgene.data_utils.iterable_ann_dataset import Cell, IterableAnnDataset
from perturbgene.data_utils.partition import split_rows
from perturbgene.data_utils.read import expand_paths
from perturbgene.data_utils.remote import is_url, shown_path
from perturbgene.data_utils.shards import write_h5ad_copy
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.data_utils.vocab import ABSENT
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import (
    ClassEvaluator,
    Evaluator,
    MlmEvaluator,
    Question,
    answer,
    inference_mode,
    run_evaluator,
    standard_questions,
    to_device,
    write_results,
)  # fmt: skip
from perturbgene.metrics import logistic_regression_baseline, majority_baseline
from perturbgene.prepare import shard_paths
from perturbgene.runs import Run, load_run

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.configs import BaseConfig, EvaluateConfig, PredictConfig

logger = logging.getLogger(__name__)

#: Training cells that the logistic regression sees at most; more cost minutes and hardly change it.
MOST_BASELINE_CELLS = 20_000


# -- predict ------------------------------------------------------------------------------------------------------


def _question_of_classifier(run: Run, ask: Sequence[str], given: Sequence[str]) -> Question:
    """Return the one question that a classifier answers: its own phenotype, given what it was trained with."""
    known = run.tokenizer.included_phenotypes
    wrong = [name for name in ask if name != run.category]
    if wrong:
        raise InputError(
            f"{run.path} classifies {run.category!r} only, not {listed(wrong)}. Ask an mlm run, or drop --ask."
        )
    strange = [name for name in given if name not in known]
    if strange:
        raise InputError(
            f"{run.path} classifies {run.category!r} only and was trained without {listed(strange)}, which cannot be "
            f"given. Give {listed(known) or 'nothing'}, or ask an mlm run."
        )
    return Question("asked", (run.category,), known)


def _question(run: Run, ask: Sequence[str], given: Mapping[str, str | None]) -> Question:
    check_question(list(ask), list(given))
    if run.is_classifier:
        return _question_of_classifier(run, ask, list(given))
    for category in [*ask, *given]:
        run.tokenizer.vocabulary.check_category(category)
    asked = tuple(ask) or tuple(name for name in run.tokenizer.included_phenotypes if name not in given)
    if not asked:
        raise InputError("nothing is asked: every phenotype of the run is given. Name one with --ask.")
    return Question("asked", asked, tuple(given))


def _constant_labels(tokenizer: GeneTokenizer, given: Mapping[str, str | None]) -> dict[str, int]:
    constants = {name: tokenizer.vocabulary.label_id(name, label) for name, label in given.items() if label is not None}
    for name, id_ in constants.items():
        if id_ == ABSENT:
            known = listed(tokenizer.phenotypes[name], most=12)
            raise InputError(f"{name}={given[name]} is not in the run's vocabulary. Choose one of: {known}.")
    return constants


def _tokenizer_of(run: Run, question: Question) -> GeneTokenizer:
    """Return a tokenizer that reads given labels only, and keeps the genes of a long cell that `evaluate` keeps.

    Slots of phenotypes that are not read leave no room for more genes: otherwise the answer of a long cell would depend
    on which labels its file happens to have.
    """
    if run.is_classifier:
        return run.tokenizer
    num_given = len(question.given)
    slots = max(len(run.tokenizer.included_phenotypes), len(question.asked) + num_given)
    max_length = max(3 + num_given, run.tokenizer.max_length - slots + num_given)
    return run.tokenizer.with_settings(included=list(question.given), max_length=max_length)


def _check_given_columns(dataset: IterableAnnDataset, given: Mapping[str, str | None]) -> None:
    """Refuse a file that lacks the column of a phenotype that is to be read from obs."""
    for index in range(len(dataset.shards)):
        for name in [name for name, label in given.items() if label is None]:
            dataset.shards[index].source.obs_column(name)


def _probabilities(run: Run, cells: Sequence[Cell], question: Question) -> dict[str, np.ndarray]:
    """Answer one batch: phenotype -> probabilities of its labels, (n, k)."""
    if not run.is_classifier:
        return answer(run.model, block_of(cells), run.tokenizer, question)
    batch = to_device(collate_fn_wrapper(run.tokenizer, packed=True)(cells), run.model.device)
    with inference_mode(run.model):
        logits_nk = run.model(**batch).logits.float()
    return {question.asked[0]: torch.softmax(logits_nk, dim=-1).cpu().numpy()}


def _batches(dataset: IterableAnnDataset, *, text: str) -> Iterator[list[Cell]]:
    with tqdm(total=len(dataset), desc=text, unit=" cells", unit_scale=True, disable=None) as bar:
        for cells in DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=list):
            yield cells
            bar.update(len(cells))


def predict_table(
    data: Any, run: Run, *, ask: Sequence[str] = (), given: Mapping[str, str | None] | None = None, **reading: Any
) -> pd.DataFrame:
    """Predict phenotypes of cells as a table.

    Args:
        data: Path of an h5ad file, or an AnnData.
        run: A loaded run.
        ask: Phenotypes to predict; none named means all that are not given.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        For each asked phenotype `predicted_X` (category) and `predicted_X_probability` (float32), a row per cell in the
        order of the input. A cell that expresses no gene of the panel has no prediction (missing).
    """
    given = dict(given or {})
    question = _question(run, ask, given)
    tokenizer = _tokenizer_of(run, question)
    dataset = IterableAnnDataset(data, tokenizer, constant_labels=_constant_labels(tokenizer, given), **reading)
    _check_given_columns(dataset, given)
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in question.asked}
    probability: dict[str, list[np.ndarray]] = {name: [] for name in question.asked}
    for cells in _batches(dataset, text="predict"):
        has_genes_n = np.array([int(cell["token_type_ids"][-2]) >= tokenizer.first_gene_type for cell in cells])
        for name, probability_nk in _probabilities(run, cells, question).items():
            chosen[name].append(np.where(has_genes_n, probability_nk.argmax(axis=1), -1))
            probability[name].append(np.where(has_genes_n, probability_nk.max(axis=1), np.nan))
    columns: dict[str, Any] = {}
    for name in question.asked:
        labels = run.class_labels if run.is_classifier else list(tokenizer.phenotypes[name])
        columns[f"predicted_{name}"] = pd.Categorical.from_codes(np.concatenate(chosen[name]), categories=labels)
        columns[f"predicted_{name}_probability"] = np.concatenate(probability[name]).astype(np.float32)
    return pd.DataFrame(columns)


def predict(
    adata: "AnnData",
    model: str | Path | Run,
    *,
    ask: Sequence[str] = (),
    given: Mapping[str, str | None] | None = None,
    device: str = "auto",
    **reading: Any,
) -> "AnnData":
    """Return a copy of the cells with `obs["predicted_X"]` and `obs["predicted_X_probability"]` filled.

    Args:
        adata: Cells; no label column is needed.
        model: Run folder, or a loaded run.
        ask, given, reading: See `predict_table`.
        device: "auto", "cpu", "cuda", ...
    """
    run = model if isinstance(model, Run) else load_run(model, device=device)
    table = predict_table(adata, run, ask=ask, given=given, **reading)
    result = adata.to_memory() if adata.isbacked else adata.copy()
    for name in table:
        result.obs[name] = table[name].array
    result.uns["perturbgene"] = _provenance(run, ask, given or {})
    return result


def _provenance(run: Run, ask: Sequence[str], given: Mapping[str, str | None]) -> dict[str, Any]:
    facts = {"version": __version__, "run": run.path, "tokenizer_fingerprint": run.tokenizer.fingerprint}
    return {**facts, "ask": list(ask), "given": json.dumps(dict(given))}


def run_predict(config: "PredictConfig") -> str:
    """Run the `predict` verb: copy the file and fill its `obs`."""
    target = Path(config.output).expanduser()
    if target.exists() and not config.overwrite:
        raise InputError(f"{target} exists. Choose another --output, or pass --overwrite.")
    paths = expand_paths([config.input])
    if len(paths) > 1:
        raise InputError(
            f"{shown_path(config.input)} names {len(paths):,} files, but predict writes one file. Name one file."
        )
    path = paths[0]
    if target.exists() and not is_url(path) and os.path.samefile(path, target):
        raise InputError(f"{target} is the input itself, which must stay as it is. Change --output.")
    run = load_run(config.run, device=config.device)
    reading = {name: getattr(config, name) for name in ("batch_size", "layer", "gene_id_column", "min_gene_coverage")}
    table = predict_table(path, run, ask=config.ask, given=config.given_labels, **reading)
    write_h5ad_copy(path, target, obs=table, uns=_provenance(run, config.ask, config.given_labels))
    lines = [f"{len(table):,} cells predicted by {config.run}, written to {target}"]
    for name in table.columns[::2]:
        counts = table[name].value_counts().head(5)
        shown = ", ".join(f"{label} {count:,}" for label, count in counts.items() if count)
        mean = table[f"{name}_probability"].mean()
        lines.append(
            f"{name}: {shown} (mean probability {mean:.2f}, {int(table[name].isna().sum())} cells without genes)"
        )
    return "\n".join(lines)


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
        return [_question_of_classifier(run, ask, given)]
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
         **{key: scores.get(key, np.nan) for key in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")}}
        for category, questions in results.items() for name, scores in questions.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")


def evaluate(
    run: Run, eval_paths: Any, *, train_paths: Any = None, ask: Sequence[str] = (), given: Sequence[str] = (),
    mask_rates: Mapping[str, float] | None = None, batch_size: int = 64, output: Path | None = None, **reading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score a run on labelled cells, beside its baselines.

    Args:
        run: A loaded run.
        eval_paths: Files (or AnnData) to score on.
        train_paths: The training files, for majority class and logistic regression; None leaves these out.
        ask, given: One question in place of the standard ones.
        mask_rates: `gene_mask_prob`, `phenotype_mask_prob`, `absent_prob` or `unexpressed_ratio` in place of the run's
            own, by which cells are masked to score genes.
        output: Folder for `metrics.json`, confusion matrices (CSV, PNG) and per-class scores; None writes nothing.
        reading: `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        Phenotype -> question or baseline -> scores; `genes` -> scores of masked genes.
    """
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise InputError(f"{output} cannot be written (it is a file, not a folder). Choose another --output.")
    evaluator = _evaluator(run, _own_questions(run, ask, given), mask_rates or {})
    category = run.category or None
    options = {"batch_size": batch_size, **reading}
    dataset = IterableAnnDataset(
        eval_paths, run.tokenizer, phenotype_category=category, binary_label=run.binary_label, **options
    )
    run_evaluator(evaluator, run.model, _batches(dataset, text="evaluate"))
    results = evaluator.results()
    if train_paths is not None:
        train = IterableAnnDataset(train_paths, run.tokenizer, **options)
        for name in [name for name in results if name != "genes" and run.binary_label is None]:
            results[name] |= baselines(train, dataset, name)
    if output is not None:
        write_results(results, evaluator.confusions(), output, text="held-out cells")
    return results


def _settings_of(run: Run) -> "BaseConfig | None":
    """Return the settings that a run was trained with; None where only weights and tokenizer are left."""
    path = Path(run.path) / "run.yaml"
    return load_config(path) if path.exists() else None


def _train_paths(config: "EvaluateConfig", trained: "BaseConfig | None", corpus: str | None) -> list[str]:
    """Return the files that the baselines are fitted on; none when neither they nor the run name any."""
    if corpus and not config.train_data_paths:
        return shard_paths(corpus, "train")
    given = config.train_data_paths or getattr(trained, "train_data_paths", [])
    return expand_paths(given) if given else []


def run_evaluate(config: "EvaluateConfig") -> str:
    """Run the `evaluate` verb on a corpus, on files, or on the data that the run was trained with."""
    run = load_run(config.run, device=config.device)
    trained = _settings_of(run)
    corpus = config.corpus or (getattr(trained, "corpus", None) if not config.eval_data_paths else None)
    if corpus:
        eval_paths = shard_paths(corpus, "eval")
    else:
        eval_paths = expand_paths(config.eval_data_paths or getattr(trained, "eval_data_paths", []))
    train_paths = _train_paths(config, trained, corpus) if config.baselines else []
    reading = {
        name: getattr(trained, name) for name in ("layer", "gene_id_column") if trained is not None and not corpus
    }
    output = Path(config.output) if config.output else Path(config.run) / "evaluation"
    results = evaluate(
        run, eval_paths, train_paths=train_paths or None, ask=config.ask,
        given=config.given, mask_rates=config.mask_rates, batch_size=config.batch_size, output=output, **reading,
    )  # fmt: skip
    return f"{_table_of(results)}\nwritten to {output}"
