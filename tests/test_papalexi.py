"""The benchmark of real knock-outs: its correlations by hand, its refusals, and the whole of it on cells made here."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks.papalexi import compare, correlations, observed_changes, read_cells, with_means
from perturbgene.errors import InputError

GENES = [f"G{number}" for number in range(12)]


def a_screen() -> ad.AnnData:
    """Make 240 cells of two replicates: without KO1 (the symbol of G0), G0 and G1 are silent; KO2 changes nothing."""
    draw = np.random.default_rng(0)
    counts_ng = draw.poisson(np.linspace(2, 6, len(GENES)), size=(240, len(GENES))).astype(np.float32)
    labels_n = np.array(["control", "KO1", "KO2"])[np.arange(240) % 3]
    counts_ng[labels_n == "KO1", :2] = 0
    obs = pd.DataFrame({"perturbation": labels_n, "bio_rep": np.where(np.arange(240) < 150, "rep_1", "rep_2")})
    obs.index = [f"cell {number}" for number in range(240)]
    var = pd.DataFrame({"feature_name": ["KO1", *GENES[1:]]}, index=GENES)
    return ad.AnnData(sparse.csr_matrix(counts_ng), obs=obs, var=var)


def test_a_prediction_is_held_against_its_own_label_without_the_gene_itself() -> None:
    observed = pd.DataFrame({"A": [9.0, 1, 2, 3]}, index=list("awxy"))
    predicted = pd.DataFrame({"A": [0.0, 1, 2, 3], "B": [0.0, 3, 2, 1]}, index=list("awxy"))
    assert correlations(predicted, observed, without={"A": "a"}).loc["A"].tolist() == pytest.approx([1.0, -1.0, 1.0])


def test_what_is_observed_is_the_difference_of_means_of_log_values() -> None:
    counts_ng = np.array([[1, 1], [1, 3], [2, 0], [1, 1]], dtype=np.float32)
    obs = pd.DataFrame({"perturbation": ["control", "control", "KO", "KO"]}, index=list("abcd"))
    changes, _ = observed_changes(ad.AnnData(counts_ng, obs=obs), ["KO"])
    quarter, most, whole = np.log1p([2.5e3, 7.5e3, 1e4])  # a half is in both groups and cancels
    assert changes["KO"].tolist() == pytest.approx([(whole - quarter) / 2, -most / 2])


@pytest.mark.parametrize("lacking", ["file", "bio_rep"])
def test_a_missing_file_or_column_is_named(lacking: str, tmp_path: Path) -> None:
    cells = a_screen()
    del cells.obs["bio_rep"]
    if lacking != "file":
        cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match={"file": "is no file", "bio_rep": "has no bio_rep"}[lacking]):
        read_cells(tmp_path / "cells.h5ad")


def test_the_benchmark_has_a_row_per_knock_out_and_finds_one_that_silences_two_genes(tmp_path: Path) -> None:
    a_screen().write_h5ad(tmp_path / "cells.h5ad")
    found = compare(tmp_path / "cells.h5ad", tmp_path / "work", held_out="rep_2", epochs=8)
    assert found.index.tolist() == ["KO1", "KO2"]
    assert found.loc["KO1", "genes moved"] >= 2 and found.loc["KO2", "genes moved"] == 0
    assert found.loc["KO1", "table, r"] > 0.9  # G1 falls in either replicate
    assert found["set label"].notna().all() and found["knock-outs"].notna().all()
    assert np.isfinite(found.loc["KO1", ["token", "rank"]].astype(float)).all() and np.isnan(found.loc["KO2", "token"])
    assert with_means(found).index.tolist() == ["KO1", "KO2", "strong", "the rest"]
