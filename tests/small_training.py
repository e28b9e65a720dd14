"""A training of 14 steps in about two seconds, on 96 of 120 PBMC cells: what tests kill, disturb and resume."""

from pathlib import Path
from typing import Any

import anndata as ad

from perturbgene.corpus.prepare import prepare
from perturbgene.main import main
from tests.faults import Killed

# 96 training cells, 16 a step: 6 steps an epoch, so that saves every 4 steps fall into the midst of epochs.
STEPS = 14
COMMON = (
    "--model_arch tiny --num_hidden_layers 1 --hidden_size 32 --num_attention_heads 2 --no_bf16 --report_to none "
    "--max_length 40 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --learning_rate 3e-3 "
    f"--max_steps {STEPS} --save_steps 4 --eval_steps 4 --logging_steps 1 --save_total_limit 2"
)


def make_corpus(folder: Path, **options: Any) -> Path:
    """Write the corpus; `options` are those of `prepare`."""
    import scanpy as sc

    whole = sc.datasets.pbmc68k_reduced()
    cells = ad.AnnData(whole.raw.X.copy(), obs=whole.obs[["bulk_labels", "phase"]], var=whole.raw.var)[:120]
    return prepare(cells.copy(), folder, phenotypes=["cell_type=bulk_labels"], num_top_genes=60, **options)


def command(corpus: Path, out: Path, more: str = "") -> list[str]:
    """Return the words of the command line; later ones go last."""
    return f"mlm --corpus {corpus} --output_dir {out} {COMMON} {more}".split()


def resume(corpus: Path, out: Path, more: str = "") -> int:
    """Continue a run; returns the exit code."""
    return main(command(corpus, out, f"--resume_from_checkpoint {more}"))


def raise_killed() -> None:
    """End a run as `kill -9` does, but not this process."""
    raise Killed
