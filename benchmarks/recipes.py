"""Which settings learn best: trains recipes on real cells and scores them next to their baselines.

Owns the sets, their splits and the bookkeeping: one JSON line per run. The work itself is the product's own `prepare`,
`mlm`, `cls` and `evaluate`. `docs/experiments.md` is written from its tables. A *recipe* is `{"prepare": FLAGS, "mlm":
FLAGS, "cls": FLAGS}`, each part a string as on the command line, all optional; without "cls" no classifier is trained,
and `"cls"` without `"mlm"` trains one from nothing. `"start"` names a recipe whose masked model the classifier starts
from, so that many fine-tunings share one pretraining.

    python -m benchmarks.recipes --recipes recipes.json --names plain thinned --sets demo0 demo1 --seeds 0 1
    python -m benchmarks.recipes --table
"""

import argparse
import hashlib
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from perturbgene.configs import parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.demo import write_cells
from perturbgene.errors import InputError
from perturbgene.inference.baselines import baselines
from perturbgene.inference.evaluate import evaluate
from perturbgene.inference.run import load_run
from perturbgene.main import set_up_logging, verb_function

logger = logging.getLogger("perturbgene.recipes")

CATEGORY = "cell_type"

#: Genes are scored under the same masks whatever a recipe trains with.
MASKS = {"gene_mask_prob": 0.15, "phenotype_mask_prob": 0.5, "absent_prob": 0.1, "unexpressed_ratio": 0.5}

#: Of both trainings: no logs, and neither a choice nor a stop by held-out cells.
QUIET = "--report_to none --save_strategy no --load_best_model_at_end false --logging_steps 0.05"


@dataclass(frozen=True)
class CellSet:
    """Cells with a split.

    Args:
        file: h5ad file in the data folder; empty means the cells of the demo.
        prepare: Flags of `prepare`: phenotypes and split.
        keep: obs column -> values of the cells that are used; empty means all.
    """

    file: str
    prepare: str
    keep: Mapping[str, Sequence[str]] = field(default_factory=dict)


_KANG, _BARON = "kang18_pbmc_ctrl_5donors.h5ad", "pancreas_baron_indrop.h5ad"
_ZHENG, _LUNG = "pbmc_facs_zheng17.h5ad", "lung_lines_5batches_mixology.h5ad"

#: Sets by name. A set that ends in `_dev` is a part of the training cells of its namesake: settings are screened there,
#: so that the namesake's held-out cells are seen by few. Sources: Zheng 2017 (sorted PBMC, the authors' split),
#: Kang 2018 (GSE96583, control cells), Baron 2016 (GSE84133), Tian 2019 (GSE118767), Kong 2023 (SCP1884).
SETS = {
    **{f"demo{seed}": CellSet("", f"--layer raw --phenotypes {CATEGORY}=bulk_labels phase --seed {seed}")
       for seed in range(4)},
    "zheng": CellSet(_ZHENG, f"--phenotypes {CATEGORY} --split_by split --eval_donors test"),
    "zheng_dev": CellSet(_ZHENG, f"--phenotypes {CATEGORY} --split_by cell", {"split": ["train"]}),
    "kang": CellSet(_KANG, f"--phenotypes {CATEGORY} --split_by donor_id --eval_donors SLE_1016 SLE_1488"),
    "kang_dev": CellSet(_KANG, f"--phenotypes {CATEGORY} --split_by donor_id --eval_donors SLE_1015",
                        {"donor_id": ["SLE_1015", "SLE_1244", "SLE_1256"]}),
    "baron": CellSet(_BARON, f"--phenotypes {CATEGORY} --split_by donor_id --eval_donors Baron_human4"),
    "baron_back": CellSet(_BARON, f"--phenotypes {CATEGORY} --split_by donor_id --eval_donors Baron_human2"),
    "lung": CellSet(_LUNG, f"--phenotypes {CATEGORY} --split_by batch --eval_donors sc_dropseq"),
    "lung_plate": CellSet(_LUNG, f"--phenotypes {CATEGORY} --split_by batch --eval_donors sc_celseq2"),
    "crohn": CellSet("crohn_ileum_colon_scp1884.h5ad", f"--phenotypes {CATEGORY} tissue --split_by donor_id"),
}  # fmt: skip


def _cells(cells: CellSet, data: Path, folder: Path) -> Path:
    """Return the h5ad file of a set's cells, written when they are no file yet."""
    if cells.file and not cells.keep:
        return data / cells.file
    path = folder / "cells.h5ad"
    if not cells.file:
        write_cells(path)
        return path
    adata = ad.read_h5ad(data / cells.file)
    for column, values in cells.keep.items():
        adata = adata[adata.obs[column].isin(list(values))]
    adata.write_h5ad(path)
    return path


def _run_verb(verb: str, flags: str) -> Any:
    """Run one verb as the command line does."""
    logger.info("$ perturbgene %s %s", verb, flags)
    return verb_function(verb)(parse_args([verb, *shlex.split(flags)]))


def corpus_of(name: str, flags: str, *, data: Path, cache: Path) -> Path:
    """Return the corpus of a set under some flags of `prepare`, made on the first call."""
    key = hashlib.sha256(f"{SETS[name]}{flags}".encode()).hexdigest()[:10]
    folder = cache / f"{name}-{key}"
    if not (folder / "corpus/manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path = _cells(SETS[name], data, folder)
        _run_verb("prepare", f"{path} --output {folder / 'corpus'} --num_processes 1 {SETS[name].prepare} {flags}")
    return folder / "corpus"


def bars_of(corpus: Path, run: Path) -> dict[str, dict[str, float]]:
    """Return the scores of the baselines, computed once per corpus."""
    path = corpus.parent / "bars.json"
    if not path.exists():
        tokenizer = load_run(run, device="cpu").tokenizer
        train, held_out = (IterableAnnDataset(Corpus.open(corpus).paths(part), tokenizer) for part in ("train", "eval"))
        answers = baselines(train, held_out, [CATEGORY])[CATEGORY]
        path.write_text(json.dumps({name: one.scores for name, one in answers.items()}))
    bars: dict[str, dict[str, float]] = json.loads(path.read_text())
    return bars


def _scored(run: Path, corpus: Path) -> dict[str, float]:
    """Return a run's scores of held-out cells, nothing given; for a masked model of genes too."""
    loaded = load_run(run, device="cpu")
    rates = None if loaded.is_classifier else MASKS
    asked = () if loaded.is_classifier else (CATEGORY,)
    results = evaluate(loaded, Corpus.open(corpus).paths("eval"), ask=asked, mask_rates=rates, calibrate=False)
    scores = results[CATEGORY]["classifier" if loaded.is_classifier else "alone"]
    kept = {name: round(scores[name], 4) for name in ("accuracy", "macro_f1", "log_loss")}
    if "genes" in results:
        kept |= {"gene_loss": round(results["genes"]["masked"]["loss"], 4)}
    return kept


def _curve(run: Path) -> list[list[float]]:
    """Return epoch, accuracy and log loss of every evaluation during training."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    names = (f"eval_{CATEGORY}_accuracy", f"eval_{CATEGORY}_log_loss")
    return [[round(entry[name], 3) for name in ("epoch", *names)] for entry in history if names[0] in entry]


def train(verb: str, flags: str, *, corpus: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train by one verb and score the last weights on the held-out cells."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    _run_verb(verb, f"--corpus {corpus} --output_dir {output} --seed {seed} {QUIET} {flags}")
    seconds = time.monotonic() - started
    scores: dict[str, Any] = _scored(output, corpus)
    return {**scores, "seconds": round(seconds), "curve": _curve(output)}


def run_recipe(name: str, recipes: Mapping[str, Mapping[str, str]], *, on: str, seed: int, data: Path, cache: Path
               ) -> dict[str, Any]:  # fmt: skip
    """Train one recipe on one set with one seed; returns its line of results."""
    recipe = recipes[name]
    begun = recipes[recipe["start"]] if "start" in recipe else recipe
    corpus = corpus_of(on, begun.get("prepare", ""), data=data, cache=cache)
    folder = cache / "runs" / f"{on}-{seed}"
    mlm, cls = folder / recipe.get("start", name) / "mlm", folder / name / "cls"
    line: dict[str, Any] = {"set": on, "recipe": name, "seed": seed, "flags": dict(recipe)}
    if "mlm" in recipe:
        line["mlm"] = train("mlm", recipe["mlm"], corpus=corpus, output=mlm, seed=seed)
    if "cls" in recipe:
        start = f"--pretrained_model_path {mlm} " if "mlm" in begun else ""
        flags = f"--phenotype_category {CATEGORY} {start}{recipe['cls']}"
        line["cls"] = train("cls", flags, corpus=corpus, output=cls, seed=seed)
    line["bars"] = bars_of(corpus, mlm if "mlm" in begun else cls)
    return line


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read all lines of results; none when there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _spread(values: pd.Series) -> str:
    return f"{values.mean():.3f}" if len(values) == 1 else f"{values.mean():.3f}±{values.std():.3f}"


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lay results out in Markdown: per set its bars, then each recipe's mean and standard deviation over seeds."""
    names = ("accuracy", "macro_f1", "log_loss", "gene_loss")
    rows = []
    for line in lines:
        bars = [{"who": f"{who} ({line['bars']['majority']['n']:.0f} cells)", **line["bars"][who]}
                for who in ("majority", "logistic_regression")]  # fmt: skip
        own = [{"who": f"{line['recipe']}: {verb}", "seed": line["seed"], **line[verb]}
               for verb in ("mlm", "cls") if verb in line]  # fmt: skip
        rows += [{"set": line["set"], **row} for row in bars + own]
    frame = pd.DataFrame(rows).reindex(columns=["set", "who", "seed", "seconds", *names])
    frame = frame.drop_duplicates(["set", "who", "seed", "accuracy", "macro_f1"])
    shown = ["| set | model | runs | accuracy | macro F1 | log loss | gene loss | s |", "|" + " --- |" * 8]
    for (on, who), group in frame.groupby(["set", "who"], sort=False):
        cells = [_spread(group[name]) if group[name].notna().any() else "" for name in names]
        seconds = f"{group['seconds'].mean():.0f}" if group["seconds"].notna().any() else ""
        shown.append(f"| {on} | {who} | {group['seed'].nunique() or ''} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(shown)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=Path, help="JSON file: name -> recipe")
    parser.add_argument("--names", nargs="+", default=[], help="recipes to run; none named means all of the file")
    parser.add_argument("--sets", nargs="+", default=[], help=f"of {', '.join(SETS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the h5ad files")
    parser.add_argument("--cache", type=Path, default=Path("recipe_cache"), help="corpora and run folders")
    parser.add_argument("--results", type=Path, default=Path("recipe_results.jsonl"), help="one line per run, appended")
    parser.add_argument("--table", action="store_true", help="print the results so far (of --sets and --names, if any)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing in the results, or print them."""
    arguments = _arguments(argv)
    done = read_results(arguments.results)
    if arguments.table:
        wanted = [line for line in done if (not arguments.sets or line["set"] in arguments.sets)
                  and (not arguments.names or line["recipe"] in arguments.names)]  # fmt: skip
        print(table(wanted))
        return 0
    recipes = json.loads(arguments.recipes.read_text())
    set_up_logging()
    have = {(line["set"], line["recipe"], line["seed"]) for line in done}
    for name in arguments.names or list(recipes):
        for on in arguments.sets:
            for seed in arguments.seeds:
                if (on, name, seed) in have:
                    continue
                try:
                    line = run_recipe(name, recipes, on=on, seed=seed, data=arguments.data, cache=arguments.cache)
                except InputError as error:
                    print(f"{name} on {on} failed: {error}", file=sys.stderr)
                    continue
                with arguments.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
