"""Cells of many h5ad files as a stream of token dicts, in an order that depends on (seed, epoch) alone.

Owns walking the plan, for one rank and one loader worker, and where it stopped; leaves reading to `shards`, tokens to
the tokenizer, masks and padding to the collators. Letters: n cells, m cells of one round for this worker.
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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from perturbgene.data_utils.budget import BatchPlan, BatchRule
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.lengths import gene_counts
from perturbgene.data_utils.opening import H5adFile, expand_paths
from perturbgene.data_utils.order import DEFAULT_BLOCK_ROWS, DEFAULT_BUFFER_ROWS, RowPlan, Share, split_rows
from perturbgene.data_utils.scale import ExpressionBlock
from perturbgene.data_utils.shards import Shard, ShardCache
from perturbgene.data_utils.tokenization import GeneTokenizer, Room, TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.urls import shown_path

logger = logging.getLogger(__name__)

STATE_VERSION = 1
#: How often the rule of batches may change within one epoch.
MOST_CHANGES = 16
#: Rules that held in an epoch before the present one, each with the number of batches that were done by its end.
_Earlier = tuple[tuple[int, BatchRule], ...]

#: Rows that are tokenised at once: their values are then still in the processor's cache.
CHUNK_ROWS = 256

#: More than two hardly help: the batches themselves are then what takes time.
DEFAULT_THREADS = 2

#: Files that threads read from at the same time; few enough that the cache of open files closes none of them.
FILES_AT_ONCE = 16


class Cell(dict[str, torch.Tensor]):
    """One cell's tensors; its identity, on which masks hang, rides along as attributes.

    Attributes:
        index: Number of the cell in the data set.
        epoch: Epoch in which it was drawn.
        seed: Seed of the data set, on which random truncation depends; -1 when unknown.
        is_measured_g: True for genes that it was measured with, shape (g,); None for all.
    """

    index: int = -1
    epoch: int = 0
    seed: int = -1
    is_measured_g: np.ndarray | None = None


class _Round(NamedTuple):
    """Rows of one round that a worker takes, and the sizes of their batches where these are not all alike."""

    rows_m: np.ndarray
    sizes_b: np.ndarray | None


class BlockCollator(Protocol):
    """A collator that also takes a whole block of cells."""

    def collate_block(self, block: TokenBlock) -> dict[str, Any]:
        """Turn a block into a batch."""


class IterableAnnDataset(IterableDataset[Cell]):
    """Streams cells from h5ad files (or AnnData objects in memory).

    The order is a pure function of (seed, epoch); ranks take every `world_size`-th cell of it, and loader workers whole
    batches in turn, so batches are the same for any number of workers. Memory holds one round of `buffer_rows`
    tokenised cells, whatever the size of the files. `state_dict` says where the stream stands, in the form that
    torchdata's `StatefulDataLoader` stores; a stream continues there without reading what came before, also with
    another number of ranks or workers.

    Args:
        paths: Files, brace patterns, globs or folders; or AnnData objects.
        tokenizer: Gives the panel, the vocabulary and the layout of sequences.
        shuffle: True draws a new order per epoch; False keeps the order of the files.
        seed: What order and random truncation depend on, with the epoch.
        batch_size: Cells per batch of the loader, so that workers can take whole batches.
        phenotype_category: Adds `labels`, the index of this phenotype's label; cells without one are left out, and the
            answer itself never stands in the input, even when the tokenizer includes it.
        binary_label: With `phenotype_category`: 1 for this label, 0 for all others.
        layer, gene_id_column, min_gene_coverage: Which matrix, which var column names the genes, least share of the
            panel that a file must have.
        missing_labels: Labels that mean "not known", beside an empty one, NaN and `unknown`.
        rank, world_size: Which part of the cells this process yields.
        keep_all: True yields each cell exactly once over all ranks (evaluation); False gives every rank the same
            number. Default: the opposite of `shuffle`.
        obs_columns: Phenotype -> obs column where the names differ.
        constant_labels: Phenotype -> input id that every cell gets, whatever obs says.
        optional_labels: False refuses a file that lacks the column of an included phenotype.
        known_sizes: Cells of each file where a manifest says so; then files are opened when they are read, not before,
            and the genes of the first speak for all.
        threads: Threads that read and tokenise local files, beside the one that uses the cells; loader workers have one
            each. What comes out does not depend on it.
        block_rows, buffer_rows: Neighbouring rows that travel together, and rows shuffled in memory.
        tokens_per_batch: Fills batches up to so many tokens in place of `batch_size` cells, counted as the tokenizer
            makes them, before masking and thinning: never more of prepared shards, and of other files, whose lengths
            are estimates, seldom and little more. Ranks then take whole batches in turn.
        group_by_length: True gives the cells of a batch like lengths, to be padded.

    Raises:
        InputError: A path does not exist or cannot be read, its genes do not cover the panel, a label column is
            missing, no cell carries a label, or `tokens_per_batch` may not hold a single cell.
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
        missing_labels: Sequence[str] = (),
        min_gene_coverage: float = 0.5,
        rank: int = 0,
        world_size: int = 1,
        keep_all: bool | None = None,
        obs_columns: dict[str, str] | None = None,
        constant_labels: dict[str, int] | None = None,
        optional_labels: bool = True,
        block_rows: int = DEFAULT_BLOCK_ROWS,
        buffer_rows: int = DEFAULT_BUFFER_ROWS,
        tokens_per_batch: int | None = None,
        group_by_length: bool = False,
        known_sizes: Sequence[int] | None = None,
        threads: int = DEFAULT_THREADS,
    ) -> None:
        super().__init__()
        self.tokenizer, self.shuffle, self.seed, self.batch_size = tokenizer, shuffle, seed, batch_size
        self.phenotype_category, self.binary_label = phenotype_category, binary_label
        self.rank, self.world_size = rank, world_size
        self.keep_all = not shuffle if keep_all is None else keep_all
        self.block_rows, self.buffer_rows, self.threads = block_rows, buffer_rows, threads
        self.tokens_per_batch, self.has_planned_batches = tokens_per_batch, bool(tokens_per_batch) or group_by_length
        self._batch_rule = BatchRule(1 if tokens_per_batch else batch_size, tokens_per_batch)
        self._last_plan: tuple[tuple[int, _Earlier, BatchRule], BatchPlan] | None = None
        self._genes_by_budget: dict[int | None, np.ndarray] = {}
        if tokens_per_batch is not None and tokens_per_batch < tokenizer.max_length:
            raise InputError(
                f"tokens_per_batch is {tokens_per_batch}, but one cell may have max_length {tokenizer.max_length}. "
                "Raise --tokens_per_batch, or lower --max_length."
            )
        # The epoch, and the position where its stream starts: shared with loader workers that live already.
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        # Rules of batches that held in this epoch before the present one: (batches by then, cells or 0, tokens or 0).
        self._changes = torch.zeros((MOST_CHANGES, 3), dtype=torch.int64).share_memory_()
        # A state that was loaded within a loader worker: (epoch, position where dealing began, position done).
        self._own_start: tuple[int, int, int] | None = None
        self._begin, self._consumed = 0, 0
        options = {**tokenizer.shard_options(), "gene_id_column": gene_id_column, "obs_columns": obs_columns or {}}
        options |= {"constant_labels": constant_labels or {}, "optional_labels": optional_labels}
        options |= {"missing_labels": tuple(missing_labels)}
        self.shards = ShardCache(_as_sources(paths), layer=layer, **options)
        self.sizes = self._checked_sizes(known_sizes, min_gene_coverage)
        self._starts_f = np.concatenate([[0], np.cumsum(self.sizes)])[:-1]
        self._class_n = self._classes() if phenotype_category is not None else None
        if sum(self.sizes) == 0:
            raise InputError(f"{listed(self.paths)} hold no cells. Give at least one file with cells.")

    # -- what is decided at the door ------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        """The files, in order."""
        return [shown_path(source) if isinstance(source, str) else "AnnData" for source in self.shards.sources]

    def _all_shards(self) -> Iterator[Shard]:
        for index in range(len(self.shards)):
            yield self.shards[index]

    def _checked_sizes(self, known_sizes: Sequence[int] | None, min_gene_coverage: float) -> tuple[int, ...]:
        """Count the cells of each file; with known sizes only the first is opened, the others when they are read."""
        if known_sizes is None:
            return tuple(self._check(shard, min_gene_coverage) for shard in self._all_shards())
        assert len(known_sizes) == len(self.shards)
        if len(known_sizes) > 0:
            self._check(self.shards[0], min_gene_coverage)
            logger.info("%d files of one corpus, %d cells", len(known_sizes), sum(known_sizes))
        return tuple(known_sizes)

    def _shard(self, file: int) -> Shard:
        """Return an open file, if it still holds the cells that the order was made for."""
        shard = self.shards[file]
        if len(shard) != self.sizes[file]:
            raise InputError(
                f"{shard.path} holds {len(shard):,} cells, not {self.sizes[file]:,}: it was changed after it was "
                "listed or during the run. Prepare the corpus again, or start anew."
            )
        return shard

    @staticmethod
    def _check(shard: Shard, min_gene_coverage: float) -> int:
        shard.alignment.check_coverage(min_gene_coverage, source=shard.path)
        logger.info("%s: %d cells, %s", shard.path, len(shard), shard.alignment.describe())
        if isinstance(shard.source, H5adFile) and shard.source.format != "csr":
            how = "dense" if shard.source.format == "dense" else "compressed by columns"
            logger.info("%s is stored %s: slow; `perturbgene prepare` makes it fast", shard.path, how)
        return len(shard)

    def _classes(self) -> np.ndarray:
        category = self.phenotype_category
        assert category is not None
        start, _ = self.tokenizer.vocabulary.id_range(category)
        ids = []
        for shard in self._all_shards():
            ids.append(replace(shard, optional_labels=False).label_ids(category))
        ids_n = np.concatenate(ids)
        if (ids_n == ABSENT).all():
            raise InputError(f"no cell of {listed(self.paths)} has a known {category!r}. Check obs and the vocabulary.")
        if (ids_n == ABSENT).any():
            logger.warning("%d of %d cells have no known %s and are left out", (ids_n < 0).sum(), len(ids_n), category)
        if self.binary_label is None:
            return np.where(ids_n == ABSENT, ABSENT, ids_n - start)
        wanted = self.tokenizer.vocabulary.label_id(category, self.binary_label)
        if wanted == ABSENT:
            known = listed(self.tokenizer.phenotypes[category], most=12)
            raise InputError(f"binary_label {self.binary_label!r} is not a {category}. Choose one of: {known}.")
        return np.where(ids_n == ABSENT, ABSENT, (ids_n == wanted).astype(np.int64))

    def class_counts(self) -> np.ndarray:
        """Count the labelled cells of each class over all ranks, int64 of shape (k,)."""
        assert self._class_n is not None and self.phenotype_category is not None
        num_classes = 2 if self.binary_label else len(self.tokenizer.phenotypes[self.phenotype_category])
        return np.bincount(self._class_n[self._class_n >= 0], minlength=num_classes)

    @property
    def coverage(self) -> float:
        """Share of the panel's genes that the files have, in 0..1: of several files, the least."""
        return min(shard.alignment.coverage for shard in self._all_shards())

    # -- the order ------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch, shared with live loader workers."""
        return int(self._start[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order (and random truncation), from its first cell on; reaches live workers too.

        The present epoch named again leaves a position that was loaded as it is.
        """
        if epoch != self.epoch:
            self._move(epoch, 0)

    def _move(self, epoch: int, position: int, earlier: _Earlier = ()) -> None:
        self._start.copy_(torch.tensor([epoch, position]))
        self._keep_earlier(earlier)
        self._begin = self._consumed = position

    def plan(self, epoch: int | None = None) -> RowPlan:
        """The order of all ranks' cells in an epoch, the present one unless told."""
        return RowPlan(
            self.sizes, seed=self.seed, epoch=self.epoch if epoch is None else epoch, is_shuffled=self.shuffle,
            rows_n=self._rows_n, block_rows=self.block_rows, buffer_rows=self.buffer_rows,
        )  # fmt: skip

    def _genes_of(self, rule: BatchRule) -> np.ndarray:
        """Genes that each cell's sequence will have, as far as its file tells without its values, shape (n,)."""
        if rule.budget not in self._genes_by_budget:
            genes = [gene_counts(shard, self.tokenizer, budget=rule.budget) for shard in self._all_shards()]
            self._genes_by_budget[rule.budget] = np.concatenate(genes)
        return self._genes_by_budget[rule.budget]

    def batch_plan(self, epoch: int | None = None) -> BatchPlan:
        """The batches of all ranks in an epoch, where they are planned: under a budget, or of like lengths."""
        epoch = self.epoch if epoch is None else epoch
        return self._batch_plan(epoch, self._earlier if epoch == self.epoch else (), self._batch_rule)

    def _batch_plan(self, epoch: int, earlier: _Earlier, rule: BatchRule) -> BatchPlan:
        """Plan an epoch in which some first batches were filled by other rules; the last plan is kept."""
        key = epoch, earlier, rule
        if self._last_plan is not None and self._last_plan[0] == key:
            return self._last_plan[1]
        plan, done = None, 0
        for until, one in (*earlier, (0, rule)):
            length_n = self._genes_of(one) + (2 + len(self.tokenizer.included_phenotypes))
            plan, done = BatchPlan(self.plan(epoch), length_n, one, plan, done), until
        assert plan is not None
        self._last_plan = key, plan
        return plan

    @property
    def _earlier(self) -> _Earlier:
        rows = [(until, BatchRule(size or 1, budget or None)) for until, size, budget in self._changes.tolist()]
        return tuple(row for row in rows if row[0])

    def _keep_earlier(self, earlier: _Earlier) -> None:
        self._changes.zero_()
        for row, (until, rule) in enumerate(earlier):
            self._changes[row] = torch.tensor([until, rule.batch_size, rule.budget or 0])

    @cached_property
    def _rows_n(self) -> np.ndarray | None:
        """Rows that take part, or None for all."""
        return None if self._class_n is None or (self._class_n >= 0).all() else np.flatnonzero(self._class_n >= 0)

    @property
    def num_cells(self) -> int:
        """Cells of an epoch over all ranks."""
        return sum(self.sizes) if self._rows_n is None else len(self._rows_n)

    def num_units(self, epoch: int | None = None) -> int:
        """Count what is dealt out to ranks in an epoch: cells, or batches where they are planned."""
        return len(self.batch_plan(epoch)) if self.has_planned_batches else self.num_cells

    @property
    def units_per_batch(self) -> int:
        """By how many units a batch moves the position on."""
        return 1 if self.has_planned_batches else self.batch_size

    def _share(self, begin: int = 0, *, epoch: int | None = None) -> Share:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return Share(
            self.num_units(epoch), begin=begin, rank=self.rank, world_size=self.world_size, is_even=not self.keep_all,
            batch_size=self.units_per_batch, worker=worker, num_workers=num_workers,
        )  # fmt: skip

    def __len__(self) -> int:
        """Cells that this rank yields in the present epoch, were it to yield all of it."""
        share = self._share()
        if not self.has_planned_batches:
            return len(share)
        own = slice(self.rank, self.rank + len(share) * self.world_size, self.world_size)
        return int(self.batch_plan().sizes_b[own].sum())

    def num_batches(self, position: int = 0, *, epoch: int | None = None) -> int:
        """Count the batches of this rank from a position on, in an epoch, the present one unless told."""
        return -(-len(self._share(position, epoch=epoch)) // self.units_per_batch)

    # -- where the stream stands ----------------------------------------------------------------------------------

    def _fingerprint_of(self, rule: BatchRule | None) -> str:
        """A hash of all that the order of an epoch depends on, beside seed and epoch."""
        facts = [list(self.sizes), self.shuffle, self.block_rows, self.buffer_rows]
        rows = b"" if self._rows_n is None else self._rows_n.astype(np.int64).tobytes()
        rows += self._genes_of(rule).tobytes() if rule is not None else b""
        return hashlib.sha256(json.dumps(facts).encode() + rows).hexdigest()[:16]

    @cached_property
    def _fingerprint(self) -> str:
        return self._fingerprint_of(self._batch_rule if self.has_planned_batches else None)

    @property
    def _rule(self) -> str:
        """What a position counts."""
        return str(self._batch_rule) if self.has_planned_batches else "cells"

    def _state(self, position: int) -> dict[str, Any]:
        earlier = [[until, str(rule)] for until, rule in self._earlier]
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": position,
            "begin": self._begin,
            "num_cells": self.num_cells,
            "fingerprint": self._fingerprint,
            **({"rule": self._rule} if self.has_planned_batches else {}),
            **({"earlier": earlier} if earlier else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands: numbers and strings only, fit for JSON.

        Returns:
            `seed` and `epoch`, which fix the order; `consumed`, how many cells of that order are done over all ranks
            and loader workers, or how many batches, where `rule` says how these are planned (and `earlier`, up to which
            batch other rules held in this epoch); `begin`, where the stream that is under way began; `num_cells` and
            `fingerprint`, by which another corpus is told apart. Within a loader worker it speaks for that worker
            alone, as `StatefulDataLoader` wants it; beside a plain loader with workers, which run ahead, use
            `state_after`.
        """
        return self._state(self._consumed)

    def state_after(self, num_batches: int) -> dict[str, Any]:
        """Say where the stream stands once each rank has used so many batches since it began.

        The stream begins at the first cell of the epoch, or where `load_state_dict` put it.
        """
        done = self._begin + num_batches * self.units_per_batch * self.world_size
        return self._state(min(done, self.num_units()))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that this data set cannot continue from.

        Raises:
            InputError: It was saved for another corpus, another seed or another version, or is no state.
        """
        if state.get("version") != STATE_VERSION or not {"seed", "epoch", "consumed", "fingerprint"} <= set(state):
            raise InputError(
                f"{dict(state)} is no state of this version ({STATE_VERSION}). Give what `state_dict` returned."
            )
        rule = BatchRule.read(state.get("rule", "cells"))
        if (rule is not None) != self.has_planned_batches:
            raise InputError(
                f"the state counts {state.get('rule', 'cells')}, so it does not say which {self._rule} are done. Give "
                "--tokens_per_batch and --train_sampling_strategy as before, or start anew."
            )
        if state["fingerprint"] != self._fingerprint_of(rule):
            raise InputError(
                f"the state is of another corpus ({state.get('num_cells', 0):,} cells, {state['fingerprint']}), not of "
                f"{listed(self.paths)} ({self.num_cells:,} cells, {self._fingerprint_of(rule)}): sizes, labels, "
                "shuffle, block_rows or buffer_rows differ. Give the same files in the same order, or start anew."
            )
        if state["seed"] != self.seed:
            raise InputError(
                f"the state was drawn with seed {state['seed']}, which orders cells differently from seed {self.seed}. "
                f"Give --seed {state['seed']}, or start anew."
            )
        num_units = self.num_cells
        if rule is not None:
            num_units = len(self._batch_plan(state["epoch"], _earlier_of(state, rule), rule))
        if not 0 <= state["consumed"] <= num_units:
            raise InputError(
                f"the state has {state['consumed']:,} of {num_units:,} {rule or 'cells'} done. Start anew."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where `state` stands; nothing before is read.

        The position holds for the state's epoch: `set_epoch` of another one starts at its first cell. Ranks and workers
        may be others than those that saved the state; each cell that is left still comes exactly once (in training, up
        to `world_size - 1` last cells of the epoch are left out as ever).

        Raises:
            InputError: It was saved for another corpus, another seed or another version, or is no state; or batches
                have changed their size and it is that of one loader worker.
        """
        self.check_state(state)
        epoch, consumed = int(state["epoch"]), int(state["consumed"])
        earlier = _earlier_of(state, self._batch_rule)
        if get_worker_info() is None:
            self._move(epoch, consumed, earlier)
            return
        # `StatefulDataLoader` hands each worker its own state: the worker goes on with its own turns of the dealing.
        if state.get("rule", "cells") != self._rule:  # no worker knows what the others have done
            raise InputError(
                f"the state of a loader worker counts {state['rule']}, not {self._rule}. Give `state_after` of the "
                "data set, or batches of the size of then."
            )
        self._start[0] = epoch
        self._keep_earlier(earlier)
        self._begin, self._consumed = int(state.get("begin", consumed)), consumed
        self._own_start = (epoch, self._begin, consumed)

    def _take_start(self) -> tuple[Share, int]:
        """Return what this worker takes and before which position all is done; a second iteration starts anew."""
        own, self._own_start = self._own_start, None
        if own is not None and own[0] == self.epoch:
            self._begin, self._consumed = own[1:]
        else:
            self._begin = self._consumed = int(self._start[1])
        if get_worker_info() is None:
            self._start[1] = 0
        return self._share(self._begin), self._consumed

    def _rows_of(self, share: Share, skip: int) -> Iterator[_Round]:
        """Yield what a worker takes of each round, from position `skip` on."""
        if self.has_planned_batches:
            yield from self._batches_of(share, skip)
            return
        for start, rows_n in self.plan().rounds(skip=skip):
            position_n = start + np.arange(len(rows_n))
            is_mine_n = share.holds(position_n) & (position_n >= skip)
            if is_mine_n.any():
                yield _Round(rows_n[is_mine_n], None)

    def _batches_of(self, share: Share, skip: int) -> Iterator[_Round]:
        for first, rows_n, sizes_b in self.batch_plan().rounds(skip=skip):
            number_b = first + np.arange(len(sizes_b))
            is_mine_b = share.holds(number_b) & (number_b >= skip)
            if is_mine_b.any():
                yield _Round(rows_n[np.repeat(is_mine_b, sizes_b)], sizes_b[is_mine_b])

    # -- the cells ------------------------------------------------------------------------------------------------

    def _tokenize(self, rows_m: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> list[TokenBlock]:
        """Read and tokenise sorted rows, chunk by chunk, the chunks of a few files at a time in several threads."""
        blocks: list[TokenBlock] = []
        for chunks in self._windows(rows_m):
            do = pool.map if self.threads > 1 and get_worker_info() is None else map
            blocks += do(self._tokenize_chunk, chunks, itertools.repeat(epoch))
        return blocks

    def _windows(self, rows_m: np.ndarray) -> Iterator[list[tuple[Shard, int, np.ndarray]]]:
        """Yield chunks of (shard, its first cell, rows) of a few files at a time.

        A file kept in memory as a whole ends its window: the cache would close its elders, and reads reopen them.
        """
        chunks: list[tuple[Shard, int, np.ndarray]] = []
        for number, (file, rows) in enumerate(split_rows(rows_m, starts_f=self._starts_f), start=1):
            shard, first_cell = self._shard(file), int(self._starts_f[file])
            chunks += [(shard, first_cell, rows[at : at + CHUNK_ROWS]) for at in range(0, len(rows), CHUNK_ROWS)]
            if number % FILES_AT_ONCE == 0 or shard.source.format == "csc":
                yield chunks
                chunks = []
        if chunks:
            yield chunks

    def _tokenize_chunk(self, chunk: tuple[Shard, int, np.ndarray], epoch: int) -> TokenBlock:
        shard, first_cell, rows_m = chunk
        block = self._without_answer(shard.read(rows_m, first_cell=first_cell))
        return self.tokenizer.tokenize_block(block, seed=self.seed, epoch=epoch)

    def _without_answer(self, block: ExpressionBlock) -> ExpressionBlock:
        if self.phenotype_category not in self.tokenizer.included_phenotypes:
            return block
        label_ids_np = block.label_ids_np.copy()
        label_ids_np[:, self.tokenizer.included_phenotypes.index(self.phenotype_category)] = ABSENT
        return replace(block, label_ids_np=label_ids_np)

    def _round(
        self, taken: _Round, epoch: int, room: Room, pool: ThreadPoolExecutor
    ) -> tuple[TokenBlock, np.ndarray, np.ndarray | None]:
        """Read and tokenise one round; return its cells by row, where each of `rows_m` stands, and sizes of batches."""
        rows_m, sizes_b = taken
        order = np.argsort(rows_m, kind="stable")
        block = TokenBlock.join(self._tokenize(rows_m[order], epoch, pool), room=room)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        if self._class_n is not None:
            block = replace(block, labels_n=self._class_n[block.cells_n])
        return block, place, sizes_b

    def _rounds(
        self, share: Share, skip: int, epoch: int
    ) -> Iterator[tuple[TokenBlock, np.ndarray, np.ndarray | None]]:
        """Yield rounds, the next one being read in a thread while the present one is used, until the one after it."""
        rooms = itertools.cycle((Room(), Room()))
        with (
            ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="tokenize") as tokenizing,
            ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool,
        ):
            waiting: Future[tuple[TokenBlock, np.ndarray, np.ndarray | None]] | None = None
            for taken in self._rows_of(share, skip):
                ahead = pool.submit(self._round, taken, epoch, next(rooms), tokenizing)
                if waiting is not None:
                    yield waiting.result()
                waiting = ahead
            if waiting is not None:
                yield waiting.result()

    def _blocks(self, share: Share, skip: int, epoch: int) -> Iterator[TokenBlock]:
        num_empty = 0
        rest: list[TokenBlock] = []
        for block, place, sizes_b in self._rounds(share, skip, epoch):
            num_empty += int((block.token_type_ids_l[block.offsets_n1[1:] - 2] < self.tokenizer.first_gene_type).sum())
            if sizes_b is not None:
                yield from map(block.take, np.split(place, np.cumsum(sizes_b)[:-1]))
                continue
            first = min(self.batch_size - sum(map(len, rest)), len(place)) if rest else 0
            if rest:
                rest.append(block.take(place[:first]))
                if sum(map(len, rest)) < self.batch_size:
                    continue
                yield TokenBlock.join(rest)
                rest = []
            for start in range(first, len(place), self.batch_size):
                piece = block.take(place[start : start + self.batch_size])
                if len(piece) == self.batch_size:
                    yield piece
                else:
                    rest = [piece]
        if rest:
            yield TokenBlock.join(rest)
        if num_empty and epoch == 0:
            logger.warning("%d cells express no gene of the panel; they carry their phenotypes only", num_empty)

    def blocks(self) -> Iterator[TokenBlock]:
        """Yield this rank's and worker's cells in blocks of `batch_size`, without a Python step per cell."""
        share, skip = self._take_start()
        num_done = share.cells_before(skip)
        for block in self._blocks(share, skip, self.epoch):
            num_done += 1 if self.has_planned_batches else len(block)
            self._consumed = share.position_after(num_done)
            yield block

    def _cell(self, block: TokenBlock, index: int, epoch: int) -> Cell:
        cell = Cell(self.tokenizer.as_tensors(*block.cell(index)))
        cell.index, cell.epoch, cell.seed = int(block.cells_n[index]), epoch, self.seed
        cell.is_measured_g = block.measured[index] if block.measured else block.is_measured_g
        if block.labels_n is not None:
            cell["labels"] = torch.tensor(int(block.labels_n[index]))
        return cell

    def __iter__(self) -> Iterator[Cell]:
        """Yield this rank's and worker's cells: `input_ids`, `token_type_ids`, `attention_mask`, maybe `labels`."""
        share, skip = self._take_start()
        epoch, num_done = self.epoch, share.cells_before(skip)
        for block in self._blocks(share, skip, epoch):
            for index in range(len(block)):
                num_done += not self.has_planned_batches or index == len(block) - 1
                self._consumed = share.position_after(num_done)
                yield self._cell(block, index, epoch)

    def batches(self, collator: BlockCollator) -> "Batches":
        """Return the same cells as finished batches, for `DataLoader(..., batch_size=None)`: the fast way.

        Args:
            collator: A `DataCollatorForPhenotypicMLM`, or what `collate_fn_wrapper` returns.
        """
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
        """Choose the epoch's order and masks; reaches live workers too."""
        self.cells.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands; see `IterableAnnDataset.state_dict`."""
        return self.cells.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where `state` stands; see `IterableAnnDataset.load_state_dict`."""
        self.cells.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what the collator makes of each block."""
        for block in self.cells.blocks():
            yield self.collator.collate_block(block)


def _earlier_of(state: Mapping[str, Any], rule: BatchRule) -> _Earlier:
    """Return which rules filled the batches of a state's epoch before `rule`, and until which batch each of them.

    Raises:
        InputError: They changed too often.
    """
    kept: _Earlier = ()
    for until, text in [*state.get("earlier", []), [state["consumed"], state.get("rule", "cells")]]:
        one = BatchRule.read(text)
        if one is not None and until > (kept[-1][0] if kept else 0):  # else nothing was trained by it
            kept = (*(kept[:-1] if kept and kept[-1][1] == one else kept), (int(until), one))
    kept = kept[:-1] if kept and kept[-1][1] == rule else kept  # that one goes on
    if len(kept) > MOST_CHANGES:
        raise InputError(
            f"batches changed their size {len(kept)} times within epoch {state['epoch']}, more than {MOST_CHANGES} "
            f"times. Go on with {state['rule']}, or start anew."
        )
    return kept


def _as_sources(paths: str | Path | Sequence[Any]) -> list[Any]:
    """Expand paths; AnnData objects pass as they are."""
    if hasattr(paths, "columns"):
        raise InputError("a DataFrame is no AnnData. Make one of it: anndata.AnnData(table).")
    if hasattr(paths, "obs_names"):
        return [paths]
    if not isinstance(paths, str | Path) and any(hasattr(path, "obs_names") for path in paths):
        return list(paths)
    return expand_paths(paths)
