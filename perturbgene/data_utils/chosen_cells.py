"""Which cells of a file a command is about: `--where COLUMN=VALUE`.

Owns reading the conditions, finding the cells, and a view of a file that has only these; leaves reading itself to
`opening`. Letters: n cells of the view, m rows that are read, l values.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.data_utils.labels import Labels
from perturbgene.data_utils.sources import CellSource
from perturbgene.errors import InputError, did_you_mean, listed

logger = logging.getLogger(__name__)

#: What `where` may be: column of obs -> value or values, or entries COLUMN=VALUE as on the command line.
Where = Mapping[str, Any] | Sequence[str]
#: Rows closer than this are fetched by one read, the ones between being thrown away.
READ_GAP_ROWS = 32


class ChosenCells(CellSource):
    """A file or AnnData of which only the chosen cells are seen; all else is that of the file.

    A cell is chosen if each column of `where` has one of the column's values there, spelled as a label is.

    Args:
        base: The open file.
        where: Column of obs -> values.
    """

    def __init__(self, base: CellSource, where: Mapping[str, Sequence[str]]) -> None:
        self.base, self.where = base, where
        self.path, self.layer = base.path, base.layer

    @cached_property
    def _labels(self) -> dict[str, Labels]:
        """Column of `where` -> the text of each cell of the file."""
        found = {}
        for column in self.where:
            try:
                found[column] = Labels.of(self.base.obs_column(column))
            except InputError as error:
                raise InputError(f"{error} Change --where.") from error
        return found

    @cached_property
    def rows_n(self) -> np.ndarray:
        """Row of each chosen cell in the file, int64 of shape (n,)."""
        is_chosen_n = np.ones(self.base.shape[0], dtype=bool)
        for column, labels in self._labels.items():
            is_chosen_n &= np.isin(labels.texts, self.where[column])[labels.codes_n]
        return np.flatnonzero(is_chosen_n)

    def counts(self, column: str) -> Counter[str]:
        """Count the cells of the whole file by their value in a column of `where`."""
        return self._labels[column].counts()

    @property
    def shape(self) -> tuple[int, int]:
        """Chosen cells, and columns of the matrix."""
        return len(self.rows_n), self.base.shape[1]

    def read_rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read chosen cells, in a row, as CSR."""
        return read_runs(self.base, self.rows_n[start:stop])

    def gather_rows(self, rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Read scattered cells as CSR where that costs no more than neighboring ones, else return None."""
        return self.base.gather_rows(self.rows_n[rows_m])

    def _column(self, frame: str, column: str) -> pd.Series:
        values = self.base._column(frame, column)
        if frame != "obs":
            return values
        values = values.iloc[self.rows_n]
        return values.cat.remove_unused_categories() if isinstance(values.dtype, pd.CategoricalDtype) else values

    def _index_of(self, frame: str) -> np.ndarray:
        names = self.base._index_of(frame)
        return names[self.rows_n] if frame == "obs" else names

    def to_adata(self) -> Any:
        """Return the chosen cells as an AnnData in memory."""
        return self.base.to_adata()[self.rows_n].copy()

    def with_layer(self, layer: str | None) -> "ChosenCells":
        """Return the same cells with another matrix."""
        return ChosenCells(self.base.with_layer(layer), self.where)

    # what is the same for all cells

    def columns_of(self, frame: str) -> list[str]:
        """Return the names of the columns of `obs`, `var` or `raw/var`."""
        return self.base.columns_of(frame)

    def varm_array(self, name: str) -> np.ndarray | None:
        """Return one array of `varm`, or None where there is none of that name."""
        return self.base.varm_array(name)

    @property
    def layers(self) -> list[str]:
        """Names of all matrices other than `X`, as --layer takes them."""
        return self.base.layers

    @property
    def var_frame(self) -> str:
        """Where the columns of the chosen matrix are named."""
        return self.base.var_frame

    @property
    def format(self) -> str:  # type: ignore[override]
        """How the matrix is stored."""
        return self.base.format

    @property
    def is_held_whole(self) -> bool:  # type: ignore[override]
        """True if the file is kept in memory as a whole while it is open."""
        return self.base.is_held_whole

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        self.base.close()


def read_runs(source: CellSource, rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read rows of a source, sorted ascending: values and columns, (l,) each, and offsets, (m + 1,)."""
    if (gathered := source.gather_rows(rows_m)) is not None:
        return gathered
    if isinstance(source, ChosenCells):
        return read_runs(source.base, source.rows_n[rows_m])
    values, columns, lengths = [], [], []
    for run in np.split(rows_m, np.flatnonzero(np.diff(rows_m) > READ_GAP_ROWS) + 1) if len(rows_m) else ():
        run_values, run_columns, offsets = source.read_rows(int(run[0]), int(run[-1]) + 1)
        wanted = run - run[0]
        if len(wanted) < len(offsets) - 1:
            keep = np.zeros(len(offsets) - 1, dtype=bool)
            keep[wanted] = True
            is_kept = np.repeat(keep, np.diff(offsets))
            run_values, run_columns = run_values[is_kept], run_columns[is_kept]
        values.append(run_values)
        columns.append(run_columns)
        lengths.append(np.diff(offsets)[wanted])
    if not values:
        return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    offsets_m1 = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    if len(values) == 1:
        return values[0], columns[0], offsets_m1
    return np.concatenate(values), np.concatenate(columns), offsets_m1


def check_where(
    files: Iterable[CellSource], where: Mapping[str, Sequence[str]], *, has_all_values: bool = True
) -> None:
    """Say how many cells are chosen, or refuse conditions that no cell can meet.

    Args:
        files: The views of all files of a command.
        where: Their conditions.
        has_all_values: False allows a value that no cell has.

    Raises:
        InputError: A column or value is unknown, with the nearest name; or no cell is left.
    """
    num_chosen = num_cells = 0
    known: dict[str, Counter[str]] = {column: Counter() for column in where}
    paths = []
    for file in files:
        assert isinstance(file, ChosenCells)
        paths.append(file.path)
        num_chosen, num_cells = num_chosen + file.shape[0], num_cells + file.base.shape[0]
        for column in where:
            known[column].update(file.counts(column))
    for column, values in where.items():
        for value in [value for value in values if has_all_values and value not in known[column]]:
            parts = [part.strip() for part in value.split(",")]
            hint = did_you_mean(value, [text for text, _ in known[column].most_common() if text])
            if all(part in known[column] for part in parts):
                hint = f"For several values, repeat the column: {' '.join(f'{column}={part!r}' for part in parts)}."
            raise InputError(f"no cell of {listed(paths, most=3)} has {column}={value}. {hint} Change --where.")
    text = " and ".join(f"{column}={' or '.join(values)}" for column, values in where.items())
    if not num_chosen:
        raise InputError(f"no cell of {listed(paths, most=3)} has {text}, so none is left. Change --where.")
    logger.info("--where %s: %s of %s cells", text, f"{num_chosen:,}", f"{num_cells:,}")
