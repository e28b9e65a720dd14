"""The cells of a file with their donors and groups, and sums of effects over them that survive an interruption.

Owns reading cells by rows, the sums, and the parts in which they are computed and kept on disk; leaves effects of
single cells to `readouts` and `screening`. Letters: n cells, m effects, u units, q perturbations, k sums.

A part is a fixed range of cells, and parts are added up in their order, so an interrupted run ends with the same table
as one without interruption, whatever the number of processes.
"""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from perturbgene.cli.verbs import DividedOptions
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.eval_utils import without_nan
from perturbgene.files import piece_path, whole_file, whole_files, whole_folder, write_json
from perturbgene.inference.calibration import weights_hash
from perturbgene.inference.parts import (
    RECORD_FILE,
    Piece,
    check_unchanged,
    differences,
    missing_parts,
    named_parts,
    share_of,
)
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import ALONE, Ranks, open_cells, part_folders, read_groups, unchanged, unwritable
from perturbgene.perturbation.readouts import LabelReadout, Readout
from perturbgene.plots import save_figure
from perturbgene.urls import is_url, shown_path

logger = logging.getLogger(__name__)

#: The obs column with donors if none is named: CELLxGENE's name for it.
DONOR_COLUMN = "donor_id"
#: Cells of a part: what an interruption loses at most, for each process. Of fewer cells there are about `NUM_PARTS`
#: parts, so that jobs can share them, but none with fewer than `LEAST_CELLS`.
PART_CELLS, NUM_PARTS, LEAST_CELLS = 1000, 64, 50

#: From a block of cells: row of the block, index of the sum, and effect of every effect, each of shape (m,).
EffectsOf = Callable[[TokenBlock], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class GroupedCells:
    """The cells of one file or AnnData, read by rows; a unit is a donor's cells of one group."""

    dataset: IterableAnnDataset
    donors: list[str]
    donor_n: np.ndarray  # index of each cell's donor, -1 where it has none
    groups: list[str]
    group_n: np.ndarray  # index of each cell's group, -1 where it has none

    @classmethod
    def open(
        cls, source: Any, run: Run, readout: Readout, *, given: Mapping[str, str | None], donor: str | None = None,
        groupby: str | None = None, **reading: Any,
    ) -> "GroupedCells":  # fmt: skip
        """Open a file or AnnData for a readout.

        Raises:
            InputError: A column is missing, a given label is unknown, or the genes do not cover the panel.
        """
        for name in given:
            run.tokenizer.vocabulary.check_category(name)
        tokenizer = run.tokenizer.reading(list(readout.given), is_whole=isinstance(readout, LabelReadout))
        dataset = open_cells(source, run, given, tokenizer=tokenizer, **reading)
        if donor is None and DONOR_COLUMN in dataset.shards[0].source.columns_of("obs"):
            donor = DONOR_COLUMN
        return cls(dataset, *read_groups(dataset, donor, flag="donor"), *read_groups(dataset, groupby, flag="groupby"))

    def __len__(self) -> int:
        return len(self.donor_n)

    @property
    def is_used_n(self) -> np.ndarray:
        """True for cells with a donor and a group, shape (n,); the others are left out."""
        return (self.donor_n >= 0) & (self.group_n >= 0)

    @cached_property
    def units_u2(self) -> np.ndarray:
        """Donor and group of each unit that has a cell, ascending."""
        return np.unique(np.stack([self.donor_n, self.group_n], axis=1)[self.is_used_n], axis=0).reshape(-1, 2)

    def blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        """Yield the cells of a range of rows, `batch_size` at a time; those without donor or group are left out."""
        rows_n = start + np.flatnonzero(self.is_used_n[start:stop])
        for first in range(0, len(rows_n), self.dataset.batch_size):
            yield self.read(rows_n[first : first + self.dataset.batch_size])

    def read(self, rows_m: np.ndarray) -> TokenBlock:
        """Tokenize some cells, ascending."""
        return self.dataset.tokenizer.tokenize_block(self.dataset.shards[0].read(rows_m))


# -- sums -------------------------------------------------------------------------------------------------------------


def cells_of_part(num_cells: int) -> int:
    """Return the number of cells of each part but the last; it depends on nothing else, so sums have the same bits."""
    return min(PART_CELLS, max(LEAST_CELLS, -(-num_cells // NUM_PARTS)))


def sum_effects(
    name: str, effects_of: EffectsOf, cells: GroupedCells, num_effects: int, *,
    store: "PartStore | None" = None, ranks: Ranks = ALONE,
) -> np.ndarray | None:  # fmt: skip
    """Add up the effects of all cells, part by part; each process computes its share, and all get the whole sum.

    `name` is that of the parts and, up to a hyphen, of the progress bar; without a store, parts are kept in memory
    (single process).

    Returns:
        Number of cells and sum of effects of each unit and perturbation, shape (u, q, 2); None if other jobs compute
        other parts, and not all of these are there.
    """
    size, num_kept, store = cells_of_part(len(cells)), 0, store or PartStore()
    starts, shown = range(0, len(cells), size), name.split("-")[0]
    own = range(len(starts)) if store.shares is None else store.shares
    is_hidden = None if ranks.is_main else True  # None: hidden where there is no terminal
    num_cells = sum(min(size, len(cells) - starts[part]) for part in own)
    bar = tqdm(total=num_cells, desc=shown, unit=" cells", unit_scale=True, disable=is_hidden)
    with unchanged(cells.dataset), bar:
        for part in ranks.watched(own):
            start, stop = starts[part], min(starts[part] + size, len(cells))
            if part % ranks.size == ranks.rank and store.load(name, part) is not None:
                num_kept += 1
            elif part % ranks.size == ranks.rank:
                store.save(name, part, _sum_part(effects_of, cells, start, stop, num_effects=num_effects))
            bar.update(stop - start)
    if num_kept:
        logger.info("%s: %d of %d parts were finished before", shown, num_kept, len(own))
    ranks.barrier()
    total_x2, missing = np.zeros((len(cells.units_u2) * num_effects, 2)), []
    for part in range(len(starts)):
        found = store.load(name, part)
        if found is None:
            missing.append(part)
        else:
            total_x2[found["place_k"]] += found["sums_k2"]
    ranks.barrier()  # rank 0 deletes the parts at the end; all ranks have read them now
    if missing:
        store.wait_for(shown, missing)
        return None
    return total_x2.reshape(len(cells.units_u2), num_effects, 2)


def _sum_part(
    effects_of: EffectsOf, cells: GroupedCells, start: int, stop: int, *, num_effects: int
) -> dict[str, np.ndarray]:
    """Return the sums of some cells that are not zero, with their place in (u, q); NaN does not count."""
    place_of = np.full((len(cells.donors), len(cells.groups)), -1)
    place_of[tuple(cells.units_u2.T)] = np.arange(len(cells.units_u2))
    sums_2x = np.zeros((2, len(cells.units_u2) * num_effects))
    for block in cells.blocks(start, stop):
        cell_m, perturbation_m, effects_m = effects_of(block)
        is_known_m, row_m = np.isfinite(effects_m), block.cells_n[cell_m]
        place_m = place_of[cells.donor_n[row_m], cells.group_n[row_m]] * num_effects + perturbation_m
        place_k, inverse_m = np.unique(place_m[is_known_m], return_inverse=True)
        sums_2x[0, place_k] += np.bincount(inverse_m)
        sums_2x[1, place_k] += np.bincount(inverse_m, effects_m[is_known_m])
    place_k = np.flatnonzero(sums_2x[0])
    return {"place_k": place_k, "sums_k2": sums_2x[:, place_k].T}


# -- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartStore:
    """Finished parts, until the table is written.

    Where several jobs divide the work, each of them keeps its share of the parts in the folder of its piece, and reads
    those of the others from theirs.
    """

    folder: Path | None = None  # hidden, next to the output, with a hash of all that the parts depend on; or in memory
    own: Piece | None = None  # what this job computes of a divided command
    pieces: Mapping[int, Piece] = field(default_factory=dict)  # those known to be of this command, by their number
    num_parts: int = 0  # of a divided command
    waits: dict[str, list[int]] = field(default_factory=dict)  # by name, the pieces whose parts are not there
    _in_memory: dict[tuple[str, int], dict[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, config: DividedOptions, *, source: str, run: Run, readout: Readout, num_cells: int, ranks: Ranks = ALONE
    ) -> "PartStore":
        """Return the store of an output; settings, weights or input other than before start a new one.

        Raises:
            InputError: It cannot be written, or pieces are of another command, see `parts`.
        """
        num_parts, output = -(-num_cells // cells_of_part(num_cells)), Path(config.output).expanduser()
        if config.pieces:
            check_unchanged(config, run=run, source=source)
            pieces = [Piece.read(Path(folder)) for folder in config.pieces]
            return cls(pieces={piece.number: piece for piece in pieces}, num_parts=num_parts)
        if config.piece:
            own = Piece.of(config, run=run, source=source)
            if ranks.is_main:
                own.make_room(overwrite=config.overwrite)
                if not own.folder.exists():
                    with whole_folder(own.folder) as folder:
                        own.save(folder)
            ranks.barrier()
            return cls(own.folder, own, {own.number: own}, num_parts)
        other = ("overwrite", "output", "show_q", "report", "part")  # what no effect depends on
        facts: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name not in other}
        if is_url(source):
            facts["source"] = shown_path(source)
        else:
            status = os.stat(source)
            facts["source"] = [os.path.abspath(source), status.st_size, status.st_mtime_ns]
        facts |= {"weights": weights_hash(run.path), "tokenizer": run.tokenizer.fingerprint, "readout": readout}
        facts["cells_of_part"] = cells_of_part(num_cells)
        text = json.dumps(facts, sort_keys=True, default=str)
        folder = output.with_name(f".{output.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.parts")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(output, error) from error
        return cls(folder)

    @property
    def shares(self) -> range | None:
        """The parts that this job computes: none if it merges, None for all."""
        if self.own:
            return share_of(self.num_parts, (self.own.number, self.own.count))
        return range(0) if self.pieces else None

    @cached_property
    def _number_of(self) -> list[int]:
        """The number of the piece that has each part."""
        count = next(iter(self.pieces.values())).count
        return [number for number in range(1, count + 1) for _ in share_of(self.num_parts, (number, count))]

    def _folder_of(self, part: int) -> Path | None:
        """Return where a part is, or may be; None if the piece that has it is not there."""
        if not self.pieces:
            return self.folder
        number = self._number_of[part]
        if number in self.pieces or self.own is None:
            return self.pieces[number].folder if number in self.pieces else None
        folder = piece_path(Path(self.own.config.output).expanduser(), number, self.own.count)
        if (folder / RECORD_FILE).exists() and not differences(self.own.identity, Piece.read(folder).identity):
            return folder
        return None

    def save(self, name: str, part: int, arrays: dict[str, np.ndarray]) -> None:
        if self.folder is None:
            self._in_memory[name, part] = arrays
            return
        with whole_file(self.folder / f"{name}.{part:06d}.npz") as temporary, open(temporary, "wb") as stream:
            np.savez(stream, place_k=arrays["place_k"], sums_k2=arrays["sums_k2"])

    def load(self, name: str, part: int) -> dict[str, np.ndarray] | None:
        """Return the sums of a part; None if they are missing or damaged, so that they are computed again."""
        if self.folder is None and not self.pieces:
            return self._in_memory.get((name, part))
        folder = self._folder_of(part)
        if folder is None:
            return None
        try:
            with open(folder / f"{name}.{part:06d}.npz", "rb") as stream, np.load(stream) as arrays:
                return {key: arrays[key] for key in ("place_k", "sums_k2")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def wait_for(self, name: str, parts: Sequence[int]) -> None:
        """Note which pieces lack parts that other jobs compute.

        Raises:
            InputError: Nobody else computes them, or all pieces should be there.
        """
        if not self.pieces:
            raise InputError(f"a finished part of {name} was deleted or damaged. Run the same command again.")
        numbers = sorted({self._number_of[part] for part in parts})
        if self.own is None:
            piece = next(iter(self.pieces.values()))
            raise missing_parts(piece.config, numbers, piece.count, what="not finished")
        self.waits[name] = numbers

    def describe(self) -> str:
        """Say what this job has done and what comes next."""
        assert self.own is not None
        shown, output = f"part {self.own.number} of {self.own.count}", self.own.config.output
        if "exact" not in self.waits and "screened" in self.waits:
            return (
                f"{shown} has screened its cells; {named_parts(self.waits['screened'])} not yet. When all have, run "
                "all parts once more: they then compute the exact effects of the strongest genes."
            )
        return f"{shown} is finished, kept in {self.own.folder}. When all parts are: perturbgene merge {output}"

    def finish(self, target: Path, table: pd.DataFrame, figure: Any, record: Mapping[str, Any]) -> None:
        """Write table (.csv or .parquet), picture (.png) and record (.json), and delete the parts."""
        png, about = target.with_suffix(".png"), target.with_suffix(".json")
        with whole_files(target, png, about) as folder:
            if target.suffix == ".parquet":
                table.to_parquet(folder / target.name, index=False)
            else:
                table.to_csv(folder / target.name, index=False)
            save_figure(figure, folder / png.name)
            write_json(folder / about.name, without_nan(record))
        for folder in part_folders(target):  # those of other settings too
            shutil.rmtree(folder, ignore_errors=True)
