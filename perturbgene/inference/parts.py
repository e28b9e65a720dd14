"""Pieces of a command that several jobs compute without knowing of each other, and the check that they fit together.

Owns what a piece is: a folder with its record, `piece.json`, and its arrays. Leaves computing to the verbs and adding
up effects to `perturbation.cells`. Letters: n cells, m some cells of a piece.

A piece has a range of the cells that begins and ends with a batch, so that its batches are those of the whole command
and its results have the same bits.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from perturbgene import __version__
from perturbgene.cli.verbs import CONFIGS, DividedOptions, MergeConfig
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.remote import local_path
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError, NewerFormatError
from perturbgene.files import (
    check_format,
    damaged_file,
    piece_path,
    read_json,
    sha256_of,
    whole_folder,
    write_json,
    write_sums,
)
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import Ranks, Rows, cell_results, computed_rows, there_already, unwritable
from perturbgene.urls import is_url

#: Version of the layout of pieces.
PIECE_FORMAT = 1
RECORD_FILE = "piece.json"
#: Settings in which pieces may differ, since no result depends on them; run and input are compared by their content.
FREE = ("run", "input", "output", "overwrite", "report", "part", "device", "batch_tokens")
#: Files of a run on which answers depend.
RUN_FILES = ("*.safetensors", "config.json", "tokenizer.json", "calibration.json")
#: So many places of a file of cells are read to tell it from another, and so many bytes at each; of a folder, so many
#: files, and a few places of each.
NUM_PLACES, BYTES_OF_PLACE = 64, 1 << 16
#: Cells of a piece that are put in their place at once.
CELLS_AT_ONCE = 65_536
#: Most missing parts that a message names.
MOST_NAMED = 20


# -- what all pieces must have in common ------------------------------------------------------------------------------


def run_sum(run: Run) -> str:
    """Return a hash of all files of a run on which answers depend."""
    paths = [path for pattern in RUN_FILES for path in sorted(Path(run.path).glob(pattern))]
    return sha256(json.dumps([[path.name, sha256_of(path)] for path in paths]).encode()).hexdigest()


def input_facts(source: str) -> dict[str, Any]:
    """Return what tells a file or folder of cells from another or a changed one, without reading all of it."""
    path = Path(local_path(source))
    files = sorted(it for it in path.rglob("*") if it.is_file()) if path.is_dir() else [path]
    sizes = [(it.relative_to(path).as_posix(), it.stat().st_size) for it in files]
    digest, num_places = sha256(json.dumps(sizes).encode()), max(2, NUM_PLACES // len(files)) if files else 0
    step = max(1, len(files) // NUM_PLACES)
    for it, (_, size) in zip(files[::step], sizes[::step], strict=True):
        with it.open("rb") as stream:
            for start in np.linspace(0, max(0, size - BYTES_OF_PLACE), num_places).astype(np.int64):
                stream.seek(int(start))
                digest.update(stream.read(BYTES_OF_PLACE))
    changed = None if is_url(source) else max((it.stat().st_mtime_ns for it in files), default=0)
    return {"path": os.path.realpath(path), "changed": changed, "sample": digest.hexdigest()}


def identity_of(config: DividedOptions, *, run: Run, source: str) -> dict[str, Any]:
    """Return what all pieces of a command have in common."""
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
    common = {"format": PIECE_FORMAT, "version": __version__, "verb": config.verb, "run": run_sum(run)}
    return {**common, "input": input_facts(source), "settings": settings}


def differences(identity: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in what two pieces differ, in words; a copy of the input elsewhere may have another age."""
    names = {"format": "the format of parts", "version": "the version of perturbgene", "verb": "the command"}
    names["run"] = "the run (weights, tokenizer or calibration)"
    found = [text for name, text in names.items() if identity[name] != other[name]]
    ours, theirs = identity["settings"], other["settings"]
    found += [f"--{name.rstrip('_')}" for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    here, there = identity["input"], other["input"]
    was_changed = here["path"] == there["path"] and here["changed"] != there["changed"]
    return [*found, "the input"] if was_changed or here["sample"] != there["sample"] else found


# -- pieces -----------------------------------------------------------------------------------------------------------


def share_of(count: int, piece: tuple[int, int]) -> range:
    """Return which of so many things are those of a piece; each is one piece's.

    Example:
        >>> [list(share_of(5, (number, 3))) for number in (1, 2, 3)]
        [[0], [1, 2], [3, 4]]
    """
    number, pieces = piece
    return range(count * (number - 1) // pieces, count * number // pieces)


def cells_of(num_cells: int, piece: tuple[int, int], *, batch_size: int) -> tuple[int, int]:
    """Return the first cell of a piece and the one after its last: whole batches, or none where there are few.

    Example:
        >>> [cells_of(10, (number, 3), batch_size=4) for number in (1, 2, 3)]
        [(0, 4), (4, 8), (8, 10)]
    """
    batches = share_of(-(-num_cells // batch_size), piece)
    return min(batches.start * batch_size, num_cells), min(batches.stop * batch_size, num_cells)


@dataclass(frozen=True)
class Piece:
    """The folder of a piece with its record."""

    folder: Path
    number: int  # from 1
    count: int
    identity: dict[str, Any]  # see `identity_of`
    settings: dict[str, Any]  # of the command that wrote it
    place: str  # the folder from which its paths are seen
    cells: tuple[int, int] = (0, 0)  # first, and one after the last; of verbs that answer each cell
    arrays: tuple[str, ...] = ()  # names of its results, which are in 000.npy, 001.npy, ...

    @classmethod
    def of(cls, config: DividedOptions, *, run: Run, source: str) -> "Piece":
        """Return the piece that a command computes."""
        assert config.piece is not None
        folder = piece_path(Path(config.output).expanduser(), *config.piece)
        facts = identity_of(config, run=run, source=source)
        return cls(folder, *config.piece, facts, config.to_dict(), os.getcwd())

    @classmethod
    def read(cls, folder: Path) -> "Piece":
        """Read the record of a piece.

        Raises:
            InputError: It is missing, damaged, or of a newer perturbgene.
        """
        try:
            record = read_json(folder / RECORD_FILE)
            check_format(folder / RECORD_FILE, record["identity"].get("format"), reads=PIECE_FORMAT)
            record |= {"cells": tuple(record["cells"]), "arrays": tuple(record["arrays"])}
            piece = cls(folder, **record)
            differences(piece.identity, piece.identity)
        except NewerFormatError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder} is no part of an output: its {RECORD_FILE} is missing or damaged. Delete the folder and run "
                "that part again."
            ) from error
        return piece

    def save(self, folder: Path) -> None:
        """Write the record into a folder, which becomes or is that of the piece."""
        names = ("number", "count", "identity", "settings", "place", "cells", "arrays")
        write_json(folder / RECORD_FILE, {name: getattr(self, name) for name in names})

    @cached_property
    def config(self) -> DividedOptions:
        """The settings of the command that wrote it."""
        config_class = CONFIGS.get(self.identity["verb"])
        assert config_class is not None and issubclass(config_class, DividedOptions)
        return config_class(**self.settings)

    def make_room(self, *, overwrite: bool) -> None:
        """Leave the folder as it is if it is of this piece; with `overwrite`, remove it if it is of another command.

        Raises:
            InputError: It is of a command with other settings, another run or another input, and stays.
        """
        if not self.folder.exists():
            return
        try:
            found = differences(self.identity, Piece.read(self.folder).identity)
        except InputError:
            if not overwrite:
                raise
            found = ["its record"]
        if found and not overwrite:
            raise InputError(
                f"{self.folder} was written by a command that differs in {', '.join(found)}. Choose another --output, "
                "or pass --overwrite."
            )
        if found:
            shutil.rmtree(self.folder)

    def rows(self) -> Iterator[Rows]:
        """Yield the results of its cells, some cells at a time.

        Raises:
            InputError: A file of the piece is missing or damaged.
        """
        if damage := damaged_file(self.folder):
            raise InputError(f"{self.folder} cannot be used: {damage}. Delete the folder and run that part again.")
        start, stop = self.cells
        paths = {name: self.folder / f"{number:03d}.npy" for number, name in enumerate(self.arrays)}
        arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        for first in range(start, stop, CELLS_AT_ONCE):
            last = min(first + CELLS_AT_ONCE, stop)
            yield np.arange(first, last), {name: it[first - start : last - start] for name, it in arrays.items()}


def missing_parts(config: DividedOptions, numbers: Sequence[int], count: int, *, what: str = "missing") -> InputError:
    """Return the error that names missing parts and the command that makes the first of them."""
    command = replace(config, part=f"{numbers[0]}/{count}", pieces=()).command()
    few = f" (in Slurm, --array={','.join(map(str, numbers))})" if len(numbers) <= MOST_NAMED else ""
    others = f", and the same with the other numbers{few}" if len(numbers) > 1 else ""
    verb = "is" if len(numbers) == 1 else "are"
    return InputError(
        f"{named_parts(numbers)} of {config.output} {verb} {what} ({len(numbers)} of {count}). Run `{command}`{others}."
    )


def named_parts(numbers: Sequence[int]) -> str:
    """Name parts by their numbers, the first few of many.

    Example:
        >>> named_parts([3]), named_parts([1, 3])
        ('part 3', 'parts 1, 3')
    """
    rest = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"part{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:MOST_NAMED]))}{rest}"


# -- writing and reading them -----------------------------------------------------------------------------------------


def write_piece(
    config: DividedOptions, dataset: IterableAnnDataset, compute: Callable[[TokenBlock], Mapping[str, np.ndarray]], *,
    run: Run, source: str, ranks: Ranks,
) -> str | None:  # fmt: skip
    """Compute the results of the cells of one piece and keep them; see `streaming.answered` for what they are.

    Returns:
        What was done, in words; only to the first of several processes.

    Raises:
        InputError: There is a piece of another command, or the folder cannot be written.
    """
    assert config.piece is not None
    num_cells, piece = dataset.num_cells, Piece.of(config, run=run, source=source)
    start, stop = cells_of(num_cells, config.piece, batch_size=dataset.batch_size)
    shown = f"part {piece.number} of {piece.count}"
    if ranks.is_main:
        piece.make_room(overwrite=config.overwrite)
    ranks.barrier()
    if piece.folder.exists():
        return f"{shown} is there already, in {piece.folder}"
    dataset.keep(start, stop)
    with cell_results(piece.folder, num_cells=stop - start, ranks=ranks, first=start) as results:
        for rows in computed_rows(dataset, compute, text=shown, most_tokens=config.batch_tokens, ranks=ranks):
            results.write(*rows)
        merged = results.merge()
        if ranks.is_main:
            try:
                with whole_folder(piece.folder) as folder:
                    for number, array in enumerate(merged.values()):
                        np.save(folder / f"{number:03d}.npy", array)
                    replace(piece, cells=(start, stop), arrays=tuple(merged)).save(folder)
                    write_sums(folder, list(folder.iterdir()))
            except OSError as error:
                raise unwritable(piece.folder, error) from error
    done = f"{shown}: {stop - start:,} of {num_cells:,} cells, kept in {piece.folder}"
    return f"{done}. When all parts are there: perturbgene merge {config.output}" if ranks.is_main else None


def stored_rows(config: DividedOptions, *, run: Run, source: str) -> Iterator[Rows] | None:
    """Return the results of all pieces that `merge` has found, as `Piece.rows` yields them; None without pieces.

    Raises:
        InputError: The run or the input is no longer what it was for the pieces.
    """
    if not config.pieces:
        return None
    check_unchanged(config, run=run, source=source)
    return (rows for folder in config.pieces for rows in Piece.read(Path(folder)).rows())


def check_unchanged(config: DividedOptions, *, run: Run, source: str) -> None:
    """Refuse pieces if the run or the input is no longer what it was for them."""
    folder = Path(config.pieces[0])
    if found := differences(identity_of(config, run=run, source=source), Piece.read(folder).identity):
        raise InputError(
            f"the parts of {config.output} cannot be merged any more: {', '.join(found)} changed since they "
            f"were computed. Undo that, or delete {folder.parent} and run all parts again."
        )


def whole_config(config: MergeConfig) -> DividedOptions:
    """Return the settings of the command that was divided, with the folders of all its pieces, in order.

    Raises:
        InputError: There are no pieces, some are missing or come twice, or they are not of one command; or the output
            exists.
    """
    target = Path(config.output).expanduser()
    home = piece_path(target, 1, 1).parent
    folders = [Path(folder) for folder in config.pieces] or sorted(home.glob("part-*-of-*"))
    if not folders and target.exists() and not config.overwrite:
        raise there_already(target, home)
    if not folders:
        raise InputError(
            f"{home} has no parts of {config.output}. Run its command with --part 1/N to N/N first, or name the "
            "folders of the parts after the output."
        )
    pieces = sorted((Piece.read(folder) for folder in folders), key=lambda piece: (piece.count, piece.number))
    check_together(pieces)
    first, numbers = pieces[0], {piece.number for piece in pieces}
    changes: dict[str, Any] = {"output": config.output, "device": config.device, "part": None}
    changes |= {"overwrite": config.overwrite or first.config.overwrite}
    changes |= {"report": config.report and first.settings["report"]} if "report" in first.settings else {}
    whole = replace(first.config, **changes, pieces=tuple(str(piece.folder) for piece in pieces))
    missing = [number for number in range(1, first.count + 1) if number not in numbers]
    if missing and target.exists() and not whole.overwrite:
        raise there_already(target, home)
    if missing:
        raise missing_parts(replace(first.config, output=config.output), missing, first.count)
    try:
        whole.check_machine()
    except InputError as error:
        here = "" if first.place == os.getcwd() else f" The parts were computed in {first.place}: merge them there."
        raise InputError(f"{error}{here}") from error
    return whole


def check_together(pieces: Sequence[Piece]) -> None:
    """Refuse pieces that are not of one command, or of which one is there twice."""
    first, folders = pieces[0], dict[int, Path]()
    for piece in pieces:
        found = differences(first.identity, piece.identity)
        found += ["the number of parts"] if piece.count != first.count else []
        if found:
            raise InputError(
                f"{first.folder} and {piece.folder} are not of one command: they differ in {', '.join(found)}. "
                "Delete the one that is not wanted, or name all that belong together after the output."
            )
        if piece.number in folders:
            raise InputError(
                f"part {piece.number} is there twice, in {folders[piece.number]} and {piece.folder}. Name only one."
            )
        folders[piece.number] = piece.folder
