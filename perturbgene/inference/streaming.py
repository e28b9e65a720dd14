"""Helpers for commands that stream cells through a model into one output file.

Owns processes (ranks), token-limited batches, per-cell results on disk and the claim on the output; leaves reading to
`data_utils` and what the model is asked to the verbs. Letters: n cells (m of one block), l tokens.

How a command uses it: `Ranks.join` and `claimed_output` (one file in, one file out), `open_cells`, then `answered`,
which yields the results of all cells to rank 0, or `stream_batches` and `sum_over_ranks`.
"""

import dataclasses
import datetime
import glob
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.verbs import FileOptions
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT, label_text
from perturbgene.data_utils.opening import as_sources, expand_paths, is_zarr, one_source, open_source
from perturbgene.data_utils.order import in_budget
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.files import claimed, partial_path, piece_path, version_of
from perturbgene.inference.heartbeat import Heartbeat, meeting
from perturbgene.inference.run import Run
from perturbgene.urls import is_url, shown_path

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Below this share of the run's genes, answers are less sure than they look.
LOW_COVERAGE = 0.9
#: A process that ends early ends the others, and `Heartbeat` finds those that hang, so a long wait for the one that
#: writes a large file does no harm.
LONGEST_WAIT = datetime.timedelta(days=2)
#: With fewer genes of the panel, a cell looks much like any other.
FEW_GENES = 10
#: The column of obs with the number of genes of the panel that the model saw of a cell.
GENES_COLUMN = "perturbgene_n_genes"
#: The one group of all cells.
ALL = "all"

#: Numbers of some cells, (m,), and their results by name, (m, ...).
Rows = tuple[np.ndarray, Mapping[str, np.ndarray]]
#: Known phenotypes with their labels; None, or a name alone, means each cell's own label in `obs`.
Given = Mapping[str, str | None] | Sequence[str]


# -- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine, which share its accelerators
    heartbeat: Heartbeat | None = field(default=None, compare=False)  # of several processes

    @classmethod
    def join(cls, device: str = "auto") -> "Ranks":
        """Meet the other processes that `torchrun` or `accelerate launch` started; else it is alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        with meeting():
            state = PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
        if state.process_index:
            logging.getLogger("perturbgene").setLevel(logging.ERROR)  # rank 0 reports for all
        place = (state.process_index, state.num_processes, state.local_process_index)
        return cls(*place, Heartbeat(*place[:2]))

    @property
    def is_main(self) -> bool:
        """True for the process that reports and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process: each process of a machine takes an accelerator of its own."""
        import torch

        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def watched(self, batches: Iterable[T]) -> Iterable[T]:
        """Yield batches; of several processes, one that hangs within one of them ends."""
        return self.heartbeat.watched(batches) if self.heartbeat else batches

    def barrier(self) -> None:
        """Wait until all processes have reached this point."""
        if self.size > 1:
            import torch

            with self.heartbeat.waiting() if self.heartbeat else nullcontext():
                torch.distributed.barrier()


#: A single process.
ALONE = Ranks()


# -- input and output files ---------------------------------------------------------------------------------------


@contextmanager
def claimed_output(config: FileOptions, ranks: Ranks = ALONE) -> Iterator[tuple[str, Path]]:
    """Yield the file to read and the file to write, which no other command may write in the meantime.

    A command that computes one piece claims that piece. One that has written the output from pieces deletes them.

    Raises:
        InputError: The output exists, is a folder or the input itself, is being written by another process or cannot be
            written, or the input names no file or several.
    """
    target = Path(config.output).expanduser()
    claim = piece_path(target, *config.piece) if config.piece else target
    with claimed(claim, flag="output") if ranks.is_main else nullcontext():
        if ranks.is_main and not config.piece:
            _remove_leftovers(target)
        if target.exists() and not config.overwrite:
            raise there_already(target, piece_path(target, 1, 1).parent if getattr(config, "pieces", ()) else None)
        if target.is_dir() and not (target.suffix == ".zarr" and is_zarr(str(target))):
            raise InputError(f"{target} cannot be written (it is a folder). Choose another --output.")
        source, *more = expand_paths([config.input])
        if more:
            raise InputError(
                f"{shown_path(config.input)} names {1 + len(more):,} files, but {config.verb} writes one file. "
                "Name one file."
            )
        if target.exists() and not is_url(source) and os.path.samefile(source, target):
            raise InputError(f"{target} is the input itself, which must stay as it is. Change --output.")
        yield source, target
        if ranks.is_main:
            remove_pieces(getattr(config, "pieces", ()), output=target)


def there_already(target: Path, home: Path | None) -> InputError:
    """Return the error about an output that is there; `home` is the folder of its pieces, when they are merged."""
    left = f" If an earlier merge was killed after it had written it, delete {home}." if home and home.exists() else ""
    return InputError(f"{target} exists.{left} Choose another --output, or pass --overwrite.")


def remove_pieces(folders: Sequence[str], *, output: Path) -> None:
    """Delete the pieces of an output, what killed jobs left of them, and their common folder if it is empty then."""
    for folder in map(Path, folders):
        shutil.rmtree(partial_path(folder), ignore_errors=True)
        folder.rename(partial_path(folder))  # so that no half of a piece is left under its name
        for path in (partial_path(folder), partial_path(f"{folder}.cells")):
            shutil.rmtree(path, ignore_errors=True)
    home = piece_path(output, 1, 1).parent
    if folders and home.is_dir() and not any(home.iterdir()):
        home.rmdir()


def part_folders(target: Path) -> list[Path]:
    """Return where `perturb` and `attribute` keep finished parts of an output, with whatever settings."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}.parts"))


def _remove_leftovers(target: Path) -> None:
    """Remove what a process left that was killed after its output was whole; unfinished parts are newer than that."""
    shutil.rmtree(_cells_folder(target), ignore_errors=True)
    for folder in part_folders(target) if target.is_file() else ():
        if all(path.stat().st_mtime_ns <= target.stat().st_mtime_ns for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({error}). Choose another --output.")


def read_cells(cells: Any) -> "AnnData":
    """Return an AnnData as it is, and one file or URL read into memory: for notebooks, not for a million cells.

    Raises:
        InputError: It is neither an AnnData nor one file that can be read.
    """
    with closing(open_source(one_source(cells))) as source:
        return source.to_adata()


def with_results(
    cells: "AnnData", *, obs: Mapping[str, Any], obsm: Mapping[str, np.ndarray], uns: Mapping[str, Any]
) -> "AnnData":
    """Return a copy in memory with further columns and matrices, and where they came from."""
    result = cells.to_memory() if cells.isbacked else cells.copy()
    for name, column in obs.items():
        result.obs[name] = column
    result.obsm.update(obsm)
    result.uns["perturbgene"] = dict(uns)
    return result


# -- opening cells ------------------------------------------------------------------------------------------------


def reading_options(config: FileOptions) -> dict[str, Any]:
    """Return the arguments of `IterableAnnDataset` that a verb's settings hold."""
    names = [declared.name for declared in dataclasses.fields(ReadingConfig)]
    return {name: getattr(config, name) for name in ("batch_size", *names)}


def given_labels(given: Given | None) -> dict[str, str | None]:
    """Return given phenotypes with their labels; a name alone means each cell's own label in `obs`.

    Example:
        >>> given_labels(["tissue"]), given_labels("tissue"), given_labels({"tissue": "lung"}), given_labels(None)
        ({'tissue': None}, {'tissue': None}, {'tissue': 'lung'}, {})
    """
    if isinstance(given, str):
        return {given: None}
    return dict(given) if isinstance(given, Mapping) else dict.fromkeys(given or ())


def open_cells(
    data: Any,
    run: Run,
    given: Mapping[str, str | None],
    *,
    tokenizer: GeneTokenizer | None = None,
    ranks: Ranks = ALONE,
    **reading: Any,
) -> IterableAnnDataset:
    """Open this rank's share of the cells of a path, URL or AnnData.

    Args:
        data: The cells.
        run: Whose genes and labels are read.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        tokenizer: What is read, see `GeneTokenizer.reading`; None reads the given phenotypes.
        ranks: Which of the processes this is.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage`, ... of `IterableAnnDataset`.

    Raises:
        InputError: A phenotype or label is unknown, or `obs` lacks the column of one that is read from it.
    """
    constants = {}
    for name, label in given.items():
        run.tokenizer.vocabulary.check_category(name)
        if label is not None:
            constants[name] = run.tokenizer.vocabulary.label_id(name, label)
        if constants.get(name) == ABSENT:
            known = listed(run.tokenizer.phenotypes[name], most=12)
            raise InputError(f"{name}={label} is not in the run's vocabulary. Choose one of: {known}.")
    options = {"batch_size": FileOptions.batch_size, **reading, "constant_labels": constants}
    options |= {"rank": ranks.rank, "world_size": ranks.size}
    dataset = IterableAnnDataset(
        as_sources(data, is_one=True), tokenizer or run.tokenizer.reading(list(given)), **options
    )
    for index in range(len(dataset.shards)):
        for name in [name for name, label in given.items() if label is None]:
            dataset.shards[index].label_column(name)  # raises where it is missing
    return dataset


def read_groups(
    dataset: IterableAnnDataset, column: str | None, *, flag: str = "groupby"
) -> tuple[list[str], np.ndarray]:
    """Return the sorted values of a column of `obs`, and each cell's index among them, int64 (n,), -1 without a value.

    Without a column all cells are one group.

    Raises:
        InputError: There is no such column, or it is empty.
    """
    if column is None:
        return [ALL], np.zeros(dataset.num_cells, dtype=np.int64)
    factor = pd.Categorical(dataset.shards[0].source.obs_column(column)).remove_unused_categories()
    names = [label_text(value) for value in factor.categories]
    groups = sorted({*names} - {""})
    if not groups:
        raise InputError(f"obs[{column!r}] has no value, so there are no groups. Change --{flag}.")
    group_n = pd.Index(groups).get_indexer([*names, ""])[factor.codes].astype(np.int64)  # code -1 takes the last
    if missing := int((group_n == ABSENT).sum()):
        logger.warning("%d of %d cells have no %s and are left out", missing, len(group_n), column)
    return groups, group_n


# -- blocks of cells ----------------------------------------------------------------------------------------------


@contextmanager
def unchanged(dataset: IterableAnnDataset) -> Iterator[None]:
    """Refuse a file of cells that is written again while the block reads it: a copy of it would have other cells.

    Raises:
        InputError: It was.
    """
    source = dataset.shards[0].source
    is_file = source.place and not is_url(source.place)
    before = version_of(source.place) if is_file else ()
    yield
    if is_file and version_of(source.place) != before:
        raise InputError(
            f"{source.path} changed while it was read, so answers may be about other cells. Run the same command again "
            "when nothing writes it any more."
        )


def stream_batches(
    dataset: IterableAnnDataset, *, text: str, ranks: Ranks = ALONE, most_tokens: int = FileOptions.batch_tokens
) -> Iterator[TokenBlock]:
    """Yield this rank's cells in batches of at most `most_tokens` tokens; rank 0 shows progress in a terminal."""
    is_hidden = None if ranks.is_main else True  # None hides the bar where there is no terminal
    bar = tqdm(total=len(dataset), desc=text, unit=" cells", unit_scale=True, disable=is_hidden)
    with unchanged(dataset), bar:
        for block in ranks.watched(dataset.blocks()):
            for piece in in_budget(np.diff(block.offsets_n1), budget=most_tokens):
                batch = block if piece == slice(0, len(block)) else block.take(np.arange(piece.start, piece.stop))
                yield batch
                bar.update(len(batch))


@dataclass(frozen=True)
class GeneTokens:
    """The gene tokens of a block: position in the block, cell and panel index, each of shape (m,)."""

    position_m: np.ndarray
    cell_m: np.ndarray
    gene_m: np.ndarray

    @classmethod
    def of(cls, block: TokenBlock, tokenizer: GeneTokenizer) -> "GeneTokens":
        position_m = np.flatnonzero(block.token_type_ids_l >= tokenizer.first_gene_type)
        cell_m = np.searchsorted(block.offsets_n1, position_m, side="right") - 1
        gene_m = block.token_type_ids_l[position_m].astype(np.int64) - tokenizer.first_gene_type
        return cls(position_m, cell_m, gene_m)


# -- results per cell ---------------------------------------------------------------------------------------------


@dataclass
class CellResults:
    """Per-cell results of one rank, until all ranks' are merged.

    Rank r owns cells first + r, first + r + size, ... as an unshuffled data set deals them. Merged results
    have a row for every cell of the file; that of a cell which was not chosen is missing (NaN, or -1).
    """

    num_cells: int  # over all ranks
    ranks: Ranks = ALONE
    folder: Path | None = None  # where the arrays are; None keeps them in memory, which only a single process may
    rows: tuple[np.ndarray, int] | None = None  # the chosen rows of the file, and how many it has; None: all
    first: int = 0  # number of the first cell
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.folder is not None or self.ranks.size == 1, "several processes meet on disk"

    def _new_array(self, file: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.folder is None or not shape[0]:
            return np.zeros(shape, dtype=dtype)
        path = self.folder / file
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now; later it would be SIGBUS
                with path.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise unwritable(path, error) from error
        return array

    def write(self, cells_m: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Keep results of some cells; the first call fixes names, types and shapes.

        Args:
            cells_m: Row number of each cell, int64 of shape (m,); all of this rank.
            values: Name -> array of shape (m, ...), always of the same names in the same order.
        """
        cells_m = cells_m - self.first
        assert (cells_m % self.ranks.size == self.ranks.rank).all(), "cells of another rank"
        for number, (name, values_mx) in enumerate(values.items()):
            if name not in self._arrays:
                shape = (len(range(self.ranks.rank, self.num_cells, self.ranks.size)), *values_mx.shape[1:])
                file = f"{number:03d}.{self.ranks.rank:05d}.npy"  # by number: a phenotype's name may hold a slash
                self._arrays[name] = self._new_array(file, shape, values_mx.dtype)
            self._arrays[name][cells_m // self.ranks.size] = values_mx

    def merge(self) -> dict[str, np.ndarray]:
        """Wait for all ranks and return each result over all cells, (n, ...); other ranks get nothing.

        A rank without cells has no arrays, so there must be at least one cell.
        """
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self.ranks.barrier()
        if not self.ranks.is_main:
            return {}
        if self.ranks.size == 1 and self.rows is None:
            return {name: np.asarray(own) for name, own in self._arrays.items()}
        rows_n, num_rows = self.rows or (np.arange(self.num_cells), self.num_cells)
        merged = {}
        for number, (name, own) in enumerate(self._arrays.items()):
            whole = self._new_array(f"{number:03d}.npy", (num_rows, *own.shape[1:]), own.dtype)
            if num_rows > self.num_cells:
                whole[:] = np.nan if own.dtype.kind == "f" else -1
            for rank in range(min(self.ranks.size, self.num_cells)):
                part = np.load(Path(self.folder or "") / f"{number:03d}.{rank:05d}.npy", mmap_mode="r") if rank else own
                whole[rows_n[rank :: self.ranks.size]] = part
            merged[name] = np.asarray(whole)
        return merged


def _cells_folder(target: str | Path) -> Path:
    return partial_path(f"{target}.cells")


@contextmanager
def cell_results(
    target: str | Path | None, *, num_cells: int, ranks: Ranks = ALONE, rows: tuple[np.ndarray, int] | None = None,
    first: int = 0,
) -> Iterator[CellResults]:  # fmt: skip
    """Keep per-cell results in a hidden folder next to the claimed output, which is removed at the end.

    What a killed process left there is removed first; `claimed_output` keeps out processes that are alive. Without a
    target, which a single process may do, they are in memory.

    Raises:
        InputError: The folder cannot be written.
    """
    if target is None:
        yield CellResults(num_cells, ranks, rows=rows, first=first)
        return
    folder = _cells_folder(target)
    try:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True, mode=0o700)
            except OSError as error:
                raise unwritable(Path(target), error) from error
        ranks.barrier()
        yield CellResults(num_cells, ranks, folder, rows, first)
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def answered(
    dataset: IterableAnnDataset,
    compute: Callable[[TokenBlock], Mapping[str, np.ndarray]],
    *,
    text: str,
    most_tokens: int = FileOptions.batch_tokens,
    target: str | Path | None = None,
    ranks: Ranks = ALONE,
    stored: Iterator[Rows] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute results batch by batch, and yield those of all cells, (n, ...) each; ranks but the first get none.

    `GENES_COLUMN` is added: the number of genes of the panel that each cell has, with a warning of cells that express
    so few that answers about them say little, and of a file that lacks many genes.

    Args:
        dataset: This rank's cells.
        compute: Returns named arrays with a row for each cell of a batch.
        text: Name of the progress bar.
        most_tokens: Most tokens in a batch.
        target, ranks: See `cell_results`.
        stored: The results, if they were computed before: numbers of some cells, and arrays with a row for each.
    """
    with cell_results(target, num_cells=dataset.num_cells, ranks=ranks, rows=dataset.chosen_rows) as results:
        for cells_m, values in stored or computed_rows(
            dataset, compute, text=text, most_tokens=most_tokens, ranks=ranks
        ):
            results.write(cells_m, values)
        merged = results.merge()
        if merged:
            num_genes_n = merged[GENES_COLUMN][merged[GENES_COLUMN] >= 0]  # without cells that were left out
            if num_few := int((num_genes_n < FEW_GENES).sum()):
                logger.warning(
                    "%s of %s cells have few genes of the run (fewer than %d), so answers about them say little; see "
                    "obs[%r]", f"{num_few:,}", f"{len(num_genes_n):,}", FEW_GENES, GENES_COLUMN,
                )  # fmt: skip
            if dataset.coverage < LOW_COVERAGE:
                logger.warning(
                    "The cells were measured with %.0f %% of the run's genes, so answers can be wrong and sure. If you "
                    "can, train again with the genes that both have (`prepare --panel`); see "
                    "docs/asking.md#genes-that-a-file-lacks", 100 * dataset.coverage,
                )  # fmt: skip
        yield merged


def computed_rows(
    dataset: IterableAnnDataset, compute: Callable[[TokenBlock], Mapping[str, np.ndarray]], *, text: str,
    most_tokens: int, ranks: Ranks,
) -> Iterator[Rows]:  # fmt: skip
    """Compute results batch by batch, and count genes; see `answered`."""
    for block in stream_batches(dataset, text=text, ranks=ranks, most_tokens=most_tokens):
        yield block.cells_n, {**compute(block), GENES_COLUMN: dataset.tokenizer.num_genes(block)}


def sum_over_ranks(arrays: Sequence[np.ndarray], *, target: str | Path | None, ranks: Ranks) -> list[np.ndarray]:
    """Add arrays over all ranks, in the order of the ranks; ranks other than the first get their own back."""
    if ranks.size == 1:
        return list(arrays)
    with cell_results(target, num_cells=0, ranks=ranks) as results:
        assert results.folder is not None  # several processes meet on disk
        for number, array in enumerate(arrays):
            np.save(results.folder / f"{number:03d}.{ranks.rank:05d}.npy", array)
        ranks.barrier()
        if not ranks.is_main:
            return list(arrays)
        added = []
        for number, own in enumerate(arrays):
            paths = [results.folder / f"{number:03d}.{rank:05d}.npy" for rank in range(ranks.size)]
            added.append(sum((np.load(path) for path in paths), start=np.zeros_like(own)))
        return added
