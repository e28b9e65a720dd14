"""Untrained runs over the nine-gene tokenizer, for claims that hold for any weights.

Embeddings are drawn wide, so that tokens differ and attention is far from uniform.
"""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbgene.inference.run import Run
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM
from perturbgene.training.train import tokenizer_facts
from tests.nine_genes import GENES, a_tokenizer

HIDDEN = 8


def a_run(kind: str = "mlm", **options: Any) -> Run:
    """Make an mlm run, or with kind "cls" a classifier of cell types that is given the tissue."""
    tokenizer = a_tokenizer(
        **{"included_phenotypes": ["tissue"] if kind == "cls" else ["cell_type", "tissue"], **options}
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    spread = {"embedding_range": 1.0, "initializer_range": 0.5}
    facts = {"direct_path": True, **sizes, **spread, **tokenizer_facts(tokenizer)}
    if kind == "mlm":
        return Run(GeneBertForPhenotypicMLM(GeneBertConfig(**facts)).eval(), tokenizer, "untrained")
    names = dict(enumerate(tokenizer.phenotypes["cell_type"]))
    numbers = {name: number for number, name in names.items()}
    config = GeneBertConfig(**facts, phenotype_category="cell_type", id2label=names, label2id=numbers)
    return Run(GeneBertForClassification(config).eval(), tokenizer, "untrained classifier")


def save(run: Run, folder: Path) -> str:
    """Write a run folder as training would."""
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    return str(folder)


def save_score(folder: Path, category: str, *, accuracy: float, question: str = "alone") -> None:
    """Write a held-out score into a run folder, next to a most frequent label with half of the cells."""
    scores = {"n": 100, "accuracy": accuracy, "majority_share": 0.5}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({category: {question: scores}}))


def some_cells(num_cells: int = 12, *, seed: int = 0) -> ad.AnnData:
    """Draw cells that express about half of the nine genes, with both phenotypes and a donor; cell 2 is empty."""
    rng = np.random.default_rng(seed)
    values_ng = rng.choice([0.0, 0.0, 1.5, 3.5], size=(num_cells, len(GENES)))
    values_ng[values_ng.sum(axis=1) == 0, 0] = 1.5
    values_ng[2] = 0
    obs = pd.DataFrame(
        {
            "cell_type": rng.choice(["B cell", "NK cell", "T cell"], num_cells),
            "tissue": rng.choice(["blood", "spleen"], num_cells),
            "donor": rng.choice(["d1", "d2"], num_cells),
        },
        index=[f"cell_{row}" for row in range(num_cells)],
    )
    var = pd.DataFrame({"feature_name": [f"symbol {gene}" for gene in GENES]}, index=GENES)
    return ad.AnnData(sparse.csr_matrix(values_ng.astype(np.float32)), obs=obs, var=var)
