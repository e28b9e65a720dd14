"""Scores of a model on a stream of cells: the questions, the counts of answers, the scores and their files.

Owns asking a model and counting its answers batch by batch, without holding logits; leaves the choice of cells to its
callers and figures to `plots`. Letters: n cells, m labelled tokens, v input ids, k classes.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.metrics import precision_recall_fscore_support

from perturbgene.data_utils.data_collators import (
    Batch,
    Collator,
    DataCollatorForPhenotypicMLM,
    Example,
    ask,
    block_of,
    collate_fn_wrapper,
)
from perturbgene.data_utils.kernels import GOLDEN, MIX_1
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.files import whole_file, write_json
from perturbgene.heap import return_if_grown
from perturbgene.plots import confusion_figure, save_figure

logger = logging.getLogger(__name__)

#: The confusion of masked genes, among those of phenotypes.
GENE_BINS = "gene_bins"
#: Scores, in a run and in the output of an evaluation.
METRICS_FILE = "metrics.json"
#: Begins the names of questions in which some other phenotypes are given: "given+sex+tissue".
GIVEN = "given"
#: With more phenotypes, `evaluate` does not give every set of them.
MOST_FOR_ALL_SETS = 4

IntArray = NDArray[np.int64]
Scores = dict[str, float]


# -- asking a model -----------------------------------------------------------------------------------------------


def model_device(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    return next(model.parameters()).device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; host-side entries stay."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextmanager
def inference_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a batch; holes that batches leave in the heap do not add up."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
        return_if_grown()


@dataclass(frozen=True)
class Question:
    """Which phenotypes are asked together, and which are given."""

    name: str  # in reports: "alone", "given_others", "given+sex", "together", "asked" or "classifier"
    asked: tuple[str, ...]
    given: tuple[str, ...] = ()
    stride: int = 1  # an evaluator asks it about every so many cells

    def describe(self) -> str:
        """Say in words what is asked."""
        return " with ".join(self.asked) + (f" given {', '.join(self.given)}" if self.given else "")


def standard_questions(categories: Sequence[str]) -> list[Question]:
    """Return the questions of an evaluation: each phenotype with nothing given, with all others given; all at once.

    Example:
        >>> [(question.name, question.asked, question.given) for question in standard_questions(["age", "sex"])]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('alone', ('age',), ()), ('given_others', ('age',), ('sex',)), ('alone', ('sex',), ()),
         ('given_others', ('sex',), ('age',)), ('together', ('age', 'sex'), ())]
    """
    if len(categories) < 2:
        return [Question("alone", (category,)) for category in categories]
    questions = []
    for category in categories:
        others = tuple(other for other in categories if other != category)
        questions += [Question("alone", (category,)), Question("given_others", (category,), others)]
    return [*questions, Question("together", tuple(categories))]


def further_questions(asked: Sequence[str], known: Sequence[str], *, stride: int = 1) -> list[Question]:
    """Return what `standard_questions` leaves out: each asked phenotype given some of the others, but not all.

    Args:
        asked: The phenotypes to ask for.
        known: All phenotypes with labels. Of up to `MOST_FOR_ALL_SETS` every set is given, of more each single one.
        stride: Of the questions.

    Example:
        >>> [question.describe() for question in further_questions(["age"], ["age", "sex", "tissue"])]
        ['age given sex', 'age given tissue']
    """
    questions = []
    for category in asked:
        others = [name for name in known if name != category]
        sizes = range(1, len(others) if len(known) <= MOST_FOR_ALL_SETS else 2)
        for given in chain.from_iterable(combinations(others, size) for size in sizes):
            questions.append(Question("+".join([GIVEN, *given]), (category,), given, stride))
    return questions


def question_logits(
    model: torch.nn.Module, block: TokenBlock, tokenizer: GeneTokenizer, question: Question
) -> dict[str, np.ndarray]:
    """Ask an MLM model one question about every cell: for each phenotype the logits of its labels, float32 (n, k)."""
    batch = to_device(ask(block, tokenizer, asked=question.asked, given=question.given), model_device(model))
    with inference_mode(model):
        logits = model(**batch).logits.float().view(len(block), len(question.asked), -1)  # (n, a, v)
    ranges = {category: slice(*tokenizer.vocabulary.id_range(category)) for category in question.asked}
    return {category: logits[:, index, ids].cpu().numpy() for index, (category, ids) in enumerate(ranges.items())}


def class_logits(model: torch.nn.Module, block: TokenBlock, collate: Collator) -> np.ndarray:
    """Ask a classifier about every cell: logits of its classes, float32 of shape (n, k)."""
    batch = to_device(collate.collate_block(replace(block, labels_n=None)), model_device(model))
    with inference_mode(model):
        return model(**batch).logits.float().cpu().numpy()


def hidden_at(model: Any, batch: Batch, positions_m: np.ndarray) -> np.ndarray:
    """Run a model's encoder on a packed batch; return its final states at ascending flat positions, float32 (m, h)."""
    if not len(positions_m):
        return np.zeros((0, model.config.hidden_size), dtype=np.float32)
    reads = {"read_positions": torch.from_numpy(positions_m.astype(np.int64))}
    with inference_mode(model):
        encoded = model.genebert(**to_device({**batch, **reads}, model_device(model)))
    return encoded.last_hidden_state.float().cpu().numpy()


def gene_log_likelihood(
    model: torch.nn.Module, block: TokenBlock, tokenizer: GeneTokenizer, *, mask_rates: Mapping[str, float]
) -> np.ndarray:
    """Return how well an MLM model predicts each cell's masked genes from the rest, with no phenotype in the sequence.

    Genes are masked at the run's own rates. Which ones depends on the cell's genes and bins, not on its row, so a cell
    scores alike in any file.

    Args:
        mask_rates: `gene_mask_prob` and `unexpressed_ratio` of the run's training, by these names.

    Returns:
        Mean log-probability of the true bins, in nats, float32 of shape (n,); NaN for cells without masked genes.
    """
    rates = {**mask_rates, "phenotype_mask_prob": 0.0, "absent_prob": 1.0}
    collator = DataCollatorForPhenotypicMLM(tokenizer, packed=True, **rates)  # type: ignore[arg-type]
    block = replace(block, cells_n=content_hash(block, tokenizer), epochs_n=None)
    batch = to_device(collator.collate_block(block), model_device(model))
    labels_m = batch.pop("labels")
    with inference_mode(model):
        losses_m = torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels_m, reduction="none")
    cell_m = np.searchsorted(batch["cu_seqlens"].cpu().numpy(), batch["label_positions"].cpu().numpy(), "right") - 1
    sums_n = np.bincount(cell_m, weights=losses_m.double().cpu().numpy(), minlength=len(block))
    counts_n = np.bincount(cell_m, minlength=len(block))
    return np.divide(-sums_n, counts_n, out=np.full(len(block), np.nan), where=counts_n > 0).astype(np.float32)


def content_hash(block: TokenBlock, tokenizer: GeneTokenizer, *, is_counted_g: np.ndarray | None = None) -> np.ndarray:
    """Return a number that depends on a cell's genes (all, or those counted) and bins alone, int64 >= 0, shape (n,)."""
    types_l, gene_l = block.token_type_ids_l.astype(np.uint64), block.token_type_ids_l.astype(np.int64)
    gene_l -= tokenizer.first_gene_type
    is_gene_l = (gene_l >= 0) if is_counted_g is None else (gene_l >= 0) & is_counted_g[np.maximum(gene_l, 0)]
    pair_l = types_l * GOLDEN + block.input_ids_l.astype(np.uint64) + np.uint64(1)
    pair_l = (pair_l ^ (pair_l >> np.uint64(31))) * MIX_1
    sums_l1 = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(np.where(is_gene_l, pair_l, np.uint64(0)))])
    return ((sums_l1[block.offsets_n1[1:]] - sums_l1[block.offsets_n1[:-1]]) >> np.uint64(1)).astype(np.int64)


def true_labels(block: TokenBlock, tokenizer: GeneTokenizer, category: str) -> np.ndarray:
    """Return the index of each cell's label, read off its own token, int64 of shape (n,); -1 where it has none."""
    token_type, (start, _) = tokenizer.vocabulary.token_type(category), tokenizer.vocabulary.id_range(category)
    cells_l = np.repeat(np.arange(len(block)), np.diff(block.offsets_n1))
    is_label_l = block.token_type_ids_l == token_type
    labels_n = np.full(len(block), ABSENT, dtype=np.int64)
    labels_n[cells_l[is_label_l]] = block.input_ids_l[is_label_l].astype(np.int64) - start
    return labels_n


# -- counting answers ---------------------------------------------------------------------------------------------


class Confusion:
    """Counts of (true, predicted) pairs, filled batch by batch so that no logits need to be held.

    Attributes:
        labels: Name of each class, k in all.
        counts_kk: True classes as rows, shape (k, k).

    Example:
        >>> confusion = Confusion(["B", "NK", "T"])
        >>> confusion.add([0, 0, 1, -1], [0, 2, 1, 0])
        >>> confusion.counts_kk.tolist()
        [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels: tuple[str, ...] = tuple(labels)
        self.counts_kk: IntArray = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)

    def add(self, true_n: ArrayLike, predicted_n: ArrayLike) -> None:
        """Count true and predicted classes (0..k-1) of more cells; those with a negative true class are left out."""
        assert np.shape(true_n) == np.shape(predicted_n), "as many predictions as true labels"
        pairs_2n = np.array([true_n, predicted_n], dtype=np.int64).reshape(2, -1)
        pairs_2n = pairs_2n[:, pairs_2n[0] >= 0]
        # Checked because a negative class would be counted, silently, from the end.
        assert (pairs_2n >= 0).all() and (pairs_2n < len(self.labels)).all(), "a class number is not in 0..k-1"
        np.add.at(self.counts_kk, tuple(pairs_2n), 1)

    def scores(self) -> Scores:
        """Return `n`, `accuracy`, `macro_precision`, `macro_recall`, `macro_f1`, `balanced_accuracy`, `majority_share`.

        The macro scores are plain means over the classes that occur among the true or the predicted labels
        (scikit-learn's default); macro F1 is the mean of per-class F1. Balanced accuracy is the mean recall over
        classes with true cells, and the majority share the share of the most frequent true class: the accuracy of
        always answering it. All but `n` are NaN when no cell was counted.

        Example:
            >>> confusion = Confusion(["B", "T"])
            >>> confusion.counts_kk[:] = [[3, 1], [0, 4]]
            >>> {name: round(value, 3) for name, value in confusion.scores().items()}
            ... # doctest: +NORMALIZE_WHITESPACE
            {'n': 8, 'accuracy': 0.875, 'macro_precision': 0.9, 'macro_recall': 0.875, 'macro_f1': 0.873,
             'balanced_accuracy': 0.875, 'majority_share': 0.5}
        """
        num_cells = int(self.counts_kk.sum())
        if not num_cells:
            names = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "balanced_accuracy", "majority_share")
            return {"n": 0, **dict.fromkeys(names, float("nan"))}
        of_class = {name: values.to_numpy() for name, values in self.per_class().items()}
        occurs_k = (self.counts_kk.sum(axis=0) + self.counts_kk.sum(axis=1)) > 0
        macro = {f"macro_{name}": float(of_class[name][occurs_k].mean()) for name in ("precision", "recall", "f1")}
        balanced = float(of_class["recall"][of_class["n"] > 0].mean())
        accuracy, share = (float(count / num_cells) for count in (np.trace(self.counts_kk), of_class["n"].max()))
        return {"n": num_cells, "accuracy": accuracy, **macro, "balanced_accuracy": balanced, "majority_share": share}

    def table(self) -> pd.DataFrame:
        """Return the counts with the true classes as named rows and the predicted ones as columns, shape (k, k)."""
        names = list(self.labels)
        return pd.DataFrame(self.counts_kk, pd.Index(names, name="true"), pd.Index(names, name="predicted"))

    def per_class(self) -> pd.DataFrame:
        """Return precision, recall, F1 (0 where undefined) and the number of true cells, one row per label."""
        true_c, predicted_c = np.nonzero(self.counts_kk)  # every pair of classes once, weighted by its count
        scores_4k: Iterable[np.ndarray] = np.zeros((4, len(self.labels)))
        if len(true_c):
            times_c = self.counts_kk[true_c, predicted_c].astype(np.float64)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # scikit-learn < 1.8: "many classes"
                scores_4k = precision_recall_fscore_support(
                    true_c, predicted_c, labels=range(len(self.labels)), sample_weight=times_c, zero_division=0
                )
        table = pd.DataFrame(dict(zip(("precision", "recall", "f1", "n"), scores_4k, strict=True)))
        return table.astype({"n": np.int64}).set_index(pd.Index(self.labels, name="label"))


@dataclass
class Tally:
    """Running counts of the answers to one question, and the sum of their losses (nats)."""

    confusion: Confusion
    loss_sum: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, probability_nk: np.ndarray, true_n: np.ndarray) -> None:
        """Count the cells whose label is known; the loss is the negative log-probability of it."""
        self.confusion.add(true_n, probability_nk.argmax(axis=1))
        known = np.flatnonzero(true_n >= 0)
        self.loss_sum -= float(np.log(np.maximum(probability_nk[known, true_n[known]], 1e-12)).sum())

    def scores(self, loss_name: str = "log_loss") -> Scores:
        """Return the scores, and the mean loss under its name."""
        scores = self.confusion.scores()
        return {**scores, loss_name: float(self.loss_sum[0]) / scores["n"] if scores["n"] else float("nan")}


class LogitCollector:
    """Keeps the logits and true labels (-1: none) of every `stride`-th cell that an evaluator sees."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self._batches: dict[tuple[str, Question], list[tuple[np.ndarray, ...]]] = {}

    def add(self, category: str, question: Question, block: TokenBlock, logits_nk: np.ndarray, true_n: Any) -> None:
        """Keep the chosen cells of a batch."""
        rows = np.flatnonzero(block.cells_n % self.stride == 0)
        batch = (block.cells_n[rows], logits_nk[rows], np.asarray(true_n)[rows])
        self._batches.setdefault((category, question), []).append(batch)

    def joined(self) -> Iterator[tuple[str, Question, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield phenotype, question, and the cells' numbers (ascending), logits (n, k) and true labels."""
        for (category, question), batches in self._batches.items():
            cells_n, logits_nk, true_n = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            order = np.argsort(cells_n, kind="stable")
            yield category, question, cells_n[order], logits_nk[order], true_n[order]


class AnswerCollector:
    """Keeps the answered class and the true class (-1: none) of every cell that an evaluator sees."""

    def __init__(self) -> None:
        self._batches: dict[tuple[str, str], list[tuple[np.ndarray, ...]]] = {}

    def add(self, category: str, question: Question, block: TokenBlock, logits_nk: np.ndarray, true_n: Any) -> None:
        """Keep the answers of a batch."""
        batch = (block.cells_n, np.asarray(true_n), logits_nk.argmax(axis=1))
        self._batches.setdefault((category, question.name), []).append(batch)

    def joined(self, category: str, question: str) -> tuple[IntArray, IntArray, IntArray]:
        """Return the cells' numbers, true classes and answers, each of shape (n,)."""
        cells_n, true_n, predicted_n = zip(*self._batches[category, question], strict=True)
        return np.concatenate(cells_n), np.concatenate(true_n), np.concatenate(predicted_n)


class Evaluator:
    """Scores a model batch by batch; a subclass asks the model. `labels` of a phenotype are the possible answers."""

    def __init__(self, questions: Sequence[Question], labels: Mapping[str, Sequence[str]]) -> None:
        self.questions, self.labels = list(questions), labels
        self.collectors: list[LogitCollector | AnswerCollector] = []
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.tallies = {
            (category, question.name): Tally(Confusion(self.labels[category]))
            for question in self.questions
            for category in question.asked
        }
        self._num_cells = np.zeros(1, dtype=np.int64)

    @property
    def num_cells(self) -> int:
        """Cells scored so far."""
        return int(self._num_cells[0])

    def add(self, model: torch.nn.Module, cells: Sequence[Example] | TokenBlock) -> None:
        """Score one batch of unmasked cells."""
        block = cells if isinstance(cells, TokenBlock) else block_of(cells)
        self._num_cells += len(block)
        self._score(model, block)

    def _score(self, model: torch.nn.Module, block: TokenBlock) -> None:
        raise NotImplementedError

    def _count(
        self, category: str, question: Question, block: TokenBlock, logits_nk: np.ndarray, true_n: np.ndarray
    ) -> None:
        self.tallies[category, question.name].add(softmax(logits_nk, axis=-1), true_n)
        for collector in self.collectors:
            collector.add(category, question, block, logits_nk, true_n)

    def sums(self) -> list[np.ndarray]:
        """Return the arrays that count; they add up over ranks."""
        tallies = [(tally.confusion.counts_kk, tally.loss_sum) for tally in self.tallies.values()]
        return [*chain.from_iterable(tallies), self._num_cells]

    def set_sums(self, sums: Sequence[np.ndarray]) -> None:
        """Replace this rank's sums by sums over all ranks."""
        for own, total in zip(self.sums(), sums, strict=True):
            own[...] = total.round() if own.dtype == np.int64 else total

    def results(self) -> dict[str, Any]:
        """Return phenotype -> question -> scores."""
        results: dict[str, Any] = {}
        for (category, name), tally in self.tallies.items():
            results.setdefault(category, {})[name] = tally.scores()
        return results

    def confusions(self) -> dict[str, Confusion]:
        """Return one confusion for each phenotype and question, by name."""
        return {f"{category}.{name}": tally.confusion for (category, name), tally in self.tallies.items()}

    def flat_metrics(self, *, loss_weights: tuple[float, float]) -> dict[str, float]:
        """Return metrics by plain names, as a trainer logs them."""
        raise NotImplementedError


class MlmEvaluator(Evaluator):
    """Scores an MLM model: masked tokens as in training, and phenotypes under each question.

    Masks are those of the training collator at epoch 0; without a collator, masked tokens are not scored.
    """

    def __init__(
        self, tokenizer: GeneTokenizer, *, collator: DataCollatorForPhenotypicMLM | None, questions: Sequence[Question]
    ) -> None:
        self.tokenizer, self.collator = tokenizer, collator
        super().__init__(questions, tokenizer.phenotypes)

    def reset(self) -> None:
        """Set all counts to zero."""
        super().reset()
        self.genes = Tally(Confusion([f"bin_{b}" for b in range(self.tokenizer.bin_edges.num_edges + 1)]))
        self._masked_phenotypes = np.zeros(2)  # sum of losses, and number of tokens

    def _score(self, model: torch.nn.Module, block: TokenBlock) -> None:
        parts = {1: block}
        for question in self.questions:
            if (part := parts.get(question.stride)) is None:
                part = block.take(np.flatnonzero(block.cells_n % question.stride == 0))
                parts[question.stride] = part
            for category, logits_nk in question_logits(model, part, self.tokenizer, question).items() if part else ():
                self._count(category, question, part, logits_nk, true_labels(part, self.tokenizer, category))
        if self.collator is not None:
            batch = to_device(self.collator.collate_block(block), model_device(model))
            labels_m = batch.pop("labels")
            with inference_mode(model):
                self.add_masked(model(**batch).logits, labels_m)

    def add_masked(self, logits_mv: torch.Tensor, labels_m: torch.Tensor) -> None:
        """Count the masked tokens of one batch: their losses, and which bins are predicted for genes."""
        losses_m = torch.nn.functional.cross_entropy(logits_mv.float(), labels_m, reduction="none").double()
        first_bin_id = self.tokenizer.first_bin_id
        is_gene_m = labels_m >= first_bin_id
        predicted_m = logits_mv[is_gene_m, first_bin_id:].argmax(dim=-1)
        self.genes.confusion.add((labels_m[is_gene_m] - first_bin_id).cpu().numpy(), predicted_m.cpu().numpy())
        self.genes.loss_sum += float(losses_m[is_gene_m].sum())
        self._masked_phenotypes += (float(losses_m[~is_gene_m].sum()), int((~is_gene_m).sum()))

    def sums(self) -> list[np.ndarray]:
        """Return the arrays that count, those of masked tokens first."""
        return [self.genes.confusion.counts_kk, self.genes.loss_sum, self._masked_phenotypes, *super().sums()]

    def results(self) -> dict[str, Any]:
        """Return phenotype -> question -> scores, and `genes` -> scores of masked genes' bins."""
        genes = {} if self.collator is None else {"genes": {"masked": self.genes.scores("loss")}}
        return super().results() | genes

    def confusions(self) -> dict[str, Confusion]:
        """Return one confusion for each phenotype and question, and one of gene bins, by name."""
        return super().confusions() | ({} if self.collator is None else {GENE_BINS: self.genes.confusion})

    def flat_metrics(self, *, loss_weights: tuple[float, float]) -> dict[str, float]:
        """Return metrics by plain names, as a trainer logs them: `loss`, `loss_genes`, `cell_type_accuracy`, ..."""
        flat: dict[str, float] = {}
        if self.collator is not None:
            genes, (loss, num_tokens) = self.genes.scores("loss"), self._masked_phenotypes.tolist()
            flat["loss_phenotypes"] = loss / max(num_tokens, 1)
            flat["loss_genes"] = genes["loss"] if genes["n"] else 0.0
            flat["loss"] = loss_weights[0] * flat["loss_phenotypes"] + loss_weights[1] * flat["loss_genes"]
            flat["gene_accuracy"] = genes["accuracy"]
        for (category, name), tally in self.tallies.items():
            if name == "alone":
                scores = tally.scores()
                flat |= {f"{category}_{key}": scores[key] for key in ("accuracy", "macro_f1", "log_loss")}
        return flat


class ClassEvaluator(Evaluator):
    """Scores a classifier of a phenotype on labeled cells; `labels` are the names of its classes."""

    def __init__(self, labels: Sequence[str], *, tokenizer: GeneTokenizer, category: str) -> None:
        self.collate = collate_fn_wrapper(tokenizer, packed=True)
        question = Question("classifier", (category,), tokenizer.included_phenotypes)
        super().__init__([question], {category: tuple(labels)})

    def _score(self, model: torch.nn.Module, block: TokenBlock) -> None:
        assert block.labels_n is not None, "a classifier is scored on labeled cells"
        [question] = self.questions
        logits_nk = class_logits(model, block, self.collate)
        self._count(question.asked[0], question, block, logits_nk, block.labels_n)

    def flat_metrics(self, *, loss_weights: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
        """Return metrics by plain names, as a trainer logs them: `loss`, `accuracy`, `macro_f1`, ..."""
        [tally] = self.tallies.values()
        scores = tally.scores()
        fixed = ("n", "majority_share", "log_loss")  # of the cells, not of the model; the loss has its own name
        return {**{key: scores[key] for key in scores if key not in fixed}, "loss": scores["log_loss"]}


def run_evaluator(
    evaluator: Evaluator, model: torch.nn.Module, batches: Iterable[Sequence[Example] | TokenBlock]
) -> Evaluator:
    """Score all batches of cells from zero; raise an InputError when there is none."""
    evaluator.reset()
    for cells in batches:
        evaluator.add(model, cells)
    if evaluator.num_cells == 0:
        raise InputError("there is no cell to evaluate on. Give an evaluation split with labeled cells.")
    return evaluator


# -- files --------------------------------------------------------------------------------------------------------


def without_nan(value: Any) -> Any:
    """Replace NaN, the score of no cell, by None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_results(
    results: Mapping[str, Any],
    confusions: Mapping[str, Confusion],
    folder: Path,
    *,
    text: str,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Write each confusion by name as CSV and PNG with its per-class scores, and at last `metrics.json`.

    Args:
        text: What was scored on which cells; becomes part of each title.
        tables: Further CSV files by name.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for title, confusion in confusions.items():
            name = title.replace("/", "_")  # a phenotype may be named "cell/type"
            for kind, table in (("confusion", confusion.table()), ("per_class", confusion.per_class())):
                with whole_file(folder / f"{kind}.{name}.csv") as temporary:
                    table.to_csv(temporary)
            unit = "masked genes" if title == GENE_BINS else "cells"
            figure = confusion_figure(confusion.table(), title=f"{title.replace('.', ', ')} ({text})", unit=unit)
            save_figure(figure, folder / f"confusion.{name}.png")
        for file, table in (tables or {}).items():
            with whole_file(folder / file) as temporary:
                table.to_csv(temporary, index=False)
        write_json(folder / METRICS_FILE, without_nan(results), indent=1)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}). Choose another --output.") from error
