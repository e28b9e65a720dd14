"""Write an archive of this release, which every later one must read: `python -m tests.archives.make [FOLDER]`.

Run it once when a release is made, commit the folder with the version's name, and never change it again:
`test_archives.py` finds it by itself. (While a version is not released, its folder may be deleted and written again.)

    0.1.0/corpus/        what `prepare` wrote
    0.1.0/mlm/  cls/     runs with all that finished ones have: with the last checkpoint, and with the genes' votes
    0.1.0/cells.h5ad     a few cells
    0.1.0/mlm.h5ad  cls.h5ad  embedded.h5ad     what `predict` and `embed` answered about them
"""

import os
import shutil
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbgene import __version__
from perturbgene.main import main

GENES = [f"ENSG{11 * number:011d}" for number in range(30)]
LABELS = ["B cell", "NK cell", "T cell"]
#: Not read back: pages, pictures, and what is larger than it is worth.
LEFT_OUT = ("all.h5ad", "*.html", "*.png", "evaluation", ".lock", "cls/checkpoint-*")
TRAINING = (
    "--corpus corpus --model_arch tiny --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 1 --max_steps 20 "
    "--per_device_train_batch_size 16 --learning_rate 1e-2 --report_to none --no_bf16 --eval_steps 10 "
    "--save_steps 10 --save_total_limit 1"
)
COMMANDS = (
    "prepare all.h5ad --output corpus --phenotypes cell_type tissue --split_by donor_id --no_report",
    f"mlm --output_dir mlm {TRAINING} --direct_path never",
    "evaluate mlm --no_report",
    f"cls --output_dir cls {TRAINING} --direct_path always --phenotype_category cell_type",
    "predict mlm cells.h5ad --output mlm.h5ad --ask cell_type tissue --ood --no_report",
    "predict cls cells.h5ad --output cls.h5ad --no_report",
    "embed mlm cells.h5ad --output embedded.h5ad",
)


def cells(num_cells: int, *, seed: int) -> ad.AnnData:
    """Draw counts of 30 genes: a third of them marks each cell type, one tissue has more of every second gene."""
    rng = np.random.default_rng(seed)
    kind_n, tissue_n = np.arange(num_cells) % 3, np.arange(num_cells) // 3 % 2
    is_marker_ng = np.arange(30)[None] // 10 == kind_n[:, None]
    rate_ng = np.where(is_marker_ng, 5.0, 0.7) * np.where(np.arange(30) % 2 == tissue_n[:, None], 1.6, 1.0)
    obs = {
        "cell_type": [LABELS[kind] for kind in kind_n],
        "tissue": [("blood", "lung")[tissue] for tissue in tissue_n],
        "donor_id": [f"d{number // 6 % 4}" for number in range(num_cells)],
    }
    index = [f"cell{number}" for number in range(num_cells)]
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rate_ng).astype(np.float32)),
        obs=pd.DataFrame(obs, index=index).astype("category"),
        var=pd.DataFrame(index=GENES),
    )


def make(folder: Path) -> None:
    """Write the archive into a new folder."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    cells(240, seed=0).write_h5ad("all.h5ad")
    cells(12, seed=1).write_h5ad("cells.h5ad")
    for command in COMMANDS:
        if main(command.split()):
            sys.exit(f"{command} failed")
    for path in [path for pattern in LEFT_OUT for path in Path().rglob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / __version__))
