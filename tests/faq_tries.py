"""How to make each error of docs/faq.md happen, and what then helps: small files, command lines, faults of the machine.

Owns the folder in which the commands run; `test_faq` runs them and compares what they print with the page.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import h5py
import numpy as np
from filelock import FileLock
from scipy import sparse

from perturbgene.corpus.manifest import Corpus
from perturbgene.files import write_sums
from perturbgene.training.checkpoints import SETTINGS_FILE, seal
from tests.plain_cells import make_run, plain_cells
from tests.untrained import a_run, save

TRAINING = "--model_arch tiny --num_hidden_layers 1 --no_bf16 --report_to none --max_steps 1 --eval_strategy no"
MLM = f"mlm --corpus corpus --output_dir runs/new {TRAINING}"
STARTED = f"mlm --corpus corpus --output_dir runs/started {TRAINING} --save_steps 1"
FROM_FILES = "mlm --pretrained_model_path runs/mlm --output_dir runs/new --no_bf16 --report_to none --max_steps 1"


def predict(file: str = "cells.h5ad", more: str = "") -> str:
    return f"predict runs/mlm {file} --output out.h5ad --ask cell_type {more}"


def prepare(file: str = "cells.h5ad", more: str = "") -> str:
    return f"prepare {file} --output made {more}"


def read(file: str, more: str) -> str:
    """Return the command that reads cells as those that ask a run do, and nothing more."""
    return f"check {file} --run runs/mlm {more}"


# -- files --------------------------------------------------------------------------------------------------------


def write_files() -> None:
    """Write into the current folder what the commands of `TRIES` name."""
    known = plain_cells(60, seed=9)
    known.obs["tissue"] = np.where(np.arange(known.n_obs) % 4, "blood", "lung")  # no T cell is from the lung
    make_run(known, corpus=Path("corpus"), run=Path("runs/mlm"), phenotypes=["cell_type", "tissue"])
    cells = plain_cells()
    cells.obs["tissue"] = np.resize(["lung", "blood"], cells.n_obs)
    cells.layers["counts"] = cells.X.copy()
    for name, change in FILES.items():
        changed = cells.copy()
        (change(changed) or changed).write_h5ad(f"{name}.h5ad")
    whole = Path("cells.h5ad").read_bytes()
    Path("truncated.h5ad").write_bytes(whole[: len(whole) // 2])
    Path("login.h5ad").write_text("<!DOCTYPE html><html>Please log in</html>")
    with h5py.File("linked.h5ad", "r+") as file:
        del file["obsm"]
        file["obsm"] = h5py.ExternalLink("elsewhere.h5", "/obsm")
    with h5py.File("newer.h5ad", "r+") as file:
        file["X"].attrs["encoding-version"] = "9.0.0"
    names = [f"{gene.capitalize()},{gene}" for gene in cells.var_names]
    Path("orthologs.csv").write_text("\n".join(["mouse,human", *names]))
    for name in ("empty", "full"):
        os.makedirs(name)
    Path("full/notes.txt").write_text("mine")
    _write_runs()


def _write_runs() -> None:
    shutil.copytree("corpus", "altered")
    with h5py.File(Corpus.open(Path("altered")).paths("train")[0], "r+") as file:
        file["X/data"][0] += 1
    save(a_run("cls", normalization="auto"), Path("runs/cls"))
    for name in ("newer", "damaged", "moved"):
        shutil.copytree("runs/mlm", f"runs/{name}")
    _replace(Path("runs/newer/config.json"), '"run_format": ', '"run_format": 9')
    _replace(Path("runs/moved/run.yaml"), "corpus: corpus", "corpus: gone")
    weights = Path("runs/damaged/model.safetensors")
    write_sums(weights.parent, [weights])
    weights.write_bytes(weights.read_bytes()[:1000])
    checkpoint = Path("runs/started/checkpoint-1")
    shutil.copytree("runs/mlm", checkpoint)
    for name in ("trainer_state.json", "scheduler.pt"):
        (checkpoint / name).touch()
    seal(checkpoint, step=1, world_size=1)
    (checkpoint.parent / SETTINGS_FILE).write_text("learning_rate: 0.002")


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def z_scores(cells: ad.AnnData) -> None:
    values = cells.X.toarray()
    cells.X = (values - values.mean(0)) / values.std(0)


def nan(cells: ad.AnnData) -> None:
    cells.X.data[3] = np.nan


def denoised(cells: ad.AnnData) -> None:
    cells.X = np.random.default_rng(0).uniform(0.1, 5, cells.shape).astype(np.float32)


def two_scales(cells: ad.AnnData) -> None:
    values = cells.X.toarray()
    values[:12] = np.log1p(1e4 * values[:12] / values[:12].sum(1, keepdims=True))
    cells.X = sparse.csr_matrix(values)


def zeros(cells: ad.AnnData) -> None:
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)


def probes(cells: ad.AnnData) -> None:
    cells.var = cells.var.set_index("gene_ids").assign(target=cells.var_names.to_numpy())
    cells.var_names = [f"probe_{i}" for i in range(cells.n_vars)]


def numbered(cells: ad.AnnData) -> None:
    probes(cells)
    cells.var_names = [str(i) for i in range(cells.n_vars)]


def mouse(cells: ad.AnnData) -> None:
    cells.var = cells.var[[]].set_axis(cells.var_names.str.capitalize())


def few_genes(cells: ad.AnnData) -> ad.AnnData:
    return cells[:, :4].copy()


def doubled(cells: ad.AnnData) -> None:
    denoised(cells)
    cells.var = cells.var[[]].set_axis(["CD1", "CD1", *cells.var_names[2:]])


def unlabeled(cells: ad.AnnData) -> None:
    del cells.obs["cell_type"]


def empty_labels(cells: ad.AnnData) -> None:
    cells.obs["cell_type"] = ""


def liver(cells: ad.AnnData) -> None:
    cells.obs["cell_type"] = "hepatocyte"


def one_donor(cells: ad.AnnData) -> None:
    cells.obs["donor_id"] = "d1"


def one_type(cells: ad.AnnData) -> None:
    cells.obs["cell_type"] = "B cell"


def twins(cells: ad.AnnData) -> None:
    cells.obs["cell_type"] = np.resize(["T cell", "T_cell"], cells.n_obs)


def scores(cells: ad.AnnData) -> ad.AnnData:
    many = ad.concat([cells] * 10, merge="same")
    many.obs_names_make_unique()
    many.obs["score"] = np.linspace(0, 1, many.n_obs)
    return many


def as_it_is(cells: ad.AnnData) -> None:
    """Leave the cells as they are."""


CHANGES = (z_scores, nan, denoised, two_scales, zeros, probes, numbered, mouse, few_genes, doubled, unlabeled,
           empty_labels, liver, one_donor, one_type, twins, scores)  # fmt: skip
FILES: dict[str, Callable[[ad.AnnData], ad.AnnData | None]] = {
    **{change.__name__: change for change in CHANGES},
    **dict.fromkeys(("cells", "linked", "newer"), as_it_is),
}


# -- faults -------------------------------------------------------------------------------------------------------


@contextmanager
def locked_file() -> Iterator[None]:
    with open("cells.h5ad", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def taken_output() -> AbstractContextManager[object]:
    return FileLock(".out.h5ad.lock")


def raising(target: str, error: Exception) -> Callable[[], AbstractContextManager[object]]:
    """Return a fault: a function of a library raises an error, as it does when the machine is at its end."""
    return lambda: patch(target, side_effect=error)


def of_system(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes."


# -- tries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """A command that fails, the command that the entry advises ('' if none), and what is wrong with the machine."""

    command: str
    remedy: str = ""
    fault: Callable[[], AbstractContextManager[object]] = nullcontext
    is_run: bool = True  # otherwise the remedy is only parsed, since it would take long


#: Anchor of an entry -> how its error happens.
TRIES = {
    "is-not-a-verb": Try("predicts runs/mlm cells.h5ad", "predict -h"),
    "is-unknown-to": Try("predict runs/mlm cells.h5ad --output out.h5ad --aks cell_type", "predict -h"),
    "is-a-setting-of": Try(f"{MLM} --ask cell_type", "mlm -h"),
    "is-missing": Try("prepare cells.h5ad --phenotypes cell_type", prepare(), is_run=False),
    "value-of-a-flag": Try(predict(more="--batch_size many"), predict(more="--batch_size 8"), is_run=False),
    "but-it-must-be-in": Try(predict(more="--abstain 90"), predict(more="--abstain 0.9"), is_run=False),
    "column-and-value": Try(predict(more="--where lung"), read("cells.h5ad", "--where tissue=lung")),
    "more-than-once": Try("perturb runs/mlm cells.h5ad --output ko.csv --genes CD1 CD1"),
    "asked-and-given": Try(predict(more="--given cell_type"), predict(more="--given tissue"), is_run=False),
    "edges-of-bins": Try(prepare(more="--bin_edges 2 1"), prepare(more="--bin_edges 1 2"), is_run=False),
    "file-of-settings": Try("mlm --config orthologs.csv", "mlm --config runs/mlm/run.yaml", is_run=False),
    "is-gone-from-transformers-5": Try(
        f"{FROM_FILES} --train_data_paths cells.h5ad --evaluation_strategy no",
        f"{FROM_FILES} --train_data_paths cells.h5ad --eval_strategy no", is_run=False,
    ),
    "needs-a-package": Try("evaluate runs/mlm --scib", "evaluate runs/mlm", lambda: patch(
        "perturbgene.cli.verbs.find_spec", return_value=None), is_run=False),
    "no-such-file-or-folder": Try(predict("cels.h5ad"), predict(), is_run=False),
    "no-cells-in-the-folder": Try(predict("empty")),
    "not-an-anndata-file": Try(predict("login.h5ad")),
    "truncated-or-damaged": Try(predict("truncated.h5ad")),
    "locked-by-a-program": Try(predict(), read("cells.h5ad", ""), locked_file),
    "links-to-another-file": Try(predict("linked.h5ad")),
    "no-such-matrix": Try(predict(more="--layer count"), read("cells.h5ad", "--layer counts")),
    "written-by-a-newer-anndata": Try(predict("newer.h5ad")),
    "would-count-twice": Try(prepare("cells.h5ad ./cells.h5ad")),
    "not-fetched": Try("download http://127.0.0.1:9/a.h5ad --output_dir made --retries 0"),
    "negative-values": Try(predict("z_scores.h5ad"), read("z_scores.h5ad", "--layer counts")),
    "nan-or-infinite-values": Try(predict("nan.h5ad"), read("nan.h5ad", "--layer counts")),
    "scale-is-not-known": Try(predict("denoised.h5ad"), read("denoised.h5ad", "--layer counts")),
    "mixed-scales": Try(predict("two_scales.h5ad"), read("two_scales.h5ad", "--layer counts")),
    "only-zeros": Try(predict("zeros.h5ad"), read("zeros.h5ad", "--layer counts")),
    "genes-are-not-found": Try(predict("probes.h5ad"), read("probes.h5ad", "--gene_id_column target")),
    "no-gene-in-common": Try(
        prepare("cells.h5ad mouse.h5ad"), "check cells.h5ad mouse.h5ad --gene_map orthologs.csv"
    ),
    "genes-without-names": Try(prepare("numbered.h5ad"), "check numbered.h5ad --gene_id_column target"),
    "columns-of-the-same-gene": Try(
        predict("doubled.h5ad", "--normalization none"), read("doubled.h5ad", "--layer counts")
    ),
    "not-a-gene-of-the-panel": Try("perturb runs/mlm cells.h5ad --output ko.csv --genes cd3"),
    "genes-are-in-no-file": Try(
        prepare("few_genes.h5ad", "--like runs/mlm"),
        prepare("few_genes.h5ad", "--like runs/mlm --min_gene_coverage 0.1"),
    ),
    "more-genes-than-there-are": Try(prepare(more="--num_top_genes 500"), prepare(more="--num_top_genes 20")),
    "no-such-column": Try(
        prepare(more="--phenotypes cel_type"), "check cells.h5ad --phenotypes cel_type=cell_type"
    ),
    "labels-that-the-run-does-not-know": Try("evaluate runs/mlm --eval_data_paths liver.h5ad --ask cell_type"),
    "not-in-the-vocabulary": Try(
        predict(more="--given tissue=liver"), predict(more="--given tissue=lung"), is_run=False
    ),
    "no-labels": Try("evaluate runs/mlm --eval_data_paths empty_labels.h5ad --ask cell_type"),
    "numbers-as-labels": Try(prepare("scores.h5ad", "--phenotypes score")),
    "two-labels-are-the-same": Try(prepare("twins.h5ad", "--phenotypes cell_type")),
    "nothing-to-classify": Try(
        f"{FROM_FILES.replace('mlm', 'cls', 1)} --train_data_paths one_type.h5ad --phenotype_category cell_type "
        "--per_device_train_batch_size 8"
    ),
    "nothing-can-be-held-out": Try(
        prepare("one_donor.h5ad", "--split_by donor_id"), "check one_donor.h5ad --split_by cell"
    ),
    "no-cell-is-chosen": Try(predict(more="--where tissue=liver"), read("cells.h5ad", "--where tissue=lung")),
    "exists-and-is-not-empty": Try("prepare cells.h5ad --output full"),
    "fewer-than-one-batch": Try(
        f"{MLM} --per_device_train_batch_size 64", f"{MLM} --per_device_train_batch_size 16", is_run=False
    ),
    "cells-in-training-and-evaluation": Try(
        f"{FROM_FILES} --train_data_paths cells.h5ad --eval_data_paths cells.h5ad",
        f"{FROM_FILES} --train_data_paths cells.h5ad --eval_data_paths cells.h5ad --allow_overlap", is_run=False,
    ),
    "nothing-to-evaluate-on": Try(
        f"{FROM_FILES} --train_data_paths cells.h5ad --eval_strategy epoch",
        f"{FROM_FILES} --train_data_paths cells.h5ad", is_run=False,
    ),
    "another-normalization": Try(
        prepare(more="--like runs/mlm --normalization none"),
        prepare(more="--like runs/mlm"),
    ),
    "knows-none-of-the-genes": Try(
        "mlm --corpus corpus --output_dir runs/new --pretrained_model_path runs/cls --no_bf16 --report_to none"
    ),
    "changed-cells": Try(MLM.replace("corpus corpus", "corpus altered"), f"{MLM} --allow_changed", is_run=False),
    "other-settings": Try(
        f"{STARTED} --resume_from_checkpoint --learning_rate 1e-5",
        f"{STARTED} --resume_from_checkpoint --learning_rate 1e-5 --allow_changed", is_run=False,
    ),
    "no-such-checkpoint": Try(
        f"{STARTED} --resume_from_checkpoint runs/started/checkpoint-9", f"{STARTED} --resume_from_checkpoint",
        is_run=False,
    ),
    "gradient-is-not-a-number": Try(
        MLM.replace("max_steps 1", "max_steps 3") + " --learning_rate 1e30", f"{MLM} --learning_rate 1e-4", is_run=False
    ),
    "needs-bfloat16": Try(
        MLM.replace("--no_bf16", "--bf16"), MLM, lambda: patch("perturbgene.devices.has_bfloat16", return_value=False),
        is_run=False,
    ),
    "needs-several-processes": Try(f"{MLM} --fsdp full_shard"),
    "no-finished-run": Try("predict corpus cells.h5ad --output out.h5ad", predict(), is_run=False),
    "run-of-another-version": Try("predict runs/newer cells.h5ad --output out.h5ad"),
    "run-is-damaged": Try("predict runs/damaged cells.h5ad --output out.h5ad"),
    "classifies-only": Try(
        "predict runs/cls cells.h5ad --output out.h5ad --ask tissue", predict(more="--ask tissue"), is_run=False
    ),
    "needs-evaluate": Try(predict(more="--ood"), "evaluate runs/mlm", is_run=False),
    "cells-of-the-run-are-gone": Try("evaluate runs/moved", "evaluate runs/moved --corpus corpus", is_run=False),
    "never-seen-in-training": Try(
        "counterfactual runs/mlm cells.h5ad --output out.h5ad --set tissue=lung --given cell_type",
        "counterfactual runs/mlm cells.h5ad --output out.h5ad --set tissue=lung --given cell_type --force",
        is_run=False,
    ),
    "no-gpu": Try(predict(more="--device cuda:7"), predict(more="--device cpu"), is_run=False),
    "no-parts": Try("merge out.h5ad", predict(more="--part 1/2"), is_run=False),
    "ending-of-the-output": Try("predict runs/mlm cells.h5ad --output out.csv", predict(), is_run=False),
    "output-exists": Try("predict runs/mlm cells.h5ad --output mouse.h5ad"),
    "output-is-the-input": Try("predict runs/mlm cells.h5ad --output cells.h5ad"),
    "written-by-another-process": Try(predict(), predict(), taken_output),
    "cannot-be-written": Try("predict runs/mlm cells.h5ad --output full/notes.txt/out.h5ad"),
    "written-by-another-command": Try("report cells.h5ad"),
    "disk-is-full": Try(prepare(), fault=raising("perturbgene.files.os.replace", of_system(errno.ENOSPC, "made"))),
    "memory-ran-out": Try(predict(), fault=raising("torch.nn.functional.linear", RuntimeError(ALLOCATOR))),
    "process-was-killed": Try(predict(), fault=raising(
        "torch.nn.functional.linear", RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))),
    "too-many-open-files": Try(predict(), fault=raising("h5py.File", of_system(errno.EMFILE, "cells.h5ad"))),
}  # fmt: skip

#: Command -> anchors of the entries about what it warns of.
WARNINGS = {
    predict("few_genes.h5ad", "--min_gene_coverage 0.05"): (
        "few-genes-of-the-run", "scored-by-what-it-measures", "it-has-few-genes"
    ),
    prepare(more="--phenotypes batch=donor_id"): ("every-label-comes-from-one-donor",),
}  # fmt: skip
