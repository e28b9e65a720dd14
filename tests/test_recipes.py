"""The recipe harness trains what is missing by the product's own verbs, and its table shows means and spreads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import recipes
from tests.conftest import _adata

SHORT = "--no_bf16 --use_cpu --num_train_epochs 1"
TINY = f"{SHORT} --model_arch tiny --num_hidden_layers 1 --hidden_size 16"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one set of 80 cells: B cells of two donors express MS4A1, T cells CD3E; another is left out."""
    is_b_n = np.arange(80) % 2 == 0
    counts_ng = np.stack([~is_b_n * 5, is_b_n * 5, np.ones(80), np.arange(80) % 3], axis=1).astype(np.float32)
    donors = np.array(["a", "a", "b", "b", "left out"])[np.arange(80) % 5]
    obs = {"cell_type": np.where(is_b_n, "B cell", "T cell"), "donor_id": donors}
    _adata(counts_ng, obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    flags = "--phenotypes cell_type --split_by donor_id --eval_donors b --num_bins 2"
    monkeypatch.setattr(recipes, "SETS", {"toy": recipes.CellSet("cells.h5ad", flags, {"donor_id": ["a", "b"]})})
    (tmp_path / "recipes.json").write_text(
        json.dumps({"both": {"mlm": TINY, "cls": SHORT}, "again": {"start": "both", "cls": SHORT}})
    )
    return tmp_path


def run(home: Path, *flags: str) -> list[dict[str, Any]]:
    """Run the harness in a folder; returns the lines of results."""
    folders = ["--data", home, "--cache", home / "cache", "--results", home / "results.jsonl"]
    assert recipes.main([*map(str, folders), "--recipes", str(home / "recipes.json"), "--sets", "toy", *flags]) == 0
    return recipes.read_results(home / "results.jsonl")


def test_a_recipe_is_run_once_and_scored_beside_its_bars_on_the_cells_kept(home: Path) -> None:
    lines = run(home, "--seeds", "3")
    assert [(line["recipe"], line["seed"]) for line in lines] == [("both", 3), ("again", 3)]
    assert lines[0]["bars"]["logistic_regression"] == {
        **lines[0]["bars"]["logistic_regression"],
        "n": 32,
        "n_train": 32,
    }
    assert set(lines[0]["mlm"]) >= {"accuracy", "macro_f1", "log_loss", "gene_loss", "seconds"}
    assert "mlm" not in lines[1] and lines[1]["cls"]["accuracy"] <= 1
    assert run(home, "--seeds", "3") == lines


def test_a_recipe_that_cannot_be_is_named_and_the_others_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"low": {"mlm": "--learning_rate -1"}, "odd": {"mlm": "--dropout 2"}}
    (home / "recipes.json").write_text(json.dumps(bad))
    assert run(home) == []
    shown = capsys.readouterr().err
    assert "low on toy failed: " in shown and "odd on toy failed: " in shown


def test_the_table_shows_bars_once_and_the_spread_over_seeds() -> None:
    bars = {"majority": {"n": 10, "accuracy": 0.5, "macro_f1": 0.25}, "logistic_regression": {"accuracy": 0.9}}
    scores = [{"accuracy": a, "macro_f1": 0.5, "log_loss": 1.0, "gene_loss": 2.0, "seconds": 7} for a in (0.7, 0.8)]
    lines = [{"set": "toy", "recipe": "x", "seed": seed, "mlm": scores[seed], "bars": bars} for seed in (0, 1)]
    assert recipes.table(lines).splitlines()[2:] == [
        "| toy | majority (10 cells) |  | 0.500 | 0.250 |  |  |  |",
        "| toy | logistic_regression (10 cells) |  | 0.900 |  |  |  |  |",
        "| toy | x: mlm | 2 | 0.750±0.071 | 0.500±0.000 | 1.000±0.000 | 2.000±0.000 | 7 |",
    ]
