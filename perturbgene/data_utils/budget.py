"""Which cells share a batch: filled to a budget of tokens, or alike in length.

Owns the batches of an epoch as a pure function of (seed, epoch, lengths); the order of cells that it starts from is
`partition`'s, what a length is says `lengths`. Letters: n cells, m cells of one round, b batches.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from perturbgene.data_utils.order import RowPlan

#: Batches that are filled side by side: a cell joins the fullest that has room. Of log-normal lengths with a median of
#: 500 and a maximum of 1,024, a count of 8, 16 or 32 fills 0.994, 0.995 or 0.995 of 8,192 tokens.
OPEN_BATCHES = 16

#: Batches whose cells are sorted by length together.
SORTED_BATCHES = 32


@numba.njit(nogil=True, cache=True)
def _best_fit(length_m, order_m, budget, room_b, name_b, batch_m, first_name):  # type: ignore[no-untyped-def]
    # pragma: no cover - compiled
    """Put cells, in an order, into the fullest open batch that has room; return (names used up, batches open).

    With all batches open and no room, the fullest one is done and its place taken by a new one.
    """
    used, name = 0, first_name
    for m in order_m:
        at = used
        for k in range(used):
            if room_b[k] >= length_m[m] and (at == used or room_b[k] < room_b[at]):
                at = k
        if at == used:
            if used < len(room_b):
                used += 1
            else:
                at = int(np.argmin(room_b))
            room_b[at], name_b[at] = budget, name
            name += 1
        room_b[at] -= length_m[m]
        batch_m[m] = name_b[at]
    return name, used


def _parts(batch_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells in the order of their batches, and how many each batch has."""
    _, sizes_b = np.unique(batch_m, return_counts=True)
    return np.argsort(batch_m, kind="stable"), sizes_b


def fill(length_m: np.ndarray, *, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill batches up to a budget of tokens, looking no further ahead than `OPEN_BATCHES` batches.

    The cells of batches that are still open at the end are put together anew with half as many open, and so on down to
    one as long as this takes no more batches: so about one is left far from full. (Filling them longest first would end
    each round with batches of long cells only and of short ones only.)

    Args:
        length_m: Tokens of each cell in the order given; none exceeds the budget.
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
        next_name, most_open = _best_fit(length_m, left, budget, room_b, name_b, trial_m, name)
        if next_name - name > most:
            break
        batch_m, name, most, num_open = trial_m, next_name, most_open, num_open // 2
        left = np.flatnonzero(np.isin(batch_m, name_b[:most_open]))
    return _parts(batch_m)


def by_length(length_m: np.ndarray, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort the cells of every `SORTED_BATCHES` batches by length, so that neighbours need little padding.

    Returns:
        The cells in the order of their batches, int64 of shape (m,), and the size of each batch, shape (b,).

    Example:
        >>> order_m, sizes_b = by_length(np.array([6, 2, 5, 3, 4]), batch_size=2)
        >>> order_m.tolist(), sizes_b.tolist()
        ([1, 3, 4, 2, 0], [2, 2, 1])
    """
    num_cells, window = len(length_m), SORTED_BATCHES * batch_size
    order_m = np.lexsort((length_m, np.arange(num_cells) // window))
    return order_m, np.diff(np.append(np.arange(0, num_cells, batch_size), num_cells))


@dataclass(frozen=True)
class BatchRule:
    """What makes a batch full.

    Args:
        batch_size: Cells of a batch, of like length; without effect under a budget.
        budget: Most tokens of a batch, at least as many as the longest cell has; None for a fixed number of cells.

    Example:
        >>> print(BatchRule(budget=8192))
        batches of 8192 tokens
        >>> BatchRule.read("batches of 6 cells of like length")
        BatchRule(batch_size=6, budget=None)
    """

    batch_size: int = 1
    budget: int | None = None

    def __str__(self) -> str:
        """Say what a position in batches of this rule counts."""
        return f"batches of {self.budget or self.batch_size} {'tokens' if self.budget else 'cells of like length'}"

    @classmethod
    def read(cls, text: str) -> "BatchRule | None":
        """Return the rule that a text of `str` stands for, or None."""
        found = re.fullmatch(r"batches of (\d+) (tokens|cells of like length)", text)
        if found is None:
            return None
        return cls(budget=int(found[1])) if found[2] == "tokens" else cls(batch_size=int(found[1]))

    def cut(self, length_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put cells into batches: return their order, shape (m,), and the sizes of the batches, shape (b,)."""
        if self.budget is None:
            return by_length(length_m, batch_size=self.batch_size)
        return fill(length_m, budget=self.budget)


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one epoch, a pure function of its fields; all of them are known before anything is read.

    Each round of the order of cells is cut into batches on its own, and its batches are shuffled.

    Args:
        rows: The order of cells.
        length_n: Tokens of each row, numbered over all files.
        rule: What makes a batch full.
        earlier: The plan that the epoch began with, where the rule has changed since.
        num_kept: Batches that are still those of `earlier`; the cells of its others are cut anew.
    """

    rows: RowPlan
    length_n: np.ndarray
    rule: BatchRule
    earlier: "BatchPlan | None" = None
    num_kept: int = 0

    def _cut(self, rows_m: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a round in the order of its batches, and the sizes of these."""
        kept_b = np.zeros(0, dtype=np.int64)
        if self.earlier is not None:
            rows_m, sizes_b = self.earlier._cut(rows_m, number)
            kept_b = sizes_b[: max(0, self.num_kept - self.earlier._firsts[number])]
        kept_m, rows_m = np.split(rows_m, [kept_b.sum()])
        order_m, sizes_b = self.rule.cut(self.length_n[rows_m])
        if self.rows.is_shuffled:
            rng = np.random.default_rng((self.rows.seed, self.rows.epoch, 1 + number, 1))
            place_b = rng.permutation(len(sizes_b))
            order_m = order_m[np.argsort(np.repeat(place_b, sizes_b), kind="stable")]
            sizes_b = sizes_b[np.argsort(place_b)]
        return np.concatenate([kept_m, rows_m[order_m]]), np.concatenate([kept_b, sizes_b])

    @cached_property
    def _rounds(self) -> list[tuple[int, np.ndarray]]:
        """Position of the first cell of each round, and the sizes of its batches."""
        return [
            (start, self._cut(rows_m, number)[1].astype(np.int32))
            for number, (start, rows_m) in enumerate(self.rows.rounds())
        ]

    @cached_property
    def _firsts(self) -> np.ndarray:
        """Number of the first batch of each round."""
        return np.cumsum([0, *(len(sizes_b) for _, sizes_b in self._rounds)])

    @cached_property
    def sizes_b(self) -> np.ndarray:
        """Cells of each batch of the epoch, shape (b,)."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *(sizes_b for _, sizes_b in self._rounds)])

    def __len__(self) -> int:
        """Batches of the epoch, over all ranks."""
        return len(self.sizes_b)

    def rounds(self, *, skip: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (number of the first batch, row numbers in the order of the batches, sizes of the batches) of rounds.

        Rounds that lie before batch `skip` are left out.
        """
        first = 0
        for number, (start, sizes_b) in enumerate(self._rounds):
            if first + len(sizes_b) > skip:
                _, rows_m = next(self.rows.rounds(skip=start))
                yield first, *self._cut(rows_m, number)
            first += len(sizes_b)
