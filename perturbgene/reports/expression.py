"""The cells that a verb has read, on a map: their labels and the expression of a few genes.

Owns reading a sample of them again; leaves the layout to `layout` and what the page says to `effects`. Letters: n
cells, m cells on the map, g genes.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.cli.verbs import PredictConfig
from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.scale import log_matrix
from perturbgene.data_utils.sources import StoredCells
from perturbgene.errors import InputError
from perturbgene.inference.classifiers import sample
from perturbgene.inference.evaluated_cells import EMBEDDING
from perturbgene.inference.run import Run, load_run
from perturbgene.inference.starts import embedding_of
from perturbgene.inference.streaming import open_cells
from perturbgene.reports.layout import umap_layout
from perturbgene.training.transfer import quiet
from perturbgene.training.votes import READING

#: Most cells that are read and embedded for the map.
MOST_CELLS = 2_000


@dataclass(frozen=True)
class ExpressionMap:
    """Some of the cells, or none with the reason in `note`."""

    labels: pd.DataFrame  # columns of obs, a row for each cell
    genes: pd.DataFrame  # log1p counts per 10,000 by the name of a gene, the same rows
    places_m2: np.ndarray
    note: str


def read_map(
    source: str, run: str, *, columns: Sequence[str], genes: Sequence[str], device: str, reading: Mapping[str, Any]
) -> ExpressionMap:
    """Read a sample of the cells that a verb has read, and lay it out.

    Args:
        source, run: File and run folder, as the verb was given them.
        columns: Columns of `obs`, or phenotypes; those that are missing are left out.
        genes: Names of genes of the run's panel; others are left out.
        device: Where cells are embedded.
        reading: How the verb read the cells.
    """
    try:
        loaded = load_run(run, device=device)
        with quiet(READING):
            dataset = open_cells(FileList([source]), loaded, {}, tokenizer=loaded.tokenizer.reading([]), **reading)
            with closing(dataset.shards):
                return _map_of(dataset, loaded, columns=columns, genes=genes)
    except InputError as error:
        none = pd.DataFrame()
        return ExpressionMap(
            none, none, np.zeros((0, 2)), f"There is no map, because the cells cannot be read: {error}"
        )


def _map_of(dataset: IterableAnnDataset, run: Run, *, columns: Sequence[str], genes: Sequence[str]) -> ExpressionMap:
    """Return the map of an open file."""
    shard, panel = dataset.shards[0], run.tokenizer.panel
    rows_m = sample(len(shard), most=MOST_CELLS, seed=0)
    places_m2, text = _places(dataset, run, rows_m)
    number_g = {name: found for name in genes if (found := panel.find(name)) >= 0}
    values_mg = log_matrix(shard.read(rows_m))[:, list(number_g.values())].toarray()
    known = shard.source.columns_of("obs")
    column_of = {name: shard.obs_columns.get(name, name) for name in columns}
    labels = {name: shard.source.obs_column(own).iloc[rows_m].array for name, own in column_of.items() if own in known}
    index = pd.Index(shard.source.obs_names[rows_m])
    some = f"all {len(rows_m):,} cells" if len(rows_m) == len(shard) else f"{len(rows_m):,} of {len(shard):,} cells"
    return ExpressionMap(
        pd.DataFrame(labels, index=index), pd.DataFrame(values_mg, index=index, columns=list(number_g)), places_m2,
        f"{text} of {some}. Expression is in log1p counts per 10,000.",
    )  # fmt: skip


def _places(dataset: IterableAnnDataset, run: Run, rows_m: np.ndarray) -> tuple[np.ndarray, str]:
    """Return where cells are: in the file's own map, or by an embedding, the file's own or the run's."""
    source, in_file_m = dataset.shards[0].source, rows_m
    if isinstance(source, ChosenCells):
        in_file_m, source = source.rows_n[rows_m], source.base
    for name, text in (("X_umap", "The file's own X_umap"), (EMBEDDING, f"UMAP of the file's own {EMBEDDING}")):
        own = source.element(f"obsm/{name}") if isinstance(source, StoredCells) else None
        points_mc = None if own is None else np.asarray(own, dtype=np.float64)[in_file_m]
        if points_mc is not None and np.isfinite(points_mc).all():
            return points_mc[:, :2] if name == "X_umap" else umap_layout(points_mc), text
    states_mh = embedding_of(run, dataset, rows_m, batch_tokens=PredictConfig.batch_tokens)
    return umap_layout(states_mh), "UMAP of the run's embedding, with no phenotype given,"
