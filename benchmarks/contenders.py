"""Every way of turning the benchmark's files into batches, each behind the same small interface.

Owns one function per contender; leaves timing to `loading`. A contender's function takes a `Job` and returns a function
that starts one epoch: an iterator of batches (dicts of arrays), or of bare counts where only rows are read. Peers get
the same fast tokeniser (`tokenize`), so that what is compared is the loading. Letters: n cells, l values.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import BIN_EDGES, gene_names, shards

BATCH = 128
BLOCK = 64
BUFFER = 16_384
PAD, CLS, EOS, MASK, FIRST_BIN, FIRST_GENE = 3, 0, 1, 2, 4, 1

Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Job:
    """The files and the longest sequence."""

    home: Path
    max_length: int = 2048


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        name: What the row says.
        epoch: Opens the files and returns the function that starts an epoch.
        limit: Name of the contender that merely reads the same files, or "".
        needs: Packages without which it is skipped.
        workers: Loader workers in addition to the main process.
        threads: Threads that read; with more than one it may use every core.
        is_buffered: True measures whole epochs, as such a loader delivers in bursts.
        build: Converts the files into the contender's own format, untimed.
    """

    name: str
    epoch: Callable[[Job], Epoch]
    limit: str = ""
    needs: tuple[str, ...] = ()
    workers: int = 0
    threads: int = 1
    is_buffered: bool = True
    build: Callable[[Job], None] | None = None

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name.partition(".")[0]) is None]


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return batch
    import torch

    return {name: torch.from_numpy(values) for name, values in batch.items()}


def tokenize(data_l: np.ndarray, columns_l: np.ndarray, offsets_n1: np.ndarray, *, max_length: int) -> dict[str, Any]:
    """Bin counts, truncate and pad: what every peer's rows go through, without a loop over cells or genes."""
    lengths_n = np.diff(offsets_n1)
    factor_n = (1e4 / np.add.reduceat(data_l, offsets_n1[:-1], dtype=np.float64)).astype(np.float32)
    kept_n = np.minimum(lengths_n, max_length - 2)
    if (kept_n < lengths_n).any():
        is_kept_l = np.arange(len(data_l)) - np.repeat(offsets_n1[:-1], lengths_n) < max_length - 2
        data_l, columns_l = data_l[is_kept_l], columns_l[is_kept_l]
    scaled_l = data_l * np.repeat(factor_n, kept_n)
    bins_l = np.full(len(scaled_l), FIRST_BIN + 1, dtype=np.int64)
    for edge in np.expm1(np.array(BIN_EDGES[1:], dtype=np.float32)):
        bins_l += scaled_l >= edge
    places_n1 = np.arange(int(kept_n.max()) + 2)
    is_gene_nl = (places_n1 >= 1) & (places_n1 <= kept_n[:, None])
    ids_nl = np.full(is_gene_nl.shape, PAD, dtype=np.int64)
    types_nl = np.zeros(is_gene_nl.shape, dtype=np.int64)
    ids_nl[is_gene_nl], types_nl[is_gene_nl] = bins_l, columns_l + FIRST_GENE
    ids_nl[:, 0] = CLS
    ids_nl[np.arange(len(kept_n)), kept_n + 1] = EOS
    mask_nl = (places_n1 <= kept_n[:, None] + 1).astype(np.int64)
    return _tensors({"input_ids": ids_nl, "token_type_ids": types_nl, "attention_mask": mask_nl})


def _tokenize_csr(matrix: Any, *, max_length: int) -> dict[str, Any]:
    return tokenize(matrix.data, matrix.indices, matrix.indptr.astype(np.int64), max_length=max_length)


def _rows_only(matrix: Any) -> int:
    return int(matrix.shape[0])


def _finish(job: Job, *, is_tokenized: bool) -> Callable[[Any], Any]:
    return partial(_tokenize_csr, max_length=job.max_length) if is_tokenized else _rows_only


# -- limits -------------------------------------------------------------------------------------------------------


def read_only(job: Job, *, variant: str) -> Epoch:
    """Read values and columns of all rows in order, in slices of whole chunks; nothing else."""
    import h5py

    files = [h5py.File(path) for path in shards(job.home, variant)]

    def epoch() -> Iterator[int]:
        for file in files:
            data, indices, indptr = file["X/data"], file["X/indices"], file["X/indptr"][:]
            chunk = (data.chunks or (1 << 14,))[0]
            step = chunk * max(1, (1 << 22) // chunk)
            for first in range(0, len(data), step):
                stop = min(first + step, len(data))
                data[first:stop], indices[first:stop]
                begin, end = np.searchsorted(indptr[1:], (first, stop), side="right")
                yield int(end - begin)

    return epoch


# -- as research code does it -------------------------------------------------------------------------------------


def _cell_tokens(matrix: Any, max_length: int) -> tuple[Any, Any]:
    import torch

    counts, genes = matrix.data, matrix.indices
    bins = np.digitize(np.log1p(counts * (1e4 / counts.sum())), BIN_EDGES)
    ids = [CLS, *(FIRST_BIN + bins)[: max_length - 2].tolist(), EOS]
    types = [0, *(FIRST_GENE + genes)[: max_length - 2].tolist(), 0]
    return torch.tensor(ids), torch.tensor(types)


def _pad_cells(cells: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([cell[0] for cell in cells], batch_first=True, padding_value=PAD)
    types = pad_sequence([cell[1] for cell in cells], batch_first=True)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": (ids != PAD).long()}


def per_cell(job: Job, *, is_backed: bool) -> Epoch:
    """Take an AnnData view of each cell of a shuffled shard, tokenise it by itself, pad 128 of them."""
    import anndata as ad

    paths = shards(job.home, "gzip")
    opened = [ad.read_h5ad(path, backed="r" if is_backed else None) for path in paths[: None if is_backed else 1]]

    def epoch() -> Iterator[Any]:
        rng, cells = np.random.default_rng(0), []
        for adata in opened:
            for row in rng.permutation(adata.n_obs):
                view = adata[row]
                cells.append(_cell_tokens(view.to_memory().X if is_backed else view.X, job.max_length))
                if len(cells) == BATCH:
                    yield _pad_cells(cells)
                    cells = []

    return epoch


def per_cell_masking(job: Job) -> Epoch:
    """Mask cells that are tokenised already, one by one, as collators in research code do."""
    import torch

    cells = next(per_cell(job, is_backed=False)())
    rows = list(zip(cells["input_ids"], cells["token_type_ids"], strict=True))

    def mask(ids: Any, types: Any) -> tuple[Any, Any, Any]:
        is_special = torch.tensor([token in (CLS, EOS, PAD) for token in ids.tolist()])
        is_masked = torch.bernoulli(torch.full(ids.shape, 0.15).masked_fill(is_special, 0.0)).bool()
        absent = np.setdiff1d(np.arange(1000), types.numpy())[: int(is_masked.sum()) // 2]
        ids = torch.cat([ids.masked_fill(is_masked, MASK), torch.full((len(absent),), MASK)])
        labels = torch.cat([torch.where(is_masked, ids[: len(types)], -100), torch.full((len(absent),), FIRST_BIN)])
        return ids, torch.cat([types, torch.from_numpy(absent)]), labels

    def epoch() -> Iterator[Any]:
        while True:
            masked = [mask(ids, types) for ids, types in rows]
            batch = _pad_cells([(ids, types) for ids, types, _ in masked])
            yield batch | {"labels": torch.nn.utils.rnn.pad_sequence([row[2] for row in masked], batch_first=True)}

    return epoch


def scgpt_like(job: Job) -> Epoch:
    """Bin each cell by its own quantiles, sample genes, pad and mask cell by cell, from rows in memory."""
    import anndata as ad
    import torch

    matrix = ad.read_h5ad(shards(job.home, "gzip")[0]).X

    def cell(row: int, rng: np.random.Generator) -> tuple[Any, Any]:
        span = slice(matrix.indptr[row], matrix.indptr[row + 1])
        values, genes = matrix.data[span], matrix.indices[span]
        bins = np.digitize(values, np.quantile(values, np.linspace(0, 1, 50)))
        kept = rng.permutation(len(genes))[: job.max_length - 1]
        ids = torch.from_numpy(np.concatenate([[CLS], FIRST_BIN + bins[kept]]))
        ids[torch.rand(len(ids)) < 0.15] = MASK
        return ids, torch.from_numpy(np.concatenate([[0], FIRST_GENE + genes[kept]]))

    def epoch() -> Iterator[Any]:
        rng = np.random.default_rng(0)
        order = rng.permutation(matrix.shape[0])
        for first in range(0, len(order), BATCH):
            yield _pad_cells([cell(row, rng) for row in order[first : first + BATCH]])

    return epoch


# -- peers --------------------------------------------------------------------------------------------------------


def ann_collection(job: Job, *, is_tokenized: bool) -> Epoch:
    """Take random rows of 128 from an AnnCollection over files in memory."""
    import anndata as ad
    from anndata.experimental import AnnCollection

    cells = AnnCollection([ad.read_h5ad(path) for path in shards(job.home, "gzip")])
    finish = _finish(job, is_tokenized=is_tokenized)

    def epoch() -> Iterator[Any]:
        order = np.random.default_rng(0).permutation(len(cells))
        for first in range(0, len(order), BATCH):
            yield finish(cells[order[first : first + BATCH]].X)

    return epoch


def ann_loader(job: Job) -> Epoch:
    """Shuffle one file in memory through AnnLoader, whose batches are dense."""
    import anndata as ad
    from anndata.experimental import AnnLoader
    from scipy import sparse

    loader = AnnLoader(ad.read_h5ad(shards(job.home, "gzip")[0]), batch_size=BATCH, shuffle=True)

    def epoch() -> Iterator[Any]:
        for batch in loader:
            values = batch.X
            rows = values if sparse.issparse(values) else sparse.csr_matrix(np.asarray(values.to_dense()))
            yield _tokenize_csr(sparse.csr_matrix(rows), max_length=job.max_length)

    return epoch


def sc_dataset(job: Job, *, variant: str, is_tokenized: bool) -> Epoch:
    """Shuffle blocks of 64 rows and a buffer of 16,384 through scDataset over backed files."""
    import anndata as ad
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    cells = AnnCollection([ad.read_h5ad(path, backed="r") for path in shards(job.home, variant)])
    dataset = scDataset(
        cells, BlockShuffling(block_size=BLOCK), batch_size=BATCH, fetch_factor=BUFFER // BATCH, seed=0,
        fetch_callback=lambda collection, rows: collection[rows].X,
        batch_transform=_finish(job, is_tokenized=is_tokenized),
    )  # fmt: skip
    return lambda: iter(DataLoader(dataset, batch_size=None))


def build_annbatch(job: Job) -> None:
    """Write the collection of zarr stores that annbatch reads, shuffled, as its documentation says."""
    import zarr
    from annbatch import DatasetCollection

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    target = job.home / "annbatch.zarr"
    if not target.exists():
        DatasetCollection(str(target)).add_adatas(adata_paths=shards(job.home, "none"), shuffle=True)


def annbatch(job: Job, *, is_tokenized: bool) -> Epoch:
    """Read chunks of 64 rows, 256 at a time, through annbatch and the zarrs codecs."""
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    loader = Loader(batch_size=BATCH, chunk_size=BLOCK, preload_nchunks=BUFFER // BLOCK, shuffle=True, to=None)
    loader = loader.use_collection(DatasetCollection(str(job.home / "annbatch.zarr")))
    finish = _finish(job, is_tokenized=is_tokenized)
    return lambda: (finish(batch["X"]) for batch in loader)


def build_scdl(job: Job) -> None:
    """Write the memory maps that BioNeMo SCDL reads."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    for path in shards(job.home, "none"):
        target = job.home / "scdl" / Path(path).stem
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            SingleCellMemMapDataset(str(target), path, use_X_not_raw=True).save()


def scdl(job: Job, *, is_tokenized: bool) -> Epoch:
    """Take random rows from BioNeMo SCDL's memory maps."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    stores = [SingleCellMemMapDataset(str(path)) for path in sorted((job.home / "scdl").iterdir())]
    starts = np.cumsum([0, *map(len, stores)])

    def batch(rows: np.ndarray) -> Any:
        files = np.searchsorted(starts, rows, side="right") - 1
        cells = [stores[file].get_row(row - starts[file])[0] for file, row in zip(files, rows, strict=True)]
        offsets = np.cumsum([0, *(len(cell[0]) for cell in cells)])
        data, columns = (np.concatenate([cell[part] for cell in cells]) for part in (0, 1))
        return tokenize(data, columns, offsets, max_length=job.max_length) if is_tokenized else len(rows)

    def epoch() -> Iterator[Any]:
        order = np.random.default_rng(0).permutation(starts[-1])
        return (batch(order[first : first + BATCH]) for first in range(0, len(order), BATCH))

    return epoch


# -- ours ---------------------------------------------------------------------------------------------------------


def _tokenizer(job: Job, *, variant: str, is_masked: bool) -> Any:
    from perturbgene.data_utils.tokenization import GeneTokenizer

    settings: dict[str, Any] = {"bin_edges": BIN_EDGES, "max_length": job.max_length}
    if variant == "corpus":
        base = GeneTokenizer.from_pretrained(job.home / "corpus")
        settings |= {"genes": base.genes, "phenotypes": base.phenotypes}
    else:
        import h5py

        with h5py.File(shards(job.home, variant)[0]) as file:
            names, types = gene_names(int(file["X"].attrs["shape"][1])), file["obs/cell_type/categories"].asstr()[:]
        settings |= {"genes": names, "phenotypes": {"cell_type": list(types)} if is_masked else {}}
    included = {"included_phenotypes": ("cell_type",)} if is_masked else {}
    return GeneTokenizer(**settings, **included)


def ours(job: Job, *, variant: str, how: str, workers: int = 0, threads: int = 1, is_cellwise: bool = False) -> Epoch:
    """Stream through IterableAnnDataset at its default settings, shuffled; by whole batches where it can.

    Args:
        job: Files and length.
        variant: Which files.
        how: "padded", "packed", or one of them and "masked" for training.
        workers: Loader workers.
        threads: Threads that read and tokenise.
        is_cellwise: True goes cell by cell through `DataLoader(dataset, batch_size, collate_fn)`.
    """
    from torch.utils.data import DataLoader

    from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, collate_fn_wrapper
    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset

    tokenizer = _tokenizer(job, variant=variant, is_masked="masked" in how)
    paths = shards(job.home, variant)
    dataset = IterableAnnDataset(paths, tokenizer, shuffle=True, batch_size=BATCH, threads=threads)
    collate = collate_fn_wrapper(tokenizer, packed="packed" in how)
    if "masked" in how:
        collate = DataCollatorForPhenotypicMLM(tokenizer, packed="packed" in how)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if hasattr(dataset, "batches") and not is_cellwise:
        loader = DataLoader(dataset.batches(collate), batch_size=None, **options)
    else:
        loader = DataLoader(dataset, batch_size=BATCH, collate_fn=collate, **options)

    def epoch() -> Iterator[Any]:
        dataset.set_epoch(dataset.epoch + 1)
        return iter(loader)

    return epoch


READS = {name: f"limit: h5py, {name} h5ad, rows in order" for name in ("gzip", "lzf", "none")}
READS["corpus"] = "limit: h5py, prepared shards, rows in order"
TITLES = {"gzip": "gzip h5ad", "lzf": "lzf h5ad", "none": "uncompressed h5ad", "corpus": "prepared corpus"}
PLAIN = "research loader: a view per cell, in memory"


def _contenders() -> Iterator[Contender]:
    for variant, name in READS.items():
        yield Contender(name, partial(read_only, variant=variant), limit=name)
    yield Contender(PLAIN, partial(per_cell, is_backed=False), is_buffered=False)
    yield Contender("research loader: a view per cell, backed gzip", partial(per_cell, is_backed=True), READS["gzip"],
                    is_buffered=False)  # fmt: skip
    yield Contender("research loader: its masking alone", per_cell_masking, is_buffered=False)
    yield Contender("scGPT-like collator, rows in memory", scgpt_like, is_buffered=False)
    yield Contender("AnnLoader, in memory, tokenised", ann_loader, is_buffered=False)
    for stage in ("rows only", "tokenised"):
        flag = {"is_tokenized": stage == "tokenised"}
        yield Contender(f"AnnCollection, in memory, {stage}", partial(ann_collection, **flag), is_buffered=False)
        for variant in ("gzip", "none"):
            yield Contender(f"scDataset, {TITLES[variant]}, {stage}", partial(sc_dataset, variant=variant, **flag),
                            READS[variant], needs=("scdataset",))  # fmt: skip
        yield Contender(f"BioNeMo SCDL, {stage}", partial(scdl, **flag), needs=("bionemo.scdl",), is_buffered=False,
                        build=build_scdl)  # fmt: skip
        yield Contender(f"annbatch, zarr + zarrs, {stage}", partial(annbatch, **flag), needs=("annbatch", "zarrs"),
                        build=build_annbatch)  # fmt: skip
    yield Contender("ours: gzip h5ad, padded, cell by cell", partial(ours, variant="gzip", how="padded",
                    is_cellwise=True), READS["gzip"])  # fmt: skip
    for variant in ("gzip", "none", "corpus"):
        for how in ("padded", "packed", "padded, masked", "packed, masked"):
            yield Contender(f"ours: {TITLES[variant]}, {how}", partial(ours, variant=variant, how=how), READS[variant])
        for several in ({"threads": 2}, {"workers": 2}):
            (kind, count), how = next(iter(several.items())), "packed, masked"
            yield Contender(f"ours: {TITLES[variant]}, {how}, {count} {kind}, 2 cores",
                            partial(ours, variant=variant, how=how, **several), READS[variant], **several)  # fmt: skip


CONTENDERS = {contender.name: contender for contender in _contenders()}
