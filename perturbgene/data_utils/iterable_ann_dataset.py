"""Cells of many h5ad files as a stream of token dicts, in an order that depends on (seed, epoch) alone.

Owns reading the cells of one rank and one loader worker in order, and the position of the stream; leaves the order to
`order`, reading to `shards`, tokens to the tokenizer, masks and padding to the collators. Letters: n cells, m cells of
one round for this worker, b batches.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from perturbgene.cli.base import Normalization, ReadingConfig
from perturbgene.cli.options import conditions, named_values
from perturbgene.data_utils.chosen_cells import ChosenCells, Where, check_where
from perturbgene.data_utils.gene_map import read_gene_map
from perturbgene.data_utils.labels import ABSENT, Labels, is_missing
from perturbgene.data_utils.opening import as_sources
from perturbgene.data_utils.order import (
    DEFAULT_BLOCK_ROWS,
    DEFAULT_BUFFER_ROWS,
    BudgetSampler,
    CellDraws,
    CellSampler,
    WorkerSampler,
    draw_rates,
    gene_counts,
    split_rows,
)
from perturbgene.data_utils.shards import Shard, ShardCache
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock, TokenBuffer
from perturbgene.data_utils.values import warn_of_notes
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import check_format
from perturbgene.urls import shown_path

logger = logging.getLogger(__name__)

STATE_VERSION = 1

#: Rows that are tokenized at once: their values are then still in the processor's cache.
CHUNK_ROWS = 256

#: More than two hardly help: assembling the batches is then what takes time.
DEFAULT_THREADS = 2

#: Files that threads read from at the same time; few enough that the cache of open files closes none of them.
FILES_AT_ONCE = 16

#: Loader workers that can share a data set.
MOST_WORKERS = 1024


class Cell(dict[str, torch.Tensor]):
    """One cell's tensors, with its identity, on which masks depend, as attributes.

    Attributes:
        index: Number of the cell in the data set.
        epoch: Epoch in which it was drawn; with `sample_by`, how often it was drawn before.
        is_measured_g: True for genes that it was measured with, shape (g,); None for all.
    """

    index: int = -1
    epoch: int = 0
    is_measured_g: np.ndarray | None = None


#: The tokens of one round: cells by row number, where each cell in order is, and sizes of batches (None: equal).
_Round = tuple[TokenBlock, np.ndarray, np.ndarray | None]


class BlockCollator(Protocol):
    """A collator that also takes a whole block of cells."""

    def collate_block(self, block: TokenBlock) -> dict[str, Any]:
        """Turn a block into a batch."""


def columns_of(phenotypes: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return phenotype -> obs column, from a mapping or from texts NAME=COLUMN.

    Example:
        >>> columns_of(["cell_type=CellType"])
        {'cell_type': 'CellType'}
    """
    if isinstance(phenotypes, Mapping):
        return dict(phenotypes)
    columns = named_values(phenotypes, flag="phenotypes")
    for name, column in columns.items():
        if column is None:
            raise InputError(
                f"phenotypes has {name!r}, which names no column of obs. Write --phenotypes {name}=COLUMN, or leave it "
                "out if the column has the same name."
            )
    return {name: str(column) for name, column in columns.items()}


def donors_of(dataset: "IterableAnnDataset", donor_column: str | None) -> np.ndarray | None:
    """Return the donor of each cell, text of shape (n,), or None if a file lacks the column."""
    if not donor_column:
        return None
    columns = []
    for file in (shard.source for shard in dataset.shards):  # one after the other: each is open only while it is read
        if donor_column not in file.columns_of("obs"):
            return None
        columns.append(file.obs_column(donor_column).astype(str).to_numpy(dtype=object))
    return np.concatenate(columns)


class IterableAnnDataset(IterableDataset[Cell]):
    """Streams cells from h5ad files (or AnnData objects in memory).

    The order is a pure function of (seed, epoch). Ranks take every `world_size`-th cell of it, and loader workers whole
    batches in turn, so batches are the same for any number of workers. Memory holds one round of `buffer_rows`
    tokenized cells, whatever the size of the files. `state_dict` and `state_after` return the position of the stream;
    a stream continues there without reading what came before, also with another number of ranks or workers.

    Args:
        paths: Files, brace patterns, globs or folders; or AnnData objects. Of the files of a corpus, only the first is
            opened and checked now, the others when they are read.
        tokenizer: Gives the panel, the vocabulary and the layout of sequences.
        shuffle: True draws a new order per epoch; False keeps the order of the files.
        seed: What the order depends on, with the epoch.
        batch_size: Cells per batch of the loader, so that workers can take whole batches.
        phenotype_category: Adds `labels`, the index of this phenotype's label. Cells without one are left out, and the
            answer itself is never in the input, even when the tokenizer includes it.
        binary_label: With `phenotype_category`: 1 for this label, 0 for all others.
        layer, gene_id_column, min_gene_coverage: Which matrix, which var column names the genes, least share of the
            panel that a file must have.
        gene_map: Table of what the files call a gene and what the panel calls it, see `read_gene_map`.
        normalization: How values are scaled; "auto" leaves that to the tokenizer.
        missing_labels: Labels that mean "not known", in addition to an empty one, NaN and `unknown`.
        where: Only cells that have these values, by columns of `obs`; cells are numbered without the others.
        has_all_values: False allows values in `where` that no cell has, but not only such.
        rank, world_size: Which part of the cells this process yields.
        keep_all: True yields each cell exactly once over all ranks (evaluation); False gives every rank the same
            number. Default: the opposite of `shuffle`.
        sample_by: Phenotype or obs column whose rare labels are drawn more often per cell, see `order.draw_rates`. An
            epoch then has about as many draws as there are cells.
        phenotypes: Phenotype -> obs column where the names differ; also as texts "cell_type=CellType".
        constant_labels: Phenotype -> input id that every cell gets, whatever obs says.
        optional_labels: False refuses a file that lacks the column of an included phenotype.
        threads: Threads that read and tokenize local files, in addition to the thread that uses the cells; loader
            workers have one each. The cells do not depend on it.
        block_rows, buffer_rows: Neighboring rows that travel together, and rows shuffled in memory.
        tokens_per_batch: Fills batches up to so many tokens instead of `batch_size` cells, counted as the tokenizer
            makes them, before masking and thinning. Batches of prepared shards never exceed it; batches of other files,
            whose lengths are estimates, rarely and slightly. Ranks then take whole batches in turn.

    Raises:
        InputError: A path does not exist or cannot be read, its genes do not cover the panel, a label column is
            missing, no cell has a label, or `tokens_per_batch` may not hold a single cell.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[Any],
        tokenizer: GeneTokenizer,
        *,
        shuffle: bool = False,
        seed: int = 0,
        batch_size: int = 1,
        phenotype_category: str | None = None,
        binary_label: str | None = None,
        layer: str | None = None,
        gene_id_column: str | None = None,
        gene_map: str | Path | None = None,
        normalization: Normalization = ReadingConfig.normalization,
        missing_labels: Sequence[str] = (),
        min_gene_coverage: float = ReadingConfig.min_gene_coverage,
        where: Where = (),
        has_all_values: bool = True,
        rank: int = 0,
        world_size: int = 1,
        keep_all: bool | None = None,
        sample_by: str | None = None,
        phenotypes: Mapping[str, str] | Sequence[str] = (),
        constant_labels: dict[str, int] | None = None,
        optional_labels: bool = True,
        block_rows: int = DEFAULT_BLOCK_ROWS,
        buffer_rows: int = DEFAULT_BUFFER_ROWS,
        tokens_per_batch: int | None = None,
        threads: int = DEFAULT_THREADS,
    ) -> None:
        super().__init__()
        self.tokenizer, self.shuffle, self.seed, self.batch_size = tokenizer, shuffle, seed, batch_size
        self.phenotype_category, self.binary_label = phenotype_category, binary_label
        self.rank, self.world_size = rank, world_size
        self.keep_all = not shuffle if keep_all is None else keep_all
        self.block_rows, self.buffer_rows, self.threads = block_rows, buffer_rows, threads
        self.tokens_per_batch = tokens_per_batch
        self._last_batches: BudgetSampler | None = None
        self._last_drawn: tuple[int, np.ndarray] | None = None  # the rows of the last epoch that was asked for
        if tokens_per_batch is not None and tokens_per_batch < tokenizer.max_length:
            raise InputError(
                f"tokens_per_batch is {tokens_per_batch}, but one cell may have max_length {tokenizer.max_length}. "
                "Raise --tokens_per_batch, or lower --max_length."
            )
        # Shared with live loader workers: the epoch and a loaded position, and which of this process and workers 0, 1,
        # ... have yet to begin there.
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._has_to_resume = torch.zeros(1 + MOST_WORKERS, dtype=torch.bool).share_memory_()
        self._begin = self._done = 0
        options = {**tokenizer.shard_options(), "gene_id_column": gene_id_column, "obs_columns": columns_of(phenotypes)}
        options |= {"constant_labels": constant_labels or {}, "optional_labels": optional_labels}
        options |= {"missing_labels": tuple(missing_labels), "gene_map": read_gene_map(gene_map)}
        options |= {} if normalization == "auto" else {"normalization": normalization}
        sources = as_sources(paths)
        self.where = conditions(where)
        self.shards = ShardCache(sources, layer=layer, where=self.where, **options)
        if self.where:
            check_where((shard.source for shard in self.shards), self.where, has_all_values=has_all_values)
        self.sizes = self._checked_sizes(getattr(sources, "sizes", None), min_gene_coverage)
        self._starts_f = np.concatenate([[0], np.cumsum(self.sizes)])[:-1]
        self._class_n = self._classes() if phenotype_category is not None else None
        if sum(self.sizes) == 0:
            raise InputError(f"{listed(self.paths)} hold no cells. Give at least one file with cells.")
        self._draws = CellDraws(self._draw_rates(sample_by), seed) if sample_by is not None else None

    # -- what is decided at the door ------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        """The files, in order."""
        return [shown_path(source) if isinstance(source, str) else "AnnData" for source in self.shards.sources]

    def _checked_sizes(self, known_sizes: Sequence[int] | None, min_gene_coverage: float) -> tuple[int, ...]:
        """Count the cells of each file; of a corpus, whose sizes are known, only the first is opened here."""
        if known_sizes is None or self.where:
            sizes, scales, notes = list[int](), dict[str, str](), list[tuple[str, list[str]]]()
            for shard in self.shards:
                sizes.append(self._check(shard, min_gene_coverage))
                scales.setdefault(shard.values.scale.name, shard.path)
                notes.append((shard.path, shard.values.notes))
            warn_of_notes(notes)
            if len(scales) > 1:
                named = ", ".join(f"{name} in {path}" for name, path in scales.items())
                logger.warning("the files are on %d scales (%s): all are brought to one", len(scales), named)
            return tuple(sizes)
        assert len(known_sizes) == len(self.shards)
        if len(known_sizes) > 0:
            self._check(self.shards[0], min_gene_coverage)
            warn_of_notes([(self.shards[0].path, self.shards[0].values.notes)])
        if len(known_sizes) > 1:
            logger.info("%d files of one corpus, %s cells", len(known_sizes), f"{sum(known_sizes):,}")
        return tuple(known_sizes)

    @staticmethod
    def _check(shard: Shard, min_gene_coverage: float) -> int:
        shard.check_genes(min_gene_coverage)
        shard.values.check_has_values()
        logger.info("%s: %s cells, %s", shard.path, f"{len(shard):,}", shard.alignment.describe())
        if shard.coverage < shard.alignment.coverage:  # a shard of `prepare` holds cells of several files
            logger.info("%s: some of its cells come from files that measure only %.1f%% of the panel",
                        shard.path, 100 * shard.coverage)  # fmt: skip
        if shard.source.format != "csr":
            how = "dense" if shard.source.format == "dense" else "compressed by columns"
            logger.info("%s is stored %s: slow; `perturbgene prepare` makes it fast", shard.path, how)
        return len(shard)

    def _classes(self) -> np.ndarray:
        category = self.phenotype_category
        assert category is not None
        start, _ = self.tokenizer.vocabulary.id_range(category)
        shards = (replace(shard, optional_labels=False) for shard in self.shards)
        ids_n = np.concatenate([shard.label_ids(category) for shard in shards])
        if (ids_n == ABSENT).all():
            raise self.shards[0].no_known_label(category)
        if (ids_n == ABSENT).any():
            logger.warning("%d of %d cells have no known %s and are left out", (ids_n < 0).sum(), len(ids_n), category)
        if self.binary_label is None:
            return np.where(ids_n == ABSENT, ABSENT, ids_n - start)
        wanted = self.tokenizer.vocabulary.label_id(category, self.binary_label)
        if wanted == ABSENT:
            known = listed(self.tokenizer.phenotypes[category], most=12)
            raise InputError(f"binary_label {self.binary_label!r} is not a {category}. Choose one of: {known}.")
        return np.where(ids_n == ABSENT, ABSENT, (ids_n == wanted).astype(np.int64))

    def _draw_rates(self, sample_by: str) -> np.ndarray:
        """Return how often each cell is drawn per epoch, by its label in a column; 0 for cells that are left out."""
        column = self.shards.options["obs_columns"].get(sample_by, sample_by)
        numbers, columns, label_n = dict[str, int](), set[str](), list[np.ndarray]()
        for shard in self.shards:
            columns |= set(shard.source.columns_of("obs"))
            labels = Labels(np.zeros(len(shard), dtype=np.int32), ("",))
            if column in shard.source.columns_of("obs"):
                labels = Labels.of(shard.source.obs_column(column))
            missing = [is_missing(text, self.shards.options["missing_labels"]) for text in labels.texts]
            parts = zip(labels.texts, missing, strict=True)
            known = [ABSENT if is_not else numbers.setdefault(text, len(numbers)) for text, is_not in parts]
            label_n.append(np.array(known)[labels.codes_n])
        if column not in columns:
            raise InputError(
                f"sample_by is {sample_by!r}, but no training file has that obs column. "
                f"{did_you_mean(column, sorted(columns))} A corpus keeps its phenotypes and the column of its split. "
                "Change --sample_by."
            )
        rate_n = np.zeros(sum(self.sizes))
        rows = slice(None) if self._rows_n is None else self._rows_n
        rate_n[rows] = draw_rates(np.concatenate(label_n)[rows])
        logger.info(
            "--sample_by %s: of %d labels, a cell is drawn %.2g to %.2g times per epoch",
            sample_by, len(numbers), rate_n[rows].min(), rate_n[rows].max(),
        )  # fmt: skip
        return rate_n

    def class_counts(self, *, per_draw: bool = False) -> np.ndarray:
        """Count the labelled cells of each class over all ranks, or how many are drawn per epoch, shape (k,)."""
        assert self._class_n is not None and self.phenotype_category is not None
        num_classes = 2 if self.binary_label else len(self.tokenizer.phenotypes[self.phenotype_category])
        is_known_n, weight_n = self._class_n >= 0, None
        if per_draw and self._draws is not None:
            weight_n = self._draws.rate_n[is_known_n]
        return np.bincount(self._class_n[is_known_n], weights=weight_n, minlength=num_classes)

    @property
    def rate_n(self) -> np.ndarray | None:
        """How often each cell is drawn per epoch, shape (n,); None if all come once."""
        return None if self._draws is None else self._draws.rate_n

    @property
    def coverage(self) -> float:
        """Share of the panel's genes that the files measure, in 0..1: of several files, the least."""
        return min(shard.coverage for shard in self.shards)

    # -- the order ------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch, shared with live loader workers."""
        return int(self._start[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order, in live workers too; naming the current one again keeps a loaded position."""
        if epoch != self.epoch:
            self._move(epoch, 0)

    def _move(self, epoch: int, position: int) -> None:
        self._start.copy_(torch.tensor([epoch, position]))
        self._has_to_resume.fill_(bool(position))
        self._begin = self._done = position

    @cached_property
    def _rows_n(self) -> np.ndarray | None:
        """Rows that take part, or None for all."""
        return None if self._class_n is None or (self._class_n >= 0).all() else np.flatnonzero(self._class_n >= 0)

    def keep(self, start: int, stop: int) -> None:
        """Leave out all cells but those numbered from `start` up to `stop`, which keep their numbers."""
        assert self._rows_n is None, "some cells are left out already"
        self._rows_n = np.arange(start, stop)

    @property
    def num_cells(self) -> int:
        """Cells that take part, over all ranks."""
        return sum(self.sizes) if self._rows_n is None else len(self._rows_n)

    @property
    def chosen_rows(self) -> tuple[np.ndarray, int] | None:
        """Rows of the cells that `where` has chosen, numbered over all files, and the number of all rows; else None."""
        if not self.where:
            return None
        rows, start = [], 0
        for shard in self.shards:
            assert isinstance(shard.source, ChosenCells)
            rows.append(start + shard.source.rows_n)
            start += shard.source.base.shape[0]
        return np.concatenate(rows), start

    def cell_sampler(self, epoch: int | None = None) -> CellSampler:
        """The order of all ranks' cells in an epoch, by default the current one."""
        epoch, rows_n = self.epoch if epoch is None else epoch, self._rows_n
        if self._draws is not None:
            if self._last_drawn is None or self._last_drawn[0] != epoch:
                self._last_drawn = epoch, self._draws.rows(epoch)
            rows_n = self._last_drawn[1]
        return CellSampler(
            self.sizes, seed=self.seed, epoch=epoch, is_shuffled=self.shuffle, rows_n=rows_n,
            block_rows=self.block_rows, buffer_rows=self.buffer_rows,
        )  # fmt: skip

    @cached_property
    def _genes_n(self) -> np.ndarray:
        """Genes that each cell's sequence will have, estimated without reading values, shape (n,)."""
        budget = self.tokens_per_batch
        return np.concatenate([gene_counts(shard, self.tokenizer, budget=budget) for shard in self.shards])

    def batch_sampler(self, epoch: int | None = None) -> BudgetSampler:
        """The batches of all ranks in an epoch under a budget of tokens; those of the last epoch asked for are kept."""
        assert self.tokens_per_batch is not None
        cells = self.cell_sampler(epoch)
        if self._last_batches is None or self._last_batches.cells.epoch != cells.epoch:
            length_n = self._genes_n + (2 + len(self.tokenizer.included_phenotypes))
            self._last_batches = BudgetSampler(cells, length_n, self.tokens_per_batch)
        return self._last_batches

    def num_units(self, epoch: int | None = None) -> int:
        """Count what is dealt out to ranks in an epoch: cells, or batches under a budget of tokens."""
        return len(self.batch_sampler(epoch) if self.tokens_per_batch else self.cell_sampler(epoch))

    @property
    def units_per_batch(self) -> int:
        """By how many units a batch moves the position on."""
        return 1 if self.tokens_per_batch else self.batch_size

    def _sampler(self, begin: int = 0, *, epoch: int | None = None) -> WorkerSampler:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return WorkerSampler(
            self.num_units(epoch), begin=begin, rank=self.rank, world_size=self.world_size, is_even=not self.keep_all,
            batch_size=self.units_per_batch, worker=worker, num_workers=num_workers,
        )  # fmt: skip

    def __len__(self) -> int:
        """Cells that this rank yields in the whole current epoch."""
        num_units = len(self._sampler())
        if not self.tokens_per_batch:
            return num_units
        own = slice(self.rank, self.rank + num_units * self.world_size, self.world_size)
        return int(self.batch_sampler().sizes_b[own].sum())

    def num_batches(self, position: int = 0, *, epoch: int | None = None) -> int:
        """Count the batches of this rank from a position on, in an epoch, by default the current one."""
        return -(-len(self._sampler(position, epoch=epoch)) // self.units_per_batch)

    # -- the position of the stream -------------------------------------------------------------------------------

    @cached_property
    def _fingerprint(self) -> str:
        """A hash of everything that the order of an epoch depends on, except seed and epoch."""
        facts = [
            list(self.sizes),
            self.shuffle,
            self.block_rows,
            self.buffer_rows,
            *([self.where] if self.where else []),
        ]
        rows = b"" if self._rows_n is None else self._rows_n.astype(np.int64).tobytes()
        rows += self._genes_n.tobytes() if self.tokens_per_batch else b""
        rows += b"" if self._draws is None else self._draws.rate_n.tobytes()
        return hashlib.sha256(json.dumps(facts).encode() + rows).hexdigest()[:16]

    @property
    def _unit(self) -> str:
        """What a position counts."""
        return f"batches of {self.tokens_per_batch} tokens" if self.tokens_per_batch else "cells"

    def _state(self, position: int) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": position,
            "num_cells": self.num_cells,
            "fingerprint": self._fingerprint,
            **({"rule": self._unit} if self.tokens_per_batch else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, fit for JSON: `consumed` counts cells (or batches of `rule`) of all ranks.

        Loader workers run ahead of their consumer: with a loader that has workers, use `state_after`.
        """
        return self._state(self._done)

    def state_after(self, num_batches: int) -> dict[str, Any]:
        """Return the position once each rank has used so many batches since the epoch, or a loaded state, began."""
        done = self._begin + num_batches * self.units_per_batch * self.world_size
        return self._state(min(done, self.num_units()))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise an InputError if a state is of another corpus, other batches, another seed or version, or none."""
        if not {"seed", "epoch", "consumed", "fingerprint"} <= set(state):
            raise InputError(f"{dict(state)} is no state of a data set. Give what `state_dict` returned.")
        check_format("the state of the data set", state.get("version"), reads=STATE_VERSION)
        if (unit := state.get("rule", "cells")) != self._unit:
            raise InputError(
                f"the checkpoint counts {unit}, so it does not say which {self._unit} are done. Give "
                "--tokens_per_batch as before, or start a new run from its weights with --pretrained_model_path."
            )
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                f"the state is of another corpus ({state.get('num_cells', 0):,} cells, {state['fingerprint']}), not of "
                f"{listed(self.paths)} ({self.num_cells:,} cells, {self._fingerprint}): sizes, labels, shuffle, "
                "block_rows or buffer_rows differ. Give the same files in the same order, or start a new run."
            )
        if state["seed"] != self.seed:
            raise InputError(
                f"the state was drawn with seed {state['seed']}, which orders cells differently from seed {self.seed}. "
                f"Give --seed {state['seed']}, or start a new run."
            )
        num_units = self.num_units(state["epoch"])
        if not 0 <= state["consumed"] <= num_units:
            raise InputError(f"the state has {state['consumed']:,} of {num_units:,} {unit} done. Start a new run.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue at the position of `state`; nothing before it is read.

        Another epoch, or a second iteration, starts at the first cell. The numbers of ranks and workers may differ from
        those that saved the state: each cell that is left still comes exactly once.

        Raises:
            InputError: It does not fit, see `check_state`, or is loaded within a loader worker.
        """
        if get_worker_info() is not None:
            raise InputError("a loader worker cannot load a state. Load it into the data set before the loader starts.")
        self.check_state(state)
        self._move(int(state["epoch"]), int(state["consumed"]))

    def _take_start(self) -> int:
        """Return the position at which this iteration begins: a loaded one once, then the epoch's first."""
        info = get_worker_info()
        who = 0 if info is None else 1 + info.id
        self._begin = self._done = int(self._start[1]) if self._has_to_resume[who] else 0
        self._has_to_resume[who] = self._has_to_resume[0] = False
        self._has_to_resume[1 if info is None else 1 + info.num_workers :] = False  # of loaders with more workers
        return self._begin

    def _own_rows(self, begin: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield this worker's rows of each round, in order, and the sizes of their batches (None: equal)."""
        sampler, units = self._sampler(begin), self.batch_sampler() if self.tokens_per_batch else self.cell_sampler()
        for first, rows_n, *sizes in units.rounds(skip=begin):
            sizes_u = sizes[0] if sizes else np.ones(len(rows_n), dtype=np.int64)
            is_own_u = sampler.holds(first + np.arange(len(sizes_u)))
            if is_own_u.any():
                yield rows_n[np.repeat(is_own_u, sizes_u)], sizes_u[is_own_u] if sizes else None

    # -- the cells ------------------------------------------------------------------------------------------------

    def _windows(self, rows_m: np.ndarray) -> Iterator[list[tuple[Shard, int, np.ndarray]]]:
        """Yield chunks of (shard, its first cell, rows) of a few files at a time."""
        chunks: list[tuple[Shard, int, np.ndarray]] = []
        for number, (file, rows) in enumerate(split_rows(rows_m, starts_f=self._starts_f), start=1):
            shard, first_cell = self.shards[file], int(self._starts_f[file])
            if len(shard) != self.sizes[file]:
                raise InputError(
                    f"{shard.path} holds {len(shard):,} cells, not {self.sizes[file]:,}: it was changed after it was "
                    "listed or during the run. Prepare the corpus again, or start a new run."
                )
            chunks += [(shard, first_cell, rows[at : at + CHUNK_ROWS]) for at in range(0, len(rows), CHUNK_ROWS)]
            # Of files that are held whole, the cache keeps few: another would close this one, and reads reopen it.
            if number % FILES_AT_ONCE == 0 or shard.is_held_whole:
                yield chunks
                chunks = []
        if chunks:
            yield chunks

    def _tokenize(self, chunk: tuple[Shard, int, np.ndarray], epoch: int) -> TokenBlock:
        """Read and tokenize some rows of one file, without the answer of a classifier."""
        shard, first_cell, rows_m = chunk
        block = shard.read(rows_m, first_cell=first_cell)
        if self.phenotype_category in self.tokenizer.included_phenotypes:
            label_ids_np = block.label_ids_np.copy()
            label_ids_np[:, self.tokenizer.included_phenotypes.index(self.phenotype_category)] = ABSENT
            block = replace(block, label_ids_np=label_ids_np)
        return self.tokenizer.tokenize_block(block, epoch=epoch)

    def _read_round(
        self, rows_m: np.ndarray, sizes_b: np.ndarray | None, epoch: int, buffer: TokenBuffer, pool: ThreadPoolExecutor
    ) -> _Round:
        """Read and tokenize one round in file order, the chunks of a few files at a time in several threads."""
        repetition_m, rows_m = np.divmod(rows_m, sum(self.sizes))
        read_m, place = np.unique(rows_m, return_inverse=True)  # a row that is drawn twice is read once
        blocks: list[TokenBlock] = []
        for chunks in self._windows(read_m):
            run = pool.map if self.threads > 1 and get_worker_info() is None else map
            blocks += run(self._tokenize, chunks, itertools.repeat(epoch))
        block = TokenBlock.join(blocks, buffer=buffer)
        if self._draws is not None:  # each draw of a cell has masks of its own
            block, place = block.take(place), np.arange(len(place))
            block = replace(block, epochs_n=self._draws.before(epoch, rows_m) + repetition_m)
        if self._class_n is not None:
            block = replace(block, labels_n=self._class_n[block.cells_n])
        return block, place, sizes_b

    def _rounds(self, begin: int, epoch: int) -> Iterator[_Round]:
        """Yield rounds; a thread reads the next one while the current one is used."""
        buffers = itertools.cycle((TokenBuffer(), TokenBuffer()))
        with (
            ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="tokenize") as tokenizing,
            ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool,
        ):
            waiting: Future[_Round] | None = None
            for rows_m, sizes_b in self._own_rows(begin):
                ahead = pool.submit(self._read_round, rows_m, sizes_b, epoch, next(buffers), tokenizing)
                if waiting is not None:
                    yield waiting.result()
                waiting = ahead
            if waiting is not None:
                yield waiting.result()

    def _blocks(self, begin: int, epoch: int) -> Iterator[TokenBlock]:
        """Yield batches: those of the budget, or of `batch_size` cells, which may span two rounds."""
        num_empty = 0
        rest: list[TokenBlock] = []
        for block, place, sizes_b in self._rounds(begin, epoch):
            num_empty += int((block.token_type_ids_l[block.offsets_n1[1:] - 2] < self.tokenizer.first_gene_type).sum())
            if sizes_b is None:
                cuts = np.arange(self.batch_size - sum(map(len, rest)), len(place), self.batch_size)
            else:
                cuts = np.cumsum(sizes_b)[:-1]
            for piece in np.split(place, cuts):
                rest.append(block.take(piece))
                if sizes_b is not None or sum(map(len, rest)) == self.batch_size:
                    yield TokenBlock.join(rest)
                    rest = []
        if rest:
            yield TokenBlock.join(rest)
        if num_empty and epoch == 0:
            logger.warning("%d cells express no gene of the panel; they have only their phenotypes", num_empty)

    def blocks(self) -> Iterator[TokenBlock]:
        """Yield this rank's and worker's cells in blocks of `batch_size`, without a Python step per cell."""
        begin, num_units = self._take_start(), self.num_units()
        for block in self._blocks(begin, self.epoch):
            done = self._done + self.world_size * (1 if self.tokens_per_batch else len(block))
            self._done = min(done, num_units)
            yield block

    def __iter__(self) -> Iterator[Cell]:
        """Yield this rank's and worker's cells: `input_ids`, `token_type_ids`, `attention_mask`, maybe `labels`."""
        begin, epoch, num_units = self._take_start(), self.epoch, self.num_units()
        for block in self._blocks(begin, epoch):
            measured_tg, table_n = block.tables(len(self.tokenizer.panel))
            masks = [None if is_measured_g.all() else is_measured_g for is_measured_g in measured_tg]
            for row in range(len(block)):
                if not self.tokens_per_batch or row == len(block) - 1:
                    self._done = min(self._done + self.world_size, num_units)
                cell = Cell(self.tokenizer.as_tensors(*block.cell(row)))
                drawn = epoch if block.epochs_n is None else int(block.epochs_n[row])
                cell.index, cell.epoch, cell.is_measured_g = int(block.cells_n[row]), drawn, masks[table_n[row]]
                if block.labels_n is not None:
                    cell["labels"] = torch.tensor(int(block.labels_n[row]))
                yield cell

    def batches(self, collator: BlockCollator) -> "Batches":
        """Return the same cells as finished batches, for `DataLoader(..., batch_size=None)`: the fast way."""
        return Batches(self, collator)


class Batches(IterableDataset[dict[str, Any]]):
    """The batches of an `IterableAnnDataset`, collated where they are read; see `IterableAnnDataset.batches`."""

    def __init__(self, cells: IterableAnnDataset, collator: BlockCollator) -> None:
        super().__init__()
        self.cells, self.collator = cells, collator

    def __len__(self) -> int:
        """Batches that this rank yields per whole epoch."""
        return self.cells.num_batches()

    def set_epoch(self, epoch: int) -> None:
        self.cells.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what the collator makes of each block."""
        for block in self.cells.blocks():
            yield self.collator.collate_block(block)
