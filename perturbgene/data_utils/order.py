"""Shuffling and sharding: the order of cells in an epoch, their batches, and which rank and worker gets which.

Owns pure functions of (seed, epoch, cell), how often a cell is drawn, and the estimate of how long its sequence is;
knows nothing of genes or tensors. Letters: n cells, m cells of one round or draws of one epoch, b batches.

The order works in rounds, so that it never has to be held in memory. Blocks of neighboring rows are permuted across
all files. Rounds of similar size take at most `buffer_rows` rows each of that permutation and deal their blocks onto
`NUM_LANES` lanes; each lane is permuted cell by cell; cells then leave the lanes in turn. So cell number p of a round
comes from lane p % NUM_LANES while all lanes last, and a rank that takes every R-th cell needs, when R divides
NUM_LANES, little more than its own blocks from disk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.kernels import best_fit
from perturbgene.data_utils.sources import CellSource, StoredCells, sampled_spans

if TYPE_CHECKING:
    from perturbgene.data_utils.shards import Shard
    from perturbgene.data_utils.tokenization import GeneTokenizer

NUM_LANES = 8
DEFAULT_BLOCK_ROWS = 64
DEFAULT_BUFFER_ROWS = 16_384

#: Blocks that each lane of a round should hold: fewer, longer blocks would mix a small sorted file badly.
BLOCKS_PER_LANE = 32

#: Batches that are filled at the same time. Of log-normal lengths with a median of 500 and a maximum of 1,024, a count
#: of 8, 16 or 32 fills 0.994, 0.995 or 0.995 of 8,192 tokens.
OPEN_BATCHES = 16


# -- the order of cells -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellSampler:
    """The order of cells in one epoch, a pure function of its fields.

    Args:
        sizes: Number of rows of each file, in the order of the paths.
        seed, epoch: What a shuffled order depends on.
        is_shuffled: False keeps the order of the files.
        rows_n: Row numbers that take part (sorted, or as `CellDraws.rows` returns them), or None for all.
        block_rows: Most neighboring rows that travel together; fewer when there are few cells.
        buffer_rows: Most rows of a round.
    """

    sizes: tuple[int, ...]
    seed: int = 0
    epoch: int = 0
    is_shuffled: bool = False
    rows_n: np.ndarray | None = None
    block_rows: int = DEFAULT_BLOCK_ROWS
    buffer_rows: int = DEFAULT_BUFFER_ROWS

    def __len__(self) -> int:
        return int(sum(self.sizes)) if self.rows_n is None else len(self.rows_n)

    @cached_property
    def _rows_of_block(self) -> int:
        return max(1, min(self.block_rows, len(self) // (NUM_LANES * BLOCKS_PER_LANE)))

    @cached_property
    def _block_order(self) -> np.ndarray:
        blocks = np.arange(-(-len(self) // self._rows_of_block))
        if self.is_shuffled:
            np.random.default_rng((self.seed, self.epoch)).shuffle(blocks)
        return blocks

    def _positions_of(self, blocks: np.ndarray) -> np.ndarray:
        positions = (blocks[:, None] * self._rows_of_block + np.arange(self._rows_of_block)).ravel()
        return positions[positions < len(self)]

    def rounds(self, *, skip: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of the first cell, row numbers of the round in order), without whole rounds before `skip`."""
        num_blocks, rows_of_block = len(self._block_order), self._rows_of_block
        num_rounds = max(1, -(-num_blocks // max(NUM_LANES, self.buffer_rows // rows_of_block)))
        blocks_per_round = max(1, -(-num_blocks // num_rounds))
        start, short = 0, len(self) % rows_of_block
        for number, first in enumerate(range(0, num_blocks, blocks_per_round)):
            blocks = self._block_order[first : first + blocks_per_round]
            length = len(blocks) * rows_of_block
            if short and (blocks == len(self) // rows_of_block).any():
                length -= rows_of_block - short
            if start + length > skip:
                order = self._positions_of(blocks)
                if self.is_shuffled:  # each lane is permuted, then one cell of each lane comes in turn
                    rng = np.random.default_rng((self.seed, self.epoch, 1 + number))
                    lanes = [rng.permutation(self._positions_of(blocks[lane::NUM_LANES])) for lane in range(NUM_LANES)]
                    turn = np.concatenate([np.arange(len(lane)) * NUM_LANES + at for at, lane in enumerate(lanes)])
                    order = np.concatenate(lanes)[np.argsort(turn, kind="stable")]
                yield start, order if self.rows_n is None else self.rows_n[order]
            start += length


@dataclass(frozen=True)
class WorkerSampler:
    """Which positions of an order one loader worker of one rank takes.

    From `begin` on, each rank takes every `world_size`-th position, and its workers take whole batches of those in
    turn. So the cells before a position are the same for any numbers of ranks and workers, and a stream that was
    stopped there can continue with other numbers.

    Args:
        num_cells: Cells (or batches) of the epoch over all ranks.
        begin: First position that is dealt.
        rank, world_size: Which rank of how many.
        is_even: True (training) gives all ranks the same number: up to `world_size - 1` last positions of the epoch's
            order are left out, others in each epoch. False (evaluation) keeps every position.
        batch_size: Cells of a batch.
        worker, num_workers: Which loader worker of how many.
    """

    num_cells: int
    begin: int = 0
    rank: int = 0
    world_size: int = 1
    is_even: bool = False
    batch_size: int = 1
    worker: int = 0
    num_workers: int = 1

    def __len__(self) -> int:
        """Positions of the rank, over all its workers."""
        rest = max(0, self.num_cells - self.begin)
        return rest // self.world_size if self.is_even else max(0, -(-(rest - self.rank) // self.world_size))

    def holds(self, position_m: np.ndarray) -> np.ndarray:
        """True for positions that the worker takes, shape (m,)."""
        local_m, rank_m = np.divmod(position_m - self.begin, self.world_size)
        is_own_m = (rank_m == self.rank) & (local_m >= 0) & (local_m < len(self))
        return is_own_m & (local_m // self.batch_size % self.num_workers == self.worker)


def split_rows(rows_m: np.ndarray, *, starts_f: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Group sorted row numbers by file: (file index, row numbers within the file)."""
    files_m = np.searchsorted(starts_f, rows_m, side="right") - 1
    cuts = np.flatnonzero(np.diff(files_m)) + 1
    parts = zip(np.split(files_m, cuts), np.split(rows_m, cuts), strict=True) if len(rows_m) else ()
    return [(int(files[0]), rows - starts_f[files[0]]) for files, rows in parts]


# -- how often a cell is drawn ------------------------------------------------------------------------------------


def draw_rates(label_n: np.ndarray) -> np.ndarray:
    """Return how often each cell is drawn per epoch, float64 of shape (n,), with a mean of 1.

    A cell's rate is proportional to one over the square root of its label's number of cells: a label that is 100 times
    as frequent as another is drawn only 10 times as often. Cells without a label (-1) are drawn once.

    Example:
        >>> draw_rates(np.array([0] * 4 + [1] + [-1])).round(3).tolist()
        [0.833, 0.833, 0.833, 0.833, 1.667, 1.0]
    """
    rate_n, is_known_n = np.ones(len(label_n)), label_n >= 0
    root_k = np.sqrt(np.bincount(label_n[is_known_n]))
    total = math.fsum(root_k)  # to the last bit, on every machine
    rate_n[is_known_n] = is_known_n.sum() / total / root_k[label_n[is_known_n]] if total else 1.0
    return rate_n


@dataclass(frozen=True)
class CellDraws:
    """Which cells an epoch has, and how often, a pure function of its fields and the epoch.

    Draws are spread evenly over epochs: a cell with a rate of 0.25 comes in every fourth epoch, from a random one on.

    Args:
        rate_n: How often each row is drawn per epoch, shape (n,); 0 leaves it out.
        seed: What the first epoch of a cell depends on.
    """

    rate_n: np.ndarray
    seed: int = 0

    @cached_property
    def _phase_n(self) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, 0, 2)).random(len(self.rate_n))

    def before(self, epoch: int, rows_m: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Count how often some rows have been drawn before an epoch, int64 of shape (m,)."""
        return np.floor(self._phase_n[rows_m] + self.rate_n[rows_m] * epoch).astype(np.int64)

    def rows(self, epoch: int) -> np.ndarray:
        """Return the rows that are drawn in an epoch; the k-th repetition of a row is `row + k * len(rate_n)`.

        First come all rows that are drawn at all, then those that are drawn a second time, and so on: so the blocks of
        a `CellSampler` seldom hold a cell twice.
        """
        times_n = self.before(epoch + 1) - self.before(epoch)
        rows_m = np.repeat(np.arange(len(times_n)), times_n)
        repetition_m = np.arange(len(rows_m)) - np.repeat(np.cumsum(times_n) - times_n, times_n)
        return np.sort(rows_m + repetition_m * len(times_n))


# -- batches under a token budget ---------------------------------------------------------------------------------


def in_budget(lengths_m: np.ndarray, *, budget: int) -> Iterator[slice]:
    """Cut sequences into runs of neighbors of at most `budget` tokens, at least one sequence each.

    Example:
        >>> list(in_budget(np.array([3, 3, 3, 9, 1]), budget=6))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start, total = 0, 0
    for index, length in enumerate(lengths_m.tolist()):
        if index > start and total + length > budget:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if start < len(lengths_m):
        yield slice(start, len(lengths_m))


def fill(length_m: np.ndarray, *, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill batches up to a budget of tokens, looking no further ahead than `OPEN_BATCHES` batches.

    The cells of batches that are still open at the end are dealt again with half as many open batches, and so on down
    to one as long as this takes no more batches: so only about one batch is far from full. (Filling the longest first
    would end each round with batches of long cells only and of short ones only.)

    Args:
        length_m: Tokens of each cell in the given order; none exceeds the budget.
        budget: Most tokens of a batch.

    Returns:
        The cells in the order of their batches, int64 of shape (m,), and the size of each batch, shape (b,).

    Example:
        >>> order_m, sizes_b = fill(np.array([6, 5, 4, 3, 2]), budget=10)
        >>> [part.tolist() for part in np.split(order_m, np.cumsum(sizes_b)[:-1])]
        [[0, 2], [1, 3, 4]]
    """
    length_m = length_m.astype(np.int64)
    assert len(length_m) == 0 or length_m.max() <= budget
    batch_m, name, num_open = np.zeros(len(length_m), dtype=np.int64), 0, OPEN_BATCHES
    left, most = np.arange(len(length_m)), len(length_m)
    while num_open:
        trial_m, room_b, name_b = batch_m.copy(), *np.zeros((2, num_open), dtype=np.int64)
        next_name, most_open = best_fit(length_m, left, budget, room_b, name_b, trial_m, name)
        if next_name - name > most:
            break
        batch_m, name, most, num_open = trial_m, next_name, most_open, num_open // 2
        left = np.flatnonzero(np.isin(batch_m, name_b[:most_open]))
    _, sizes_b = np.unique(batch_m, return_counts=True)
    return np.argsort(batch_m, kind="stable"), sizes_b


@dataclass(frozen=True)
class BudgetSampler:
    """The batches of one epoch, filled to a budget of tokens; a pure function of its fields.

    Each round of the order of cells is cut into batches on its own, and its batches are shuffled.

    Args:
        cells: The order of cells.
        length_n: Tokens of each row, numbered over all files; a row beyond them is a repetition.
        budget: Most tokens of a batch, at least as many as the longest cell has.
    """

    cells: CellSampler
    length_n: np.ndarray
    budget: int

    def _cut(self, rows_m: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a round in the order of its batches, and the sizes of these."""
        order_m, sizes_b = fill(self.length_n[rows_m % len(self.length_n)], budget=self.budget)
        if self.cells.is_shuffled:
            rng = np.random.default_rng((self.cells.seed, self.cells.epoch, 1 + number, 1))
            place_b = rng.permutation(len(sizes_b))
            order_m = order_m[np.argsort(np.repeat(place_b, sizes_b), kind="stable")]
            sizes_b = sizes_b[np.argsort(place_b)]
        return rows_m[order_m], sizes_b

    @cached_property
    def _rounds(self) -> list[tuple[int, np.ndarray]]:
        """Position of the first cell of each round, and the sizes of its batches."""
        rounds = enumerate(self.cells.rounds())
        return [(start, self._cut(rows_m, number)[1].astype(np.int32)) for number, (start, rows_m) in rounds]

    @cached_property
    def sizes_b(self) -> np.ndarray:
        """Cells of each batch of the epoch, shape (b,)."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *(sizes_b for _, sizes_b in self._rounds)])

    def __len__(self) -> int:
        """Batches of the epoch, over all ranks."""
        return len(self.sizes_b)

    def rounds(self, *, skip: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (number of the first batch, row numbers by batch, sizes of batches), without rounds before `skip`."""
        first = 0
        for number, (start, sizes_b) in enumerate(self._rounds):
            if first + len(sizes_b) > skip:
                _, rows_m = next(self.cells.rounds(skip=start))
                yield first, *self._cut(rows_m, number)
            first += len(sizes_b)


# -- how long sequences are ---------------------------------------------------------------------------------------

_CHUNK_ROWS = 1024


def stored_values(source: CellSource) -> np.ndarray:
    """Count the values that are stored for each cell, int64 of shape (n,), without reading those of a CSR matrix."""
    if isinstance(source, ChosenCells):
        return stored_values(source.base)[source.rows_n]
    if isinstance(source, StoredCells) and source.format == "csr":
        return np.diff(source.offsets).astype(np.int64)
    starts = range(0, source.shape[0], _CHUNK_ROWS)
    counts = [np.diff(source.read_rows(start, min(start + _CHUNK_ROWS, source.shape[0]))[2]) for start in starts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


def genes_per_value(
    shard: "Shard", tokenizer: "GeneTokenizer", stored_n: np.ndarray, *, cells_per_batch: float = np.inf
) -> float:
    """Measure on sampled cells how many of the stored values become genes of a sequence, at most 1.

    In a prepared shard nearly all do; elsewhere columns may be outside the panel, zeros may be stored, or values may be
    below the first edge. The result is two standard errors above the mean, so that batches seldom exceed their budget:
    errors even out over `cells_per_batch`. The tokenizer's `max_length` is ignored.
    """
    rows_m = np.unique(np.concatenate([np.arange(*span) for span in sampled_spans(len(shard))]))
    if not stored_n[rows_m].any():
        return 1.0
    unlimited = tokenizer.reading(tokenizer.included_phenotypes, is_whole=True)
    block = unlimited.tokenize_block(shard.read(rows_m))
    is_gene_l = block.token_type_ids_l >= tokenizer.first_gene_type
    genes_m = np.diff(np.concatenate([[0], np.cumsum(is_gene_l)])[block.offsets_n1])
    share = genes_m.sum() / stored_n[rows_m].sum()
    error = (genes_m - share * stored_n[rows_m]).std() / np.sqrt(max(1.0, cells_per_batch))
    return float(min(1.0, share + 2 * error / stored_n[rows_m].mean()))


def gene_counts(shard: "Shard", tokenizer: "GeneTokenizer", *, budget: int | None = None) -> np.ndarray:
    """Estimate the genes in each cell's sequence from its CSR row length, uint32 of shape (n,), cut to `max_length`.

    A pure function of file and settings, and for a prepared shard a bound that no cell exceeds. `budget` is that of the
    batches that the cells are for, None where single cells matter.
    """
    if len(shard) == 0:
        return np.zeros(0, dtype=np.uint32)
    stored_n, most_genes = stored_values(shard.source), tokenizer.most_genes
    cells_per_batch = np.inf if budget is None else budget / max(1.0, min(most_genes, stored_n.mean()))
    share = genes_per_value(shard, tokenizer, stored_n, cells_per_batch=cells_per_batch)
    return np.minimum(np.ceil(stored_n * share), most_genes).astype(np.uint32)
