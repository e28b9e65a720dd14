"""The values of one file: row numbers in, values of genes on a known scale and library sizes out.

Owns what is decided once per file about its values (which columns are genes, the scale, where library sizes come from)
and reading scattered rows; leaves recognizing a scale to `recognition` and genes of a panel to `shards`.
Letters: n cells, m rows asked for, c columns, l values.
"""

import logging
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from perturbgene.data_utils.genes import features_of
from perturbgene.data_utils.recognition import (
    AS_GIVEN,
    COUNTS,
    FEWEST_GENES,
    Scale,
    check_cells,
    check_values,
    recognize,
)
from perturbgene.data_utils.scale import TARGET_SUM, Normalization, library_sizes
from perturbgene.data_utils.sources import CellSource, Rows, sampled_spans
from perturbgene.errors import InputError, listed

logger = logging.getLogger(__name__)

#: Column of obs in which `prepare` keeps each cell's total counts over all genes of its source file.
LIBRARY_SIZE_COLUMN = "perturbgene_library_size"

#: Columns of obs that may hold each cell's total counts, in any case (habits of scanpy, Seurat, CELLxGENE and GEO).
TOTAL_COLUMNS = (
    "total_counts", "n_counts", "ncount_rna", "n_umi", "n_umis", "numi", "numis", "total_umi", "total_umis",
    "umi_count", "umi_counts", "raw_sum", "ncounts",
)  # fmt: skip

#: Scale of a prepared shard that does not hold counts.
_CP10K = Scale("cut", "log1p", TARGET_SUM)

_SEARCH_ROWS = 1024


@dataclass
class CellValues:
    """The values of the genes of one file (or AnnData).

    Args:
        source: The open file.
        normalization: "auto" recognizes the scale, "log1p_cp10k" takes values for counts, "none" as they are.
    """

    source: CellSource
    normalization: Normalization = "auto"

    def __len__(self) -> int:
        return self.source.shape[0]

    @property
    def name(self) -> str:
        """The file and the matrix, for messages."""
        return f"{self.source.path} ({self.source.layer or 'X'})"

    # -- what is decided once -------------------------------------------------------------------------------------

    @cached_property
    def _features(self) -> tuple[np.ndarray, str] | None:
        return features_of(self.source)

    @property
    def num_genes(self) -> int:
        """Columns that are gene expression."""
        return self.source.shape[1] if self._features is None else int(self._features[0].sum())

    @cached_property
    def _sample(self) -> tuple[Rows, np.ndarray]:
        """Sampled rows, or the first rows that hold values, and their numbers."""
        num_rows = len(self)
        spans = np.unique(np.concatenate([np.arange(*span) for span in sampled_spans(num_rows)]))
        searched = (np.arange(start, min(num_rows, start + _SEARCH_ROWS)) for start in range(0, num_rows, _SEARCH_ROWS))
        for rows_m in (spans, *searched):
            rows = self._read_genes(rows_m)
            if rows.values_l.any():
                break
        return rows, rows_m

    def forget_sample(self) -> None:
        """Let go of what only decided how values are read: megabytes of each file. It is read again if needed."""
        for name in ("_sample", "_obs_totals"):
            self.__dict__.pop(name, None)

    def check_has_values(self) -> None:
        """Raise an InputError that names the other matrices if every value is 0."""
        if len(self) and not self._sample[0].values_l.any():
            source, name = self.source, self.source.layer or "X"
            others = [layer for layer in source.layers if layer != source.layer]
            advice = f"Choose another matrix with --layer: {listed(others)}" if others else "Add the counts to it"
            raise InputError(f"{source.path}: {name} holds no value other than 0, so no gene is expressed. {advice}.")

    @cached_property
    def scale(self) -> Scale:
        """What the values are, recognized on sampled rows; an InputError names the matrices whose scale is known."""
        try:
            return self._recognized()
        except InputError as error:
            others = []
            for layer in [layer for layer in (None, *self.source.layers) if layer != self.source.layer]:
                other = CellValues(self.source.with_layer(layer))
                with suppress(InputError), closing(other.source):
                    others.append(
                        f"{f'--layer {layer}' if layer else 'X, without --layer,'} ({other._recognized().name})"
                    )
            raise InputError(f"{error}{f' Known are: {listed(others)}.' if others else ''}") from error

    @cached_property
    def can_be_summed(self) -> bool:
        """True if values can be brought to a linear scale, on which columns of one gene are summed."""
        return self.scale.kind not in ("as_given", "assumed") or not (self._sample[0].values_l % 1).any()

    def _recognized(self) -> Scale:
        rows, rows_m = self._sample
        check_values(rows.values_l, source=self.name)
        if self.normalization != "auto":
            return AS_GIVEN if self.normalization == "none" else COUNTS
        if self._prepared_size_n is not None:
            return _CP10K if (rows.values_l % 1 != 0).any() else COUNTS
        totals_m = None if self._obs_totals is None else self._obs_totals[1][rows_m]
        sampled = (rows.values_l, rows.offsets_m1, rows_m)
        return recognize(*sampled, totals_n=totals_m, num_genes=self.num_genes, source=self.name)

    # -- library sizes --------------------------------------------------------------------------------------------

    @cached_property
    def _prepared_size_n(self) -> np.ndarray | None:
        """Library sizes that `prepare` has noted, floats of shape (n,), of single precision if that is exact."""
        if LIBRARY_SIZE_COLUMN not in self.source.columns_of("obs"):
            return None
        size_n = one_per_cell(self.source.obs_column(LIBRARY_SIZE_COLUMN).to_numpy(dtype=np.float64), self)
        with np.errstate(over="ignore"):
            single_n = size_n.astype(np.float32)
        return single_n if np.array_equal(single_n, size_n) else size_n

    @cached_property
    def _obs_totals(self) -> tuple[str, np.ndarray] | None:
        """The column of obs that holds the cells' total counts, and its values, float64 of shape (n,)."""
        columns = {column.lower(): column for column in reversed(self.source.columns_of("obs"))}
        for column in (columns[name] for name in TOTAL_COLUMNS if name in columns):
            total_n = pd.to_numeric(self.source.obs_column(column), errors="coerce").to_numpy(dtype=np.float64)
            if len(total_n) == len(self) and np.isfinite(total_n).all() and (total_n >= 0).all():
                return column, total_n
        return None

    @property
    def _may_be_cut(self) -> bool:
        """True if library sizes are sums over few genes."""
        kinds = ("counts", "fractional", "per_total", "per_cell")
        is_summed = self._prepared_size_n is None and self.scale.kind in kinds
        return is_summed and len(self) > 0 and self.num_genes < FEWEST_GENES

    @cached_property
    def _library_size_n(self) -> np.ndarray | None:
        """Library sizes that obs has of a file of counts that was cut to fewer genes, float64 of shape (n,)."""
        is_counts = self.scale.kind in ("counts", "fractional") and not self.scale.transform
        if self._obs_totals is None or self._features is not None or not is_counts or not self._may_be_cut:
            return None
        rows, rows_m = self._sample
        ratio_m = self._obs_totals[1][rows_m] / np.maximum(library_sizes(rows.values_l, rows.offsets_m1), 1e-300)
        return self._obs_totals[1] if (ratio_m > 1 - 1e-3).all() and np.median(ratio_m) > 1.01 else None

    def _prepared_sizes_of(self, rows_m: np.ndarray) -> np.ndarray | None:
        return None if self._prepared_size_n is None else self._prepared_size_n[rows_m].astype(np.float64)

    def _sizes_of(self, rows: Rows, rows_m: np.ndarray, sums_m: np.ndarray | None) -> np.ndarray | None:
        """Return the library sizes of linear values, float64 of shape (m,): as noted, as known, or their sums."""
        prepared_m = self._prepared_sizes_of(rows_m)
        if self.scale.kind == "cut":
            return np.full(len(rows_m), self.scale.total) if prepared_m is None else prepared_m
        summed_m = library_sizes(rows.values_l, rows.offsets_m1) if sums_m is None else sums_m
        if prepared_m is None:
            return summed_m if self._library_size_n is None else np.maximum(summed_m, self._library_size_n[rows_m])
        for at in np.flatnonzero(~(prepared_m >= summed_m * (1 - 1e-6)) | ~np.isfinite(prepared_m))[:1]:
            raise InputError(
                f"{self.source.path}: obs[{LIBRARY_SIZE_COLUMN!r}] of cell {rows_m[at]} is {prepared_m[at]:g}, but its "
                f"counts sum to {summed_m[at]:g}. Remove the column if the matrix was changed after `prepare`."
            )
        return prepared_m

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the values are read, each in a sentence."""
        notes = []
        if self._features is not None:
            notes.append(f"{self._features[1]} are left out of genes and library sizes")
        if self.normalization == "log1p_cp10k" and self._prepared_size_n is None:
            with suppress(InputError):
                if (found := replace(self, normalization="auto")._recognized()).transform:
                    notes.append(
                        f"{self.source.layer or 'X'} looks like {found.name}, but is taken for counts by "
                        "--normalization or that of the run; if that is wrong, choose counts with --layer, or give "
                        "--normalization none"
                    )
        if self.scale.note:
            notes.append(f"{self.source.layer or 'X'} {self.scale.note}")
        if self._library_size_n is not None:
            assert self._obs_totals is not None
            notes.append(
                f"it was cut to {self.num_genes:,} genes: library sizes are those of obs[{self._obs_totals[0]!r}], "
                "which are larger than the sums of its counts"
            )
        elif self._may_be_cut:
            notes.append(
                f"it has few genes ({self.num_genes:,}), and library sizes are sums over them. If it was cut from more "
                "genes, bins come out too high: give the whole file, or total counts of cells as obs['total_counts']"
            )
        return notes

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, rows_m: np.ndarray, *, is_summed: bool) -> tuple[Rows, np.ndarray | None, bool]:
        """Read rows, sorted ascending; `is_summed` if some columns will be added up, which logarithms cannot be.

        Returns:
            The rows; their library sizes, float64 of shape (m,), or None; and True if values are linear, still to be
            divided by the library sizes, False if they are compared with bins as they are.
        """
        rows, sums_m = self._read_genes(rows_m), None
        if self.normalization == "auto":
            sums_m = check_cells(rows.values_l, rows.offsets_m1, rows_m, scale=self.scale, source=self.name)
        if self.scale.is_binned_as_is and not (is_summed and self.scale.transform):
            return rows, self._prepared_sizes_of(rows_m), False
        rows = rows._replace(values_l=self.scale.linear(rows.values_l))
        if self.scale.is_binned_as_is:
            return rows, np.full(len(rows_m), TARGET_SUM), True
        return rows, self._sizes_of(rows, rows_m, sums_m), True

    def _read_genes(self, rows_m: np.ndarray) -> Rows:
        """Read rows without the columns that are not gene expression."""
        rows = self.source.read(rows_m)
        if self._features is None or not len(rows.columns_l):
            return rows
        is_gene_c = self._features[0]
        return rows.keep(is_gene_c[np.clip(rows.columns_l, 0, len(is_gene_c) - 1)])  # one outside is found later


def warn_of_notes(notes_of_files: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Log what a user should know about how files are read; what several files share is one line.

    Args:
        notes_of_files: The path and the `notes` of each file.
    """
    paths_of: dict[str, list[str]] = {}
    for path, notes in notes_of_files:
        for note in notes:
            paths_of.setdefault(note, []).append(path)
    for note, paths in paths_of.items():
        more = f" (and {len(paths) - 1:,} more)" if len(paths) > 1 else ""
        logger.warning("%s%s: %s", paths[0], more, note)


def one_per_cell(values_n: np.ndarray, cells: CellValues) -> np.ndarray:
    """Return values of `obs`, if there is one for each row of the matrix."""
    if len(values_n) != len(cells):
        raise InputError(
            f"{cells.name} does not fit obs: {len(values_n):,} cells in obs for {len(cells):,} rows. Re-save it."
        )
    return values_n
