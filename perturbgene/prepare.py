"""Raw h5ad files to a corpus: genes harmonised and ranked, bins and vocabulary fitted, donors split, shards shuffled.

Owns what is decided once for a data set, from its training cells alone, and writes it down in `manifest.json`; leaves
reading to `shards` and tokens to the tokenizer. Letters: n cells, g genes, l values, m rows of one block.
"""

import datetime
import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm.auto import tqdm

from perturbgene import __version__
from perturbgene.data_utils.binning import LOWEST_EDGE, ValueHistogram, read_edges
from perturbgene.data_utils.expression import TARGET_SUM, ExpressionBlock, Normalization, check_values
from perturbgene.data_utils.genes import ID_COLUMNS, SYMBOL_COLUMNS, GenePanel, clean_gene, is_ensembl, read_panel
from perturbgene.data_utils.moments import GeneMoments
from perturbgene.data_utils.partition import split_rows
from perturbgene.data_utils.read import expand_paths
from perturbgene.data_utils.shards import LIBRARY_SIZE_COLUMN, Shard, ShardCache
from perturbgene.data_utils.tokenization import RANK_COLUMN, GeneTokenizer
from perturbgene.data_utils.vocab import Vocabulary, is_missing, label_text
from perturbgene.errors import InputError, listed

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
SPLITS = ("train", "eval")

#: Columns of obs that name the donor, in the order they are tried when --split_by is not given.
DONOR_COLUMNS = ("donor_id", "donor", "individual", "patient", "sample")

#: A numeric obs column with more distinct values than this is a measurement, not a phenotype.
MOST_NUMERIC_LABELS = 50

_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class PrepareOptions:
    """How a corpus is made; the fields of `configs.PrepareConfig` under the same names, where they are explained."""

    phenotypes: Sequence[str] = ()
    split_by: str | None = None
    eval_fraction: float = 0.2
    eval_donors: Sequence[str] = ()
    num_top_genes: int | None = None
    bin_edges: Sequence[float] | None = None
    bin_edges_path: str | None = None
    num_bins: int = 8
    per_gene_bins: bool = False
    normalization: Normalization = "auto"
    layer: str | None = None
    gene_id_column: str | None = None
    panel: str | None = None
    shard_size: int = 10_000
    min_genes: int = 1
    overwrite: bool = False
    seed: int = 0

    @property
    def column_of_phenotype(self) -> dict[str, str]:
        """Phenotype -> obs column, from entries `name` or `name=column`."""
        pairs = [entry.partition("=") for entry in self.phenotypes]
        return {name: column or name for name, _, column in pairs}


@dataclass
class Survey:
    """What the files say before anything is fitted: one entry per cell, files in order.

    Args:
        labels: One column per phenotype, '' where missing.
        names_n: Names of the cells, str of shape (n,).
        units_n: What is never split (a donor, or the cell itself), '' where missing, shape (n,).
        split_by: The obs column of the units, or "cell".
    """

    labels: pd.DataFrame
    names_n: np.ndarray
    units_n: np.ndarray
    split_by: str
    warnings: list[str] = field(default_factory=list)


# -- what the files hold ------------------------------------------------------------------------------------------


def _each(shards: ShardCache) -> Iterator[Shard]:
    for index in range(len(shards)):
        yield shards[index]


def _names_of_columns(shard: Shard, gene_id_column: str | None) -> tuple[tuple[object, ...], ...]:
    """Return what a file calls its genes: names, ids and symbols (the names where it has no such column)."""
    source = shard.source
    known = source.columns_of(source.var_frame)
    names = source.var_names if gene_id_column is None else source.var_column(gene_id_column).to_numpy(dtype=object)
    others = [next((column for column in wanted if column in known), None) for wanted in (ID_COLUMNS, SYMBOL_COLUMNS)]
    return tuple(tuple(names if column is None else source.var_column(column)) for column in (None, *others))


def _id_and_symbol(name: object, id_: object, symbol: object) -> tuple[str, str]:
    """Choose a gene's id: the Ensembl id wherever the file keeps it, else the name of its column."""
    own, other = clean_gene(name), clean_gene(id_)
    return (own if is_ensembl(own) or not is_ensembl(other) else other), clean_gene(label_text(symbol)) or own


def _union_panel(sources: Sequence[Any], options: PrepareOptions) -> GenePanel:
    """Join the genes of all files, in order of first appearance; a gene known by id and by symbol is one gene."""
    symbol_of: dict[str, str] = {}
    kept_apart: set[str] = set()
    seen: set[int] = set()
    bare = ShardCache(sources, layer=options.layer, panel=GenePanel(("none",)), vocabulary=Vocabulary({}))
    for shard in _each(bare):
        columns = _names_of_columns(shard, options.gene_id_column)
        if hash(columns) in seen:
            continue
        seen.add(hash(columns))
        genes = dict(itertools.starmap(_id_and_symbol, zip(*columns, strict=True)))
        kept_apart.update(symbol for gene, symbol in genes.items() if symbol != gene and symbol in genes)
        for gene, symbol in genes.items():
            if symbol_of.setdefault(gene, symbol) == gene:
                symbol_of[gene] = symbol
    if not symbol_of:
        raise InputError("the files hold no genes. Give files with at least one column.")
    times = Counter(symbol for gene, symbol in symbol_of.items() if symbol != gene)
    aliases = {symbol for symbol, count in times.items() if count == 1 and not is_ensembl(symbol)} - kept_apart
    kept = {gene: symbol for gene, symbol in symbol_of.items() if gene not in aliases}
    return GenePanel(tuple(kept), tuple(kept.values()))


def _texts_of(values_n: pd.Series) -> np.ndarray:
    """Spell one obs column as labels, str objects of shape (n,), '' where there is no value."""
    factor = pd.Categorical(values_n)
    return np.array([*map(label_text, factor.categories), ""], dtype=object)[factor.codes]


def _labels_of(shard: Shard, category: str, column: str) -> np.ndarray:
    values_n = shard.source.obs_column(column)
    kinds = values_n.cat.categories if isinstance(values_n.dtype, pd.CategoricalDtype) else values_n
    is_number = pd.api.types.is_numeric_dtype(kinds) and not pd.api.types.is_bool_dtype(kinds)
    if is_number and values_n.nunique() > MOST_NUMERIC_LABELS:
        raise InputError(
            f"{shard.path}: obs[{column!r}] holds {values_n.nunique():,} different numbers, too many to be labels of "
            f"{category!r}. Cut it into groups first, e.g. with pandas.cut."
        )
    texts_n = _texts_of(values_n)
    texts_n[np.isin(texts_n, [text for text in set(texts_n) if is_missing(text)])] = ""
    return texts_n


def _unit_column(shards: ShardCache, options: PrepareOptions) -> str:
    if options.split_by:
        return options.split_by
    for column in DONOR_COLUMNS:
        if all(column in shard.source.columns_of("obs") for shard in _each(shards)):
            units = {
                text for shard in _each(shards) for text in map(label_text, shard.source.obs_column(column).unique())
            }
            if len([unit for unit in units if not is_missing(unit)]) > 1:
                return column
    return "cell"


def _survey(shards: ShardCache, options: PrepareOptions) -> Survey:
    split_by = _unit_column(shards, options)
    names, units, labels = [], [], []
    for shard in _each(shards):
        names.append(np.asarray(shard.source.obs_names, dtype=object).astype(str))
        units.append(names[-1] if split_by == "cell" else _texts_of(shard.source.obs_column(split_by)))
        labels.append([_labels_of(shard, name, column) for name, column in options.column_of_phenotype.items()])
    table = {
        name: np.concatenate(parts)
        for name, parts in zip(options.column_of_phenotype, zip(*labels, strict=True), strict=True)
    }
    names_n, units_n = np.concatenate(names), np.concatenate(units)
    survey = Survey(pd.DataFrame(table, index=range(len(names_n))), names_n, units_n, split_by)
    if split_by == "cell":
        survey.warnings.append(
            "split by cell: cells of one donor stand on both sides, so scores are optimistic; give --split_by donor_id"
        )
    elif num_missing := int((units_n == "").sum()):
        survey.warnings.append(f"{num_missing:,} cells have no {split_by}: they stay together, as if one {split_by}")
    return survey


def _is_eval_cell(survey: Survey, options: PrepareOptions) -> np.ndarray:
    """Choose the evaluation cells: whole donors, or single cells, by a hash of their names."""
    is_eval_n = np.zeros(len(survey.units_n), dtype=bool)
    if survey.split_by != "cell":
        return np.isin(survey.units_n, _eval_units(survey, options))
    if options.eval_donors:
        raise InputError(
            f"eval_donors {listed(options.eval_donors)} need a split by donor, but cells are split one by one. Name "
            "the donor column with --split_by."
        )
    key_n = pd.util.hash_array(survey.names_n.astype(object), hash_key=f"{options.seed:016d}"[-16:], categorize=False)
    is_eval_n[np.argsort(key_n, kind="stable")[: round(options.eval_fraction * len(key_n))]] = True
    return is_eval_n


def _eval_units(survey: Survey, options: PrepareOptions) -> list[str]:
    """Choose the donors to hold out: those named, or by hash up to about `eval_fraction` of the cells."""
    size_of = Counter(survey.units_n.tolist())
    unknown = sorted(set(options.eval_donors) - set(size_of))
    if unknown:
        raise InputError(
            f"eval_donors {listed(unknown)} are not in obs[{survey.split_by!r}]. Known: {listed(size_of)}."
        )
    if len(size_of) < 2:
        raise InputError(
            f"obs[{survey.split_by!r}] holds one value ({listed(size_of)}), so nothing can be held out. Give another "
            "--split_by, or --split_by cell."
        )
    if set(options.eval_donors) == set(size_of):
        raise InputError(f"eval_donors name every {survey.split_by}, so nothing is left to train on. Name fewer.")
    wanted, chosen, held_out = options.eval_fraction * len(survey.units_n), list(options.eval_donors), 0
    if chosen or not wanted:
        return chosen
    for unit in _rank_by_hash(list(size_of), options.seed):
        is_nearer = abs(held_out + size_of[unit] - wanted) < abs(held_out - wanted)
        if is_nearer and len(chosen) < len(size_of) - 1:
            chosen.append(unit)
            held_out += size_of[unit]
    return chosen or [min(sorted(size_of), key=size_of.__getitem__)]


def _rank_by_hash(texts: Sequence[str], seed: int) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())


# -- pass one: what is fitted, on training cells ------------------------------------------------------------------


def _checked(block: ExpressionBlock) -> ExpressionBlock:
    """Refuse values that have no bin and columns that do not exist: the door has seen a sample of rows only."""
    check_values(block.values_l, source=block.source)
    num_columns = len(block.alignment.gene_of_column_c)
    if len(block.columns_l) and not 0 <= block.columns_l.min() <= block.columns_l.max() < num_columns:
        raise InputError(f"{block.source} holds column indices outside its {num_columns:,} columns. Write it again.")
    return block


def _blocks(shards: ShardCache, rows_n: np.ndarray, sizes: Sequence[int], *, text: str) -> Iterator[ExpressionBlock]:
    """Read rows (sorted, numbered over all files) in blocks, with a progress bar."""
    starts_f = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    with tqdm(total=len(rows_n), desc=text, unit=" cells", unit_scale=True, disable=None) as bar:
        for first in range(0, len(rows_n), _BLOCK_ROWS):
            for file, rows in split_rows(rows_n[first : first + _BLOCK_ROWS], starts_f=starts_f):
                yield _checked(shards[file].read(rows, first_cell=int(starts_f[file])))
                bar.update(len(rows))


def _by_gene(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return the block's values over the union panel, float64 of shape (n, g), columns of one gene summed."""
    genes_l = block.alignment.gene_of_column_c[block.columns_l]
    is_kept_l = (genes_l >= 0) & (block.values_l != 0)
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    parts = (block.values_l[is_kept_l].astype(np.float64), genes_l[is_kept_l], offsets)
    matrix = sparse.csr_matrix(parts, shape=(len(block), block.alignment.num_genes))
    if block.alignment.duplicated:
        matrix.sum_duplicates()
    return matrix


def _per_10_000(block: ExpressionBlock, matrix: sparse.csr_matrix) -> np.ndarray:
    """Return each stored count of the block per 10,000 counts of its cell, shape (l,)."""
    assert block.library_size_n is not None
    return matrix.data * np.repeat(TARGET_SUM / np.maximum(block.library_size_n, 1e-300), np.diff(matrix.indptr))


def _linear_values(block: ExpressionBlock, *, normalization: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """Return counts per 10,000 (the values as they are with "none") and the gene of each stored value, shape (l,)."""
    matrix = _by_gene(block)
    if block.is_counts:
        return _per_10_000(block, matrix), matrix.indices
    return matrix.data if normalization == "none" else np.expm1(matrix.data), matrix.indices


@dataclass
class Fit:
    """What pass one found on the training cells."""

    moments: GeneMoments
    histogram: ValueHistogram


def _fit(blocks: Iterator[ExpressionBlock], num_genes: int, options: PrepareOptions) -> Fit:
    rows, resolution = (num_genes, 512) if options.per_gene_bins else (1, 4096)
    fit = Fit(GeneMoments.zeros(num_genes), ValueHistogram(num_rows=rows, resolution=resolution))
    for block in blocks:
        linear_l, genes_l = _linear_values(block, normalization=options.normalization)
        fit.moments.add(linear_l, genes_l, num_cells=len(block))
        is_expressed_l = linear_l > 0
        rows_l = genes_l[is_expressed_l] if options.per_gene_bins else None
        fit.histogram.add(np.log1p(linear_l[is_expressed_l]), rows_l)
    return fit


def _given_panel(union: GenePanel, panel: str, warnings: list[str]) -> np.ndarray:
    """Return indices into the union panel of a given panel's genes, in its order; those of no file are counted."""
    path = Path(panel)
    try:
        is_tokenizer = path.is_dir() or path.suffix == ".json"
        given = GeneTokenizer.from_pretrained(path).genes if is_tokenizer else read_panel(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"panel {panel} cannot be read ({error}). Give a text file of genes, or a run's folder."
        ) from error
    found = np.array([union.find(gene) for gene in given], dtype=np.int64)
    num_missing = int((found < 0).sum())
    if 2 * num_missing > len(given) or not len(given):
        raise InputError(
            f"panel {panel}: {num_missing:,} of {len(given):,} genes are in no file. Give another --panel."
        )
    if num_missing:
        warnings.append(f"{num_missing:,} of {len(given):,} genes of panel {panel} are in no file and are left out")
    return found[found >= 0]


def _choose_panel(union: GenePanel, fit: Fit, options: PrepareOptions, warnings: list[str]) -> np.ndarray:
    """Return indices into the union panel: a given panel's genes, or expressed genes by variability."""
    if options.panel:
        ranked = _given_panel(union, options.panel, warnings)
    else:
        ranked = fit.moments.rank()
        ranked = ranked[fit.moments.num_expressed_g[ranked] > 0]
    if not len(ranked):
        raise InputError("no training cell expresses any gene: is X empty? Choose the matrix with --layer.")
    if options.num_top_genes and options.num_top_genes > len(ranked):
        raise InputError(
            f"num_top_genes {options.num_top_genes:,} exceeds the {len(ranked):,} expressed genes. Lower it."
        )
    return ranked[: options.num_top_genes]


def _choose_edges(fit: Fit, union: GenePanel, chosen_g: np.ndarray, options: PrepareOptions) -> Any:
    if options.bin_edges_path:
        return read_edges(options.bin_edges_path)
    if options.bin_edges:
        return list(options.bin_edges)
    if options.normalization == "none":
        raise InputError("--normalization none needs --bin_edges, because quantile bins are fitted on log1p_cp10k.")
    if not options.per_gene_bins:
        return fit.histogram.quantile_edges(options.num_bins)
    return {union.genes[g]: _edges_of_gene(fit.histogram, int(g), options.num_bins) for g in chosen_g}


def _edges_of_gene(histogram: ValueHistogram, gene: int, num_bins: int) -> list[float]:
    """Quantile edges of one gene; coinciding quantiles are spread so that every gene has `num_bins` edges."""
    edges = histogram.quantile_edges(num_bins, row=gene) or [LOWEST_EDGE]
    step = histogram.top / histogram.counts_gr.shape[1]
    while len(edges) < num_bins:
        edges.append(round(edges[-1] + step, 6))
    return edges


def _choose_labels(survey: Survey, is_eval_n: np.ndarray, options: PrepareOptions) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    for category in options.column_of_phenotype:
        seen = Counter(survey.labels.loc[~is_eval_n, category])
        seen.pop("", None)
        if not seen:
            raise InputError(
                f"no training cell has a {category!r}. Leave it out of --phenotypes, or choose its column."
            )
        labels[category] = sorted(seen)
        new = sorted(set(survey.labels.loc[is_eval_n, category]) - {"", *seen})
        if new:
            survey.warnings.append(f"{category}: {listed(new)} occur in eval cells only and cannot be predicted")
    return labels


# -- pass two: shards ---------------------------------------------------------------------------------------------


def _smallest_type(values_l: np.ndarray) -> np.dtype:
    """Return the narrowest type that holds the values exactly: an unsigned integer, float32 or float64."""
    if not values_l.size or (values_l == np.floor(values_l)).all():
        return np.min_scalar_type(int(values_l.max(initial=0)))
    return np.dtype(np.float32 if (values_l.astype(np.float32) == values_l).all() else np.float64)


def _content_hashes(matrix: sparse.csr_matrix) -> np.ndarray:
    """Hash the expressed genes and values of each cell, uint64 of shape (n,); equal cells have equal hashes."""
    key_l = matrix.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key_l ^= (matrix.data * 1024).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    key_l = (key_l ^ (key_l >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    sums_n = np.add.reduceat(np.append(key_l, np.uint64(0)), matrix.indptr[:-1].astype(np.int64))
    return np.where(np.diff(matrix.indptr) > 0, sums_n, np.uint64(0))


@dataclass(frozen=True)
class _PanelRows:
    """Rows as they are written: panel genes (n, g), library sizes and hashes of the whole cells, both (n,)."""

    matrix: sparse.csr_matrix
    library_size_n: np.ndarray
    hash_n: np.ndarray


def _panel_rows(block: ExpressionBlock, gene_to_panel: np.ndarray, num_genes: int, *, as_counts: bool) -> _PanelRows:
    """Return a block's panel genes, in panel order, as counts or as log1p counts per 10,000."""
    whole = _by_gene(block)
    hash_n = _content_hashes(whole)
    if block.is_counts and not as_counts:
        whole.data = np.log1p(_per_10_000(block, whole)).astype(np.float32)
    panel_l = gene_to_panel[whole.indices]
    is_kept_l = panel_l >= 0
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[whole.indptr]
    matrix = sparse.csr_matrix((whole.data[is_kept_l], panel_l[is_kept_l], offsets), shape=(len(block), num_genes))
    matrix.sum_duplicates()
    size_n = block.library_size_n if block.library_size_n is not None else np.full(len(block), TARGET_SUM)
    return _PanelRows(matrix, size_n, hash_n)


class _ShardWriter:
    """Writes one split's cells, in the order of a global shuffle, to h5ad files of `shard_size` cells."""

    def __init__(self, folder: Path, survey: Survey, tokenizer: GeneTokenizer, options: PrepareOptions) -> None:
        self.folder, self.survey, self.tokenizer, self.options = folder, survey, tokenizer, options
        self.written: list[dict[str, Any]] = []
        folder.mkdir(parents=True)

    def _var(self) -> pd.DataFrame:
        symbols = self.tokenizer.gene_symbols or self.tokenizer.genes
        frame = pd.DataFrame({"feature_name": symbols, RANK_COLUMN: np.arange(len(symbols))})
        return frame.set_axis(pd.Index(self.tokenizer.genes, dtype=str))

    def _obs(self, rows_m: np.ndarray, library_size_m: np.ndarray) -> pd.DataFrame:
        survey = self.survey
        columns = {name: labels_n.to_numpy()[rows_m] for name, labels_n in survey.labels.items()}
        if survey.split_by != "cell":
            columns.setdefault(survey.split_by, survey.units_n[rows_m])
        table = {name: pd.Categorical(np.where(texts_m == "", None, texts_m)) for name, texts_m in columns.items()}
        names = ad.utils.make_index_unique(pd.Index(survey.names_n[rows_m]))
        return pd.DataFrame({**table, LIBRARY_SIZE_COLUMN: library_size_m}, index=names)

    def write(self, rows_m: np.ndarray, matrix: sparse.csr_matrix, library_size_m: np.ndarray) -> None:
        """Write one shard whose rows are `rows_m`, numbered over all files."""
        path = self.folder / f"shard_{len(self.written):05d}.h5ad"
        matrix = sparse.csr_matrix(matrix, dtype=_smallest_type(matrix.data))
        adata = ad.AnnData(matrix, obs=self._obs(rows_m, library_size_m), var=self._var())
        adata.write_h5ad(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.written.append({"file": f"{self.folder.name}/{path.name}", "cells": len(rows_m), "sha256": digest})


@dataclass
class _Split:
    """What the audit needs to know of the cells of one split."""

    hashes: list[np.ndarray] = field(default_factory=list)
    num_dropped: int = 0


def _write_split(
    writer: _ShardWriter,
    shards: ShardCache,
    sizes: Sequence[int],
    rows_n: np.ndarray,
    *,
    gene_to_panel: np.ndarray,
    as_counts: bool,
) -> _Split:
    split, options, num_genes = _Split(), writer.options, len(writer.tokenizer.panel)
    shuffled = np.random.default_rng((options.seed, len(rows_n))).permutation(rows_n)
    for first in range(0, len(shuffled), options.shard_size):
        order = shuffled[first : first + options.shard_size]
        rows = np.sort(order)
        blocks = _blocks(shards, rows, sizes, text=f"{writer.folder.name} shard {len(writer.written)}")
        parts = [_panel_rows(block, gene_to_panel, num_genes, as_counts=as_counts) for block in blocks]
        matrix = sparse.vstack([part.matrix for part in parts], format="csr")
        place = np.searchsorted(rows, order)
        place = place[np.diff(matrix.indptr)[place] >= options.min_genes]
        split.num_dropped += len(order) - len(place)
        if len(place):
            writer.write(rows[place], matrix[place], np.concatenate([part.library_size_n for part in parts])[place])
            split.hashes.append(np.concatenate([part.hash_n for part in parts])[place])
    return split


# -- audit and manifest -------------------------------------------------------------------------------------------


def _unmeasured(shards: ShardCache, chosen_g: np.ndarray) -> list[str]:
    """Report panel genes that some file lacks: in the shards its cells have no counts there, as if not expressed."""
    num_missing, files = np.zeros(len(chosen_g), dtype=np.int64), []
    for shard in _each(shards):
        is_missing_g = ~shard.alignment.is_measured_g[chosen_g]
        num_missing += is_missing_g
        files += [shard.path] if is_missing_g.any() else []
    if not files:
        return []
    return [
        f"{(num_missing > 0).sum():,} of {len(chosen_g):,} panel genes are not measured in all files "
        f"({listed(files, most=3)} lack some): there they count as not expressed"
    ]


def _audit(survey: Survey, splits: Mapping[str, _Split], options: PrepareOptions) -> list[str]:
    """Return what may make scores dishonest: duplicate cells, confounded labels, donors on both sides."""
    findings = list(survey.warnings)
    hashes = {
        name: np.concatenate(split.hashes) if split.hashes else np.zeros(0, np.uint64) for name, split in splits.items()
    }
    for name, values in hashes.items():
        if (copies := len(values) - len(np.unique(values))) > 0:
            findings.append(f"{copies:,} of {len(values):,} {name} cells are exact copies of another {name} cell")
    if (shared := np.isin(hashes["eval"], hashes["train"]).sum()) > 0:
        findings.append(f"{shared:,} of {len(hashes['eval']):,} eval cells are exact copies of a training cell")
    for name, split in splits.items():
        if split.num_dropped:
            findings.append(
                f"{split.num_dropped:,} {name} cells express fewer than {options.min_genes} panel genes: dropped"
            )
    if survey.split_by != "cell":
        for category in options.column_of_phenotype:
            is_known_n = (survey.labels[category] != "").to_numpy()
            units = pd.Series(survey.units_n[is_known_n])
            donors_of_label = units.groupby(survey.labels.loc[is_known_n, category].to_numpy()).nunique()
            alone = donors_of_label.index[donors_of_label == 1].tolist()
            if alone:
                findings.append(f"{category}: {listed(alone)} come from one {survey.split_by} only (confounded)")
    return findings


def _manifest(
    survey: Survey, shards: ShardCache, tokenizer: GeneTokenizer, writers: Mapping[str, _ShardWriter],
    is_eval_n: np.ndarray, findings: Sequence[str], options: PrepareOptions, *, as_counts: bool,
) -> dict[str, Any]:  # fmt: skip
    categories = options.column_of_phenotype
    units = {name: np.unique(survey.units_n[is_eval_n == (name == "eval")].astype(str)) for name in SPLITS}
    is_by_donor = survey.split_by != "cell"
    inputs = [
        {"path": str(shard.path), "cells": len(shard), "values": "counts" if shard.is_counts else "log",
         "genes": shard.alignment.describe()}
        for shard in _each(shards)
    ]  # fmt: skip
    return {
        "manifest_version": MANIFEST_VERSION,
        "perturbgene_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "values": "counts" if as_counts else "log1p_cp10k",
        "num_genes": len(tokenizer.panel),
        "bin_edges": tokenizer.bin_edges.to_json(tokenizer.genes) if tokenizer.bin_edges.is_shared else "per gene",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "split": {
            "by": survey.split_by,
            "seed": options.seed,
            "eval_fraction": options.eval_fraction,
            **({name: units[name].tolist() for name in SPLITS} if is_by_donor else {}),
        },
        "phenotypes": {
            category: {name: _label_counts(survey, category, is_eval_n == (name == "eval")) for name in SPLITS}
            for category in categories
        },
        "shards": {name: writer.written for name, writer in writers.items()},
        "audit": list(findings),
    }


def _label_counts(survey: Survey, category: str, is_chosen_n: np.ndarray) -> dict[str, int]:
    counts = Counter(survey.labels.loc[is_chosen_n, category])
    return {label or "(missing)": count for label, count in sorted(counts.items())}


def _target(output: str | Path, *, overwrite: bool) -> tuple[Path, Path]:
    """Return the corpus folder and the folder beside it that is filled first."""
    folder = Path(output).expanduser()
    folder = folder if folder.name else folder.resolve()
    if folder.exists() and not overwrite:
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if not is_empty:
            raise InputError(f"{folder} exists and is not empty. Choose another --output, or pass --overwrite.")
    elif folder.exists() and not (folder / MANIFEST_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not a corpus ({MANIFEST_FILE} is missing), so --overwrite leaves it alone.")
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Choose another --output.") from error
    return folder, temporary


def prepare(inputs: str | Path | Sequence[Any], output: str | Path, **options: Any) -> Path:
    """Make a corpus from h5ad files (or AnnData objects).

    Args:
        inputs: Files, patterns or folders; or AnnData objects.
        output: The corpus folder: `train/`, `eval/` (shards that scanpy opens), `tokenizer.json`, `manifest.json`.
        options: See `PrepareOptions` and `perturbgene prepare -h`.

    Returns:
        The corpus folder, complete; it appears by one rename.

    Raises:
        InputError: A file, column or option cannot be used; nothing is left behind.
    """
    chosen = PrepareOptions(**options)
    folder, temporary = _target(output, overwrite=chosen.overwrite)
    try:
        _prepare(inputs, temporary, chosen)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    logger.info("corpus written to %s", folder)
    return folder


def _prepare(inputs: Any, folder: Path, options: PrepareOptions) -> None:
    is_memory = hasattr(inputs, "obs_names") or (
        not isinstance(inputs, str | Path) and any(hasattr(i, "obs_names") for i in inputs)
    )
    sources = ([inputs] if hasattr(inputs, "obs_names") else list(inputs)) if is_memory else expand_paths(inputs)
    union = _union_panel(sources, options)
    shards = ShardCache(
        sources, layer=options.layer, panel=union, vocabulary=Vocabulary({}), normalization=options.normalization,
        gene_id_column=options.gene_id_column,
    )  # fmt: skip
    survey = _survey(shards, options)
    sizes = [len(shard) for shard in _each(shards)]
    is_eval_n = _is_eval_cell(survey, options)
    labels = _choose_labels(survey, is_eval_n, options)
    fit = _fit(_blocks(shards, np.flatnonzero(~is_eval_n), sizes, text="genes and bins"), len(union), options)
    chosen_g = _choose_panel(union, fit, options, survey.warnings)
    survey.warnings += _unmeasured(shards, chosen_g)
    tokenizer = GeneTokenizer(
        genes=[union.genes[g] for g in chosen_g],
        gene_symbols=[union.symbols[g] for g in chosen_g],
        phenotypes=labels,
        bin_edges=_choose_edges(fit, union, chosen_g, options),
        included_phenotypes=list(labels),
        normalization=options.normalization,
    )
    gene_to_panel = np.full(len(union), -1, dtype=np.int64)
    gene_to_panel[chosen_g] = np.arange(len(chosen_g))
    as_counts = all(shard.is_counts for shard in _each(shards))
    writers = {name: _ShardWriter(folder / name, survey, tokenizer, options) for name in SPLITS}
    splits = {
        name: _write_split(
            writers[name], shards, sizes, np.flatnonzero(is_eval_n == (name == "eval")),
            gene_to_panel=gene_to_panel, as_counts=as_counts,
        )
        for name in SPLITS
    }  # fmt: skip
    findings = _audit(survey, splits, options)
    for finding in findings:
        logger.warning("audit: %s", finding)
    tokenizer.save_pretrained(folder)
    manifest = _manifest(survey, shards, tokenizer, writers, is_eval_n, findings, options, as_counts=as_counts)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_prepare(config: Any) -> Path:
    """Run the `prepare` verb."""
    names = PrepareOptions.__dataclass_fields__
    return prepare(config.inputs, config.output, **{name: getattr(config, name) for name in names})


def read_manifest(corpus: str | Path) -> dict[str, Any]:
    """Read a corpus folder's manifest.

    Raises:
        InputError: The folder is no corpus, or of another version.
    """
    path = Path(corpus) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{corpus} is not a corpus ({error}). Make one with `perturbgene prepare`.") from error
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        raise InputError(
            f"{path} has version {manifest.get('manifest_version')!r}, not {MANIFEST_VERSION}. Run prepare again."
        )
    return dict(manifest)


def shard_paths(corpus: str | Path, split: str) -> list[str]:
    """Return the shards of one split ("train" or "eval") of a corpus."""
    return [str(Path(corpus) / entry["file"]) for entry in read_manifest(corpus)["shards"][split]]


__all__ = ["PrepareOptions", "prepare", "read_manifest", "run_prepare", "shard_paths"]
