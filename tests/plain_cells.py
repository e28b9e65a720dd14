"""Counts that are drawn, and an untrained run that knows their genes and labels: inputs that are made in no time."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbgene.configs import MlmConfig
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM
from perturbgene.training.train import tokenizer_facts

SYMBOLS = [f"{family}{number}" for family in ("CD", "IL", "HLA-", "RPL") for number in range(1, 11)]
IDS = [f"ENSG{11 * number:011d}" for number in range(40)]


def plain_cells(num_cells: int = 24, seed: int = 0) -> ad.AnnData:
    """Draw counts of 40 genes by symbol, with Ensembl ids, two cell types, three donors."""
    rng = np.random.default_rng(seed)
    kind = np.arange(num_cells) % 2
    rate = np.where((np.arange(40) < 20)[None] == (kind[:, None] == 0), 6.0, 1.0) * rng.gamma(2, 0.5, (num_cells, 40))
    obs = {"cell_type": np.array(["B cell", "T cell"])[kind], "donor_id": [f"d{i % 3}" for i in range(num_cells)]}
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(obs, index=[f"cell{seed}_{i}" for i in range(num_cells)]).astype("category"),
        var=pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS),
    )


def make_run(cells: ad.AnnData, *, corpus: Path, run: Path, phenotypes: list[str]) -> None:
    """Write a corpus of cells and a run with random weights, of that corpus as its settings say."""
    prepare(cells, corpus, phenotypes=phenotypes)
    tokenizer = GeneTokenizer.from_pretrained(corpus)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    GeneBertForPhenotypicMLM(GeneBertConfig(**sizes, **tokenizer_facts(tokenizer))).save_pretrained(run)
    tokenizer.save_pretrained(run)
    MlmConfig(output_dir=str(run), corpus=str(corpus)).save(run / "run.yaml")
