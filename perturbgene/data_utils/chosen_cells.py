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
from perturbgene.data_utils.sources import CellSource, Rows
from perturbgene.errors import InputError, did_you_mean, listed

logger = logging.getLogger(__name__)

#: What `where` may be: column of obs -> value or values, or entries COLUMN=VALUE as on the command line.
Where = Mapping[str, Any] | Sequence[str]


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
    def labels(self) -> dict[str, Labels]:
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
        for column, labels in self.labels.items():
            is_chosen_n &= np.isin(labels.texts, self.where[column])[labels.codes_n]
        return np.flatnonzero(is_chosen_n)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows_n), self.base.shape[1]

    def read_rows(self, start: int, stop: int) -> Rows:
        return self.base.read(self.rows_n[start:stop])

    def read(self, rows_m: np.ndarray) -> Rows:
        return self.base.read(self.rows_n[rows_m])

    def _column(self, frame: str, column: str) -> pd.Series:
        values = self.base._column(frame, column)
        if frame != "obs":
            return values
        values = values.iloc[self.rows_n]
        return values.cat.remove_unused_categories() if isinstance(values.dtype, pd.CategoricalDtype) else values

    def _index_of(self, frame: str) -> np.ndarray:
        names = self.base._index_of(frame)
        return names[self.rows_n] if frame == "obs" else names

    def cell_names(self, start: int, stop: int) -> np.ndarray:
        rows_m = self.rows_n[start:stop]
        return self.base.cell_names(rows_m[0], rows_m[-1] + 1)[rows_m - rows_m[0]] if len(rows_m) else rows_m[:0]

    def to_adata(self) -> Any:
        return self.base.to_adata()[self.rows_n].copy()

    def with_layer(self, layer: str | None) -> "ChosenCells":
        return ChosenCells(self.base.with_layer(layer), self.where)

    # what is the same for all cells

    def columns_of(self, frame: str) -> list[str]:
        return self.base.columns_of(frame)

    def varm_array(self, name: str) -> np.ndarray | None:
        return self.base.varm_array(name)

    @property
    def layers(self) -> list[str]:
        return self.base.layers

    @property
    def var_frame(self) -> str:
        return self.base.var_frame

    @property
    def format(self) -> str:  # type: ignore[override]
        return self.base.format

    @property
    def is_held_whole(self) -> bool:  # type: ignore[override]
        return self.base.is_held_whole

    @property
    def is_resting(self) -> bool:  # type: ignore[override]
        return self.base.is_resting

    def close(self) -> None:
        self.base.close()

    def rest(self) -> None:
        self.base.rest()


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
            known[column].update(file.labels[column].counts())
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
