"""`ShardedTrainer` gives one global batch the same step however cut, reads each cell once, and resumes exactly."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perturbgene.configs import parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.training.checkpoints import take_settings
from perturbgene.training.train import run_mlm
from tests.forked import in_two_processes, needs_fork
from tests.fsdp_on_cpu import allow_fsdp

COMMON = (
    "--model_arch tiny --no_bf16 --report_to none --max_length 60 --dropout 0 --optim sgd --learning_rate 0.1 "
    "--max_steps 2 --lr_scheduler_type constant --warmup_steps 0 --weight_decay 0 --logging_steps 1 "
    "--save_steps 1 --eval_strategy no --save_total_limit 9"
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
        for name in ("grad_norm", "loss", "loss_phenotypes", "loss_genes"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4 if name.startswith("loss_") else 2e-5)
    ours, theirs = load_file(run / "model.safetensors"), load_file(uncut / "model.safetensors")
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert worst < 1e-6


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 2), (2, 4)])
def test_accumulated_batches_make_the_step_of_8(
    corpus: Path, uncut: Path, tmp_path: Path, batch: int, accumulated: int
) -> None:
    words = arguments(corpus, tmp_path / "run", batch=batch, accumulated=accumulated)
    assert_same_steps(run_mlm(parse_args(words)), uncut)  # type: ignore[arg-type]


def test_recomputing_activations_changes_no_step(corpus: Path, uncut: Path, tmp_path: Path) -> None:
    line = [*arguments(corpus, tmp_path / "run", batch=4, accumulated=2), "--gradient_checkpointing"]
    assert_same_steps(run_mlm(parse_args(line)), uncut)  # type: ignore[arg-type]


@needs_fork
def test_two_processes_of_4_cells_make_the_step_of_8(corpus: Path, uncut: Path, tmp_path: Path) -> None:
    """One process continues from their checkpoint with the same second step."""
    words = [*arguments(corpus, tmp_path / "run", batch=4, accumulated=1), "--use_cpu"]
    done = in_two_processes(words, tmp_path)
    assert done.codes == [0, 0], done.printed
    assert_same_steps(tmp_path / "run", uncut)
    assert done.printed.count("step 2/2 ·") == 1
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-1", resumed / "checkpoint-1")
    run_mlm(parse_args([*arguments(corpus, resumed, batch=8, accumulated=1), "--resume_from_checkpoint"]))  # type: ignore[arg-type]
    assert_same_steps(resumed, uncut)


@needs_fork
def test_weights_spread_over_two_processes_by_fsdp2_make_the_step_of_8(
    corpus: Path, uncut: Path, tmp_path: Path
) -> None:
    """Tried twice: one of two hundred runs ended early, for a reason that was not kept; a warning would now show it."""
    run = tmp_path / "run"
    command = [*arguments(corpus, run, batch=4, accumulated=1), "--use_cpu"]
    done = in_two_processes(command, tmp_path, before=allow_fsdp)
    if done.codes != [0, 0]:
        warnings.warn(f"two processes under FSDP2 ended with {done.codes}:\n{done.printed}", stacklevel=1)
        shutil.rmtree(run, ignore_errors=True)
        done = in_two_processes(command, tmp_path, before=allow_fsdp)
    assert done.codes == [0, 0], done.printed
    assert (run / "checkpoint-1" / "pytorch_model_fsdp.bin").exists()  # written by FSDP only
    for name in ("grad_norm", "loss"):
        assert [e[name] for e in log_of(run)] == pytest.approx([e[name] for e in log_of(uncut)], abs=2e-5)
    ours, theirs = load_file(run / "model.safetensors"), load_file(uncut / "checkpoint-2" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6


def test_the_log_holds_both_loss_parts(uncut: Path) -> None:
    entry = log_of(uncut)[0]
    weighted = entry["loss_phenotypes"] + 0.3 * entry["loss_genes"]
    assert weighted == pytest.approx(entry["loss"], abs=1e-3)


def test_training_leaves_no_process_group_behind(uncut: Path) -> None:
    assert not torch.distributed.is_initialized()


# -- resuming ------------------------------------------------------------------------------------------------------

# 96 training cells in batches of 8, two accumulated: 6 steps an epoch. Dropout is on: random states must be right too.
LONG = (
    "--model_arch tiny --no_bf16 --report_to none --max_length 60 --eval_strategy no --save_total_limit 9 "
    "--logging_steps 1 --per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}"
)
STEPS, STEPS_OF_EPOCH = 15, 6


def long_run(corpus: Path, out: Path, more: str = "", *, batch: int = 8, accumulated: int = 2) -> Path:
    text = f"mlm --corpus {corpus} --output_dir {out} {LONG.format(batch=batch, accumulated=accumulated)} {more}"
    return run_mlm(parse_args(text.split()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped, with a checkpoint in each epoch and one between two."""
    return long_run(corpus, tmp_path_factory.mktemp("whole") / "run", f"--max_steps {STEPS} --save_steps 2")


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, free to be continued from any of its checkpoints."""
    return Path(shutil.copytree(whole, tmp_path / "stopped"))


@pytest.fixture
def trained_cells(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the numbers of all training cells that are read, in the order of reading."""
    numbers: list[int] = []
    read = Shard.read

    def read_and_note(shard: Shard, rows_m: np.ndarray, **options: Any) -> Any:
        block = read(shard, rows_m, **options)
        numbers.extend(block.cells_n.tolist() if "/train/" in shard.path else [])
        return block

    monkeypatch.setattr(Shard, "read", read_and_note)
    monkeypatch.setattr("perturbgene.training.train.save_space", lambda *args, **options: None)  # reads them again
    return numbers


@pytest.mark.parametrize(
    ("step", "workers"),
    [(4, 2), (STEPS_OF_EPOCH, 0), (8, 0), (14, 1)],
    ids=["first epoch, 2 workers", "between epochs", "second epoch", "third epoch, 1 worker"],
)
def test_a_resumed_run_ends_with_the_same_weights_and_the_same_log(
    corpus: Path, whole: Path, stopped: Path, step: int, workers: int
) -> None:
    more = f"--max_steps {STEPS} --save_steps 2 --resume_from_checkpoint {stopped}/checkpoint-{step}"
    resumed = long_run(corpus, stopped, f"{more} --dataloader_num_workers {workers}")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [(entry["step"], entry["epoch"], entry["loss"], entry["loss_genes"]) for entry in log_of(resumed)] == [
        (entry["step"], entry["epoch"], entry["loss"], entry["loss_genes"]) for entry in log_of(whole)
    ]


def test_a_resumed_run_reads_only_cells_that_were_not_trained_on(
    corpus: Path, stopped: Path, trained_cells: list[int]
) -> None:
    more = f"--max_steps {2 * STEPS_OF_EPOCH} --save_strategy no"
    long_run(corpus, stopped, f"{more} --resume_from_checkpoint {stopped}/checkpoint-8")
    assert len(trained_cells) == len(set(trained_cells)) == (2 * STEPS_OF_EPOCH - 8) * 16


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 1), (12, 3), (7, 2)])
def test_a_run_resumed_with_other_batches_continues_with_the_cells_that_are_left(
    corpus: Path, tmp_path: Path, trained_cells: list[int], batch: int, accumulated: int
) -> None:
    out = long_run(corpus, tmp_path / "run", "--num_train_epochs 1 --save_steps 2 --direct_path never")
    dataset = IterableAnnDataset(
        Corpus.open(corpus).paths("train"), GeneTokenizer.from_pretrained(out), shuffle=True, seed=42
    )
    left = [cell.index for cell in dataset][4 * 16 :]
    trained_cells.clear()
    more = f"--num_train_epochs 1 --save_strategy no --allow_changed --resume_from_checkpoint {out}/checkpoint-4"
    more += " --direct_path never"
    long_run(corpus, out, more, batch=batch, accumulated=accumulated)
    assert sorted(trained_cells) == sorted(left)
    steps = 4 + -(-len(left) // (batch * accumulated))
    assert (log_of(out)[-1]["step"], log_of(out)[-1]["epoch"]) == (steps, 1.0)


def test_a_run_resumed_with_other_batches_still_makes_all_steps(corpus: Path, stopped: Path) -> None:
    """16 steps of 16 cells were to be 3 epochs; from step 12 on they are of 4 cells, and of 24 an epoch."""
    more = f"--max_steps 16 --save_strategy no --allow_changed --resume_from_checkpoint {stopped}/checkpoint-12"
    long_run(corpus, stopped, more, batch=4, accumulated=1)
    assert log_of(stopped)[-1]["step"] == 16
    assert log_of(stopped)[-1]["epoch"] == pytest.approx(2 + 4 / 24)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_changed_learning_rate_takes_effect_when_it_is_allowed(corpus: Path, tmp_path: Path, schedule: str) -> None:
    out = tmp_path / "run"
    words = [*arguments(corpus, out, batch=8, accumulated=1), "--lr_scheduler_type", schedule]
    run_mlm(parse_args(words))  # type: ignore[arg-type]
    before, then = (load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    again = ["--learning_rate", "0.05", "--resume_from_checkpoint", f"{out}/checkpoint-1"]  # it was 0.1
    with pytest.raises(InputError, match="learning_rate was 0.1, is 0.05"):
        run_mlm(parse_args([*words, *again]))  # type: ignore[arg-type]
    run_mlm(parse_args([*words, *again, "--allow_changed"]))  # type: ignore[arg-type]
    now = load_file(out / "checkpoint-2" / "model.safetensors")
    for name in before:  # of plain gradient descent the step is half as long
        torch.testing.assert_close(now[name] - before[name], (then[name] - before[name]) / 2, atol=1e-6, rtol=1e-3)
    assert any(not torch.equal(now[name], then[name]) for name in before)


def test_the_settings_of_now_replace_those_of_a_checkpoint() -> None:
    group = {"lr": 0.05, "initial_lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "params": [3]}
    take_settings(group, {"lr": 0.0, "initial_lr": 0.4, "weight_decay": 0.0, "betas": (0.9, 0.98), "params": [7]})
    assert group.pop("lr") == pytest.approx(0.2)
    assert group == {"initial_lr": 0.4, "weight_decay": 0.0, "betas": (0.9, 0.98), "eps": 1e-8, "params": [3]}


# Batches of at most 130 tokens: 14 in some epochs, 15 in others. All 96 cells are read once at the door, to measure how
# many values become tokens.
PLANNED = LONG.replace("--per_device_train_batch_size {batch}", "{rule}").format(rule="{rule}", accumulated=2)
RULES = {
    "budget": "--tokens_per_batch 130",
}


def planned_run(corpus: Path, out: Path, more: str, *, rule: str) -> Path:
    text = f"mlm --corpus {corpus} --output_dir {out} {PLANNED.format(rule=RULES[rule])} {more}"
    return run_mlm(parse_args(text.split()))  # type: ignore[arg-type]


def planned_stream(corpus: Path, run: Path) -> IterableAnnDataset:
    """Make the stream that a run under the budget trained on."""
    tokenizer, paths = GeneTokenizer.from_pretrained(run), Corpus.open(corpus).paths("train")
    return IterableAnnDataset(paths, tokenizer, shuffle=True, seed=42, tokens_per_batch=130)


def cells_after(corpus: Path, run: Path, *, num_batches: int) -> list[int]:
    """Return which cells are left of the first epoch of a run under the budget, ascending."""
    stream = planned_stream(corpus, run)
    left = list(stream)[int(stream.batch_sampler().sizes_b[:num_batches].sum()) :]
    return sorted(cell.index for cell in left)


@pytest.mark.parametrize(("rule", "workers"), [("budget", 2), ("budget", 0)])
def test_a_run_of_planned_batches_resumes_with_the_same_weights_and_log(
    corpus: Path, tmp_path: Path, rule: str, workers: int
) -> None:
    common = "--num_train_epochs 2 --save_steps 5"
    whole = planned_run(corpus, tmp_path / "whole", common, rule=rule)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    more = f"{common} --dataloader_num_workers {workers} --resume_from_checkpoint"
    resumed = planned_run(corpus, stopped, f"{more} {stopped}/checkpoint-10", rule=rule)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [(entry["step"], entry["epoch"], entry["loss"]) for entry in log_of(resumed)] == [
        (entry["step"], entry["epoch"], entry["loss"]) for entry in log_of(whole)
    ]


def test_every_epoch_of_planned_batches_is_trained_to_its_own_end(
    corpus: Path, tmp_path: Path, trained_cells: list[int]
) -> None:
    run = planned_run(corpus, tmp_path / "run", "--num_train_epochs 4 --save_strategy no", rule="budget")
    read = trained_cells[2 * 96 :]  # the genes' votes are solved on all cells first
    stream = planned_stream(corpus, run)
    batches = [stream.num_batches(epoch=epoch) for epoch in range(4)]
    assert len(set(batches)) > 1
    assert log_of(run)[-1]["step"] == sum(-(-count // 2) for count in batches)
    assert log_of(run)[-1]["epoch"] == 4.0
    assert log_of(run)[-1]["learning_rate"] < 1e-5  # the schedule ends where training does
    assert sorted(read) == sorted([*range(96)] * 4)


def test_a_run_under_a_budget_resumed_with_other_accumulation_trains_on_what_is_left(
    corpus: Path, tmp_path: Path, trained_cells: list[int]
) -> None:
    out = planned_run(corpus, tmp_path / "run", "--num_train_epochs 1 --save_steps 3", rule="budget")
    left = cells_after(corpus, out, num_batches=6)
    trained_cells.clear()
    more = f"--num_train_epochs 1 --save_strategy no --resume_from_checkpoint {out}/checkpoint-3"
    planned_run(corpus, out, f"{more} --gradient_accumulation_steps 3 --allow_changed", rule="budget")
    assert sorted(trained_cells[96:]) == left


def test_a_run_is_not_resumed_with_another_budget(corpus: Path, tmp_path: Path) -> None:
    out = planned_run(corpus, tmp_path / "run", "--num_train_epochs 2 --save_steps 2", rule="budget")
    more = f"--num_train_epochs 2 --tokens_per_batch 70 --resume_from_checkpoint {out}/checkpoint-2"
    with pytest.raises(InputError, match="tokens_per_batch was 130, is 70"):
        planned_run(corpus, out, more, rule="budget")
    with pytest.raises(InputError, match="--tokens_per_batch as before, or start a new run from its weights"):
        planned_run(corpus, out, f"{more} --allow_changed", rule="budget")


def test_resuming_on_other_cells_is_refused(corpus: Path, stopped: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    shutil.copy(Corpus.open(other).paths("eval")[0], Corpus.open(other).paths("train")[0])
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"]["train"][0]["cells"] = manifest["shards"]["eval"][0]["cells"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"another corpus \(96 cells.*Give the same files"):
        long_run(other, stopped, f"--max_steps 20 --allow_changed --resume_from_checkpoint {stopped}/checkpoint-8")


def test_resuming_with_another_seed_is_refused(corpus: Path, stopped: Path) -> None:
    more = f"--max_steps 20 --resume_from_checkpoint {stopped}/checkpoint-8 --seed 7 --allow_changed"
    with pytest.raises(InputError, match=r"Give --seed \d+"):
        long_run(corpus, stopped, more)


# -- early stopping ------------------------------------------------------------------------------------------------

# Weights that do not move do not improve: the first evaluation is the best, and the third one without a gain ends it.
STALLED = (
    "--learning_rate 1e-12 --max_steps 12 --early_stopping_patience 3 --early_stopping_threshold 0.01 --eval_steps 2 "
    "--eval_strategy steps --save_strategy steps --save_steps 2"
)


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def stalled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_run(corpus, tmp_path_factory.mktemp("stalled") / "run", STALLED)


def test_training_ends_when_evaluations_no_longer_improve(stalled: Path) -> None:
    assert state_of(stalled)["global_step"] == 8
    assert {"alone", "given_others"} <= json.loads((stalled / "metrics.json").read_text())["phase"].keys()


def test_a_run_that_stopped_early_is_finished(corpus: Path, stalled: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (stalled / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        long_run(corpus, stalled, f"{STALLED} --resume_from_checkpoint")
    assert "is finished: nothing to resume" in caplog.text
    assert (stalled / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [4, 8], ids=["one evaluation without a gain", "stopped but not delivered"])
def test_a_resumed_run_stops_where_the_whole_one_did(corpus: Path, stalled: Path, tmp_path: Path, step: int) -> None:
    resumed = Path(shutil.copytree(stalled, tmp_path / "run"))
    (resumed / "trainer_state.json").unlink()
    for checkpoint in resumed.glob("checkpoint-*"):
        if int(checkpoint.name[11:]) > step:
            shutil.rmtree(checkpoint)
    long_run(corpus, resumed, f"{STALLED} --resume_from_checkpoint")
    assert state_of(resumed)["global_step"] == 8
    assert (resumed / "model.safetensors").read_bytes() == (stalled / "model.safetensors").read_bytes()
    assert (resumed / "metrics.json").read_text() == (stalled / "metrics.json").read_text()


def test_more_patience_continues_a_run_that_stopped_early(corpus: Path, stalled: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(stalled, tmp_path / "run"))
    long_run(corpus, resumed, f"{STALLED.replace('patience 3', 'patience 4')} --resume_from_checkpoint")
    assert state_of(resumed)["global_step"] == 10


@pytest.mark.parametrize(("metric", "hint"), [("eval_accuracy", "gene_accuracy"), ("f1", "Known: 'eval_loss")])
def test_a_metric_that_the_run_has_not_is_refused(corpus: Path, tmp_path: Path, metric: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"metric_for_best_model is '{metric}', which is no score .*{hint}"):
        flags = f"--max_steps 1 --eval_strategy steps --eval_steps 1 --metric_for_best_model {metric}"
        long_run(corpus, tmp_path / "r", flags)
