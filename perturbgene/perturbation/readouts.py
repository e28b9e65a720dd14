"""What of a cell is compared before and after a perturbation: its state, or the log-odds of a label.

Owns how a cell is put to the model and read, and exact effects, for which every edited cell is run; leaves the edits to
`edits` and estimates without running edited cells to `screening`. Letters: n cells, l tokens, h hidden size, q
perturbations, m edited cells, k labels.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from perturbgene.cli.verbs import Pooling
from perturbgene.data_utils.data_collators import Batch, ask, pack
from perturbgene.data_utils.order import in_budget
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, did_you_mean
from perturbgene.eval_utils import inference_mode, model_device, to_device
from perturbgene.inference.calibration import Calibration, read_calibration
from perturbgene.inference.run import Run
from perturbgene.perturbation.edits import Perturbations, edit
from perturbgene.perturbation.first_layer import FirstLayer

#: Tokens that run at once on each kind of device: enough to fill it, few enough for its memory, on a CPU for its cache.
TOKEN_BUDGET = {"cpu": 4_096, "cuda": 262_144}


@dataclass(frozen=True)
class LabelReadout:
    """Log-odds, in nats, of one label against all others of its phenotype, or against one other."""

    category: str  # the phenotype
    towards: int  # index of the label among the phenotype's labels
    away: int | None  # index of the label that it is compared with; None means all others together
    num_labels: int
    first_id: int | None  # input id of the phenotype's first label; None for a classifier
    given: tuple[str, ...] = ()  # phenotypes whose tokens are in the sequence
    temperature: float = 1.0  # divides the logits

    @property
    def asked(self) -> tuple[str, ...]:
        """The phenotype; a classifier's sequences hold no slot for it."""
        return () if self.first_id is None else (self.category,)

    def logits(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Return the calibrated logits of the phenotype's labels, (n, k)."""
        if self.first_id is None:
            return model(**batch).logits.float() / self.temperature
        positions_n = batch["cu_seqlens"][:-1].long() + 1  # the asked slot follows [CLS]
        logits_nv = model(**batch, label_positions=positions_n).logits.float()
        return logits_nv[:, self.first_id : self.first_id + self.num_labels] / self.temperature

    def log_odds(self, logits_nk: Tensor, *, towards_n: Tensor | None = None) -> Tensor:
        """Turn logits into log-odds, (n, k) -> (n,); `towards_n` is the label of each cell, in place of `towards`."""
        if towards_n is None:
            towards_n = torch.full((len(logits_nk),), self.towards, device=logits_nk.device)
        wanted_n = logits_nk.gather(1, towards_n[:, None]).squeeze(1)
        if self.away is not None:
            return wanted_n - logits_nk[:, self.away]
        others_nk = logits_nk.scatter(1, towards_n[:, None], -torch.inf)
        return wanted_n - others_nk.logsumexp(dim=1)

    def read(self, model: torch.nn.Module, batch: Batch, *, is_counted_l: Tensor) -> Tensor:
        """Run the model and return the log-odds, (n,)."""
        return self.log_odds(self.logits(model, batch))


@dataclass(frozen=True)
class StateReadout:
    """A cell's embedding: the final hidden state of `[CLS]`, or the mean over gene tokens that are not perturbed."""

    pooling: Pooling = "cls"
    given: tuple[str, ...] = ()  # phenotypes whose tokens are in the sequence
    asked: tuple[str, ...] = field(default=(), init=False)

    def read(self, model: torch.nn.Module, batch: Batch, *, is_counted_l: Tensor) -> Tensor:
        """Run the model and return the embeddings, (n, h); `is_counted_l` is True for the tokens of a mean."""
        base = getattr(model, "genebert")  # noqa: B009 - typed as a module otherwise
        starts_n = batch["cu_seqlens"][:-1].long()
        if self.pooling == "cls":
            return base(**batch, read_positions=starts_n).last_hidden_state.float()
        reads_m = is_counted_l.nonzero().squeeze(1)
        hidden_mh = base(**batch, read_positions=reads_m).last_hidden_state.float()
        cell_m = torch.searchsorted(batch["cu_seqlens"][1:].long(), reads_m, right=True)
        sums_nh = hidden_mh.new_zeros(len(starts_n), hidden_mh.shape[1]).index_add(0, cell_m, hidden_mh)
        return sums_nh / torch.bincount(cell_m, minlength=len(starts_n))[:, None]


#: What is compared before and after.
Readout = LabelReadout | StateReadout


def label_readout(run: Run, *, towards: str, away: str | None = None, given: Sequence[str] = ()) -> LabelReadout:
    """Return the readout of `category=label`, or of one such label against another, calibrated if `evaluate` ran.

    Raises:
        InputError: The phenotype or a label is unknown, the two are not of one phenotype, or it is given as well.
    """
    named: list[tuple[str, str]] = []
    for flag, text in (("towards", towards), ("from", away)):
        category, _, label = (part.strip() for part in (text or "").partition("="))
        if text is not None and not (category and label):
            raise InputError(f"--{flag} is {text!r}, but it must read PHENOTYPE=LABEL, e.g. 'cell_type=B cell'.")
        named += [(category, label)] if text is not None else []
    category = named[0][0]
    if category in given:
        raise InputError(f"{category!r} is given and asked at once. Remove it from --given.")
    if run.is_classifier and category != run.category:
        raise InputError(f"{run.path} classifies {run.category!r} only, not {category!r}. Change --towards.")
    if {name for name, _ in named} != {category} or len(set(named)) < len(named):
        raise InputError(f"--towards {towards} and --from {away} are not two labels of one phenotype. Change --from.")
    first_id = None if run.is_classifier else run.tokenizer.vocabulary.id_range(category)[0]
    labels = run.class_labels if run.is_classifier else list(run.tokenizer.phenotypes[category])
    for flag, (_, label) in zip(("towards", "from"), named, strict=False):
        if label not in labels:
            hint = did_you_mean(label, labels)
            raise InputError(f"{category}={label} is no label of the run. {hint} Change --{flag}.")
    asked, *others = (labels.index(label) for _, label in named)
    run.warn_if_ignored(given, [category])
    given = tuple(run.tokenizer.included_phenotypes if run.is_classifier else given)
    nearest = (read_calibration(run.path) or Calibration()).nearest(category, asked=(category,), given=given)
    temperature = nearest.temperature if nearest else 1.0
    return LabelReadout(category, asked, next(iter(others), None), len(labels), first_id, given, temperature)


# -- sequences ------------------------------------------------------------------------------------------------------


def sequences(block: TokenBlock, tokenizer: GeneTokenizer, readout: Readout) -> TokenBlock:
    """Return cells as the readout needs them: asked slots masked after `[CLS]`, given ones kept, all others absent."""
    batch = ask(block, tokenizer, asked=readout.asked, given=readout.given)
    ids_l, types_l = batch["input_ids"].numpy(), batch["token_type_ids"].numpy()
    return TokenBlock(ids_l, types_l, batch["cu_seqlens"].numpy().astype(np.int64), block.cells_n)


# -- exact effects --------------------------------------------------------------------------------------------------


def exact_effects(
    run: Run, block: TokenBlock, perturbations: Perturbations, readout: Readout, *,
    pairs: tuple[np.ndarray, np.ndarray], budget: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Score perturbations exactly: run every edited cell, and compare it with the unperturbed cell.

    Args:
        run, readout: The model, and what is compared.
        block: From `sequences`.
        perturbations, pairs: What is done, and the cell and the perturbation of each edited cell, each of shape (m,).
        budget: Maximum number of tokens that run at once; None takes what suits the device.

    Returns:
        Effects of shape (m,), float32: the change of the log-odds in nats, or the cosine distance of states, in 0..2.
        With mean states, a cell that has no gene but the perturbed ones has no effect (NaN).
    """
    if not len(pairs[0]):
        return np.zeros(0, dtype=np.float32)
    budget = token_budget(run.model, budget)
    is_gene_l = block.token_type_ids_l >= run.tokenizer.first_gene_type
    is_mean = isinstance(readout, StateReadout) and readout.pooling == "mean"
    if is_mean:
        base = getattr(run.model, "genebert")  # noqa: B009 - typed as a module otherwise
        with inference_mode(run.model):
            states = [base(**batch).last_hidden_state.double() for _, batch in batches(run.model, block, budget=budget)]
        hidden_lh = torch.cat(states).cpu().numpy()
    else:
        before = read_block(run.model, block, readout, is_counted_l=is_gene_l, budget=budget)
    effects = []
    for part, after in _read_copies(run, block, perturbations, readout, pairs=pairs, budget=budget):
        if after.ndim == 1:
            effects.append(after - before[part[0]])
        elif is_mean:
            effects.append(_cosine_distance(_means_of_others(hidden_lh, is_gene_l, block, perturbations, part), after))
        else:
            effects.append(_cosine_distance(before[part[0]], after))
    return np.concatenate(effects).astype(np.float32)


def _read_copies(
    run: Run, block: TokenBlock, perturbations: Perturbations, readout: Readout, *,
    pairs: tuple[np.ndarray, np.ndarray], budget: int,
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:  # fmt: skip
    """Run the edited cells, and yield some of the pairs with what is read of them."""
    first_gene_type, most = run.tokenizer.first_gene_type, run.model.config.most_genes or sys.maxsize
    room = len(run.tokenizer.panel) if isinstance(readout, LabelReadout) else run.tokenizer.most_genes
    last_type_n = _last_types(block, most=most, first_gene_type=first_gene_type)
    length_m = np.diff(block.offsets_n1)[pairs[0]]
    # A single layer computes only what is read, so there is nothing to share.
    shares_layer = run.model.config.num_hidden_layers > 1 and not _votes_alone(run, readout)
    for cell, copies in _copies_by_cell(pairs[0], length_m, budget=budget if shares_layer else sys.maxsize):
        first = None if cell is None else _first_layer(run.model, block, cell, last_type=last_type_n[cell])
        for piece in in_budget(length_m[copies], budget=budget):
            part = (pairs[0][copies][piece], pairs[1][copies][piece])
            edited, is_own_l = edit(block, perturbations, run.tokenizer, pairs=part, most_genes=room)
            is_counted_l = (edited.token_type_ids_l >= first_gene_type) & ~is_own_l
            is_read_l, edited_length_m = None, np.diff(edited.offsets_n1)
            # whatever is removed or added, the other genes stay read
            if max(edited_length_m.max(), length_m[copies][piece].max()) > most + 2:
                is_read_l = (edited.token_type_ids_l <= last_type_n[part[0]].repeat(edited_length_m)) | is_own_l
            reading = {"is_counted_l": is_counted_l, "is_read_l": is_read_l, "first": first}
            yield part, read_block(run.model, edited, readout, budget=budget, **reading)


def _copies_by_cell(cell_m: np.ndarray, length_m: np.ndarray, *, budget: int) -> Iterator[tuple[int | None, slice]]:
    """Yield runs of copies: those of one cell, with the cell, if they fill a batch; None with those of other cells."""
    group_m = np.where((np.bincount(cell_m, length_m) > budget)[cell_m], cell_m, -1)
    bounds = np.flatnonzero(np.diff(group_m, prepend=-2, append=-2))
    for start, stop in pairwise(bounds.tolist()):
        yield (None if group_m[start] < 0 else int(group_m[start])), slice(start, stop)


def _votes_alone(run: Run, readout: Readout) -> bool:
    """Return whether the run answers by the genes' votes alone, so that no copy goes through the transformer."""
    return isinstance(readout, LabelReadout) and not any(run.shares(readout.category)[: 1 + bool(readout.given)])


def _first_layer(model: torch.nn.Module, block: TokenBlock, cell: int, *, last_type: int) -> FirstLayer:
    """Return the first layer of a cell of the block."""
    ids_l, types_l = (torch.from_numpy(values).to(model_device(model)) for values in block.cell(cell))
    is_read_l = types_l <= last_type
    with inference_mode(model):
        return FirstLayer(getattr(model, "genebert"), ids_l[is_read_l], types_l[is_read_l])  # noqa: B009


def token_budget(model: torch.nn.Module, budget: int | None = None) -> int:
    """Return how many tokens run at once: the given number, or what suits the model's device."""
    return TOKEN_BUDGET.get(model_device(model).type, TOKEN_BUDGET["cpu"]) if budget is None else budget


def batches(model: torch.nn.Module, block: TokenBlock, *, budget: int | None) -> Iterator[tuple[slice, Batch]]:
    """Yield the sequences of a block as packed batches on the model's device, each with its range of tokens."""
    for piece in in_budget(np.diff(block.offsets_n1), budget=token_budget(model, budget)):
        batch = to_device(pack(block.take(np.arange(piece.start, piece.stop))), model_device(model))
        yield slice(block.offsets_n1[piece.start], block.offsets_n1[piece.stop]), batch


def _last_types(block: TokenBlock, *, most: int, first_gene_type: int) -> np.ndarray:
    """Return the highest token type that the transformer reads of each cell, int64 (n,)."""
    is_gene_l = block.token_type_ids_l >= first_gene_type
    genes_before_l1 = np.concatenate([[0], np.cumsum(is_gene_l)])
    number_l = genes_before_l1[:-1] - genes_before_l1[block.offsets_n1[:-1]].repeat(np.diff(block.offsets_n1))
    last_type_n = np.full(len(block), np.iinfo(np.int64).max)
    is_full_n = np.diff(genes_before_l1[block.offsets_n1]) >= most
    last_type_n[is_full_n] = block.token_type_ids_l[is_gene_l & (number_l == most - 1)]
    return last_type_n


def read_block(
    model: torch.nn.Module, block: TokenBlock, readout: Readout, *, is_counted_l: np.ndarray,
    is_read_l: np.ndarray | None = None, first: FirstLayer | None = None, budget: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Read all sequences of a block: (n,) or (n, h), float32.

    `is_read_l` is what the transformer reads of them, `first` the first layer of the cell of which all are copies.
    """
    values = []
    for span, batch in batches(model, block, budget=budget):
        if is_read_l is not None:
            batch["is_read"] = torch.from_numpy(is_read_l[span]).to(batch["input_ids"].device)
        is_counted = torch.from_numpy(is_counted_l[span]).to(batch["input_ids"].device)
        with inference_mode(model):
            if first is not None:
                batch["first_hidden"] = first.of_copies(batch)
            values.append(readout.read(model, batch, is_counted_l=is_counted).cpu().numpy())
    return np.concatenate(values)


def _means_of_others(
    hidden_lh: np.ndarray, is_gene_l: np.ndarray, block: TokenBlock, perturbations: Perturbations,
    pairs: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Return the mean state of each unperturbed cell over its genes other than the perturbed ones, (m, h)."""
    mean_mh = np.full((len(pairs[0]), hidden_lh.shape[1]), np.nan)
    for row, (cell, perturbation) in enumerate(zip(*pairs, strict=True)):
        span = slice(block.offsets_n1[cell], block.offsets_n1[cell + 1])
        is_other = is_gene_l[span] & ~np.isin(block.token_type_ids_l[span], perturbations.types(perturbation))
        if is_other.any():
            mean_mh[row] = hidden_lh[span][is_other].mean(axis=0)
    return mean_mh


def _cosine_distance(first_mh: np.ndarray, second_mh: np.ndarray) -> np.ndarray:
    """Return 1 - cosine, (m, h) and (m, h) -> (m,), without the cancellation of that difference."""
    unit_mh, other_mh = (
        values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True) for values in (first_mh, second_mh)
    )
    return np.square(unit_mh - other_mh).sum(axis=1) / 2
