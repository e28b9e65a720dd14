"""`ShardedTrainer` gives one global batch the same step however it is cut, and reads each cell once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import pytest
import torch
from safetensors.torch import load_file

from perturbgene.configs import parse_args
from perturbgene.prepare import prepare
from perturbgene.train import run_mlm

COMMON = (
    "--model_arch tiny --no_bf16 --report_to none --max_length 60 --dropout 0 --optim sgd --learning_rate 0.1 "
    "--max_steps 2 --lr_scheduler_type constant --warmup_steps 0 --weight_decay 0 --logging_steps 1 "
    "--save_strategy no --eval_strategy no"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import scanpy as sc

    whole = sc.datasets.pbmc68k_reduced()
    cells = ad.AnnData(whole.raw.X.copy(), obs=whole.obs[["bulk_labels", "phase"]], var=whole.raw.var)[:120]
    folder = tmp_path_factory.mktemp("trainer") / "corpus"
    return prepare(cells.copy(), folder, phenotypes=["cell_type=bulk_labels", "phase"], num_top_genes=80)


def arguments(corpus: Path, out: Path, *, batch: int, accumulated: int) -> list[str]:
    cut = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}"
    return ["mlm", *f"--corpus {corpus} --output_dir {out} {COMMON} {cut}".split()]


def log_of(run: Path) -> list[dict[str, float]]:
    state = json.loads((run / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def uncut(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncut") / "run"
    return run_mlm(parse_args(arguments(corpus, out, batch=8, accumulated=1)))  # type: ignore[arg-type]


def assert_same_steps(run: Path, uncut: Path) -> None:
    for ours, theirs in zip(log_of(run), log_of(uncut), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)
    ours, theirs = load_file(run / "model.safetensors"), load_file(uncut / "model.safetensors")
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert worst < 1e-6


def test_accumulating_2_x_4_cells_is_the_step_of_8(corpus: Path, uncut: Path, tmp_path: Path) -> None:
    run = run_mlm(parse_args(arguments(corpus, tmp_path / "run", batch=4, accumulated=2)))  # type: ignore[arg-type]
    assert_same_steps(run, uncut)


def test_two_processes_of_4_cells_make_the_step_of_8(corpus: Path, uncut: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "perturbgene.main", *arguments(corpus, tmp_path / "run", batch=4, accumulated=1), "--use_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, env=environment, timeout=200, capture_output=True)
    assert_same_steps(tmp_path / "run", uncut)


def test_the_log_holds_both_loss_parts(uncut: Path) -> None:
    entry = log_of(uncut)[0]
    weighted = entry["loss_phenotypes"] + 0.3 * entry["loss_genes"]
    assert weighted == pytest.approx(entry["loss"], abs=1e-3)


def test_training_leaves_no_process_group_behind(uncut: Path) -> None:
    assert not torch.distributed.is_initialized()
