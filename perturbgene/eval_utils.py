"""Scores of a model on a stream of cells: which questions are put, what is counted, how it is written down.

Owns asking a model and counting its answers batch by batch, without holding logits; leaves the arithmetic of scores to
`metrics` and pictures to `plots`. Letters: n cells, m labelled tokens, v input ids, k classes.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perturbgene.data_utils.data_collators import (
    Batch,
    Collator,
    DataCollatorForPhenotypicMLM,
    Example,
    ask,
    block_of,
    collate_fn_wrapper,
)
from perturbgene.data_utils.iterable_ann_dataset import Cell
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.metrics import Confusion, Scores, confusion_table, per_class_scores
from perturbgene.plots import confusion_figure, save_figure

logger = logging.getLogger(__name__)

#: A batch of unmasked cells: one by one, as a loader joins them, or as a block.
Cells = Sequence[Cell] | TokenBlock


def model_device(model: torch.nn.Module) -> torch.device:
    """Return where the model's weights lie."""
    return next(model.parameters()).device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; host-side entries stay."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextmanager
def inference_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Question:
    """Which phenotypes are asked together, and which are given.

    Args:
        name: How the question is called in reports: "alone", "given_others", "together" or "asked".
    """

    name: str
    asked: tuple[str, ...]
    given: tuple[str, ...] = ()


def standard_questions(categories: Sequence[str]) -> list[Question]:
    """Return the questions every evaluation puts.

    Each phenotype alone with nothing given; each with all others given; all at once.

    Example:
        >>> [(question.name, question.asked, question.given) for question in standard_questions(["age", "sex"])]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('alone', ('age',), ()), ('given_others', ('age',), ('sex',)), ('alone', ('sex',), ()),
         ('given_others', ('sex',), ('age',)), ('together', ('age', 'sex'), ())]
    """
    questions = []
    for category in categories:
        others = tuple(other for other in categories if other != category)
        questions.append(Question("alone", (category,)))
        if others:
            questions.append(Question("given_others", (category,), others))
    return [*questions, Question("together", tuple(categories))] if len(categories) > 1 else questions


def question_logits(
    model: torch.nn.Module, block: TokenBlock, tokenizer: GeneTokenizer, question: Question
) -> dict[str, np.ndarray]:
    """Ask an MLM model one question about every cell.

    Returns:
        For each asked phenotype the logits of its labels alone, float32 of shape (n, k).
    """
    batch = to_device(ask(block, tokenizer, asked=question.asked, given=question.given), model_device(model))
    with inference_mode(model):
        logits = model(**batch).logits.float().view(len(block), len(question.asked), -1)  # (n, a, v)
    ranges = {category: slice(*tokenizer.vocabulary.id_range(category)) for category in question.asked}
    return {category: logits[:, index, ids].cpu().numpy() for index, (category, ids) in enumerate(ranges.items())}


def answer(
    model: torch.nn.Module, block: TokenBlock, tokenizer: GeneTokenizer, question: Question
) -> dict[str, np.ndarray]:
    """Ask an MLM model one question about every cell.

    Returns:
        For each asked phenotype the probability of its labels, float32 of shape (n, k): a softmax over that phenotype's
        labels only.
    """
    return {name: softmax(logits_nk) for name, logits_nk in question_logits(model, block, tokenizer, question).items()}


def softmax(logits_nk: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities, (n, k)."""
    return torch.softmax(torch.from_numpy(logits_nk), dim=-1).numpy()


def class_logits(model: torch.nn.Module, block: TokenBlock, collate: Collator) -> np.ndarray:
    """Ask a classifier about every cell: logits of its classes, float32 of shape (n, k)."""
    batch = to_device(collate.collate_block(replace(block, labels_n=None)), model_device(model))
    with inference_mode(model):
        return model(**batch).logits.float().cpu().numpy()


def gene_log_likelihood(
    model: torch.nn.Module, block: TokenBlock, tokenizer: GeneTokenizer, *, num_draws: int = 1
) -> np.ndarray:
    """Return how well an MLM model tells each cell's hidden genes from the rest, with no phenotype in sight.

    As in training, 15 % of the expressed genes are hidden, joined by half as many that are not expressed. Which ones
    depends on the cell's own genes and bins, not on its row, so a cell scores alike in any file.

    Args:
        num_draws: How many times other genes are hidden; more steady the score.

    Returns:
        Mean log-probability of the true bins, in nats, float32 of shape (n,); NaN for cells without genes.
    """
    block = replace(block, cells_n=_content_hash(block, tokenizer), epochs_n=None)
    sums_n, counts_n = np.zeros(len(block)), np.zeros(len(block))
    for draw in range(num_draws):
        collator = DataCollatorForPhenotypicMLM(
            tokenizer, packed=True, gene_mask_prob=0.15, phenotype_mask_prob=0, absent_prob=1, seed=draw
        )
        batch = to_device(collator.collate_block(block), model_device(model))
        labels_m = batch.pop("labels")
        with inference_mode(model):
            losses_m = torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels_m, reduction="none")
        cells_m = np.searchsorted(batch["cu_seqlens"].cpu().numpy(), batch["label_positions"].cpu().numpy(), "right")
        sums_n -= np.bincount(cells_m - 1, weights=losses_m.double().cpu().numpy(), minlength=len(block))
        counts_n += np.bincount(cells_m - 1, minlength=len(block))
    return np.divide(sums_n, counts_n, out=np.full(len(block), np.nan), where=counts_n > 0).astype(np.float32)


def _content_hash(block: TokenBlock, tokenizer: GeneTokenizer) -> np.ndarray:
    """Return a number that depends on a cell's genes and bins alone, int64 >= 0 of shape (n,)."""
    types_l = block.token_type_ids_l.astype(np.uint64)
    is_gene_l = block.token_type_ids_l >= tokenizer.first_gene_type
    pair_l = types_l * np.uint64(0x9E3779B97F4A7C15) + block.input_ids_l.astype(np.uint64) + np.uint64(1)
    pair_l = (pair_l ^ (pair_l >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
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


@dataclass
class PhenotypeTally:
    """Running counts of one phenotype under one question."""

    confusion: Confusion
    log_loss_sum: float = 0.0

    def add(self, probability_nk: np.ndarray, true_n: np.ndarray) -> None:
        """Count the cells whose label is known."""
        self.confusion.add(true_n, probability_nk.argmax(axis=1))
        known = np.flatnonzero(true_n >= 0)
        self.log_loss_sum -= float(np.log(np.maximum(probability_nk[known, true_n[known]], 1e-12)).sum())

    def scores(self) -> Scores:
        """Scores of `metrics.classification_scores`, and the mean negative log-probability of the true label (nats)."""
        scores = self.confusion.scores()
        return {**scores, "log_loss": self.log_loss_sum / max(1, scores["n"])}


@dataclass
class MaskedTally:
    """Running losses of masked tokens, and the confusion of bins."""

    bins: Confusion
    sums: np.ndarray = field(default_factory=lambda: np.zeros(2))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))

    def add(self, logits_mv: torch.Tensor, labels_m: torch.Tensor, *, first_bin_id: int) -> None:
        """Count the masked tokens of one batch."""
        losses_m = torch.nn.functional.cross_entropy(logits_mv.float(), labels_m, reduction="none").double()
        is_gene_m = labels_m >= first_bin_id
        for part, is_part_m in enumerate((~is_gene_m, is_gene_m)):
            self.sums[part] += float(losses_m[is_part_m].sum())
            self.counts[part] += int(is_part_m.sum())
        predicted_m = logits_mv[is_gene_m, first_bin_id:].argmax(dim=-1)
        self.bins.add((labels_m[is_gene_m] - first_bin_id).cpu().numpy(), predicted_m.cpu().numpy())

    def means(self) -> dict[str, float]:
        """Mean loss of the phenotype part and of the gene part, in nats per token."""
        means = self.sums / np.maximum(self.counts, 1)
        return {"loss_phenotypes": float(means[0]), "loss_genes": float(means[1])}


@dataclass(frozen=True)
class LabeledLogits:
    """Logits of one phenotype under one question, for cells whose number divides evenly.

    Args:
        cells_n, logits_nk, true_n: Number, logits and true label (-1: none) of each cell.
    """

    cells_n: np.ndarray
    logits_nk: np.ndarray
    true_n: np.ndarray

    @classmethod
    def join(cls, pieces: "Sequence[LabeledLogits]") -> "LabeledLogits":
        """Put batches behind each other, by cell number."""
        cells, logits, true = (
            np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("cells_n", "logits_nk", "true_n")
        )
        order = np.argsort(cells, kind="stable")
        return cls(cells[order], logits[order], true[order])


class LogitCollector:
    """Keeps the logits of every `stride`-th cell that an evaluator sees."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.pieces: dict[tuple[str, Question], list[LabeledLogits]] = {}

    def add(self, category: str, question: Question, block: TokenBlock, logits_nk: np.ndarray, true_n: Any) -> None:
        """Keep what is to be kept of a batch."""
        rows = np.flatnonzero(block.cells_n % self.stride == 0)
        kept = LabeledLogits(block.cells_n[rows], logits_nk[rows], np.asarray(true_n)[rows])
        self.pieces.setdefault((category, question), []).append(kept)


class MlmEvaluator:
    """Scores an MLM model: masked tokens as in training, and phenotypes under each question.

    Args:
        tokenizer: Of the model.
        collator: The training collator, whose masks are static at epoch 0; None leaves masked scores out.
        questions: What is asked; see `standard_questions`.
    """

    def __init__(
        self, tokenizer: GeneTokenizer, *, collator: DataCollatorForPhenotypicMLM | None, questions: Sequence[Question]
    ) -> None:
        self.tokenizer, self.collator, self.questions = tokenizer, collator, list(questions)
        self.keeper: LogitCollector | None = None
        self.all_questions = self.questions
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        labels = self.tokenizer.phenotypes
        self.tallies = {
            (category, question.name): PhenotypeTally(Confusion(labels[category]))
            for question in self.questions
            for category in question.asked
        }
        self.masked = MaskedTally(Confusion([f"bin_{b}" for b in range(self.tokenizer.bin_edges.num_edges + 1)]))
        self.num_cells = 0

    def add(self, model: torch.nn.Module, cells: Cells) -> None:
        """Score one batch of unmasked cells."""
        block = cells if isinstance(cells, TokenBlock) else block_of(cells)
        self.num_cells += len(block)
        for question in self.questions:
            for category, logits_nk in question_logits(model, block, self.tokenizer, question).items():
                true_n = true_labels(block, self.tokenizer, category)
                self.tallies[category, question.name].add(softmax(logits_nk), true_n)
                if self.keeper is not None:
                    self.keeper.add(category, question, block, logits_nk, true_n)
        if self.collator is not None:
            batch = to_device(self.collator.collate_block(block), model_device(model))
            labels_m = batch.pop("labels")
            with inference_mode(model):
                self.masked.add(model(**batch).logits, labels_m, first_bin_id=self.tokenizer.first_bin_id)

    def numbers(self) -> list[np.ndarray]:
        """All running sums, as arrays that add up over ranks."""
        tallies = [np.append(tally.confusion.counts_kk.ravel(), tally.log_loss_sum) for tally in self.tallies.values()]
        return [
            *tallies,
            self.masked.bins.counts_kk.ravel(),
            self.masked.sums,
            self.masked.counts,
            np.array([self.num_cells]),
        ]

    def set_numbers(self, numbers: Sequence[np.ndarray]) -> None:
        """Take sums over all ranks in place of this rank's."""
        *tallies, bins, sums, counts, num_cells = numbers
        for tally, values in zip(self.tallies.values(), tallies, strict=True):
            shape = tally.confusion.counts_kk.shape
            tally.confusion.counts_kk = values[:-1].reshape(shape).round().astype(np.int64)
            tally.log_loss_sum = float(values[-1])
        self.masked.bins.counts_kk = bins.reshape(self.masked.bins.counts_kk.shape).round().astype(np.int64)
        self.masked.sums, self.masked.counts = sums, counts.round().astype(np.int64)
        self.num_cells = int(num_cells[0])

    def results(self) -> dict[str, Any]:
        """Phenotype -> question -> scores; and `genes` -> scores of masked genes' bins."""
        results: dict[str, Any] = {}
        for (category, name), tally in self.tallies.items():
            results.setdefault(category, {})[name] = tally.scores()
        if self.collator is not None:
            results["genes"] = {"masked": {**self.masked.bins.scores(), "loss": self.masked.means()["loss_genes"]}}
        return results

    def confusions(self) -> dict[str, Confusion]:
        """Name -> confusion, one for each phenotype and question, and one for gene bins."""
        named = {f"{category}.{name}": tally.confusion for (category, name), tally in self.tallies.items()}
        return {**named, "gene_bins": self.masked.bins} if self.collator is not None else named

    def flat_metrics(self, *, loss_weights: tuple[float, float]) -> dict[str, float]:
        """Metrics by plain names, as a trainer logs them: `loss`, `loss_genes`, `cell_type_accuracy`, ..."""
        flat: dict[str, float] = {}
        if self.collator is not None:
            flat = self.masked.means()
            flat["loss"] = loss_weights[0] * flat["loss_phenotypes"] + loss_weights[1] * flat["loss_genes"]
            flat["gene_accuracy"] = self.masked.bins.scores()["accuracy"]
        for (category, name), tally in self.tallies.items():
            if name == "alone":
                scores = tally.scores()
                flat |= {f"{category}_{key}": scores[key] for key in ("accuracy", "macro_f1", "log_loss")}
        return flat


class ClassEvaluator:
    """Scores a classifier: accuracy, macro F1 and its siblings, and the log loss.

    Args:
        labels: Name of each class.
        category: The phenotype, for reports.
    """

    def __init__(self, labels: Sequence[str], *, tokenizer: GeneTokenizer, category: str) -> None:
        self.labels, self.category = tuple(labels), category
        self.collate = collate_fn_wrapper(tokenizer, packed=True)
        self.question = Question("classifier", (category,), tokenizer.included_phenotypes)
        self.all_questions = [self.question]
        self.keeper: LogitCollector | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.tally = PhenotypeTally(Confusion(self.labels))

    @property
    def num_cells(self) -> int:
        """Cells counted so far."""
        return int(self.tally.confusion.counts_kk.sum())

    def add(self, model: torch.nn.Module, cells: Cells) -> None:
        """Score one batch of labelled cells."""
        block = cells if isinstance(cells, TokenBlock) else block_of(cells)
        assert block.labels_n is not None, "a classifier is scored on labelled cells"
        logits_nk = class_logits(model, block, self.collate)
        self.tally.add(softmax(logits_nk), block.labels_n)
        if self.keeper is not None:
            self.keeper.add(self.category, self.question, block, logits_nk, block.labels_n)

    def numbers(self) -> list[np.ndarray]:
        """All running sums, as arrays that add up over ranks."""
        return [np.append(self.tally.confusion.counts_kk.ravel(), self.tally.log_loss_sum)]

    def set_numbers(self, numbers: Sequence[np.ndarray]) -> None:
        """Take sums over all ranks in place of this rank's."""
        counts = numbers[0][:-1].reshape(self.tally.confusion.counts_kk.shape)
        self.tally.confusion.counts_kk = counts.round().astype(np.int64)
        self.tally.log_loss_sum = float(numbers[0][-1])

    def results(self) -> dict[str, Any]:
        """The phenotype -> "classifier" -> scores."""
        return {self.category: {"classifier": self.tally.scores()}}

    def confusions(self) -> dict[str, Confusion]:
        """The one confusion, by name."""
        return {f"{self.category}.classifier": self.tally.confusion}

    def flat_metrics(self, *, loss_weights: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
        """Metrics by plain names, as a trainer logs them: `loss`, `accuracy`, `macro_f1`, ..."""
        scores = self.tally.scores()
        return {
            **{key: value for key, value in scores.items() if key not in ("n", "log_loss")},
            "loss": scores["log_loss"],
        }


Evaluator = MlmEvaluator | ClassEvaluator


def run_evaluator(
    evaluator: Evaluator, model: torch.nn.Module, batches: Iterable[Sequence[Example] | TokenBlock]
) -> Evaluator:
    """Score all batches of cells from zero; raise an InputError when there is none."""
    evaluator.reset()
    for cells in batches:
        evaluator.add(model, cells)  # type: ignore[arg-type]
    if evaluator.num_cells == 0:
        raise InputError("there is no cell to evaluate on. Give an evaluation split with labelled cells.")
    return evaluator


def write_results(results: Mapping[str, Any], confusions: Mapping[str, Confusion], folder: Path, *, text: str) -> None:
    """Write `metrics.json`, and for each confusion a CSV, its per-class scores and a PNG.

    Args:
        text: What was scored on which cells; becomes part of each title.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_results(results, confusions, folder, text=text)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Choose another --output.") from error


def results_json(results: Mapping[str, Any]) -> str:
    """Return scores as strict JSON text."""
    return json.dumps(without_nan(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Replace scores that nothing was counted for by null: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_results(results: Mapping[str, Any], confusions: Mapping[str, Confusion], folder: Path, *, text: str) -> None:
    content = results_json(results)
    (folder / "metrics.json").write_text(content, encoding="utf-8")
    for title, confusion in confusions.items():
        name = title.replace("/", "_")  # a phenotype may be named "cell/type"
        table = confusion_table(confusion)
        table.to_csv(folder / f"confusion.{name}.csv")
        per_class_scores(confusion).to_csv(folder / f"per_class.{name}.csv")
        save_figure(
            confusion_figure(table, title=f"{title.replace('.', ', ')} ({text})"), folder / f"confusion.{name}.png"
        )
