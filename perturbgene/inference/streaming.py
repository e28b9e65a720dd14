"""What every verb that reads cells and writes a file shares: ranks, batches, results on disk, the target's door.

Owns dividing cells among processes and keeping per-cell results out of memory until rank 0 writes them; leaves reading
to the data set, h5ad files to `shards`, and what is asked to the verbs. Letters: n cells (m of one block), l tokens.

The road of a verb, types at the arrows:

1. `Ranks.join(device)` -> which part of the cells is this process's; `check_target` -> the one file to read.
2. `IterableAnnDataset(..., rank=ranks.rank, world_size=ranks.size)` -> `stream` -> `TokenBlock` of its own cells.
3. `CellResults.write(block.cells_n, {"name": values_mx})` -> an array per name and rank, on disk beside the target.
4. `CellResults.merge()` waits for all ranks -> `RowArray` per name, in row order, read slice by slice; rank 0 writes.
"""

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from perturbgene.data_utils.labels import ABSENT, label_text
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.remote import local_path
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.urls import is_url, shown_path

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset

logger = logging.getLogger(__name__)

#: Name of the one group of all cells.
ALL = "all"
LONGEST_WAIT = datetime.timedelta(days=2)
#: Cells of a batch at most, where a caller names no other number.
BATCH_CELLS = 256
#: Tokens of a batch at most, where a caller names no other number: about 0.4 GB of activations at width 512.
BATCH_TOKENS = 32_768


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Args:
        rank, size: This process among all.
        local_rank: This process among those of its machine, which share its accelerators.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str = "auto") -> "Ranks":
        """Meet the other processes that `torchrun` or `accelerate launch` started; alone without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # A process that ends early ends the others, so waiting long for one that writes a large file harms nobody.
        state = PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
        if state.process_index:
            logging.getLogger("perturbgene").setLevel(logging.ERROR)  # rank 0 says it for all
        return cls(state.process_index, state.num_processes, state.local_process_index)

    @property
    def is_main(self) -> bool:
        """True for the process that reports and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process: each of a machine's processes takes an accelerator of its own."""
        import torch

        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()


class Blocks(Protocol):
    """Cells in blocks, as `IterableAnnDataset` yields them."""

    def __len__(self) -> int:
        """Cells of this rank."""

    def blocks(self) -> Iterator[TokenBlock]:
        """Yield them."""


def check_target(source: str, target: str | Path, *, overwrite: bool, verb: str) -> tuple[str, Path]:
    """Return the one file to read and the path to write.

    Raises:
        InputError: The target exists or is the input itself, or the input names no file or several.
    """
    target = Path(target).expanduser()
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists. Choose another --output, or pass --overwrite.")
    paths = expand_paths([source])
    if len(paths) > 1:
        raise InputError(f"{shown_path(source)} names {len(paths):,} files, but {verb} writes one file. Name one file.")
    if target.exists() and not is_url(paths[0]) and os.path.samefile(paths[0], target):
        raise InputError(f"{target} is the input itself, which must stay as it is. Change --output.")
    return paths[0], target


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({error}). Choose another --output.")


def read_cells(path: str | Path) -> "AnnData":
    """Read a whole h5ad file, or what a URL leads to, into memory: for notebooks, not for a million cells.

    Raises:
        InputError: There is no such file, or several.
    """
    import anndata

    paths = expand_paths([str(path)])
    if len(paths) > 1:
        raise InputError(f"{shown_path(str(path))} names {len(paths):,} files, but one is read here. Name one file.")
    return anndata.read_h5ad(local_path(paths[0]))


def token_batches(block: TokenBlock, *, most_tokens: int = BATCH_TOKENS) -> Iterator[tuple[slice, TokenBlock]]:
    """Cut a block into batches of neighbouring cells that hold at most so many tokens; a longer cell goes alone.

    Yields:
        Which cells of the block, and these cells.
    """
    lengths_n = np.diff(block.offsets_n1)
    start, total = 0, 0
    for row, length in enumerate(lengths_n.tolist()):
        if row > start and total + length > most_tokens:
            yield slice(start, row), block.take(np.arange(start, row))
            start, total = row, 0
        total += length
    if start == 0:
        yield slice(0, len(block)), block
    else:
        yield slice(start, len(block)), block.take(np.arange(start, len(block)))


def stream_batches(
    dataset: Blocks, *, text: str, ranks: Ranks, most_tokens: int = BATCH_TOKENS
) -> Iterator[TokenBlock]:
    """Yield this rank's cells in batches of at most so many tokens, with a progress bar in cells/s on rank 0."""
    is_hidden = None if ranks.is_main else True  # None: hidden where there is no terminal
    with tqdm(total=len(dataset), desc=text, unit=" cells", unit_scale=True, disable=is_hidden) as bar:
        for block in dataset.blocks():
            for _, batch in token_batches(block, most_tokens=most_tokens):
                yield batch
                bar.update(len(batch))


def has_genes(block: TokenBlock, tokenizer: GeneTokenizer) -> np.ndarray:
    """True for cells that express a gene of the panel, shape (n,): genes stand last, before [EOS]."""
    return block.token_type_ids_l[block.offsets_n1[1:] - 2] >= tokenizer.first_gene_type


@dataclass(frozen=True)
class RowArray:
    """One value (or row of values) per cell over all ranks, read in row order by slices.

    Args:
        parts: One array for each rank, which holds rows `rank`, `rank + size`, ...
        shape: Of the whole, (n, ...).

    Example:
        >>> RowArray([np.array([0, 2]), np.array([1])], (3,))[:]
        array([0, 1, 2])
    """

    parts: Sequence[np.ndarray]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read neighbouring rows."""
        start, stop, step = rows.indices(len(self))
        assert step == 1, "rows are read in order"
        out, size = np.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype), len(self.parts)
        for rank, part in enumerate(self.parts):
            first = start + (rank - start) % size
            out[first - start :: size] = part[first // size : first // size + len(range(first, stop, size))]
        return out

    def blocks(self, num_rows: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) from the first to the last."""
        for start in range(0, len(self), num_rows):
            yield start, self[start : start + num_rows]


@dataclass
class CellResults:
    """Per-cell results of one rank, until all ranks' are merged.

    Args:
        num_cells: Over all ranks; rank r owns rows r, r + size, ... as an unshuffled data set deals them.
        ranks: Which of the processes this is.
        folder: Where the arrays lie; None keeps them in memory, which only a single process may.
    """

    num_cells: int
    ranks: Ranks = Ranks()
    folder: Path | None = None
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.folder is not None or self.ranks.size == 1, "several processes meet on disk"

    def _path(self, name: str, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{list(self._arrays).index(name):03d}.{rank:05d}.npy"

    def _create(self, name: str, values_mx: np.ndarray) -> np.ndarray:
        num_rows = len(range(self.ranks.rank, self.num_cells, self.ranks.size))
        shape, dtype = (num_rows, *values_mx.shape[1:]), values_mx.dtype
        self._arrays[name] = np.empty(0)  # takes its number, by which its file is called
        if self.folder is None or not num_rows:
            return np.zeros(shape, dtype=dtype)
        path = self._path(name, self.ranks.rank)
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and would be a dead process later
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise _unwritable(path, error) from error
        return array

    def write(self, cells_m: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Keep results of some cells; the first call fixes names, types and shapes.

        Args:
            cells_m: Row number of each cell, int64 of shape (m,); all of this rank.
            values: Name -> array of shape (m, ...), always of the same names in the same order.
        """
        assert (cells_m % self.ranks.size == self.ranks.rank).all(), "cells of another rank"
        for name, values_mx in values.items():
            if name not in self._arrays:
                self._arrays[name] = self._create(name, values_mx)
            self._arrays[name][cells_m // self.ranks.size] = values_mx

    def merge(self) -> dict[str, RowArray]:
        """Wait for all ranks and return each result over all cells, in row order; other ranks get nothing.

        A rank without cells has no part, so there must be at least one cell.
        """
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self.ranks.barrier()
        return {name: self._merged(name) for name in self._arrays} if self.ranks.is_main else {}

    def _merged(self, name: str) -> RowArray:
        parts = [self._arrays[name]]
        for rank in range(1, min(self.ranks.size, self.num_cells)):
            parts.append(np.load(self._path(name, rank), mmap_mode="r"))
        missing = max(0, self.ranks.size - len(parts))
        parts += [np.zeros((0, *parts[0].shape[1:]), dtype=parts[0].dtype)] * missing
        return RowArray(parts, (self.num_cells, *parts[0].shape[1:]))


@contextmanager
def cell_results(target: str | Path, *, num_cells: int, ranks: Ranks = Ranks()) -> Iterator[CellResults]:
    """Keep per-cell results in a hidden folder beside the target, `.TARGET.part`, which is removed at the end.

    Raises:
        InputError: The folder cannot be written.
    """
    target = Path(target)
    folder = target.with_name(f".{target.name}.part")
    try:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise _unwritable(target, error) from error
        ranks.barrier()
        yield CellResults(num_cells, ranks, folder)
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def collect_results(
    parts: CellResults, batches: Iterator[TokenBlock], answer: Callable[[TokenBlock], Mapping[str, np.ndarray]]
) -> dict[str, RowArray]:
    """Answer every batch, keep the results and merge them."""
    for block in batches:
        parts.write(block.cells_n, answer(block))
    return parts.merge()


def read_groups(
    dataset: "IterableAnnDataset", column: str | None, *, flag: str = "groupby"
) -> tuple[list[str], np.ndarray]:
    """Return the groups of a column of `obs` and the index of each cell's group, int64 of shape (n,), -1 if missing.

    Without a column, all cells are one group.

    Raises:
        InputError: There is no such column, or it is empty.
    """
    if column is None:
        return [ALL], np.zeros(dataset.num_cells, dtype=np.int64)
    factor = pd.Categorical(dataset.shards[0].source.obs_column(column))
    names = [label_text(value) for value in factor.categories]
    groups = sorted({name for name in names if name})
    place = {name: at for at, name in enumerate(groups)}
    code_of = np.array([*(place.get(name, ABSENT) for name in names), ABSENT], dtype=np.int64)
    group_n = code_of[factor.codes]
    if not groups:
        raise InputError(f"obs[{column!r}] has no value, so there are no groups. Change --{flag}.")
    if missing := int((group_n == ABSENT).sum()):
        logger.warning("%d of %d cells have no %s and are left out", missing, len(group_n), column)
    return groups, group_n


def reading_options(config: Any) -> dict[str, Any]:
    """Return the arguments of `IterableAnnDataset` that a verb's settings hold."""
    names = ("batch_size", "layer", "gene_id_column", "missing_labels", "min_gene_coverage")
    return {name: getattr(config, name) for name in names}


def sum_over_ranks(arrays: Sequence[np.ndarray], parts: CellResults) -> list[np.ndarray]:
    """Add arrays over all ranks, in the order of the ranks; ranks other than the first get their own back."""
    if parts.ranks.size == 1:
        return list(arrays)
    assert parts.folder is not None  # several processes meet on disk
    for number, array in enumerate(arrays):
        np.save(parts.folder / f"sum{number:03d}.{parts.ranks.rank:05d}.npy", array)
    parts.ranks.barrier()
    if not parts.ranks.is_main:
        return list(arrays)
    added = []
    for number in range(len(arrays)):
        of_ranks = (np.load(parts.folder / f"sum{number:03d}.{rank:05d}.npy") for rank in range(parts.ranks.size))
        added.append(sum(of_ranks, start=np.zeros_like(arrays[number])))
    return added
