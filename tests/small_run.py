"""A small run, trained in seconds by a plain loop on a corpus that `prepare` made, for claims about trained models."""

from pathlib import Path
from typing import Any

import anndata as ad
import torch

from perturbgene.configs import MlmConfig
from perturbgene.corpus.manifest import Corpus
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.eval_utils import MlmEvaluator, Question, run_evaluator
from perturbgene.files import write_json
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM
from perturbgene.training.train import tokenizer_facts

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WIDE = {"norm_position": "branch", "initializer_range": 0.15, "embedding_range": 0.5}
NAMES = {"CD19+ B": "B cell", "CD14+ Monocyte": "monocyte", "CD56+ NK": "NK cell"}


def three_types() -> ad.AnnData:
    """Take the 255 B cells, monocytes and NK cells among scanpy's PBMC; tissue and donor are made up."""
    import scanpy

    whole = scanpy.datasets.pbmc68k_reduced()
    cells = whole[whole.obs["bulk_labels"].isin(NAMES)].raw.to_adata()
    numbers = range(cells.n_obs)
    cells.obs = cells.obs[["bulk_labels"]].astype(str).replace(NAMES).rename(columns={"bulk_labels": "cell_type"})
    cells.obs["tissue"] = [("blood", "lung")[number // 2 % 2] for number in numbers]
    cells.obs["donor_id"] = [f"D{number % 4}" for number in numbers]
    return cells


def train(
    corpus: Path, folder: Path, *, num_epochs: int, learning_rate: float = 3e-3, wide: bool = False, **masks: Any
) -> None:
    """Train on a corpus and write the run folder; on one thread: the steps are too small for more.

    Args:
        corpus, folder: Read, and written with `run.yaml` and `metrics.json`.
        num_epochs, learning_rate: How long and how fast.
        wide: True draws weights so wide that the interaction of a label and a gene is learnt in a few hundred steps.
        masks: Of the collator and `run.yaml`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = GeneTokenizer.from_pretrained(corpus)
    config = GeneBertConfig(**tokenizer_facts(tokenizer), **SIZES, **(WIDE if wide else {}), dropout=0.0)
    model = GeneBertForPhenotypicMLM(config).train()
    cells = IterableAnnDataset(Corpus.open(corpus).paths("train"), tokenizer, shuffle=True, batch_size=32)
    batches = cells.batches(DataCollatorForPhenotypicMLM(tokenizer, packed=True, **masks))
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for epoch in range(num_epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.set_num_threads(threads)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    MlmConfig(output_dir=str(folder), corpus=str(corpus), **masks).save(folder / "run.yaml")
    questions = [Question("alone", (category,)) for category in tokenizer.included_phenotypes]
    held_out = IterableAnnDataset(Corpus.open(corpus).paths("eval"), tokenizer)
    scored = run_evaluator(MlmEvaluator(tokenizer, collator=None, questions=questions), model, held_out.blocks())
    write_json(folder / "metrics.json", scored.results())


def make_folder(folder: Path) -> None:
    """Write `cells.h5ad`, a `corpus` of its 200 most variable genes and `runs/mlm`, trained on it."""
    cells = three_types()
    cells.write_h5ad(folder / "cells.h5ad")
    prepare(
        cells, folder / "corpus", phenotypes=["cell_type", "tissue"], split_by="donor_id", num_top_genes=200
    )  # fmt: skip
    train(folder / "corpus", folder / "runs/mlm", num_epochs=40)
