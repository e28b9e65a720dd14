"""Cells to batches: padding, packing, masking for training and asking for inference.

Owns every change that a sequence undergoes between the dataset and the model. Masks are pure functions of
(seed, epoch, cell, token), so they do not depend on batches, workers or ranks. Letters: n cells, l tokens, m labels.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import torch

from perturbgene.data_utils.kernels import pad_rows
from perturbgene.data_utils.labels import MASK_ID, PAD_ID
from perturbgene.data_utils.order import cell_key, mix, unit
from perturbgene.data_utils.tokenization import TRUNCATIONS, GeneTokenizer, Room, TokenBlock
from perturbgene.errors import InputError

IGNORED = -100

Example = Mapping[str, torch.Tensor]
Batch = dict[str, Any]


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}, but a probability lies in 0..1. Change --{name}.")


def _identity(example: Example) -> int:
    """Return the cell's number, or for a plain dict a hash of its tokens."""
    index = getattr(example, "index", None)
    if isinstance(index, int) and index >= 0:
        return index
    ids = torch.stack([example["input_ids"], example["token_type_ids"]]).numpy().astype(np.uint64)
    weights = np.arange(1, ids.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return int((ids.ravel() * weights).sum() >> np.uint64(1))


def block_of(examples: Sequence[Example]) -> TokenBlock:
    """Join examples (unpadded, of one file or of several) into one ragged block."""
    ids = [example["input_ids"].numpy() for example in examples]
    types = [example["token_type_ids"].numpy() for example in examples]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    measured = [getattr(example, "is_measured_g", None) for example in examples]
    labels = [int(example["labels"]) for example in examples] if "labels" in examples[0] else None
    return TokenBlock(
        np.concatenate(ids),
        np.concatenate(types),
        offsets,
        np.array([_identity(example) for example in examples], dtype=np.int64),
        epochs_n=np.array([getattr(example, "epoch", 0) for example in examples], dtype=np.int64),
        seeds_n=np.array([getattr(example, "seed", -1) for example in examples], dtype=np.int64),
        measured=measured if any(mask is not None for mask in measured) else (),
        labels_n=None if labels is None else np.array(labels, dtype=np.int64),
    )


def _padded_length(longest: int, multiple: int | None) -> int:
    return longest if not multiple else -(-longest // multiple) * multiple


def pad(block: TokenBlock, *, pad_to_multiple_of: int | None = None, labels_l: np.ndarray | None = None) -> Batch:
    """Lay a ragged block out as tensors (n, l): ids padded with [PAD], types and mask with 0, labels with -100."""
    lengths_n = np.diff(block.offsets_n1)
    length = _padded_length(int(lengths_n.max()), pad_to_multiple_of)
    columns = [("input_ids", block.input_ids_l, PAD_ID), ("token_type_ids", block.token_type_ids_l, 0)]
    columns += [("labels", labels_l, IGNORED)] if labels_l is not None else []
    padded_cnl = np.empty((len(columns) + 1, len(block), length), dtype=np.int64)  # one piece, see `pack`
    for padded_nl, (_, values_l, filler) in zip(padded_cnl, columns, strict=False):
        pad_rows(values_l, block.offsets_n1, filler, padded_nl)
    padded_cnl[-1] = np.arange(length) < lengths_n[:, None]
    names = [name for name, _, _ in columns] + ["attention_mask"]
    return dict(zip(names, torch.from_numpy(padded_cnl), strict=True))


def pack(block: TokenBlock, *, labels_l: np.ndarray | None = None) -> Batch:
    """Lay a ragged block out without padding.

    Returns:
        `input_ids`, `token_type_ids` (l,), `cu_seqlens` int32 (n + 1,), `max_seqlen`, `lengths` (n,) on the host; with
        labels also `label_positions` (m,) and `labels` (m,).
    """
    lengths_n = np.diff(block.offsets_n1)
    # One piece of memory: large ones come from huge pages, and filling fresh small pages costs ten times as much.
    tokens_2l = np.empty((2, len(block.input_ids_l)), dtype=np.int64)
    tokens_2l[0], tokens_2l[1] = block.input_ids_l, block.token_type_ids_l
    batch: Batch = {
        "input_ids": torch.from_numpy(tokens_2l[0]),
        "token_type_ids": torch.from_numpy(tokens_2l[1]),
        "cu_seqlens": torch.from_numpy(block.offsets_n1.astype(np.int32)),
        "max_seqlen": int(lengths_n.max()),
        "lengths": lengths_n.tolist(),
    }
    if labels_l is not None:
        positions = np.flatnonzero(labels_l != IGNORED)
        batch["label_positions"] = torch.from_numpy(positions)
        batch["labels"] = torch.from_numpy(labels_l[positions].astype(np.int64))
    return batch


def _epochs(block: TokenBlock) -> np.ndarray:
    return np.zeros(len(block), dtype=np.int64) if block.epochs_n is None else block.epochs_n


def thin(block: TokenBlock, tokenizer: GeneTokenizer, *, gene_drop_prob: float, seed: int = 0) -> TokenBlock:
    """Let each cell lose a share of its genes, drawn from [0, gene_drop_prob) as a function of (seed, epoch, cell)."""
    ids, types = np.empty_like(block.input_ids_l), np.empty_like(block.token_type_ids_l)
    offsets = np.zeros(len(block) + 1, dtype=np.int64)
    _thin_rows(
        block.input_ids_l, block.token_type_ids_l, block.offsets_n1, block.cells_n, _epochs(block), seed,
        gene_drop_prob, tokenizer.first_gene_type, ids, types, offsets,
    )  # fmt: skip
    stop = offsets[-1]
    return replace(block, input_ids_l=ids[:stop], token_type_ids_l=types[:stop], offsets_n1=offsets)


@dataclass(frozen=True)
class Collator:
    """Joins cells without masking; made by `collate_fn_wrapper`."""

    tokenizer: GeneTokenizer
    pad_to_multiple_of: int | None = None
    packed: bool = False
    gene_drop_prob: float = 0.0
    seed: int = 0

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Join cells; `labels` of classification become shape (n,)."""
        return self.collate_block(block_of(examples))

    def collate_block(self, block: TokenBlock) -> Batch:
        """Join the cells of a block."""
        if self.gene_drop_prob:
            block = thin(block, self.tokenizer, gene_drop_prob=self.gene_drop_prob, seed=self.seed)
        batch = pack(block) if self.packed else pad(block, pad_to_multiple_of=self.pad_to_multiple_of)
        if block.labels_n is not None:
            batch["labels"] = torch.from_numpy(block.labels_n.astype(np.int64))
        return batch


def collate_fn_wrapper(
    tokenizer: GeneTokenizer,
    pad_to_multiple_of: int | None = None,
    *,
    packed: bool = False,
    gene_drop_prob: float = 0.0,
    seed: int = 0,
) -> Collator:
    """Return a collator that joins cells without masking; `labels` of classification become shape (n,).

    Args:
        tokenizer: Gives the layout.
        pad_to_multiple_of: Round the padded length up.
        packed: True lays the batch out without padding.
        gene_drop_prob: For training: each cell loses a share of its genes, drawn anew from [0, this) every epoch.
        seed: What the thinning depends on, with epoch and cell.

    Raises:
        InputError: `gene_drop_prob` lies outside 0..1.

    Example:
        >>> tokenizer = GeneTokenizer(genes=["A"], phenotypes={}, bin_edges=[1.0], max_length=4)
        >>> a = {"input_ids": torch.tensor([0, 5, 1]), "token_type_ids": torch.tensor([0, 1, 0])}
        >>> b = {"input_ids": torch.tensor([0, 1]), "token_type_ids": torch.tensor([0, 0])}
        >>> collate_fn_wrapper(tokenizer)([a, b])["input_ids"].tolist()
        [[0, 5, 1], [0, 1, 3]]
    """
    _check_probability("gene_drop_prob", gene_drop_prob)
    return Collator(tokenizer, pad_to_multiple_of, packed, gene_drop_prob, seed)


class _Scratch(threading.local):
    """Memory of this thread for tokens on their way into a batch, used again for every batch."""

    def __init__(self) -> None:
        self.tokens, self.labels = Room(), Room()


_SCRATCH = _Scratch()

# What each random decision about a cell is for; the numbers are part of the contract and never change.
_ABSENT, _ASKED, _GENE, _ROUNDING, _UNEXPRESSED, _MASKING = (np.uint64(n) for n in (1, 2, 3, 4, 5, 8))
_DROP, _DROP_SHARE = np.uint64(9), np.uint64(10)

# What becomes of a token: it stays as it is, is hidden behind [MASK], or leaves the sequence.
_KEPT, _HIDDEN, _DROPPED = np.uint8(0), np.uint8(1), np.uint8(2)

#: Draws per unexpressed gene that is wanted, before a cell that expresses nearly all of the panel goes without.
_TRIES = 8


@numba.njit(nogil=True, cache=True)
def _kept_hash_limit(types, key, first_gene_type):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return the largest hash of kept genes: under random truncation, unkept genes below it are not expressed."""
    limit = np.uint64(0)
    for type_ in types:
        if type_ >= first_gene_type:
            limit = max(limit, mix(key, np.uint64(type_ - first_gene_type)))
    return limit


@numba.njit(nogil=True, cache=True)
def _draw_unexpressed(  # type: ignore[no-untyped-def]
    types, wanted, num_genes, first_gene_type, max_length, rule, order_key, is_order_known, key, stamp, stamp_value,
    measured, out,
):  # fmt: skip  # pragma: no cover - compiled
    """Fill `out` with token types of genes that the cell surely does not express; return how many."""
    limit = num_genes
    is_full = len(types) >= max_length
    if is_full and (rule == 1 or (rule == 2 and not is_order_known)):
        return 0
    if is_full and rule == 0 and len(types) > 1 and types[-2] >= first_gene_type:
        limit = types[-2] - first_gene_type
    hash_limit = _kept_hash_limit(types, order_key, first_gene_type) if is_full and rule == 2 else np.uint64(0)
    for type_ in types:
        if type_ >= first_gene_type:
            stamp[type_ - first_gene_type] = stamp_value
    found, tries = 0, 0
    while found < wanted and tries < _TRIES * (wanted + 1) and limit > 0:
        gene = np.int64(mix(mix(key, _UNEXPRESSED), np.uint64(tries)) % np.uint64(limit))
        tries += 1
        is_known = not (is_full and rule == 2) or mix(order_key, np.uint64(gene)) < hash_limit
        if stamp[gene] != stamp_value and measured[gene] and is_known:
            stamp[gene] = stamp_value
            out[found] = first_gene_type + gene
            found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _drop_genes(types, first_gene_type, most, key, fate):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Thin one cell: its genes leave with one share, drawn uniformly from [0, most); return how many left."""
    fate[: len(types)] = _KEPT
    if most == 0:
        return 0
    share, drop_key, count = unit(mix(key, _DROP_SHARE)) * most, mix(key, _DROP), 0
    for k in range(len(types)):
        if types[k] >= first_gene_type and unit(mix(drop_key, np.uint64(types[k]))) < share:
            fate[k] = _DROPPED
            count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _mask_genes(types, first_gene_type, probability, key, fate, draws):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Choose the hidden genes of one cell among those that are left, at least one; return how many.

    Loops without branches: compilers then draw for eight tokens at once.
    """
    gene_key, count = mix(key, _GENE), 0
    for k in range(len(types)):
        draws[k] = unit(mix(gene_key, np.uint64(types[k])))
    for k in range(len(types)):
        is_hidden = (draws[k] < probability) & (types[k] >= first_gene_type) & (fate[k] != _DROPPED)
        fate[k] = _HIDDEN if is_hidden else fate[k]
        count += is_hidden
    if count > 0 or probability <= 0:
        return count
    best, lowest = -1, 2.0
    for k in range(len(types)):
        if types[k] >= first_gene_type and fate[k] != _DROPPED and draws[k] < lowest:
            best, lowest = k, draws[k]
    if best >= 0:
        fate[best] = _HIDDEN
    return int(best >= 0)


@numba.njit(nogil=True, cache=True)
def _thin_rows(  # type: ignore[no-untyped-def]
    ids_l, types_l, offsets_n1, cells_n, epochs_n, seed, most, first_gene_type, out_ids, out_types, out_offsets
):  # fmt: skip  # pragma: no cover - compiled
    """Write what `_drop_genes` leaves of every cell."""
    fate, at = np.zeros(len(types_l) + 1, np.uint8), 0
    for row in range(len(cells_n)):
        ids, types = ids_l[offsets_n1[row] : offsets_n1[row + 1]], types_l[offsets_n1[row] : offsets_n1[row + 1]]
        _drop_genes(types, first_gene_type, most, mix(cell_key(seed, epochs_n[row], cells_n[row]), _MASKING), fate)
        for k in range(len(types)):
            if fate[k] == _KEPT:
                out_ids[at], out_types[at] = ids[k], types[k]
                at += 1
        out_offsets[row + 1] = at


@numba.njit(nogil=True, cache=True)
def _write_all(ids, types, fate, out_ids, out_types, labels, at):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Write the genes of a cell that loses none, a few at once; return the end."""
    stop = at + len(ids)
    to_ids, to_types, to_labels = out_ids[at:stop], out_types[at:stop], labels[at:stop]
    for k in range(len(ids)):
        to_ids[k] = MASK_ID if fate[k] == _HIDDEN else ids[k]
    for k in range(len(ids)):
        to_types[k] = types[k]
    for k in range(len(ids)):
        to_labels[k] = np.int32(ids[k]) if fate[k] == _HIDDEN else np.int32(IGNORED)
    return stop


@numba.njit(nogil=True, cache=True)
def _mask_rows(  # type: ignore[no-untyped-def]
    ids_l, types_l, offsets_n1, cells_n, epochs_n, order_seeds_n, seed, gene_prob, phenotype_prob, absent_prob,
    drop_prob, unexpressed_ratio, first_gene_type, first_bin_id, num_genes, max_length, rule, measured_ug, source_n,
    out_ids, out_types, labels, out_offsets,
):  # fmt: skip  # pragma: no cover - compiled
    """Write the masked tokens and labels of all cells; see `DataCollatorForPhenotypicMLM`."""
    stamp = np.full(num_genes, -1, np.int32)
    longest = 0
    for row in range(len(cells_n)):
        longest = max(longest, offsets_n1[row + 1] - offsets_n1[row])
    fate, draws = np.zeros(longest, np.uint8), np.empty(longest)
    extra = np.empty(min(num_genes, int(unexpressed_ratio * longest) + 1), np.int64)
    at = 0
    for row in range(len(cells_n)):
        ids, types = ids_l[offsets_n1[row] : offsets_n1[row + 1]], types_l[offsets_n1[row] : offsets_n1[row + 1]]
        key = mix(cell_key(seed, epochs_n[row], cells_n[row]), _MASKING)
        order_key = cell_key(order_seeds_n[row], epochs_n[row], cells_n[row])
        dropped = _drop_genes(types, first_gene_type, drop_prob, key, fate)
        masked = _mask_genes(types, first_gene_type, gene_prob, key, fate, draws)
        wanted = min(int(unexpressed_ratio * masked + unit(mix(key, _ROUNDING))), num_genes)
        found = _draw_unexpressed(
            types, wanted, num_genes, first_gene_type, max_length, rule, order_key, order_seeds_n[row] >= 0, key, stamp,
            row, measured_ug[source_n[row]], extra,
        )  # fmt: skip
        to_drop = max(0, len(types) - dropped + found - max_length)
        last_kept = len(types)
        while to_drop > 0 and last_kept > 0:
            last_kept -= 1
            to_drop -= types[last_kept] >= first_gene_type and fate[last_kept] == _KEPT
        found -= min(found, to_drop)
        first_gene, end = 0, len(types) - 1
        while first_gene < end and types[first_gene] < first_gene_type:
            type_, first_gene = types[first_gene], first_gene + 1
            out_ids[at], out_types[at], labels[at] = ids[first_gene - 1], type_, IGNORED
            if type_ > 0:
                if unit(mix(mix(key, _ABSENT), np.uint64(type_))) < absent_prob:
                    continue
                if unit(mix(mix(key, _ASKED), np.uint64(type_))) < phenotype_prob:
                    out_ids[at], labels[at] = MASK_ID, ids[first_gene - 1]
            at += 1
        if dropped == 0:
            sure = max(first_gene, min(last_kept, end))  # before here all genes stay
            genes = slice(first_gene, sure)
            at = _write_all(ids[genes], types[genes], fate[genes], out_ids, out_types, labels, at)
            first_gene = sure
        for k in range(first_gene, end):
            if fate[k] != _DROPPED and not (k >= last_kept and fate[k] == _KEPT):
                is_hidden = fate[k] == _HIDDEN
                out_ids[at], out_types[at] = MASK_ID if is_hidden else ids[k], types[k]
                labels[at] = ids[k] if is_hidden else IGNORED
                at += 1
        for k in range(found):
            out_ids[at], out_types[at], labels[at] = MASK_ID, extra[k], first_bin_id
            at += 1
        out_ids[at], out_types[at], labels[at] = ids[-1], types[-1], IGNORED
        at += 1
        out_offsets[row + 1] = at


def _distinct_masks(measured: Sequence[np.ndarray | None], num_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack the few distinct masks of measured genes, (u, g), and say which each cell has, (n,)."""
    order = {id(mask): mask for mask in measured}
    rows = [np.ones(num_genes, dtype=bool) if mask is None else mask for mask in order.values()]
    row_of_id = {key: row for row, key in enumerate(order)}
    return np.stack(rows), np.array([row_of_id[id(mask)] for mask in measured], dtype=np.int64)


@dataclass
class DataCollatorForPhenotypicMLM:
    """Masks genes and phenotypes together and joins cells to a batch.

    A phenotype slot leaves the sequence with `absent_prob`; of the others, `phenotype_mask_prob` are asked (`[MASK]`,
    type kept, labelled). Genes are masked with `gene_mask_prob`, at least one per cell, and joined by masked genes that
    the cell does *not* express, labelled `bin_0`: otherwise "masked" would mean "expressed". Genes that the file does
    not measure, or that truncation may have cut, never serve as unexpressed. A full cell gives up its last unmasked
    genes for them, so no sequence grows past `max_length`.

    `gene_drop_prob` thins cells like a shallower sequencing would: each cell loses a share of its genes, drawn anew
    from [0, `gene_drop_prob`) every epoch, before any gene is hidden. It keeps small data from being learnt by heart.

    Args:
        tokenizer: Gives the layout.
        gene_mask_prob, phenotype_mask_prob, absent_prob, gene_drop_prob: Probabilities in [0, 1].
        unexpressed_ratio: Unexpressed genes per masked expressed gene.
        seed: Masks are a pure function of (seed, epoch, cell, token).
        pad_to_multiple_of: Round the padded length up.
        packed: True lays the batch out without padding.

    Example:
        >>> tokenizer = GeneTokenizer(genes=["A", "B"], phenotypes={"sex": ["f", "m"]}, bin_edges=[1.0],
        ...                           included_phenotypes=["sex"], max_length=8)
        >>> cell = {"input_ids": torch.tensor([0, 5, 7, 1]), "token_type_ids": torch.tensor([0, 1, 2, 0])}
        >>> collator = DataCollatorForPhenotypicMLM(tokenizer, gene_mask_prob=0, phenotype_mask_prob=1, absent_prob=0)
        >>> batch = collator([cell])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[0, 2, 7, 1]], [[-100, 5, -100, -100]])
    """

    tokenizer: GeneTokenizer
    gene_mask_prob: float = 0.15
    phenotype_mask_prob: float = 0.5
    absent_prob: float = 0.1
    seed: int = 0
    unexpressed_ratio: float = 0.5
    pad_to_multiple_of: int | None = None
    packed: bool = False
    gene_drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gene_mask_prob", "phenotype_mask_prob", "absent_prob", "gene_drop_prob"):
            _check_probability(name, getattr(self, name))
        if self.unexpressed_ratio < 0:
            raise InputError(f"unexpressed_ratio is {self.unexpressed_ratio}, but must be >= 0.")

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Mask and join cells.

        Returns:
            Padded: `input_ids`, `token_type_ids`, `attention_mask`, `labels`, all (n, l). Packed: see `pack`.
        """
        return self.collate_block(block_of(examples))

    def collate_block(self, block: TokenBlock) -> Batch:
        """Mask and join the cells of a block."""
        masked, labels_l = self._mask(block, _SCRATCH.tokens, _SCRATCH.labels)
        if self.packed:
            return pack(masked, labels_l=labels_l)
        return pad(masked, pad_to_multiple_of=self.pad_to_multiple_of, labels_l=labels_l)

    def mask(self, block: TokenBlock) -> tuple[TokenBlock, np.ndarray]:
        """Mask a ragged block; returns the new block and its labels, shape (l,), -100 where nothing is asked.

        A full cell whose seed of random truncation is not known gets no unexpressed genes, as nobody can say which
        genes it lost.
        """
        return self._mask(block, Room(), Room())

    def _mask(self, block: TokenBlock, tokens_room: Room, labels_room: Room) -> tuple[TokenBlock, np.ndarray]:
        tokenizer, num_cells = self.tokenizer, len(block)
        num_genes, dtype = len(tokenizer.panel), block.input_ids_l.dtype
        room = int(len(block.input_ids_l) * (1 + self.unexpressed_ratio)) + 2 * num_cells
        ids, types = tokens_room.of(room, dtype)
        labels = labels_room.of(room, np.dtype(np.int32))[0]
        offsets = np.zeros(num_cells + 1, dtype=np.int64)
        measured_ug, source_n = _distinct_masks(block.measured or [block.is_measured_g] * num_cells, num_genes)
        epochs_n = _epochs(block)
        seeds_n = np.full(num_cells, -1, dtype=np.int64) if block.seeds_n is None else block.seeds_n
        _mask_rows(
            block.input_ids_l, block.token_type_ids_l, block.offsets_n1, block.cells_n, epochs_n, seeds_n, self.seed,
            self.gene_mask_prob, self.phenotype_mask_prob, self.absent_prob, self.gene_drop_prob,
            self.unexpressed_ratio, tokenizer.first_gene_type, tokenizer.first_bin_id, num_genes, tokenizer.max_length,
            TRUNCATIONS.index(tokenizer.truncation), measured_ug, source_n, ids, types, labels, offsets,
        )  # fmt: skip
        stop = offsets[-1]
        return TokenBlock(ids[:stop], types[:stop], offsets, block.cells_n), labels[:stop]


def _gene_number(types_l: np.ndarray, offsets_n1: np.ndarray, first_gene_type: int) -> np.ndarray:
    """Count the genes of the same cell before each gene token, shape (l,); -1 for tokens that are no genes."""
    is_gene_l = types_l >= first_gene_type
    genes_before_l1 = np.concatenate([[0], np.cumsum(is_gene_l)])
    number_l = genes_before_l1[:-1] - np.repeat(genes_before_l1[offsets_n1[:-1]], np.diff(offsets_n1))
    return np.where(is_gene_l, number_l, -1)


def ask(block: TokenBlock, tokenizer: GeneTokenizer, *, asked: Sequence[str], given: Sequence[str] = ()) -> Batch:
    """Pose one question to every cell: a packed batch that asks some phenotypes and gives others.

    Every asked slot is `[MASK]`, whether or not the cell has a label there; given slots keep their token where the cell
    has one; all other phenotypes are absent. A long cell keeps the first genes that it would keep with all its labels,
    so the answer does not depend on whether it has any, and no sequence grows past `max_length`.

    Returns:
        A packed batch with `label_positions` (n * a,), cell by cell, for the a asked phenotypes in the order asked.
    """
    asked_types = np.array([tokenizer.vocabulary.token_type(category) for category in asked], dtype=np.int64)
    given_types = [tokenizer.vocabulary.token_type(category) for category in given]
    types_l = block.token_type_ids_l.astype(np.int64)
    is_kept_l = (types_l == 0) | (types_l >= tokenizer.first_gene_type) | np.isin(types_l, given_types)
    is_kept_l &= ~np.isin(types_l, asked_types)
    slots = max(len(tokenizer.included_phenotypes), len(asked) + len(given))
    most_genes = max(0, tokenizer.max_length - 2 - slots)
    is_kept_l &= _gene_number(types_l, block.offsets_n1, tokenizer.first_gene_type) < most_genes
    kept_before = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    kept_n, num_asked = np.diff(kept_before), len(asked_types)
    offsets = np.concatenate([[0], np.cumsum(kept_n + num_asked)]).astype(np.int64)
    positions_na = offsets[:-1, None] + 1 + np.arange(num_asked)
    is_asked_l = np.zeros(int(offsets[-1]), dtype=bool)
    is_asked_l[positions_na.ravel()] = True
    ids, types = np.empty(len(is_asked_l), dtype=np.int64), np.empty(len(is_asked_l), dtype=np.int64)
    ids[is_asked_l], types[is_asked_l] = MASK_ID, np.tile(asked_types, len(block))
    ids[~is_asked_l], types[~is_asked_l] = block.input_ids_l[is_kept_l], types_l[is_kept_l]
    batch = pack(TokenBlock(ids, types, offsets, block.cells_n))
    batch["label_positions"] = torch.from_numpy(positions_na.ravel())
    return batch
