"""Expression bins: their edges, and the expression that a bin represents.

Owns reading, checking and fitting edges; the compiled loops of `kernels` apply them, as `numpy.digitize` does. Knows
nothing of tokens or AnnData. Letters: g genes, e edges.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturbgene.cli.options import check_edges
from perturbgene.data_utils.genes import clean_gene
from perturbgene.errors import InputError, listed
from perturbgene.files import read_json

#: log1p counts per 10,000 of one read in a hundred million: below any expressed value, above rounding.
LOWEST_EDGE = 1e-4
#: log1p counts per 10,000 of a cell that expresses a single gene, and the width of bins above the highest quantile.
HIGHEST, TOP_WIDTH = 9.21, 1.0


def checked_edges(edges_e: Sequence[float] | np.ndarray, *, owner: str = "bin_edges") -> np.ndarray:
    """Return edges as float64, shape (e,), or say which one breaks the order.

    Raises:
        InputError: No edge, or one that is not a number, not finite, not above zero, or not above its predecessor.
    """
    try:
        edges = np.asarray(edges_e)
    except ValueError:  # lists of unequal length
        edges = np.asarray([""])
    if edges.size and edges.dtype.kind not in "iuf":  # text, null and true, which numpy would convert
        raise InputError(f"{owner} must be numbers, but got {edges_e!r}. Give e.g. --bin_edges 0.5 1 2.")
    edges = edges.astype(np.float64)
    if edges.ndim != 1 or edges.size == 0:
        raise InputError(f"{owner} must be a non-empty list of numbers, but got {edges_e!r}. Give at least one edge.")
    check_edges(edges.tolist(), owner=owner)
    return edges


@dataclass(frozen=True)
class BinEdges:
    """Edges shared by all genes, shape (1, e), or one row per gene of the panel, shape (g, e)."""

    edges_ge: np.ndarray

    @classmethod
    def shared(cls, edges_e: Sequence[float]) -> "BinEdges":
        """One list of edges for all genes."""
        return cls(checked_edges(edges_e)[None, :])

    @classmethod
    def per_gene(cls, edges_of_gene: Mapping[str, Sequence[float]], *, genes: Sequence[str]) -> "BinEdges":
        """One list of edges per gene, in panel order; all genes need one, all of the same length."""
        names = Counter(map(clean_gene, edges_of_gene))
        if repeated := [gene for gene, count in names.items() if count > 1]:
            raise InputError(
                f"bin_edges name {listed(repeated)} more than once (in several versions). Keep one of each."
            )
        edges_of_gene = dict(zip(names, edges_of_gene.values(), strict=True))
        missing = [gene for gene in genes if gene not in edges_of_gene]
        if missing:
            raise InputError(
                f"bin_edges lack {len(missing):,} genes of the panel: {listed(missing)}. Give edges for every gene, "
                "or one shared list."
            )
        rows = [checked_edges(edges_of_gene[gene], owner=f"bin_edges of gene {gene}") for gene in genes]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise InputError(f"bin_edges must have the same count for every gene, but counts are {sorted(lengths)}.")
        return cls(np.stack(rows))

    @property
    def num_edges(self) -> int:
        """Number of edges e; bins are 0..e."""
        return int(self.edges_ge.shape[1])

    @property
    def is_shared(self) -> bool:
        """True when all genes share one list."""
        return len(self.edges_ge) == 1

    def values(self) -> np.ndarray:
        """Return the expression that each bin represents: 0 for bin 0, then the middle of each bin.

        The lowest bin begins at nothing and the highest has no end. The lowest is counted from half its upper edge, and
        the highest is as wide as the one below it.

        Returns:
            Float64 of shape (g, e + 1), or (1, e + 1) if all genes share the edges; on the scale of the edges.

        Example:
            >>> BinEdges.shared([1e-4, 2.0, 3.0]).values().tolist()
            [[0.0, 1.5, 2.5, 3.5]]
        """
        edges_ge, zero_g1 = self.edges_ge, np.zeros((len(self.edges_ge), 1))
        if self.num_edges == 1:
            return np.concatenate([zero_g1, edges_ge], axis=1)
        lower_ge = np.concatenate([np.maximum(edges_ge[:, :1], edges_ge[:, 1:2] / 2), edges_ge[:, 1:]], axis=1)
        upper_ge = np.concatenate([edges_ge[:, 1:], 2 * edges_ge[:, -1:] - edges_ge[:, -2:-1]], axis=1)
        return np.concatenate([zero_g1, (lower_ge + upper_ge) / 2], axis=1)

    def levels(self) -> list[float]:
        """Return how much expression each bin represents, averaged over genes, relative to the mean of bins 1 to e.

        Example:
            >>> BinEdges.shared([1e-4, 2.0, 3.0]).levels()
            [0.0, 0.6, 1.0, 1.4]
        """
        middle_e = self.values().mean(axis=0)[1:]
        return [0.0, *(round(float(level), 4) for level in middle_e / middle_e.mean())]

    def to_json(self, genes: Sequence[str]) -> list[float] | dict[str, list[float]]:
        """Return the edges as they are written in files: a list, or gene -> list."""
        if self.is_shared:
            return list(self.edges_ge[0].tolist())
        return dict(zip(genes, self.edges_ge.tolist(), strict=True))


def read_edges(path: str | Path) -> list[float] | dict[str, list[float]]:
    """Read edges from JSON: a shared list, or gene -> list."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"bin edges {path} cannot be read as JSON ({error}). Give [0.5, 1] or a gene -> list map."
        ) from error
    if not isinstance(content, list | dict):
        raise InputError(f"bin edges {path} hold a {type(content).__name__}. Give [0.5, 1] or a gene -> list map.")
    return content


class ValueHistogram:
    """Mergeable histogram of positive values, for quantiles of data that never fit in memory.

    The grid has `resolution` cells over (0, `top`]. Quantile edges are on cell boundaries, so they do not depend on the
    order of the values and are practically never exactly on one.
    """

    def __init__(self, *, top: float = 12.0, resolution: int = 4096) -> None:
        self.top = top
        self.counts_r = np.zeros(resolution, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count positive values."""
        resolution = len(self.counts_r)
        cells = np.clip((values * (resolution / self.top)).astype(np.int64), 0, resolution - 1)
        self.counts_r += np.bincount(cells, minlength=resolution)

    def quantile_edges(self, num_bins: int) -> list[float]:
        """Return edges that cut the expressed values into `num_bins` bins of about equal size.

        The first edge is `LOWEST_EDGE`, so every expressed value, seen or not yet seen, has a bin >= 1. There are fewer
        edges if neighboring quantiles coincide. Above the highest quantile the bins are `TOP_WIDTH` wide up to
        `HIGHEST`: a hormone may be a hundred times as high as where the top eighth of all values begins.
        """
        if self.counts_r.sum() == 0:
            return []
        step = self.top / len(self.counts_r)
        cumulative_r = np.cumsum(self.counts_r) / self.counts_r.sum()
        inner = [(np.searchsorted(cumulative_r, b / num_bins) + 1) * step for b in range(1, num_bins)]
        above = np.arange(max(inner, default=0.0) + TOP_WIDTH, HIGHEST, TOP_WIDTH)
        return [LOWEST_EDGE, *(round(float(edge), 6) for edge in (*np.unique(inner), *above))]
