"""What every verb writes can be opened again by anndata alone, whatever odd columns the input has."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbgene.main import main

VERBS = {
    "prepare": "prepare {cells} --output corpus --phenotypes cell_type --num_top_genes 50",
    "predict": "predict {run} {cells} --output out.h5ad --audit",
    "predict to zarr": "predict {run} {cells} --output out.zarr",
    "embed": "embed {run} {cells} --output out.h5ad --phenotype cell_type --genes CD79A",
    "embed to zarr": "embed {run} {cells} --output out.zarr",
    "embed genes": "embed {run} {cells} --output out.h5ad --groupby cell_type --network --min_cells 2",
    "counterfactual": "counterfactual {run} {cells} --output out.h5ad --set tissue=lung --num_null 0",
}


@pytest.fixture
def odd_cells(small_folder: Path, tmp_path: Path) -> Path:
    """Some cells with missing values of every kind, an odd index and repeated names of genes."""
    cells = ad.read_h5ad(small_folder / "cells.h5ad")[:60].copy()
    cells.obs["count"] = pd.array([1, None] * 30, dtype="Int64")
    cells.obs["is_good"] = pd.array([True, None] * 30, dtype="boolean")
    cells.obs["note"] = pd.array(["a", None] * 30, dtype="string")
    cells.obs["empty"] = pd.Categorical([None] * 60)
    cells.obs["share"] = np.linspace(0, 1, 60)
    cells.obs.index.name = "barcode"
    cells.obsm["X_pca"], cells.layers["twice"] = np.ones((60, 2)), cells.X * 2
    cells.uns["nested"] = {"deep": {"value": 3}}
    with ad.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


@pytest.mark.parametrize("verb", VERBS)
def test_anndata_opens_what_a_verb_wrote(
    verb: str, odd_cells: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(VERBS[verb].format(cells=odd_cells, run=small_folder / "runs/mlm").split()) == 0
    written = [path for path in tmp_path.rglob("*.h5ad") if path != odd_cells] + list(tmp_path.glob("*.zarr"))
    assert written
    for path in written:
        cells = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
        assert cells.n_obs and all(len(cells.obs[name]) == cells.n_obs for name in cells.obs)
