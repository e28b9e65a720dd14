"""The main job on real cells, start to end: `python -m perturbgene.demo` (what `make demo` runs).

Owns one worked example on the 700 PBMC cells that ship inside scanpy: prepare, mlm, evaluate, cls fine-tuned from it,
predict on held-out cells. Every step is a command that a user can type; the demo prints each before it runs it.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import anndata as ad
import pandas as pd

from perturbgene.main import main, set_up_logging

CATEGORY = "cell_type"
#: File that marks a folder as the demo's own; only such a folder is ever replaced.
MARKER = ".made_by_perturbgene_demo"

#: Settings that both training runs share on 560 cells: small enough for float32 on two CPU cores.
COMMON = "--model_arch tiny --no_bf16 --report_to none --logging_steps 20 --save_total_limit 1"


def write_cells(path: Path) -> None:
    """Write the PBMC cells of scanpy as a user would have them: expression in `.raw`, labels in `bulk_labels`."""
    import scanpy as sc

    sc.datasets.pbmc68k_reduced().write_h5ad(path)


def commands(folder: Path) -> list[str]:
    """The demo as commands, in order."""
    corpus, mlm, cls = folder / "corpus", folder / "mlm", folder / "cls"
    held_out = corpus / "eval/shard_00000.h5ad"
    return [
        f"prepare {folder}/pbmc.h5ad --output {corpus} --layer raw --phenotypes {CATEGORY}=bulk_labels phase",
        f"mlm --corpus {corpus} --output_dir {mlm} {COMMON} --num_hidden_layers 1 --num_train_epochs 20 "
        "--learning_rate 1.5e-3 --adam_beta2 0.98 --weight_decay 0.3 --phenotype_mask_prob 0.8 --gene_drop_prob 0.9 "
        "--eval_steps 0.5 --load_best_model_at_end false",  # choosing by the held-out cells would flatter the score
        f"evaluate {mlm}",
        f"cls --corpus {corpus} --output_dir {cls} {COMMON} --pretrained_model_path {mlm} "
        f"--phenotype_category {CATEGORY} --num_train_epochs 4 --learning_rate 5e-4 --weight_decay 1 "
        "--gene_drop_prob 0.5 --no_balanced_dataset --eval_strategy no --save_strategy no",
        f"evaluate {cls} --no_baselines",
        f"predict {mlm} {held_out} --output {folder}/predicted_by_mlm.h5ad --ask {CATEGORY}",
        f"predict {cls} {held_out} --output {folder}/predicted_by_cls.h5ad",
    ]


def summary(folder: Path) -> str:
    """Return the table of held-out scores, and how often the two models agree."""
    paths = (folder / name / "evaluation/metrics.json" for name in ("mlm", "cls"))
    asked, classified = (json.loads(path.read_text())[CATEGORY] for path in paths)
    rows = {
        "majority class": asked["majority"],
        "logistic regression": asked["logistic_regression"],
        "mlm, nothing given": asked["alone"],
        "classifier": classified["classifier"],
    }
    table = pd.DataFrame(rows).T[["n", "accuracy", "macro_f1", "log_loss"]]
    by_mlm, by_cls = (ad.read_h5ad(folder / f"predicted_by_{name}.h5ad") for name in ("mlm", "cls"))
    column = f"predicted_{CATEGORY}"
    agreement = (by_mlm.obs[column].astype(str) == by_cls.obs[column].astype(str)).mean()
    text = table.to_string(formatters={"n": "{:.0f}".format}, float_format="{:.3f}".format, na_rep="")
    return f"{CATEGORY} of held-out cells\n{text}\nmlm and classifier agree on {agreement:.1%} of held-out cells"


def cli() -> None:
    """Run the demo in a folder and print what it found and where everything is."""
    parser = argparse.ArgumentParser(prog="python -m perturbgene.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where to work (default: demo)")
    parser.add_argument("--only_cells", type=Path, metavar="FILE", help="write the cells to this h5ad file and stop")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.only_cells:
        write_cells(arguments.only_cells)
        return
    if folder.exists() and not (folder.is_dir() and ((folder / MARKER).exists() or not any(folder.iterdir()))):
        sys.exit(f"error: {folder} exists and was not made by the demo. Choose another --folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("The demo made this folder, and replaces it when it runs again.\n")
    started = time.monotonic()
    set_up_logging()
    write_cells(folder / "pbmc.h5ad")
    for command in commands(folder):
        print(f"\n$ perturbgene {command}", flush=True)
        if code := main(command.split()):
            sys.exit(code)
    print(f"\n{summary(folder)}")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Models, scores and pictures are in {folder}/:")
    pages = ("mlm/evaluation/report.html", "cls/evaluation/report.html", "predicted_by_mlm.report.html")
    for path in (*pages, "corpus/manifest.json", "predicted_by_mlm.h5ad", "mlm/README.md"):
        print(f"  {folder / path}")


if __name__ == "__main__":
    cli()
