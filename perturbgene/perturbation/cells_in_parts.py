"""Effects of all cells of a file, added up in parts that survive an interruption.

Owns reading cells by rows, the two stages (screened, exact), the parts on disk and dividing them among processes;
leaves effects of single cells to `readouts` and `screening`, and what is done with the sums to `effects`. Letters: n
cells, m effects, q perturbations.

A part is a fixed range of cells, so its sums do not depend on processes or interruptions; all parts are added up in
their order, and an interrupted run ends with the same table.
"""

import glob
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.inference.asking import constant_labels
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import Ranks
from perturbgene.perturbation.edits import Perturbations, changed_pairs
from perturbgene.perturbation.readouts import Readout, exact_effects, most_genes, sequences
from perturbgene.perturbation.screening import NUM_DIRECTIONS, screen_removals
from perturbgene.perturbation.statistics import Tally

logger = logging.getLogger(__name__)

#: The obs column of donors that is taken unasked: CELLxGENE's name.
DONOR_COLUMN = "donor_id"
ALONE = Ranks()


@dataclass(frozen=True)
class GroupedCells:
    """The cells of one file or AnnData, read by rows, with the donor and the group of each.

    Args:
        dataset: Opens and checks the source.
        donors, donor_n: Names, and the index of each cell's donor, -1 where it has none.
        groups, group_n: Names, and the index of each cell's group, -1 where it has none.
    """

    dataset: IterableAnnDataset
    donors: tuple[str, ...]
    donor_n: np.ndarray
    groups: tuple[str, ...]
    group_n: np.ndarray

    @classmethod
    def open(
        cls,
        source: Any,
        run: Run,
        readout: Readout,
        *,
        given: Mapping[str, str | None],
        donor: str | None,
        groupby: str | None,
        **reading: Any,
    ) -> "GroupedCells":
        """Open a file or AnnData for a readout.

        Raises:
            InputError: A column is missing, a given label is unknown, or the genes do not cover the panel.
        """
        for name in given:
            run.tokenizer.vocabulary.check_category(name)
        tokenizer = _tokenizer_of(run, readout)
        dataset = IterableAnnDataset(
            source, tokenizer, constant_labels=constant_labels(run.tokenizer, given), **reading
        )
        shard = dataset.shards[0]
        for name in [name for name, label in given.items() if label is None]:
            shard.source.obs_column(name)
        if donor is None and DONOR_COLUMN in shard.source.columns_of("obs"):
            donor = DONOR_COLUMN
        return cls(dataset, *_codes(dataset, donor), *_codes(dataset, groupby))

    def __len__(self) -> int:
        return len(self.donor_n)

    def blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        """Yield the cells of a range of rows, `batch_size` at a time; those without donor or group are left out."""
        rows_n = start + np.flatnonzero((self.donor_n[start:stop] >= 0) & (self.group_n[start:stop] >= 0))
        for first in range(0, len(rows_n), self.dataset.batch_size):
            yield self.read(rows_n[first : first + self.dataset.batch_size])

    def read(self, rows_m: np.ndarray) -> TokenBlock:
        """Tokenise some cells, ascending."""
        return self.dataset.tokenizer.tokenize_block(self.dataset.shards[0].read(rows_m))

    def cells_per_donor(self, group: int) -> np.ndarray:
        """Count the cells of each donor in a group, shape (d,)."""
        is_here_n = (self.group_n == group) & (self.donor_n >= 0)
        return np.bincount(self.donor_n[is_here_n], minlength=len(self.donors))


def _tokenizer_of(run: Run, readout: Readout) -> GeneTokenizer:
    """Return a tokenizer that reads given labels only and cuts long cells where `data_utils.ask` cuts them."""
    max_length = max(3, most_genes(run.tokenizer, readout) + 2) + len(readout.given)
    return run.tokenizer.with_settings(included=list(readout.given), max_length=max_length)


def _codes(dataset: IterableAnnDataset, column: str | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of a column of obs, sorted, and each cell's index among them; one name without a column."""
    if column is None:
        return ("all",), np.zeros(dataset.num_cells, dtype=np.int64)
    values = dataset.shards[0].source.obs_column(column)
    codes_n, names = pd.factorize(values.astype(object).where(values.notna()), sort=False)
    order = sorted(range(len(names)), key=lambda index: str(names[index]))
    rank = np.empty(len(names) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(names)), -1
    if (codes_n < 0).any():
        logger.warning("%d of %d cells have no %s and are left out", (codes_n < 0).sum(), len(codes_n), column)
    if not len(names):
        raise InputError(f"obs column {column!r} is empty. Name another column.")
    return tuple(str(names[index]) for index in order), rank[codes_n]


# -- effects of a range of cells ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One pass over the cells.

    Args:
        name: "screened" or "exact".
        run, readout: What is asked of whom.
        perturbations: Every gene of the panel for "screened"; those to re-run for "exact".
        num_directions: See `screening.screen_removals`.
        budget: Tokens that run at once.
    """

    name: str
    run: Run
    readout: Readout
    perturbations: Perturbations
    num_directions: int = NUM_DIRECTIONS
    budget: int = 16_384

    @property
    def num_effects(self) -> int:
        """q."""
        return len(self.perturbations)

    def effects(self, block: TokenBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return cell (row of the block), perturbation and effect of whatever changes, each of shape (m,)."""
        tokenizer = self.run.tokenizer
        asked = sequences(block, tokenizer, self.readout)
        if self.name == "exact":
            cell_m, perturbation_m = changed_pairs(asked, self.perturbations, tokenizer)
            effects_m = exact_effects(
                self.run, asked, self.perturbations, self.readout, pairs=(cell_m, perturbation_m), budget=self.budget
            )
            return cell_m, perturbation_m, effects_m
        estimate_l = screen_removals(
            self.run, asked, self.readout, num_directions=self.num_directions, budget=self.budget
        )
        is_gene_l = asked.token_type_ids_l >= tokenizer.first_gene_type
        cell_l = np.repeat(np.arange(len(asked)), np.diff(asked.offsets_n1))
        gene_m = asked.token_type_ids_l[is_gene_l] - tokenizer.first_gene_type
        return cell_l[is_gene_l], gene_m, estimate_l[is_gene_l]


class Pass(Protocol):
    """What `run_stage` runs on every block of cells: a `Stage`, or another pass whose effects are added up."""

    @property
    def name(self) -> str:
        """Of its parts."""

    @property
    def num_effects(self) -> int:
        """How many sums are kept."""

    def effects(self, block: TokenBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return cell (row of the block), which sum, and effect, each of shape (m,)."""


def _tally(stage: Pass, cells: GroupedCells, start: int, stop: int, *, table: Path | None) -> Tally:
    """Add up the effects of a range of cells; with `table` also write each of them there."""
    tally, frames = Tally(stage.num_effects), []
    for block in cells.blocks(start, stop):
        cell_m, perturbation_m, effects_m = stage.effects(block)
        row_m = block.cells_n[cell_m]
        tally.add(effects_m, donor_m=cells.donor_n[row_m], group_m=cells.group_n[row_m], perturbation_m=perturbation_m)
        if table is not None:
            assert isinstance(stage, Stage)
            names = np.asarray(stage.perturbations.names, dtype=object)[perturbation_m]
            frames.append(pd.DataFrame({"cell": row_m, "perturbation": names, "effect": effects_m}))
    if table is not None:
        everything = pd.concat(frames) if frames else pd.DataFrame(columns=["cell", "perturbation", "effect"])
        write_table(everything.assign(method=stage.name), table)
    return tally


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, or Parquet by its suffix, to a temporary name that is then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            table.to_parquet(temporary, index=False)
        else:
            table.to_csv(temporary, index=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartFolder:
    """Where finished parts lie until the table is written.

    Args:
        folder: Hidden, beside the output; its name holds a fingerprint of all that the parts depend on.
        tables: Folder of the long tables, or None when only sums are wanted.
        suffix: Of the long tables.
    """

    folder: Path
    tables: Path | None = None
    suffix: str = ".csv"

    @classmethod
    def beside(cls, output: Path, facts: Mapping[str, Any], *, tables: Path | None = None) -> "PartFolder":
        """Return the folder for an output and the facts that its parts depend on, made when it is not there.

        Raises:
            InputError: It cannot be written.
        """
        relevant = {name: value for name, value in facts.items() if name not in ("overwrite", "output")}
        text = json.dumps(relevant, sort_keys=True, default=str)
        folder = output.with_name(f".{output.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.parts")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if tables is not None:
                tables.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{output} cannot be written ({error}). Choose another --output.") from error
        return cls(folder, tables, output.suffix)

    def path(self, stage: str, part: int) -> Path:
        """Return where the sums of a part lie."""
        return self.folder / f"{stage}.{part:06d}.npz"

    def table(self, stage: str, part: int) -> Path | None:
        """Return where the long table of a part lies, or None."""
        return None if self.tables is None else self.tables / f"{stage}.{part:06d}{self.suffix}"

    def load(self, stage: str, part: int) -> dict[str, np.ndarray] | None:
        """Read the sums of a part; None when they are not there or damaged, so that it is made again."""
        try:
            with open(self.path(stage, part), "rb") as stream, np.load(stream) as arrays:
                return {name: arrays[name] for name in ("keys", "sums")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, stage: str, part: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the sums of a part, whole or not at all."""
        path = self.path(stage, part)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as stream:
            np.savez(stream, keys=arrays["keys"], sums=arrays["sums"])
        os.replace(temporary, path)

    def remove(self) -> None:
        """Remove the parts, once the table is written; those of this output with other settings too."""
        for folder in self.folder.parent.glob(f"{glob.escape(self.folder.name.rsplit('.', 2)[0])}.*.parts"):
            shutil.rmtree(folder, ignore_errors=True)


def run_stage(
    stage: Pass, cells: GroupedCells, *, part_cells: int, parts: PartFolder | None = None, ranks: Ranks = ALONE
) -> Tally:
    """Add up the effects of all cells, part by part, every rank its share; all ranks get the whole sum.

    Args:
        stage: What to compute.
        cells: Of which.
        part_cells: Cells of a part.
        parts: Where finished parts are kept; None keeps them in memory (single process).
        ranks: Which of the processes this is.
    """
    starts = range(0, len(cells), part_cells)
    in_memory: list[Mapping[str, np.ndarray]] = []
    num_kept = 0
    is_hidden = None if ranks.is_main else True
    with tqdm(total=len(cells), desc=stage.name, unit=" cells", unit_scale=True, disable=is_hidden) as bar:
        for part, start in enumerate(starts):
            stop = min(start + part_cells, len(cells))
            if part % ranks.size == ranks.rank:
                if parts is not None and parts.load(stage.name, part) is not None:
                    num_kept += 1
                else:
                    table = None if parts is None else parts.table(stage.name, part)
                    arrays = _tally(stage, cells, start, stop, table=table).arrays()
                    in_memory.append(arrays) if parts is None else parts.save(stage.name, part, arrays)
            bar.update(stop - start)
    if num_kept:
        logger.info("%s: %d of %d parts were finished before", stage.name, num_kept, len(starts))
    ranks.barrier()
    total = _summed(stage, in_memory if parts is None else _loaded(parts, stage.name, len(starts)))
    ranks.barrier()  # the first rank removes the parts at the end, which all must have read by then
    return total


def _loaded(parts: PartFolder, stage: str, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    for part in range(count):
        arrays = parts.load(stage, part)
        if arrays is None:
            raise InputError(f"{parts.path(stage, part)} is gone or damaged. Run the same command again.")
        yield arrays


def _summed(stage: Pass, all_arrays: Sequence[Mapping[str, np.ndarray]] | Iterator[Mapping[str, np.ndarray]]) -> Tally:
    total = Tally(stage.num_effects)
    for arrays in all_arrays:
        total.add_arrays(arrays["keys"], arrays["sums"])
    return total
