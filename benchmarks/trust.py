"""May an answer be trusted? `python -m benchmarks.trust --folder FOLDER` trains on PBMC cells and says what it found.

Owns three experiments on the 700 PBMC cells that ship inside scanpy, with the recipe of the demo: (1) calibration
before and after the temperature; (2) cell types held out of training: how well strangeness ranks their cells before
held-out cells of known types; (3) planted label swaps: how well the audit ranks them. All of it is what verbs write.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from sklearn.metrics import roc_auc_score

from perturbgene.demo import CATEGORY, commands, write_cells
from perturbgene.inference.predict import predict
from perturbgene.main import main

logger = logging.getLogger(__name__)

HELD_OUT_TYPES = ("CD19+ B", "Dendritic", "CD14+ Monocyte", "CD56+ NK")
SWAPPED = 0.05
REPEATS = 20


def swap_labels(labels_n: np.ndarray, *, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give a share of cells the label of another class, drawn by how common the classes are.

    Returns:
        The labels, and True for swapped cells.

    Example:
        >>> swapped_n, is_swapped_n = swap_labels(np.array(["a"] * 50 + ["b"] * 50), share=0.1, seed=0)
        >>> int(is_swapped_n.sum()), bool((swapped_n != np.array(["a"] * 50 + ["b"] * 50))[is_swapped_n].all())
        (10, True)
    """
    rng, swapped_n = np.random.default_rng(seed), labels_n.copy()
    rows = rng.choice(len(labels_n), size=round(share * len(labels_n)), replace=False)
    for row in rows:
        swapped_n[row] = rng.choice(labels_n[labels_n != labels_n[row]])
    is_swapped_n = np.zeros(len(labels_n), dtype=bool)
    is_swapped_n[rows] = True
    return swapped_n, is_swapped_n


def train(folder: Path, cells: ad.AnnData) -> Path:
    """Run the demo's prepare, mlm and evaluate on these cells; return the run."""
    folder.mkdir(parents=True)
    cells.write_h5ad(folder / "pbmc.h5ad")
    for command in commands(folder)[:3]:
        code = main(command.split())
        assert code == 0, command
    return folder / "mlm"


def calibration_of(run: Path) -> dict[str, Any]:
    """Return what `evaluate` wrote about calibration, by phenotype and question."""
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    return {
        f"{phenotype}, {question}": scores["calibration"]
        for phenotype, questions in metrics.items()
        for question, scores in questions.items()
        if "calibration" in scores
    }


def strangers(folder: Path, cells: ad.AnnData, held_out: str) -> dict[str, float]:
    """Train without a type, and rank its cells against held-out cells of known types."""
    is_stranger_n = (cells.obs["bulk_labels"] == held_out).to_numpy()
    known = cells[~is_stranger_n].copy()
    known.obs["bulk_labels"] = known.obs["bulk_labels"].cat.remove_unused_categories()
    run = train(folder, known)
    eval_names = ad.read_h5ad(folder / "corpus/eval/shard_00000.h5ad").obs_names
    asked = cells[is_stranger_n | cells.obs_names.isin(eval_names)]
    answers = predict(asked, run, ask=[CATEGORY], ood=True, layer="raw", device="cpu").obs
    is_new_n = (answers["bulk_labels"] == held_out).to_numpy()
    scores = {
        "score": answers[f"ood_{CATEGORY}_score"],
        "gene log-likelihood": -answers["ood_gene_log_likelihood"],
        "1 - probability": 1 - answers[f"predicted_{CATEGORY}_probability"],
        "entropy": answers[f"predicted_{CATEGORY}_entropy"],
    }
    counts = {"strangers": int(is_new_n.sum()), "known": int((~is_new_n).sum())}
    return counts | {name: float(roc_auc_score(is_new_n, values)) for name, values in scores.items()}


def audited_swaps(run: Path, cells: ad.AnnData, column: str) -> float:
    """Return the AUROC of swapped labels by `1 - audit probability`; obs says which are swapped."""
    answers = predict(cells, run, ask=[CATEGORY], audit=True, device="cpu", layer=column or None).obs
    return float(roc_auc_score(answers["is_swapped"], -answers[f"audit_{CATEGORY}_probability"]))


def swaps_in_new_cells(run: Path) -> dict[str, float]:
    """Swap labels of held-out cells only, several times."""
    cells = ad.read_h5ad(run.parent / "corpus/eval/shard_00000.h5ad")
    own_n, found = cells.obs[CATEGORY].astype(str).to_numpy(), []
    for seed in range(REPEATS):
        cells.obs[CATEGORY], cells.obs["is_swapped"] = swap_labels(own_n, share=SWAPPED, seed=seed)
        found.append(audited_swaps(run, cells, ""))
    return {"cells": len(own_n), "swapped": round(SWAPPED * len(own_n)), "repeats": REPEATS,
            "auroc_mean": float(np.mean(found)), "auroc_sd": float(np.std(found))}  # fmt: skip


def swaps_in_all_cells(folder: Path, cells: ad.AnnData) -> dict[str, float]:
    """Swap labels before `prepare`, so that the model is trained on them too, and audit all cells."""
    cells = cells.copy()
    cells.obs["bulk_labels"], cells.obs["is_swapped"] = swap_labels(
        cells.obs["bulk_labels"].astype(str).to_numpy(), share=SWAPPED, seed=0
    )
    run = train(folder, cells)
    cells.obs[CATEGORY] = cells.obs["bulk_labels"]
    return {"cells": cells.n_obs, "swapped": int(cells.obs["is_swapped"].sum()),
            "auroc": audited_swaps(run, cells, "raw")}  # fmt: skip


def run_all(folder: Path, types: Sequence[str]) -> dict[str, Any]:
    """Run the experiments; what was found is written after each."""
    write_cells(folder / "cells.h5ad")
    cells, found = ad.read_h5ad(folder / "cells.h5ad"), {}
    run = train(folder / "all", cells)
    steps = {
        "calibration": lambda: calibration_of(run),
        "swaps in held-out cells": lambda: swaps_in_new_cells(run),
        **{f"stranger {name}": lambda name=name: strangers(folder / name.split()[0], cells, name) for name in types},
        "swaps in all cells": lambda: swaps_in_all_cells(folder / "swapped", cells),
    }
    for name, step in steps.items():
        found[name] = step()
        print(json.dumps({name: found[name]}), flush=True)
        (folder / "trust.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; must not exist yet")
    parser.add_argument("--types", nargs="*", default=HELD_OUT_TYPES, help="cell types to hold out, one run each")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    run_all(arguments.folder, arguments.types)
