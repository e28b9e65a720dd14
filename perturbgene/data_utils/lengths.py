"""How many tokens a cell will have, told from how many values its file stores for it, without reading them.

Owns the estimate, which decides only which cells share a batch; leaves tokens to the tokenizer and batches to `budget`.
Letters: n cells, m sampled cells.
"""

import numpy as np

from perturbgene.data_utils.opening import H5adFile, MemoryFile
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.tokenization import GeneTokenizer

_SPOTS, _ROWS_OF_SPOT, _CHUNK_ROWS = 4, 64, 1024


def stored_values(source: H5adFile | MemoryFile) -> np.ndarray:
    """Count the values that are stored for each cell, int64 of shape (n,).

    Of a CSR matrix on disk only the offsets are read; a dense one is read whole, as nothing less says it.
    """
    if isinstance(source, H5adFile) and source.format == "csr":
        return np.diff(source.offsets)
    starts = range(0, source.shape[0], _CHUNK_ROWS)
    counts = [np.diff(source.read_rows(start, min(start + _CHUNK_ROWS, source.shape[0]))[2]) for start in starts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


def _sampled_rows(num_rows: int) -> np.ndarray:
    starts = {max(0, min(num_rows - _ROWS_OF_SPOT, num_rows * spot // _SPOTS)) for spot in range(_SPOTS)}
    return np.unique(np.concatenate([np.arange(start, min(start + _ROWS_OF_SPOT, num_rows)) for start in starts]))


def genes_per_value(
    shard: Shard, tokenizer: GeneTokenizer, stored_n: np.ndarray, *, cells_per_batch: float = np.inf
) -> float:
    """Measure on sampled cells how many of the stored values become genes of a sequence, at most 1.

    In a prepared shard nearly all do; elsewhere columns lie outside the panel, zeros are stored, or values lie below
    the first edge. The share lies two standard errors above the mean, so that batches seldom have more genes than told.

    Args:
        shard: The cells.
        tokenizer: Decides what becomes a token; the longest sequence is left aside.
        stored_n: Stored values of each cell.
        cells_per_batch: Cells over which errors even out.
    """
    rows_m = _sampled_rows(len(shard))
    if not stored_n[rows_m].any():
        return 1.0
    endless = tokenizer.with_settings(max_length=len(tokenizer.panel) + len(tokenizer.included_phenotypes) + 2)
    block = endless.tokenize_block(shard.read(rows_m))
    is_gene_l = block.token_type_ids_l >= tokenizer.first_gene_type
    genes_m = np.diff(np.concatenate([[0], np.cumsum(is_gene_l)])[block.offsets_n1])
    share = genes_m.sum() / stored_n[rows_m].sum()
    error = (genes_m - share * stored_n[rows_m]).std() / np.sqrt(max(1.0, cells_per_batch))
    return float(min(1.0, share + 2 * error / stored_n[rows_m].mean()))


def gene_counts(shard: Shard, tokenizer: GeneTokenizer, *, budget: int | None = None) -> np.ndarray:
    """Estimate the genes in each cell's sequence, uint32 of shape (n,), as many as `max_length` has room for.

    A pure function of file and settings, and for a prepared shard a bound that no cell exceeds.

    Args:
        shard: The cells.
        tokenizer: Gives panel, bins and layout of sequences.
        budget: Tokens of the batches that the cells are for, None where single cells matter.
    """
    if len(shard) == 0:
        return np.zeros(0, dtype=np.uint32)
    stored_n = stored_values(shard.source)
    room = tokenizer.max_length - 2 - len(tokenizer.included_phenotypes)
    cells_per_batch = np.inf if budget is None else budget / max(1.0, min(room, stored_n.mean()))
    share = genes_per_value(shard, tokenizer, stored_n, cells_per_batch=cells_per_batch)
    return np.minimum(np.ceil(stored_n * share), room).astype(np.uint32)
