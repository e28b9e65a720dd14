"""The verb `predict`: ask a run for phenotypes of new cells and write the answers to `obs`.

Owns which questions are asked and the columns that answers become; leaves running the model to `eval_utils`,
temperatures to `calibration`, and batches and files to `streaming`. Letters: n cells, k labels, t ranks of labels.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from perturbgene.cli.verbs import AnswerOptions, PredictConfig
from perturbgene.configs import check_question
from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.data_collators import collate_fn_wrapper
from perturbgene.data_utils.h5ad_writing import write_copy
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT, Labels, is_missing
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import Question, class_logits, gene_log_likelihood, question_logits
from perturbgene.inference.calibration import Calibration, Temperature, percentile, read_calibration
from perturbgene.inference.conformal import floor_at, label_sets
from perturbgene.inference.majority import BY_EMBEDDING, CLUSTER_COLUMN, clusters_of, majority
from perturbgene.inference.novelty import LEAST_CELLS, TrainingCells, Usual
from perturbgene.inference.ontology import SUFFIX, LabelTerms, ontology_parser, term_ids
from perturbgene.inference.parts import stored_rows, write_piece
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    GENES_COLUMN,
    Given,
    Ranks,
    answered,
    claimed_output,
    given_labels,
    open_cells,
    read_cells,
    reading_options,
    with_results,
)
from perturbgene.training.votes import expression_of

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

#: Written in place of a label that is not probable enough.
UNKNOWN = "unknown"

#: Between the labels of a set.
SEPARATOR = " | "

#: Columns of `obs` by name: arrays (n,) or categoricals.
Columns = dict[str, Any]


# -- questions ----------------------------------------------------------------------------------------------------


def questions_of(run: Run, ask: Sequence[str], given: Sequence[str], *, joint: bool) -> list[Question]:
    """Return one question for each asked phenotype, or with `joint` one question for all of them.

    A classifier answers one question: its own phenotype, given those that it was trained with.

    Raises:
        InputError: A phenotype is unknown, asked twice, or asked and given; nothing is asked; the run knows none; or a
            classifier is asked or given something else.
    """
    check_question(ask, given)
    known = run.tokenizer.included_phenotypes
    if run.is_classifier:
        only = f"{run.path} classifies {run.category!r} only"
        if wrong := [name for name in ask if name != run.category]:
            raise InputError(f"{only}, not {listed(wrong)}. Ask an mlm run, or drop --ask.")
        if strange := [name for name in given if name not in known]:
            raise InputError(
                f"{only} and was trained without {listed(strange)}, which cannot be given. Give "
                f"{listed(known) or 'nothing'}, or ask an mlm run."
            )
        return [Question("asked", (run.category,), known)]
    if not known:
        raise InputError(
            f"{run.path} knows no phenotypes, so there is nothing to predict. Use `perturbgene embed`, or train on a "
            "corpus that was prepared with --phenotypes."
        )
    for category in [*ask, *given]:
        run.tokenizer.vocabulary.check_category(category)
    asked = tuple(ask) or tuple(name for name in known if name not in given)
    if not asked:
        raise InputError("nothing is asked: every phenotype of the run is given. Name one with --ask.")
    groups = [asked] if joint else [(name,) for name in asked]
    return [Question("asked", group, tuple(given)) for group in groups]


class Predictor:
    """Asks a run about blocks of cells and turns the answers into columns.

    Args:
        run: A loaded run.
        ask: Phenotypes to predict; an empty list means all that are not given.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        options: Which columns to write for each prediction.

    Raises:
        InputError: This run cannot answer the question.
    """

    def __init__(self, run: Run, ask: Sequence[str], given: Given | None, options: AnswerOptions) -> None:
        self.run, self.given, self.options = run, given_labels(given), options
        self.ask = [ask] if isinstance(ask, str) else list(ask)
        self.questions = questions_of(run, self.ask, list(self.given), joint=options.joint)
        self.question_of = {name: question for question in self.questions for name in question.asked}
        self.asked = list(self.question_of)
        run.warn_if_ignored(self.given, self.asked)
        found = read_calibration(run.path) if options.calibrate or options.ood else None
        self.is_calibrated, self.calibration = options.calibrate and found is not None, found or Calibration()
        self.training_cells = self._training_cells() if options.ood else None
        self.collate = collate_fn_wrapper(run.tokenizer, packed=True)
        self.floors = {name: self._floor(name) for name in self.asked} if options.conformal is not None else {}
        self.mask_rates = run.mask_rates if options.ood else {}
        self.terms: dict[str, LabelTerms] = {}  # of the phenotypes whose labels are terms, with `coarse`
        if options.coarse:
            ontology_parser()  # raises
        self._own_label_n: dict[str, np.ndarray] = {}
        self._clusters: Labels | None = None  # of all cells of the file
        if options.majority_by == BY_EMBEDDING and run.space is None:
            logger.warning(
                "%s has no embedding.safetensors, so cells are clustered by states that may tell types apart badly; "
                "train it again, or name a column with --majority_by", run.path,
            )  # fmt: skip

    def _training_cells(self) -> TrainingCells:
        """Return the statistics of training cells that say how unusual a cell is.

        Raises:
            InputError: The run has none, or none for a phenotype that is asked.
        """
        found = TrainingCells.read(self.run.path)
        lacking = [name for name, question in self.question_of.items() if not self._usual(name, question)]
        if found is not None and not lacking:
            return found
        what = "statistics of its training cells" if found is None else f"what is usual for {listed(lacking)}"
        raise InputError(
            f"{self.run.path} does not hold {what}, which --ood needs. Run `perturbgene evaluate {self.run.path}` "
            f"again where its training and evaluation cells (at least {LEAST_CELLS}) are, or leave out --ood."
        )

    @cached_property
    def audits(self) -> list[Question]:
        """The question that the audit of each asked phenotype asks: the same, given all others."""
        if not self.options.audit:
            return []
        if self.run.is_classifier:
            return self.questions
        known = [*self.run.tokenizer.included_phenotypes, *(name for name in self.given if name not in self.asked)]
        others = {name: tuple(dict.fromkeys(other for other in known if other != name)) for name in self.asked}
        return [Question("audit", (name,), others[name]) for name in self.asked]

    @cached_property
    def tokenizer(self) -> GeneTokenizer:
        """Reads the cells with only those labels that are used."""
        read = list(dict.fromkeys([*self.given, *(name for audit in self.audits for name in audit.given)]))
        if self.run.is_classifier:
            read = list(self.run.tokenizer.included_phenotypes)
        return self.run.tokenizer.reading(read, is_whole=True)

    def open(self, data: Any, **reading: Any) -> IterableAnnDataset:
        """Open a file or an AnnData; see `open_cells`.

        Raises:
            InputError: The column of a phenotype that is given from `obs`, or audited, is missing.
        """
        dataset = open_cells(data, self.run, self.given, tokenizer=self.tokenizer, **reading)
        for (name,) in [audit.asked for audit in self.audits]:
            ids = []
            for index in range(len(dataset.shards)):
                dataset.shards[index].label_column(name)  # raises where it is missing
                ids.append(dataset.shards[index].label_ids(name))
            ids_n, vocabulary = np.concatenate(ids), self.run.tokenizer.vocabulary
            own_n = ids_n - vocabulary.id_range(name)[0]
            if self.run.binary_label is not None:
                own_n = (ids_n == vocabulary.label_id(name, self.run.binary_label)).astype(np.int32)
            self._own_label_n[name] = np.where(ids_n == ABSENT, ABSENT, own_n)
        if self.options.majority_by not in (None, BY_EMBEDDING):
            self._clusters = _labels_of(dataset, str(self.options.majority_by))
        if self.options.coarse:
            found = {name: LabelTerms.of(self.labels_of(name), term_ids(dataset, name)) for name in self.asked}
            self.terms = {name: terms for name, terms in found.items() if terms.term_of}
            if not self.terms:
                raise InputError(
                    f"no label of {listed(self.asked)} is a term of an ontology (the first labels are "
                    f"{listed(self.labels_of(self.asked[0]), most=3)}), so nothing is coarser. Remove --coarse, or "
                    "train on names of the Cell Ontology or on term ids."
                )
        return dataset

    # -- answers --------------------------------------------------------------------------------------------------

    def temperature(self, phenotype: str, question: Question) -> Temperature | None:
        """Return the temperature of this question or the most similar one; None without calibration."""
        return self.calibration.nearest(phenotype, asked=question.asked, given=question.given)

    def _usual(self, phenotype: str, question: Question) -> Usual | None:
        """Return what is usual under this question or the most similar one; None if `evaluate` did not fit it."""
        fitted = self.temperature(phenotype, question)
        return fitted.usual if fitted else None

    def _floor(self, phenotype: str) -> float:
        """Return the probability that a label needs to be in a set; refuse a question that `evaluate` did not ask."""
        question, level = self.question_of[phenotype], self.options.conformal
        fitted = self.temperature(phenotype, question)
        if level is not None and fitted and fitted.floors and not fitted.distance(question.asked, question.given):
            return floor_at(fitted.floors, level)
        is_standard = self.run.is_classifier or not question.given
        flags = "" if is_standard else f" --ask {' '.join(question.asked)} --given {' '.join(question.given)}"
        raise InputError(
            f"{self.run.path} has no sets of labels for this question about {phenotype}: `evaluate` has not fitted "
            f"them. Run `perturbgene evaluate {self.run.path}{flags}`, or remove --conformal."
        )

    def _asked(self, block: TokenBlock, question: Question) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each asked phenotype with the logits and the calibrated probabilities of its labels, (n, k)."""
        if self.run.is_classifier:
            found = {question.asked[0]: class_logits(self.run.model, block, self.collate)}
        else:
            found = question_logits(self.run.model, block, self.run.tokenizer, question)
        for name, logits_nk in found.items():
            fitted = self.temperature(name, question)
            temperature = fitted.temperature if fitted and self.is_calibrated else 1.0
            yield name, logits_nk, softmax(logits_nk / np.float32(temperature), axis=-1)

    def answer(self, block: TokenBlock) -> dict[str, np.ndarray]:
        """Answer one batch: named arrays with a row per cell, -1 and NaN for cells without genes."""
        num_genes_n, answers = self.run.tokenizer.num_genes(block), dict[str, np.ndarray]()
        has_genes_n = num_genes_n > 0
        for question in self.questions:
            for name, logits_nk, probability_nk in self._asked(block, question):
                order_nt = np.argsort(-probability_nk, axis=1, kind="stable")[:, : self.options.top_k]
                best_nt = np.take_along_axis(probability_nk, order_nt, axis=1)
                entropy_n = -(probability_nk * np.log(np.maximum(probability_nk, 1e-30))).sum(axis=1)
                answers[f"code:{name}"] = np.where(has_genes_n[:, None], order_nt, -1).astype(np.int32)
                answers[f"probability:{name}"] = _where(best_nt, has_genes_n[:, None])
                if self.options.probabilities:
                    answers[f"probabilities:{name}"] = _where(probability_nk, has_genes_n[:, None])
                answers[f"entropy:{name}"] = _where(np.abs(entropy_n), has_genes_n)
                if name in self.terms:
                    found = self.terms[name].coarse(probability_nk, least=self.options.abstain)
                    answers[f"coarse:{name}"], answers[f"coarse_probability:{name}"] = found
                if name in self.floors:
                    answers[f"set:{name}"] = label_sets(probability_nk, self.floors[name]).astype(np.int8)
                if self.training_cells and (usual := self._usual(name, question)):
                    points_nr = self.training_cells.locate(expression_of(block, self.run.model.config))
                    parts_np = self.training_cells.parts(name, points_nr, logits_nk)
                    answers[f"novelty:{name}"] = _where(usual.score(parts_np, num_genes_n), has_genes_n)
        if self.options.ood and not self.run.is_classifier:
            answers["genes"] = gene_log_likelihood(self.run.model, block, self.tokenizer, mask_rates=self.mask_rates)
        if self.options.majority_by == BY_EMBEDDING:
            answers["embedding"] = self.run.embed(block, pooling=self.run.default_pooling())
        for question in self.audits:
            [(name, _, probability_nk)] = self._asked(block, question)
            own_n = self._own_label_n[name][block.cells_n]
            of_own_n = probability_nk[np.arange(len(block)), np.maximum(own_n, 0)]
            answers[f"audit:{name}"] = _where(of_own_n, has_genes_n & (own_n >= 0))
        return answers

    # -- columns --------------------------------------------------------------------------------------------------

    def columns(self, merged: Mapping[str, np.ndarray]) -> Columns:
        """Return the columns of `obs` that the answers become."""
        columns: Columns = {}
        for name, question in self.question_of.items():
            codes_nt, probability_nt, labels = (
                merged[f"code:{name}"],
                merged[f"probability:{name}"],
                self.labels_of(name),
            )
            best_n, categories, abstain = codes_nt[:, 0], labels, self.options.abstain
            if abstain:
                categories = labels if UNKNOWN in labels else [*labels, UNKNOWN]
                is_unsure_n = (probability_nt[:, 0] < abstain) & (best_n >= 0)
                best_n = np.where(is_unsure_n, categories.index(UNKNOWN), best_n)
            columns[f"predicted_{name}"] = pd.Categorical.from_codes(best_n, categories=categories)
            columns[f"predicted_{name}_probability"] = probability_nt[:, 0]
            if name in self.terms:
                columns |= self._coarse_columns(name, merged)
            columns[f"predicted_{name}_entropy"] = merged[f"entropy:{name}"]
            # The best label is in `predicted_X` already, unless that may be `unknown`.
            for rank in range(0 if abstain else 1, codes_nt.shape[1]):
                next_n = pd.Categorical.from_codes(codes_nt[:, rank], categories=labels)
                columns[f"predicted_{name}_{rank + 1}"] = next_n
                if rank or name in self.terms:
                    columns[f"predicted_{name}_{rank + 1}_probability"] = probability_nt[:, rank]
            if name in self.floors:
                columns |= _set_columns(name, merged[f"set:{name}"], codes_nt[:, 0] >= 0, labels)
            if self.options.ood:
                fitted = self.temperature(name, question)
                quantiles_q = fitted.novelty_quantiles if fitted else ()
                columns |= _ood_columns(f"ood_{name}_score", merged[f"novelty:{name}"], quantiles_q)
        if "genes" in merged:
            quantiles_q = self.calibration.gene_quantiles
            columns |= _ood_columns("ood_gene_log_likelihood", merged["genes"], quantiles_q, sign=-1)
        for question in self.audits:
            own_n = merged[f"audit:{question.asked[0]}"]
            columns[f"audit_{question.asked[0]}_probability"] = own_n
            ranks_n = pd.Series(own_n).rank(method="first").fillna(0)  # 1: the least probable; 0: no label
            columns[f"audit_{question.asked[0]}_rank"] = ranks_n.to_numpy(dtype=np.int32)
        if self.options.majority_by:
            columns |= self._majority_columns(merged)
        return {**columns, GENES_COLUMN: merged[GENES_COLUMN]}

    def _majority_columns(self, merged: Mapping[str, np.ndarray]) -> Columns:
        """Return the label that most cells of each cell's cluster get, its share, and clusters of the embedding."""
        columns: Columns = {}
        if self._clusters is None:
            cluster_n = clusters_of(merged["embedding"])
            names = [str(number) for number in range(cluster_n.max(initial=-1) + 1)]
            columns[CLUSTER_COLUMN] = pd.Categorical.from_codes(cluster_n, categories=names)
        else:
            is_missing_r = np.array([is_missing(text) for text in self._clusters.texts])
            cluster_n = np.where(is_missing_r[self._clusters.codes_n], -1, self._clusters.codes_n).astype(np.int64)
        for name in self.asked:
            labels = self.labels_of(name)
            label_n, share_n = majority(merged[f"code:{name}"][:, 0], cluster_n, num_labels=len(labels))
            columns[f"majority_{name}"] = pd.Categorical.from_codes(label_n, categories=labels)
            columns[f"majority_{name}_share"] = share_n.astype(np.float32)
        return columns

    def _coarse_columns(self, name: str, merged: Mapping[str, np.ndarray]) -> Columns:
        """Return the finest answer that is probable enough, its probability and its term id; `unknown` without one.

        Where it is `unknown`, the probability is that of the most probable label.
        """
        terms, code_n, is_answered_n = self.terms[name], merged[f"coarse:{name}"], merged[f"code:{name}"][:, 0] >= 0
        names_n = np.array([*terms.answers[0], UNKNOWN], dtype=object)[code_n]
        ids_n = np.array([*terms.answer_ids, ""], dtype=object)[code_n]
        names_n[~is_answered_n], ids_n[~is_answered_n | (ids_n == "")] = None, None
        labels = self.labels_of(name)
        others = sorted(set(names_n[is_answered_n]) - {*labels, UNKNOWN})
        is_coarse_n = is_answered_n & (code_n >= 0)
        probability_n = np.where(is_coarse_n, merged[f"coarse_probability:{name}"], merged[f"probability:{name}"][:, 0])
        return {
            f"predicted_{name}": pd.Categorical(names_n, categories=list(dict.fromkeys([*labels, *others, UNKNOWN]))),
            f"predicted_{name}_probability": probability_n,
            f"predicted_{name}{SUFFIX}": pd.Categorical(ids_n),
        }

    def matrices(self, merged: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the matrices of `obsm` that the answers become."""
        names = self.asked if self.options.probabilities else []
        return {matrix_key(name): merged[f"probabilities:{name}"] for name in names}

    def labels_of(self, name: str) -> list[str]:
        """Return the labels that an answer may be, in the order of the probabilities."""
        return self.run.class_labels if self.run.is_classifier else list(self.run.tokenizer.phenotypes[name])

    # -- reports --------------------------------------------------------------------------------------------------

    def facts(self, dataset: IterableAnnDataset) -> dict[str, Any]:
        """Return what was asked and how, for `uns["perturbgene"]`."""
        options = self.options
        facts: dict[str, Any] = {"ask": self.ask, "given": self.given, "joint": options.joint, "entropy_unit": "nats"}
        facts["calibration"] = self.describe_calibration()
        if dataset.where:
            facts["where"] = dataset.where
        if options.abstain:
            facts["abstain"] = options.abstain
        if options.coarse:
            facts["coarse"] = {name: terms.describe(name) for name, terms in self.terms.items()}
        if options.majority_by:
            facts["majority_by"] = options.majority_by
        if options.conformal is not None:
            facts["conformal"], facts["conformal_floors"] = options.conformal, self.floors
        if options.probabilities:
            facts |= {matrix_key(name): self.labels_of(name) for name in self.asked}
        if options.ood:
            facts["ood_percentile"] = "among the run's evaluation cells; high means unusual"
        unknown: dict[str, Counter[str]] = {}  # cells that are asked without a phenotype, by the label that obs has
        for index in range(len(dataset.shards)):
            for name in [name for name, label in self.given.items() if label is None]:
                column = dataset.shards[index].label_column(name)
                if counts := self.run.tokenizer.vocabulary.encode(name, column)[1]:
                    unknown.setdefault(name, Counter()).update(counts)
        if unknown:
            facts["unknown_labels_count_as_absent"] = json.dumps(unknown)
        return provenance(self.run, facts, coverage=dataset.coverage)

    def describe_calibration(self) -> dict[str, str]:
        """Say for each asked phenotype which temperature its probabilities were divided by."""
        if not self.is_calibrated:
            reason = "run `perturbgene evaluate` first" if self.options.calibrate else "turned off"
            return dict.fromkeys(self.asked, f"uncalibrated ({reason})")
        described = {}
        for name, question in self.question_of.items():
            fitted = self.temperature(name, question)
            described[name] = fitted.describe() if fitted else "uncalibrated (evaluate did not ask this phenotype)"
            if fitted and fitted.distance(question.asked, question.given):
                described[name] += "; the nearest question that was fitted"
        return described

    def summary(self, phenotype: str, columns: Columns, *, num_cells: int) -> str:
        """Say in one line what was predicted for a phenotype of so many cells."""
        answers = pd.Series(columns[f"predicted_{phenotype}"])
        probability_n = columns[f"predicted_{phenotype}_probability"]
        num_empty = num_cells - int(answers.notna().sum())
        counts = answers.value_counts()
        shown = [f"{label} {count:,}" for label, count in counts.head(5).items() if count]
        more = [f"{len(counts[counts > 0]) - 5} other labels"] if (counts > 0).sum() > 5 else []
        mean = np.nanmean(probability_n) if num_empty < num_cells else np.nan
        if phenotype in self.terms:
            num_coarse = int(answers.isin(set(answers.cat.categories) - {*self.labels_of(phenotype), UNKNOWN}).sum())
            more += [f"of these {num_coarse:,} with a coarser term ({self.terms[phenotype].describe(phenotype)})"]
        empty = f"; {num_empty:,} cells express no gene of the run and have no prediction" if num_empty else ""
        text = (
            f"predicted_{phenotype}: {', '.join([*shown, *more])}; mean probability {mean:.2f} "
            f"({self.describe_calibration()[phenotype]}){empty}"
        )
        if self.options.majority_by:
            text += f"\n{about_majority(phenotype, pd.DataFrame(columns))}"
        return text


def about_majority(phenotype: str, obs: pd.DataFrame) -> str:
    """Say how many cells get another label by majority than by themselves."""
    own = f"predicted_{phenotype}_1"
    answers, voted = obs[own if own in obs else f"predicted_{phenotype}"], obs[f"majority_{phenotype}"]
    num_voted = int(voted.notna().sum())
    num_changed = int((answers.astype(object) != voted.astype(object))[voted.notna()].sum())
    share = f" ({num_changed / num_voted:.1%})" if num_voted else ""
    return f"majority_{phenotype}: another label than the cell's own in {num_changed:,} of {num_voted:,} cells{share}"


def _labels_of(dataset: IterableAnnDataset, column: str) -> Labels:
    """Return the texts of a column of `obs`, of all cells of the file, also those that `where` leaves out."""
    try:
        source = dataset.shards[0].source
        return Labels.of((source.base if isinstance(source, ChosenCells) else source).obs_column(column))
    except InputError as error:
        raise InputError(f"{error} Change --majority_by, or pass `--majority_by {BY_EMBEDDING}`.") from error


def matrix_key(phenotype: str) -> str:
    """Return the name in `obsm` of a phenotype's probabilities; a slash would be a folder within HDF5."""
    return f"predicted_{phenotype.replace('/', '_')}_probabilities"


def _where(values_n: np.ndarray, is_valid_n: np.ndarray) -> np.ndarray:
    return np.where(is_valid_n, values_n, np.nan).astype(np.float32)


def _set_columns(name: str, is_in_nk: np.ndarray, is_answered_n: np.ndarray, labels: Sequence[str]) -> Columns:
    """Return each cell's set of labels as text, in the order of the run's labels, and its size; 0 without an answer."""
    is_in_nk = (is_in_nk == 1) & is_answered_n[:, None]
    packed_sb, set_n = np.unique(np.packbits(is_in_nk, axis=1), axis=0, return_inverse=True)
    is_in_sk = np.unpackbits(packed_sb, axis=1, count=len(labels)) == 1
    texts = [SEPARATOR.join(labels[label] for label in np.flatnonzero(is_in_k).tolist()) for is_in_k in is_in_sk]
    texts_n = np.array([text or None for text in texts], dtype=object)[set_n.ravel()]
    return {
        f"predicted_{name}_set": pd.Categorical(texts_n),
        f"predicted_{name}_set_size": is_in_nk.sum(axis=1, dtype=np.int32),
    }


def _ood_columns(name: str, values_n: np.ndarray, quantiles_q: Sequence[float], *, sign: int = 1) -> Columns:
    """Return a score and its percentile among held-out cells; the percentile is high for an unusual cell."""
    if not quantiles_q:
        return {name: values_n}
    ascending_q = quantiles_q if sign > 0 else [-value for value in reversed(quantiles_q)]
    return {name: values_n, f"{name}_percentile": percentile(sign * values_n, ascending_q).astype(np.float32)}


# -- the verb and its functions -----------------------------------------------------------------------------------


def predict_table(
    data: Any,
    run: str | Path | Run,
    *,
    ask: Sequence[str] = (),
    given: Given | None = None,
    options: AnswerOptions | None = None,
    batch_tokens: int = PredictConfig.batch_tokens,
    **reading: Any,
) -> pd.DataFrame:
    """Predict phenotypes of cells as a table.

    Args:
        data: Path or URL of an h5ad file, or an AnnData.
        run: Run folder, or a loaded run.
        ask: Phenotypes to predict; an empty list means all that are not given.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        options: Which columns to write for each prediction.
        batch_tokens: Most tokens in a batch.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage`, ... of `IterableAnnDataset`.

    Returns:
        For each asked phenotype X, a row per cell in the order of the input: `predicted_X` (category),
        `predicted_X_probability` (float32), `predicted_X_entropy` (nats), and for the next labels `predicted_X_2`,
        `predicted_X_2_probability`, ... A cell that expresses no gene of the panel has no prediction (missing), nor has
        one that `where` leaves out. The last column, `perturbgene_n_genes`, is the number of genes that the model saw,
        -1 for cells left out. `options` may add columns. `table.attrs` holds what `predict` writes to
        `uns["perturbgene"]`.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.predict_table("cells.h5ad", pg.load_run("runs/mlm"), ask=["cell_type"])
        >>> table.shape, list(table.columns[:3])
        ((255, 8), ['predicted_cell_type', 'predicted_cell_type_probability', 'predicted_cell_type_entropy'])
    """
    predictor = Predictor(load_run(run), ask, given, options or AnswerOptions())
    dataset = predictor.open(data, **reading)
    with answered(dataset, predictor.answer, text="predict", most_tokens=batch_tokens) as merged:
        table = pd.DataFrame(predictor.columns(merged))
    table.attrs = predictor.facts(dataset)
    return table


def predict(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    ask: Sequence[str] = (),
    given: Given | None = None,
    top_k: int = AnswerOptions.top_k,
    probabilities: bool = AnswerOptions.probabilities,
    joint: bool = AnswerOptions.joint,
    abstain: float = AnswerOptions.abstain,
    coarse: bool = AnswerOptions.coarse,
    conformal: float | None = AnswerOptions.conformal,
    ood: bool = AnswerOptions.ood,
    audit: bool = AnswerOptions.audit,
    majority_by: str | None = AnswerOptions.majority_by,
    calibrate: bool = AnswerOptions.calibrate,
    device: str = PredictConfig.device,
    batch_tokens: int = PredictConfig.batch_tokens,
    **reading: Any,
) -> "AnnData":
    """Return a copy of the cells with the answers in `obs` and where they came from in `uns["perturbgene"]`.

    `obsm["predicted_X_probabilities"]` holds the probabilities of all labels of phenotype X, float32 (n, k), and
    `uns["perturbgene"]["predicted_X_probabilities"]` the labels of its columns.

    Args:
        adata: Cells, in memory or backed, or the path or URL of an h5ad file; no label column is needed.
        model: Run folder, or a loaded run.
        ask, given, batch_tokens, reading: See `predict_table`.
        top_k, probabilities, joint, abstain, coarse, conformal, ood, audit, majority_by, calibrate: See `perturbgene
            predict -h`.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: The run cannot answer this question, or the cells cannot be read.

    Example:
        >>> import perturbgene as pg
        >>> cells = pg.predict("cells.h5ad", "runs/mlm", ask=["cell_type"])
        >>> cells.obs["predicted_cell_type"].head(3).tolist()
        ['monocyte', 'NK cell', 'B cell']
    """
    options = AnswerOptions(
        top_k=top_k, probabilities=probabilities, joint=joint, abstain=abstain, coarse=coarse, conformal=conformal,
        ood=ood, audit=audit, majority_by=majority_by, calibrate=calibrate,
    )  # fmt: skip
    predictor = Predictor(load_run(model, device=device), ask, given, options)
    cells = read_cells(adata)
    dataset = predictor.open(cells, **reading)
    with answered(dataset, predictor.answer, text="predict", most_tokens=batch_tokens) as merged:
        obs, obsm = predictor.columns(merged), predictor.matrices(merged)
        return with_results(cells, obs=obs, obsm=obsm, uns=predictor.facts(dataset))


def run_predict(config: PredictConfig) -> str | None:
    """Run the verb `predict`: copy the file and fill its `obs`, or keep one part of the answers.

    Of several processes, the first reports.
    """
    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (source, target):
        run = load_run(config.run, device=ranks.device(config.device))
        predictor = Predictor(run, config.ask, config.given_labels, config)
        dataset = predictor.open(FileList([source]), ranks=ranks, **reading_options(config))
        if config.piece:
            return write_piece(config, dataset, predictor.answer, run=run, source=source, ranks=ranks)
        if ranks.is_main:
            check_readable(source)  # before the work, since a copy of it will be written
        stored = stored_rows(config, run=run, source=source)
        options: dict[str, Any] = {"text": "predict", "most_tokens": config.batch_tokens, "stored": stored}
        with answered(dataset, predictor.answer, target=target, ranks=ranks, **options) as merged:
            if not ranks.is_main:
                return None
            obs, obsm = predictor.columns(merged), predictor.matrices(merged)
            write_copy(source, target, obs=obs, obsm=obsm, uns=predictor.facts(dataset), layer=config.layer)
        first = f"{dataset.num_cells:,} cells predicted by {config.run}, written to {target}"
        summaries = [predictor.summary(name, obs, num_cells=dataset.num_cells) for name in predictor.asked]
        return "\n".join([first, *summaries])
