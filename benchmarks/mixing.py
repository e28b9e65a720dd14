"""Is the shuffle a shuffle, and does memory stay put? Two small tables at the default settings.

Owns the mixing statistic and the memory curve; leaves the set to `cells` and running to `loading`. Mixing is the mean
entropy of a label within batches, divided by the same for a perfect shuffle of the same cells.

Run from the repository root: python -m benchmarks.mixing --folder benchmark_sets
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cells import CellSet, build
from benchmarks.contenders import BATCH, BIN_EDGES
from benchmarks.loading import ROOT, machine, peak_mib, versions


def mean_entropy(labels_n: np.ndarray, *, batch: int = BATCH) -> float:
    """Return the mean entropy, in nats, of integer labels within whole batches of neighbours.

    Example:
        >>> round(mean_entropy(np.array([0, 1, 0, 1, 0, 0, 1, 1]), batch=4), 3)
        0.693
    """
    whole = labels_n[: len(labels_n) // batch * batch].reshape(-1, batch)
    entropies = []
    for row in whole:
        share_k = np.bincount(row) / batch
        share_k = share_k[share_k > 0]
        entropies.append(-(share_k * np.log(share_k)).sum())
    return float(np.mean(entropies))


def mixing(labels_n: np.ndarray, order_n: np.ndarray, *, batch: int = BATCH) -> float:
    """Return the entropy within batches of an order, relative to a perfect shuffle of the same cells."""
    perfect = np.random.default_rng(0).permutation(labels_n)
    return mean_entropy(labels_n[order_n], batch=batch) / mean_entropy(perfect, batch=batch)


def _dataset(paths: Sequence[str]):  # type: ignore[no-untyped-def]  # the annotation would import torch
    import anndata as ad

    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
    from perturbgene.data_utils.tokenization import GeneTokenizer

    genes = ad.read_h5ad(paths[0], backed="r").var_names
    tokenizer = GeneTokenizer(genes=list(genes), phenotypes={}, bin_edges=BIN_EDGES)
    return IterableAnnDataset(list(paths), tokenizer, shuffle=True, batch_size=BATCH)


def mixing_table(home: Path) -> dict[str, float]:
    """Return the mixing of every label over one epoch of what the data set truly yields."""
    import anndata as ad
    import pandas as pd

    paths = sorted(map(str, (home / "gzip").glob("*.h5ad")))
    obs = pd.concat([ad.read_h5ad(path, backed="r").obs for path in paths])
    order_n = np.array([cell.index for cell in _dataset(paths)])
    assert (np.sort(order_n) == np.arange(len(obs))).all(), "an epoch must hold every cell once"
    return {name: mixing(pd.factorize(obs[name])[0], order_n) for name in ("cell_type", "donor_id")}


def copied(paths: Sequence[str], folder: Path, *, copies: int) -> list[str]:
    """Copy every file so many times; return all names. Links would be refused: their cells would count twice."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for copy in range(copies):
        for path in paths:
            target = folder / f"copy_{copy}_{Path(path).name}"
            if not target.exists():
                shutil.copy(path, target)
            names.append(str(target))
    return names


def _peak(paths: Sequence[str], seconds: float) -> dict[str, float]:
    """Stream padded batches for so long; return cells, opening time and peak memory. Runs in its own process."""
    from torch.utils.data import DataLoader

    from perturbgene.data_utils.data_collators import collate_fn_wrapper

    started = time.perf_counter()
    dataset = _dataset(paths)
    opened = time.perf_counter() - started
    collate = collate_fn_wrapper(dataset.tokenizer)
    is_whole = hasattr(dataset, "batches")
    source = dataset.batches(collate) if is_whole else dataset
    options = {"batch_size": None} if is_whole else {"batch_size": BATCH, "collate_fn": collate}
    cells, until = 0, time.perf_counter() + seconds
    for batch in DataLoader(source, **options):
        cells += len(batch["input_ids"])
        if time.perf_counter() > until:
            break
    return {"files": len(paths), "cells": cells, "open_s": round(opened, 2), "peak_mib": round(peak_mib())}


def peak_of(paths: Sequence[str], *, seconds: float) -> dict[str, float]:
    """Measure `_peak` in a fresh process."""
    request = json.dumps({"paths": list(paths), "seconds": seconds})
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "benchmarks.mixing", "--peak"]
    done = subprocess.run(command, input=request, text=True, capture_output=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_curve(folder: Path, *, scale: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return peak memory over 4 shards, ten copies of each, and one file of 200,000 cells."""
    home = build(CellSet.scaled(scale), folder)
    four = sorted(map(str, (home / "gzip").glob("*.h5ad")))
    long = build(CellSet(shards=1, cells=max(640, round(200_000 * scale)), genes=2_000, expressed=300), folder)
    short = build(CellSet(shards=1, cells=max(64, round(20_000 * scale)), genes=2_000, expressed=300), folder)
    cases = {
        "4 shards": four,
        "40 shards (ten copies of each)": copied(four, home / "copied", copies=10),
        "one file of a tenth of the cells, 2,000 genes": [str(short / "gzip" / "shard_0.h5ad")],
        "one file of 200,000 cells x scale, 2,000 genes": [str(long / "gzip" / "shard_0.h5ad")],
    }
    return {name: peak_of(paths, seconds=seconds) for name, paths in cases.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixing", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where sets are kept (default: a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is 40,000 cells for mixing")
    parser.add_argument("--seconds", type=float, default=20.0, help="streaming time of each memory case")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(_peak(**json.load(sys.stdin))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        small = CellSet(cells=max(64, round(10_000 * options.scale)), genes=500, expressed=20)
        print(f"{machine()}; {versions()}\n\n| label | mixing, 1.0 = perfect |\n|---|---|")
        for name, value in mixing_table(build(small, folder)).items():
            print(f"| {name} | {value:.4f} |")
        print("\n| files | cells read | seconds to open | peak MiB |\n|---|---|---|---|")
        for name, case in memory_curve(folder, scale=options.scale, seconds=options.seconds).items():
            print(f"| {name} | {case['cells']:,} | {case['open_s']} | {case['peak_mib']:,} |")


if __name__ == "__main__":
    main()
