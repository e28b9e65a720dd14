"""Who sees which cell when: the order of cells, their division among ranks and workers, and stateless randomness.

Owns pure functions of (seed, epoch, cell); knows nothing of files, genes or tensors. Letters: n cells.

The order works in rounds, so that it never has to be held in memory. Blocks of neighbouring rows are permuted across
all files; rounds, alike in size, take at most `buffer_rows` rows each of that permutation and deal their blocks onto
`NUM_LANES` lanes; each lane is permuted cell by cell; cells then leave the lanes in turn. So cell number p of a round
comes from lane p % NUM_LANES while all lanes last, and a rank that takes every R-th cell needs, when R divides
NUM_LANES, little more than its own blocks from disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

NUM_LANES = 8
DEFAULT_BLOCK_ROWS = 64
DEFAULT_BUFFER_ROWS = 16_384

#: Blocks that each lane of a round should hold: fewer, longer blocks would leave a small sorted file badly mixed.
BLOCKS_PER_LANE = 32

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_UNIT = 1.0 / (1 << 53)


@numba.njit(inline="always")
def mix(key: np.uint64, value: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """Fold a value into a 64-bit key with the finaliser of SplitMix64 (Steele et al. 2014, OOPSLA)."""
    z = (key ^ value) + _GOLDEN
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@numba.njit(inline="always")
def unit(key: np.uint64) -> float:  # pragma: no cover - compiled
    """Turn a 64-bit hash into a number in [0, 1)."""
    return float(key >> _S11) * _UNIT


@numba.njit(cache=True)
def cell_key(seed: int, epoch: int, cell: int) -> np.uint64:  # pragma: no cover - compiled
    """Return the hash that all random decisions about one cell in one epoch start from."""
    return mix(mix(mix(np.uint64(0), np.uint64(seed)), np.uint64(epoch)), np.uint64(cell))


@dataclass(frozen=True)
class RowPlan:
    """The order of cells in one epoch, a pure function of its fields.

    Args:
        sizes: Number of rows of each file, in the order of the paths.
        seed, epoch: What the order depends on when shuffling.
        is_shuffled: False keeps the order of the files.
        rows_n: Row numbers that take part (sorted), or None for all.
        block_rows: Most neighbouring rows that travel together; fewer when there are few cells.
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
    def _blocks_per_round(self) -> int:
        most = max(NUM_LANES, self.buffer_rows // self._rows_of_block)
        num_rounds = max(1, -(-len(self._block_order) // most))
        return max(1, -(-len(self._block_order) // num_rounds))

    @cached_property
    def _block_order(self) -> np.ndarray:
        blocks = np.arange(-(-len(self) // self._rows_of_block))
        if self.is_shuffled:
            np.random.default_rng((self.seed, self.epoch)).shuffle(blocks)
        return blocks

    def _positions_of(self, blocks: np.ndarray) -> np.ndarray:
        positions = (blocks[:, None] * self._rows_of_block + np.arange(self._rows_of_block)).ravel()
        return positions[positions < len(self)]

    def _shuffled_round(self, blocks: np.ndarray, number: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.epoch, 1 + number))
        lanes = [rng.permutation(self._positions_of(blocks[lane::NUM_LANES])) for lane in range(NUM_LANES)]
        turn = np.concatenate([np.arange(len(lane)) * NUM_LANES + index for index, lane in enumerate(lanes)])
        return np.concatenate(lanes)[np.argsort(turn, kind="stable")]

    def rounds(self, *, skip: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of the first cell, row numbers of the round in order), skipping whole rounds before `skip`.

        Rows are numbered over all files in turn. Nothing is read or computed for a skipped round but its length.
        """
        start, short = 0, len(self) % self._rows_of_block
        for number, first in enumerate(range(0, len(self._block_order), self._blocks_per_round)):
            blocks = self._block_order[first : first + self._blocks_per_round]
            length = len(blocks) * self._rows_of_block
            if short and (blocks == len(self) // self._rows_of_block).any():
                length -= self._rows_of_block - short
            if start + length > skip:
                order = self._shuffled_round(blocks, number) if self.is_shuffled else self._positions_of(blocks)
                yield start, order if self.rows_n is None else self.rows_n[order]
            start += length


def cells_of_rank(num_cells: int, *, rank: int, world_size: int, is_even: bool) -> int:
    """Count the cells of one rank, which takes every `world_size`-th of the order.

    Args:
        is_even: True (training) drops the up to `world_size - 1` last cells of the epoch's order so that all ranks have
            the same number; another epoch's order drops others. False (evaluation) keeps every cell.
    """
    if is_even:
        return num_cells // world_size
    return max(0, -(-(num_cells - rank) // world_size))


@dataclass(frozen=True)
class Share:
    """Which positions of the order one loader worker of one rank takes.

    From `begin` on, each rank takes every `world_size`-th position, and its workers take whole batches of those in
    turn. So the cells before a position are the same whatever the numbers of ranks and workers, and a stream that was
    stopped there continues with any others.

    Args:
        num_cells: Cells of the epoch over all ranks.
        begin: First position that is dealt.
        rank, world_size: Which rank of how many.
        is_even: True gives all ranks the same number; see `cells_of_rank`.
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
        """Cells of the rank, over all its workers."""
        rest = max(0, self.num_cells - self.begin)
        return cells_of_rank(rest, rank=self.rank, world_size=self.world_size, is_even=self.is_even)

    def holds(self, position_m: np.ndarray) -> np.ndarray:
        """True for positions that the worker takes, shape (m,)."""
        local_m, rank_m = np.divmod(position_m - self.begin, self.world_size)
        is_own_m = (rank_m == self.rank) & (local_m >= 0) & (local_m < len(self))
        return is_own_m & (local_m // self.batch_size % self.num_workers == self.worker)

    def cells_before(self, position: int) -> int:
        """Count the worker's cells before a position."""
        local = min(len(self), max(0, -(-(position - self.begin - self.rank) // self.world_size)))
        turns, rest = divmod(local, self.batch_size * self.num_workers)
        return turns * self.batch_size + min(max(0, rest - self.worker * self.batch_size), self.batch_size)

    def position_after(self, num_cells: int) -> int:
        """Say before which position all is done, over all ranks and workers, once the worker has so many cells done.

        Ranks go in step, and workers in turn: the batches of other workers before its own count as done.
        """
        if num_cells == 0:
            return self.begin
        batch, at = divmod(num_cells - 1, self.batch_size)
        local = (batch * self.num_workers + self.worker) * self.batch_size + at + 1
        return min(self.num_cells, self.begin + local * self.world_size)


def split_rows(rows_m: np.ndarray, *, starts_f: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Group sorted row numbers by file: (file index, row numbers within the file)."""
    files_m = np.searchsorted(starts_f, rows_m, side="right") - 1
    cuts = np.flatnonzero(np.diff(files_m)) + 1
    parts = zip(np.split(files_m, cuts), np.split(rows_m, cuts), strict=True) if len(rows_m) else ()
    return [(int(files[0]), rows - starts_f[files[0]]) for files, rows in parts]


def runs_of(rows_m: np.ndarray, *, gap: int) -> list[np.ndarray]:
    """Cut sorted row numbers into runs whose neighbours are at most `gap` apart: each run is one read."""
    return np.split(rows_m, np.flatnonzero(np.diff(rows_m) > gap) + 1) if len(rows_m) else []
