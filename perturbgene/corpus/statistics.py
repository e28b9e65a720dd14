"""Pass one: what the cells say before anything is written, counted part by part and merged in a fixed order.

Owns the survey of a file (cells, donors, genes, content) and the statistics of a part (gene moments, value histogram,
label counts); leaves deciding to `prepare`. Letters: n cells, g genes, l values, m rows of one block.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse

from perturbgene.corpus.journal import entry_of, temporary_name
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.moments import CountTable, GeneMoments
from perturbgene.corpus.survey import (
    SPLITS,
    CellTable,
    Part,
    Plan,
    PrepareOptions,
    blocks_of,
    close_source,
    content_key,
    digest_of,
    gene_names_of,
    state_of_file,
    table_of,
)
from perturbgene.data_utils.binning import ValueHistogram
from perturbgene.data_utils.genes import GenePanel
from perturbgene.data_utils.labels import Vocabulary
from perturbgene.data_utils.scale import TARGET_SUM, ExpressionBlock, Normalization
from perturbgene.data_utils.shards import ShardCache

logger = logging.getLogger(__name__)

STATISTICS_FOLDER = "statistics"


@dataclass
class FileSurvey:
    """What one file says of its cells and genes.

    Args:
        key: Hash of its content, which decides the order of the files whatever their names.
        state: Size and time of change.
        genes: Hash of its gene names; files that agree share one table of genes.
        is_counts: True when its values are counts still to be normalised.
        units: Cells of each donor, '' where missing; empty when split by cell.
        units_of_label: Phenotype -> label -> donors with a cell of that label.
        cell_keys_n: Hash of each cell's name, uint64 of shape (n,); empty unless split by cell.
    """

    num_cells: int
    key: str
    state: tuple[int, int]
    genes: str
    is_counts: bool
    units: Counter[str] = field(default_factory=Counter)
    units_of_label: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    cell_keys_n: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


def survey_file(context: tuple[Sequence[Any], PrepareOptions, str], index: int) -> FileSurvey:
    """Survey one file.

    Args:
        context: The sources, the options and the obs column that is never split.
        index: Which source.
    """
    sources, options, split_by = context
    shard = ShardCache(
        [sources[index]], layer=options.layer, panel=GenePanel(("none",)), vocabulary=Vocabulary({}),
        normalization=options.normalization,
    )[0]  # fmt: skip
    table = CellTable(shard, options.column_of_phenotype, split_by, options.seed)
    genes = digest_of(*(str(column) for column in gene_names_of(shard, options.gene_id_column)))
    survey = FileSurvey(
        len(shard), content_key(table, genes), state_of_file(sources[index]), genes, shard.is_counts
    )  # fmt: skip
    if split_by == BY_CELL:
        survey.cell_keys_n = table.keys_n
    else:
        survey.units = Counter(_counts(table.units.codes_n, table.units.texts))
        survey.units_of_label = {name: _units_of_label(table, name) for name in options.column_of_phenotype}
    close_source(shard)
    return survey


def _counts(codes_n: np.ndarray, texts: Sequence[str]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for text, count in zip(texts, np.bincount(codes_n, minlength=len(texts)).tolist(), strict=True):
        counted[text] += count
    return {text: count for text, count in counted.items() if count}


def _units_of_label(table: CellTable, category: str) -> dict[str, set[str]]:
    labels, units, found = table.labels[category], table.units, dict[str, set[str]]()
    pairs = np.unique(np.stack([labels.codes_n, units.codes_n]), axis=1)
    for label, unit in pairs.T.tolist():
        if labels.texts[label]:
            found.setdefault(labels.texts[label], set()).add(units.texts[unit])
    return found


# -- values on one scale ------------------------------------------------------------------------------------------


def by_gene(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return the block's values over the union panel, float64 of shape (n, g), columns of one gene summed."""
    genes_l = block.alignment.gene_of_column_c[block.columns_l]
    is_kept_l = (genes_l >= 0) & (block.values_l != 0)
    if is_kept_l.all():
        parts = (block.values_l.astype(np.float64), genes_l, block.offsets_n1)
    else:
        offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
        parts = (block.values_l[is_kept_l].astype(np.float64), genes_l[is_kept_l], offsets)
    matrix = sparse.csr_matrix(parts, shape=(len(block), block.alignment.num_genes))
    if block.alignment.duplicated:
        matrix.sum_duplicates()
    return matrix


def per_10_000(block: ExpressionBlock, matrix: sparse.csr_matrix) -> np.ndarray:
    """Return each stored count of the block per 10,000 counts of its cell, shape (l,)."""
    assert block.library_size_n is not None
    return matrix.data * np.repeat(TARGET_SUM / np.maximum(block.library_size_n, 1e-300), np.diff(matrix.indptr))


def _linear_values(block: ExpressionBlock, matrix: sparse.csr_matrix, normalization: Normalization) -> np.ndarray:
    """Return counts per 10,000 (the values as they are with "none") of each stored value, shape (l,)."""
    if block.is_counts:
        return per_10_000(block, matrix)
    return matrix.data if normalization == "none" else np.expm1(matrix.data)


# -- statistics of parts ------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """What pass one finds on training cells; parts merge into the whole."""

    moments: GeneMoments
    histogram: ValueHistogram
    counts: CountTable | None = None
    labels: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    num_cells: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    @classmethod
    def of(cls, plan: Plan) -> "Statistics":
        """Statistics of no cell."""
        num_genes, is_per_gene = len(plan.panel), plan.options.per_gene_bins
        rows, resolution = (num_genes, 512) if is_per_gene else (1, 4096)
        return cls(
            GeneMoments.zeros(num_genes),
            ValueHistogram(num_rows=rows, resolution=resolution),
            CountTable(num_genes) if plan.flavor == "seurat_v3" else None,
            {name: {split: Counter() for split in SPLITS} for name in plan.options.column_of_phenotype},
        )

    def add(self, block: ExpressionBlock, options: PrepareOptions) -> None:
        """Add a block of training cells."""
        matrix = by_gene(block)
        linear_l, genes_l = _linear_values(block, matrix, options.normalization), matrix.indices
        self.moments.add(linear_l, genes_l, num_cells=len(block))
        if self.counts is not None:
            self.counts.add(matrix.data, genes_l)
        if not (options.bin_edges or options.bin_edges_path):
            self.histogram.add(np.log1p(linear_l), genes_l if options.per_gene_bins else None)

    def save(self, path: Path) -> None:
        """Write the numbers to a file; it appears whole or not at all."""
        tensors = {"num_cells": np.array([self.moments.num_cells]), "sum_g": self.moments.sum_g}
        tensors |= {"sum_squares_g": self.moments.sum_squares_g, "num_expressed_g": self.moments.num_expressed_g}
        flat = self.histogram.counts_gr.ravel()
        tensors["histogram_at"] = np.flatnonzero(flat)
        tensors["histogram"] = flat[tensors["histogram_at"]]
        if self.counts is not None:
            tensors |= self.counts.tensors()
        temporary = temporary_name(path)
        save_file(tensors, temporary)
        temporary.replace(path)

    def merge(self, path: Path, entry: dict[str, Any]) -> None:
        """Add a part: its file and what the journal says of it."""
        tensors = load_file(path)
        self.moments.merge(
            GeneMoments(
                int(tensors["num_cells"][0]), *(tensors[n] for n in ("sum_g", "sum_squares_g", "num_expressed_g"))
            )
        )
        self.histogram.counts_gr.ravel()[tensors["histogram_at"]] += tensors["histogram"]
        if self.counts is not None:
            self.counts.merge(tensors)
        for category, of_split in entry["labels"].items():
            for split, counts in of_split.items():
                self.labels[category][split].update(counts)
        for split in SPLITS:
            self.num_cells[split] += entry[split]


def fit_part(plan: Plan, part: Part) -> dict[str, Any]:
    """Write the statistics of one part and return its journal entry: cells and label counts of both splits."""
    table, statistics = table_of(plan, part.source), Statistics.of(plan)
    is_eval_n = table.is_eval(plan)[part.start : part.stop]
    for block in blocks_of(plan, part, part.start + np.flatnonzero(~is_eval_n)):
        statistics.add(block, plan.options)
    is_chosen = {"train": ~is_eval_n, "eval": is_eval_n}
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for category, found in table.labels.items():
        codes_n = found.codes_n[part.start : part.stop]
        labels[category] = {split: _counts(codes_n[is_chosen[split]], found.texts) for split in SPLITS}
    path = Path(plan.folder) / STATISTICS_FOLDER / part.name
    statistics.save(path)
    cells = {split: int(is_chosen[split].sum()) for split in SPLITS}
    return entry_of(path, Path(plan.folder), labels=labels, **cells)


def merged(plan: Plan, entries: Iterable[dict[str, Any]]) -> Statistics:
    """Add up all parts in their order, so that rounding is the same whoever counted them."""
    statistics = Statistics.of(plan)
    for entry in entries:
        statistics.merge(Path(plan.folder) / entry["file"], entry)
    return statistics
