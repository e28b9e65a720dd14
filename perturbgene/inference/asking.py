"""A question to a trained run, put to blocks of cells: which phenotypes, given which, and what is told of the answers.

Owns the rules of a question, how the cells are read for it, and the columns that answers become; leaves running the
model to `eval_utils`, temperatures to `calibration` and files to the verbs. Letters: n cells, k labels, t ranks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from perturbgene.configs import check_question
from perturbgene.data_utils.data_collators import collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import Question, class_logits, gene_log_likelihood, question_logits
from perturbgene.inference.calibration import Calibration, Temperature, energy, percentile, read_calibration
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import RowArray, has_genes

#: What stands in place of a label of which the model is not sure enough.
UNKNOWN = "unknown"

Columns = dict[str, Callable[[], Any]]


def question_of_classifier(run: Run, ask: Sequence[str], given: Sequence[str]) -> Question:
    """Return the one question that a classifier answers: its own phenotype, given what it was trained with.

    Raises:
        InputError: Something else is asked or given.
    """
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


def questions_of(run: Run, ask: Sequence[str], given: Sequence[str], *, joint: bool) -> list[Question]:
    """Return the questions to put: one for each asked phenotype, or with `joint` a single one for all.

    Raises:
        InputError: A phenotype is unknown, asked twice, or asked and given; or nothing is asked.
    """
    check_question(list(ask), list(given))
    if run.is_classifier:
        return [question_of_classifier(run, ask, given)]
    for category in [*ask, *given]:
        run.tokenizer.vocabulary.check_category(category)
    asked = tuple(ask) or tuple(name for name in run.tokenizer.included_phenotypes if name not in given)
    if not asked:
        raise InputError("nothing is asked: every phenotype of the run is given. Name one with --ask.")
    groups = [asked] if joint else [(name,) for name in asked]
    return [Question("asked", group, tuple(given)) for group in groups]


#: Phenotypes that are told: their labels, None for each cell's own in `obs`; names alone stand for the latter.
Given = Mapping[str, str | None] | Sequence[str]


def given_labels(given: Given | None) -> dict[str, str | None]:
    """Return given phenotypes with their labels; names alone stand for each cell's own label in `obs`.

    Example:
        >>> given_labels(["tissue"]), given_labels("tissue"), given_labels({"tissue": "lung"}), given_labels(None)
        ({'tissue': None}, {'tissue': None}, {'tissue': 'lung'}, {})
    """
    if isinstance(given, str):
        return {given: None}
    return dict(given) if isinstance(given, Mapping) else dict.fromkeys(given or ())


def constant_labels(tokenizer: GeneTokenizer, given: Mapping[str, str | None]) -> dict[str, int]:
    """Return the input id of each label that is said of all cells.

    Raises:
        InputError: A label is not in the vocabulary.
    """
    constants = {name: tokenizer.vocabulary.label_id(name, label) for name, label in given.items() if label is not None}
    for name, id_ in constants.items():
        if id_ == ABSENT:
            known = listed(tokenizer.phenotypes[name], most=12)
            raise InputError(f"{name}={given[name]} is not in the run's vocabulary. Choose one of: {known}.")
    return constants


@dataclass(frozen=True)
class AnswerOptions:
    """What is told of every answer.

    Args:
        top_k: How many labels with their probabilities; at least 1.
        joint: True asks all phenotypes in one sequence, so that one forward answers them; False asks each by itself, so
            that an answer does not depend on what else is asked.
        abstain: An answer less probable than this becomes `unknown`; 0 always answers.
        ood: Tell how strange the cell is: energy, and log-likelihood of hidden genes.
        ood_draws: How often genes are hidden for that.
        audit: Tell how probable the cell's own label is, given its genes and its other phenotypes.
        calibrate: Divide logits by the temperatures that `evaluate` fitted.
    """

    top_k: int = 3
    joint: bool = False
    abstain: float = 0.0
    ood: bool = False
    ood_draws: int = 1
    audit: bool = False
    calibrate: bool = True

    def __post_init__(self) -> None:
        for name, is_fine, range_ in (
            ("top_k", self.top_k >= 1, "at least 1"),
            ("abstain", 0 <= self.abstain <= 1, "a probability in 0..1"),
            ("ood_draws", self.ood_draws >= 1, "at least 1"),
        ):
            if not is_fine:
                raise InputError(f"{name} is {getattr(self, name)}, but must be {range_}. Change --{name}.")


class Predictor:
    """Puts one question to blocks of cells and turns the answers into columns.

    Args:
        run: A loaded run.
        ask: Phenotypes to predict; none named means all that are not given.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        options: What is told of the answers.

    Raises:
        InputError: The question cannot be put to this run.
    """

    def __init__(self, run: Run, ask: Sequence[str], given: Given | None, options: AnswerOptions) -> None:
        self.run, self.given, self.options = run, given_labels(given), options
        self.ask = [ask] if isinstance(ask, str) else list(ask)
        self.questions = questions_of(run, self.ask, list(self.given), joint=options.joint)
        self.asked = [name for question in self.questions for name in question.asked]
        self.constants = constant_labels(run.tokenizer, self.given)
        found = read_calibration(run.path) if options.calibrate else None
        self.is_calibrated, self.calibration = found is not None, found or Calibration()
        self.collate = collate_fn_wrapper(run.tokenizer, packed=True)
        self._own_ids_n: dict[str, np.ndarray] = {}

    # -- how the cells are read -----------------------------------------------------------------------------------

    @property
    def audits(self) -> list[Question]:
        """For each asked phenotype the question that its audit puts: given all others."""
        if not self.options.audit:
            return []
        if self.run.is_classifier:
            return self.questions
        known = [*self.run.tokenizer.included_phenotypes, *(name for name in self.given if name not in self.asked)]
        others = {name: tuple(dict.fromkeys(other for other in known if other != name)) for name in self.asked}
        return [Question("audit", (name,), others[name]) for name in self.asked]

    @cached_property
    def tokenizer(self) -> GeneTokenizer:
        """What the cells are read with: only labels that are used, and the genes of a long cell that `evaluate` keeps.

        Slots of phenotypes that are not read leave no room for more genes: otherwise the answer of a long cell would
        depend on which labels its file happens to have.
        """
        own = self.run.tokenizer
        if self.run.is_classifier:
            return own
        read = list(dict.fromkeys([*self.given, *(name for audit in self.audits for name in audit.given)]))
        most_slots = max(len(question.asked) + len(question.given) for question in self.questions)
        slots = max(len(own.included_phenotypes), most_slots)
        max_length = max(3 + len(read), own.max_length - slots + len(read))
        return own.with_settings(included=read, max_length=max_length)

    def open(self, data: Any, **reading: Any) -> IterableAnnDataset:
        """Open a file or an AnnData to be asked about.

        Raises:
            InputError: The column of a phenotype that is given from obs, or audited, is missing.
        """
        dataset = IterableAnnDataset(data, self.tokenizer, constant_labels=self.constants, **reading)
        for index in range(len(dataset.shards)):
            for name in [name for name, label in self.given.items() if label is None]:
                dataset.shards[index].source.obs_column(name)
        for audit in self.audits:
            self._own_ids_n[audit.asked[0]] = _own_labels(dataset, self.run, audit.asked[0])
        return dataset

    def unknown_labels(self, dataset: IterableAnnDataset) -> dict[str, dict[str, int]]:
        """Count the values of given columns that the vocabulary lacks and that therefore count as absent."""
        found: dict[str, dict[str, int]] = {}
        for index in range(len(dataset.shards)):
            for name in [name for name, label in self.given.items() if label is None]:
                column = dataset.shards[index].source.obs_column(name)
                for label, count in self.run.tokenizer.vocabulary.encode(name, column)[1].items():
                    found.setdefault(name, {})[label] = found.get(name, {}).get(label, 0) + count
        return found

    # -- the answers ----------------------------------------------------------------------------------------------

    def labels(self, phenotype: str) -> list[str]:
        """Return the labels that an answer may have, in vocabulary order."""
        return self.run.class_labels if self.run.is_classifier else list(self.run.tokenizer.phenotypes[phenotype])

    def _logits(self, block: TokenBlock, question: Question) -> dict[str, np.ndarray]:
        if self.run.is_classifier:
            return {question.asked[0]: class_logits(self.run.model, block, self.collate)}
        return question_logits(self.run.model, block, self.run.tokenizer, question)

    def temperature(self, phenotype: str, question: Question) -> Temperature | None:
        """Return what was fitted for this question or the nearest; None without calibration."""
        return self.calibration.nearest(phenotype, asked=question.asked, given=question.given)

    def _probabilities(self, logits_nk: np.ndarray, phenotype: str, question: Question) -> np.ndarray:
        fitted = self.temperature(phenotype, question)
        return softmax(logits_nk / np.float32(fitted.temperature if fitted else 1.0), axis=-1)

    def answer(self, block: TokenBlock) -> dict[str, np.ndarray]:
        """Answer one batch: named arrays with a row per cell, -1 and NaN for cells without genes."""
        is_answered_n = has_genes(block, self.run.tokenizer)
        answers: dict[str, np.ndarray] = {}
        for question in self.questions:
            for name, logits_nk in self._logits(block, question).items():
                probability_nk = self._probabilities(logits_nk, name, question)
                answers |= _told(name, probability_nk, is_answered_n, top_k=self.options.top_k)
                if self.options.ood:
                    answers[f"energy:{name}"] = _where(energy(logits_nk), is_answered_n)
        if self.options.ood and not self.run.is_classifier:
            draws = self.options.ood_draws
            answers["genes"] = gene_log_likelihood(self.run.model, block, self.tokenizer, num_draws=draws)
        for question in self.audits:
            answers |= self._audited(block, question, is_answered_n)
        return answers

    def _audited(self, block: TokenBlock, question: Question, is_answered_n: np.ndarray) -> dict[str, np.ndarray]:
        (name,) = question.asked
        probability_nk = self._probabilities(self._logits(block, question)[name], name, question)
        own_n = self._own_ids_n[name][block.cells_n]
        of_own_n = probability_nk[np.arange(len(block)), np.maximum(own_n, 0)]
        return {f"audit:{name}": _where(of_own_n, is_answered_n & (own_n >= 0))}

    # -- what is written ------------------------------------------------------------------------------------------

    def columns(self, merged: Mapping[str, RowArray]) -> Columns:
        """Return the columns of `obs` that the answers become, each made when its turn has come."""
        columns: Columns = {}
        for question in self.questions:
            for name in question.asked:
                columns |= self._columns_of(name, merged)
                if self.options.ood:
                    fitted = self.temperature(name, question)
                    columns |= _strangeness(
                        f"ood_{name}_energy", merged[f"energy:{name}"], fitted.energy_quantiles if fitted else ()
                    )
        if "genes" in merged:
            columns |= _strangeness(
                "ood_gene_log_likelihood", merged["genes"], self.calibration.gene_quantiles, sign=-1
            )
        for question in self.audits:
            own = merged[f"audit:{question.asked[0]}"]
            columns[f"audit_{question.asked[0]}_probability"] = partial(_all_of, own)
            columns[f"audit_{question.asked[0]}_rank"] = partial(_ranks, own)
        return columns

    def _columns_of(self, name: str, merged: Mapping[str, RowArray]) -> Columns:
        codes, probability, labels = merged[f"code:{name}"], merged[f"probability:{name}"], self.labels(name)
        abstain = self.options.abstain
        columns: Columns = {
            f"predicted_{name}": lambda: _chosen(codes[:][:, 0], probability[:][:, 0], labels, abstain=abstain),
            f"predicted_{name}_probability": lambda: probability[:][:, 0],
            f"predicted_{name}_entropy": lambda: merged[f"entropy:{name}"][:],
        }
        # The best label stands in `predicted_X` already, unless that may be `unknown`.
        for rank in range(0 if abstain else 1, codes.shape[1]):
            columns[f"predicted_{name}_{rank + 1}"] = partial(_label_of_rank, codes, labels, rank)
            if rank:
                columns[f"predicted_{name}_{rank + 1}_probability"] = partial(_all_of, probability, rank)
        return columns

    def facts(self, dataset: IterableAnnDataset) -> dict[str, Any]:
        """Say what was asked and how, for the provenance."""
        options = self.options
        told: dict[str, Any] = {"ask": self.ask, "given": self.given, "joint": options.joint, "entropy_unit": "nats"}
        told["calibration"] = self.describe_calibration()
        told |= {"abstain": options.abstain} if options.abstain else {}
        told |= {"ood_percentile": "of the run's evaluation cells; high is strange"} if options.ood else {}
        unknown = self.unknown_labels(dataset)
        return told | ({"unknown_labels_count_as_absent": json.dumps(unknown)} if unknown else {})

    def describe_calibration(self) -> dict[str, str]:
        """Say for each asked phenotype which temperature its probabilities were divided by."""
        if not self.is_calibrated:
            reason = "run `perturbgene evaluate` first" if self.options.calibrate else "not wanted"
            return dict.fromkeys(self.asked, f"uncalibrated ({reason})")
        described = {}
        for question in self.questions:
            for name in question.asked:
                fitted = self.temperature(name, question)
                is_exact = fitted is not None and not fitted.distance(question.asked, question.given)
                text = fitted.describe() if fitted else "uncalibrated (nothing was fitted for this phenotype)"
                described[name] = text + ("" if is_exact or not fitted else "; the nearest question that was fitted")
        return described


def _own_labels(dataset: IterableAnnDataset, run: Run, phenotype: str) -> np.ndarray:
    """Return the index of each cell's own label among those of the answer, int32 of shape (n,); -1 without one."""
    start, _ = run.tokenizer.vocabulary.id_range(phenotype)
    ids = []
    for index in range(len(dataset.shards)):
        dataset.shards[index].source.obs_column(phenotype)  # refuses a file without it
        ids.append(dataset.shards[index].label_ids(phenotype))
    ids_n = np.concatenate(ids)
    codes_n = np.where(ids_n == ABSENT, ABSENT, ids_n - start)
    if run.binary_label is None:
        return codes_n
    wanted = run.tokenizer.vocabulary.label_id(phenotype, run.binary_label)
    return np.where(ids_n == ABSENT, ABSENT, (ids_n == wanted).astype(np.int32))


def _all_of(array: RowArray, column: int | None = None) -> np.ndarray:
    """Return all rows of an array, or of one of its columns."""
    return array[:] if column is None else array[:][:, column]


def _label_of_rank(codes: RowArray, labels: list[str], rank: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes[:][:, rank], categories=labels)


def _where(values_n: np.ndarray, is_valid_n: np.ndarray) -> np.ndarray:
    return np.where(is_valid_n, values_n, np.nan).astype(np.float32)


def _told(name: str, probability_nk: np.ndarray, is_answered_n: np.ndarray, *, top_k: int) -> dict[str, np.ndarray]:
    """Return the best labels, their probabilities (n, t) and the entropy (n,) in nats."""
    order_nt = np.argsort(-probability_nk, axis=1, kind="stable")[:, : min(top_k, probability_nk.shape[1])]
    best_nt = np.take_along_axis(probability_nk, order_nt, axis=1)
    entropy_n = -(probability_nk * np.log(np.maximum(probability_nk, 1e-30))).sum(axis=1)
    return {
        f"code:{name}": np.where(is_answered_n[:, None], order_nt, -1).astype(np.int32),
        f"probability:{name}": _where(best_nt, is_answered_n[:, None]),
        f"entropy:{name}": _where(np.abs(entropy_n), is_answered_n),
    }


def _chosen(codes_n: np.ndarray, probability_n: np.ndarray, labels: list[str], *, abstain: float) -> pd.Categorical:
    """Return each cell's label, or `unknown` where its probability lies below `abstain`."""
    if not abstain:
        return pd.Categorical.from_codes(codes_n, categories=labels)
    categories = labels if UNKNOWN in labels else [*labels, UNKNOWN]
    is_unsure_n = (probability_n < abstain) & (codes_n >= 0)
    return pd.Categorical.from_codes(np.where(is_unsure_n, categories.index(UNKNOWN), codes_n), categories=categories)


def _strangeness(name: str, values: RowArray, quantiles_q: Sequence[float], *, sign: int = 1) -> Columns:
    """Return a score and its percentile among held-out cells; the percentile is high for a strange cell."""
    columns: Columns = {name: lambda: values[:]}
    if quantiles_q:
        ascending_q = quantiles_q if sign > 0 else [-value for value in reversed(quantiles_q)]
        columns[f"{name}_percentile"] = lambda: percentile(sign * values[:], ascending_q).astype(np.float32)
    return columns


def _ranks(probability: RowArray) -> np.ndarray:
    """Rank cells by the probability of their own label: 1 for the least probable, 0 for cells without a label."""
    probability_n = probability[:]
    ranks_n, is_known_n = np.zeros(len(probability_n), dtype=np.int32), ~np.isnan(probability_n)
    order = np.argsort(probability_n[is_known_n], kind="stable")
    ranks_n[np.flatnonzero(is_known_n)[order]] = np.arange(1, len(order) + 1)
    return ranks_n
