"""Cells to batches: padding, packing, masking for training and asking for inference.

Owns every change that a sequence undergoes between the dataset and the model. Masks are pure functions of
(seed, epoch, cell, token), so they do not depend on batches, workers or ranks. Letters: n cells, l tokens, m labels.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from perturbgene.data_utils.kernels import GOLDEN, IGNORED, mask_rows, pad_rows, thin_rows
from perturbgene.data_utils.labels import MASK_ID, PAD_ID
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock, TokenBuffer
from perturbgene.errors import InputError

Example = Mapping[str, torch.Tensor]
Batch = dict[str, Any]


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}, but a probability must be in 0..1. Change --{name}.")


def block_of(examples: Sequence[Example]) -> TokenBlock:
    """Join examples (unpadded, of one file or of several) into one ragged block.

    A plain dict, which has no number in a data set, gets a hash of its tokens in place of it.
    """
    ids = [example["input_ids"].numpy() for example in examples]
    types = [example["token_type_ids"].numpy() for example in examples]
    numbers = [int(getattr(example, "index", -1)) for example in examples]
    for row in (row for row, number in enumerate(numbers) if number < 0):
        tokens = np.concatenate([ids[row], types[row]]).astype(np.uint64)
        weights = np.arange(1, len(tokens) + 1, dtype=np.uint64) * GOLDEN
        numbers[row] = int((tokens * weights).sum() >> np.uint64(1))
    masks: list[Any] = [getattr(example, "is_measured_g", None) for example in examples]
    measured: dict[str, Any] = {}
    if known := [mask for mask in masks if mask is not None]:
        masks = [np.ones_like(known[0]) if mask is None else mask for mask in masks]
        keys = {mask.tobytes(): mask for mask in masks}
        tables = {key: table for table, key in enumerate(keys)}
        table_n = np.array([tables[mask.tobytes()] for mask in masks], dtype=np.int64)
        measured = {"measured_tg": np.stack(list(keys.values())), "table_n": table_n}
    if "labels" in examples[0]:
        measured["labels_n"] = np.array([int(example["labels"]) for example in examples], dtype=np.int64)
    return TokenBlock(
        np.concatenate(ids),
        np.concatenate(types),
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        np.array(numbers, dtype=np.int64),
        epochs_n=np.array([getattr(example, "epoch", 0) for example in examples], dtype=np.int64),
        **measured,
    )


def pad(block: TokenBlock, *, pad_to_multiple_of: int | None = None, labels_l: np.ndarray | None = None) -> Batch:
    """Lay a ragged block out as tensors (n, l): ids padded with [PAD], types and mask with 0, labels with -100."""
    lengths_n = np.diff(block.offsets_n1)
    multiple = pad_to_multiple_of or 1
    length = -(-int(lengths_n.max()) // multiple) * multiple
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
    thin_rows(
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
        gene_drop_prob: For training: each cell loses a share of its genes, drawn again from [0, this) every epoch.
        seed: What the thinning depends on, with epoch and cell.

    Raises:
        InputError: `gene_drop_prob` is outside 0..1.

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
        self.tokens, self.labels = TokenBuffer(), TokenBuffer()


_SCRATCH = _Scratch()


@dataclass
class DataCollatorForPhenotypicMLM:
    """Masks genes and phenotypes together and joins cells to a batch.

    A phenotype slot leaves the sequence with `absent_prob`; of the others, `phenotype_mask_prob` are asked (`[MASK]`,
    type kept, labelled). Genes are masked with `gene_mask_prob`, at least one per cell, and joined by masked genes that
    the cell does *not* express, labelled `bin_0`: otherwise "masked" would mean "expressed". Genes that the file does
    not measure, or that truncation may have cut, never serve as unexpressed. A full cell gives up its last unmasked
    genes for them, so no sequence grows past `max_length`; longer cells are cut to it first.

    `gene_drop_prob` thins cells like a shallower sequencing would: each cell loses a share of its genes, drawn again
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
        """Mask a ragged block; returns the new block and its labels, shape (l,), -100 where nothing is asked."""
        return self._mask(block, TokenBuffer(), TokenBuffer())

    def _mask(self, block: TokenBlock, tokens: TokenBuffer, labels_: TokenBuffer) -> tuple[TokenBlock, np.ndarray]:
        tokenizer, num_cells = self.tokenizer, len(block)
        block = block.cut(tokenizer.max_length)
        num_genes, dtype = len(tokenizer.panel), block.input_ids_l.dtype
        room = int(len(block.input_ids_l) * (1 + self.unexpressed_ratio)) + 2 * num_cells
        ids, types = tokens.rows(room, dtype)
        labels = labels_.rows(room, np.dtype(np.int32))[0]
        offsets = np.zeros(num_cells + 1, dtype=np.int64)
        mask_rows(
            block.input_ids_l, block.token_type_ids_l, block.offsets_n1, block.cells_n, _epochs(block), self.seed,
            self.gene_mask_prob, self.phenotype_mask_prob, self.absent_prob, self.gene_drop_prob,
            self.unexpressed_ratio, tokenizer.first_gene_type, tokenizer.first_bin_id, num_genes, tokenizer.max_length,
            *block.tables(num_genes), ids, types, labels, offsets,
        )  # fmt: skip
        stop = offsets[-1]
        return TokenBlock(ids[:stop], types[:stop], offsets, block.cells_n), labels[:stop]


def ask(block: TokenBlock, tokenizer: GeneTokenizer, *, asked: Sequence[str], given: Sequence[str] = ()) -> Batch:
    """Pose one question to every cell: a packed batch that asks some phenotypes and gives others.

    Every asked slot is `[MASK]`, whether or not the cell has a label there; given slots keep their token where the cell
    has one; all other phenotypes are absent.

    Returns:
        A packed batch with `label_positions` (n * a,), cell by cell, for the a asked phenotypes in the order asked.
    """
    asked_types = np.array([tokenizer.vocabulary.token_type(category) for category in asked], dtype=np.int64)
    given_types = [tokenizer.vocabulary.token_type(category) for category in given]
    types_l = block.token_type_ids_l.astype(np.int64)
    is_kept_l = (types_l == 0) | (types_l >= tokenizer.first_gene_type) | np.isin(types_l, given_types)
    is_kept_l &= ~np.isin(types_l, asked_types)
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
