"""`--train_only`: what is frozen keeps its bits, and updates of LoRA end up in plain weights that every verb reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perturbgene.configs import parse_args
from perturbgene.data_utils.data_collators import ask
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.errors import InputError
from perturbgene.inference.run import load_run
from perturbgene.training.train import run_cls, run_mlm
from perturbgene.training.trainable import LowRank, choose_weights
from perturbgene.training.transfer import weights_folder
from tests.faults import Killed, plant
from tests.untrained import a_run, some_cells

WORDS, TYPES = (f"genebert.embeddings.{name}_embeddings.weight" for name in ("word", "token_type"))
COMMON = (
    "--no_bf16 --report_to none --max_length 80 --per_device_train_batch_size 16 --gradient_accumulation_steps 2 "
    "--learning_rate 3e-3 --max_steps 6 --save_steps 3 --eval_steps 3 --num_train_epochs 9"
)


def train(verb: str, folder: Path, out: Path, more: str) -> Path:
    """Train from the small run on its corpus."""
    run = {"mlm": run_mlm, "cls": run_cls}[verb]
    paths = f"--corpus {folder}/corpus --pretrained_model_path {folder}/runs/mlm --output_dir {out}"
    config: Any = parse_args([verb, *f"{paths} {COMMON} {more}".split()])
    return run(config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def lora_run(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the masked model that LoRA has trained for six steps."""
    return train("mlm", small_folder, tmp_path_factory.mktemp("lora") / "run", "--train_only lora")


def logits(model: Any, run: Any) -> torch.Tensor:
    """Ask for both phenotypes, which computes queries at their slots only."""
    block = next(IterableAnnDataset(some_cells(), run.tokenizer, batch_size=12).blocks())
    with torch.no_grad():
        return model(**ask(block, run.tokenizer, asked=["cell_type", "tissue"])).logits


@pytest.mark.parametrize("verb", ["mlm", "cls"])
def test_only_the_head_learns(verb: str, small_folder: Path, tmp_path: Path) -> None:
    more = "--train_only head" + (" --phenotype_category cell_type" if verb == "cls" else "")
    before, after = weights(small_folder / "runs/mlm"), weights(train(verb, small_folder, tmp_path / "run", more))
    encoder = [name for name in before if name.startswith("genebert.")]
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    if verb == "mlm":
        assert not torch.equal(before["mlm_dense.weight"], after["mlm_dense.weight"])


def test_a_frozen_encoder_is_not_backpropagated() -> None:
    run = a_run()
    choose_weights(run.model.train(), "head", is_new={})
    block = next(IterableAnnDataset(some_cells(), run.tokenizer, batch_size=12).blocks())
    hidden = run.model.genebert(**ask(block, run.tokenizer, asked=["cell_type"])).last_hidden_state
    assert hidden.grad_fn is None


def test_updates_reach_every_answer_and_merge_into_plain_weights() -> None:
    run = a_run()
    plain = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    before, adapters = logits(run.model, run), LowRank(run.model)
    last = run.model.genebert.layers[-1].qkv
    torch.nn.init.normal_(last.lora_B["default"].weight)  # of the projection that is sliced for the asked slots
    updated, merged = logits(run.model, run), adapters.merged_state()
    assert (updated - before).abs().max() > 0.01
    adapters.merge()
    torch.testing.assert_close(logits(run.model, run), updated, atol=1e-5, rtol=1e-5)
    assert merged.keys() == plain.keys() == run.model.state_dict().keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in run.model.state_dict().items())
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, plain[name])}
    assert changed == {"genebert.layers.1.qkv.weight"}


def test_lora_changes_matrices_and_heads_and_leaves_what_is_known_as_it_was(small_folder: Path, lora_run: Path) -> None:
    before, after = weights(small_folder / "runs/mlm"), weights(lora_run)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if ".layers." in name and name.endswith("weight") and "norm" not in name}
    assert {name for name in changed if name.startswith("genebert.")} == matrices
    assert any(name.startswith("mlm_") for name in changed)


def test_what_is_new_learns_under_lora_and_nothing_else_of_its_embedding() -> None:
    run = a_run()
    words = run.model.state_dict()[WORDS]
    is_new = {WORDS: torch.arange(len(words)) == 5, TYPES: torch.zeros(12, dtype=torch.bool)}
    choose_weights(run.model.train(), "lora", is_new=is_new)
    before = {name: run.model.state_dict()[name].clone() for name in (WORDS, TYPES)}
    learning = [weight for weight in run.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1, weight_decay=0)
    block = next(IterableAnnDataset(some_cells(), run.tokenizer, batch_size=12).blocks())
    for _ in range(3):
        optimizer.zero_grad()
        run.model(**ask(block, run.tokenizer, asked=["tissue"], given=["cell_type"])).logits[:, 7:9].sum().backward()
        optimizer.step()
    after = run.model.state_dict()
    assert (before[WORDS] != after[WORDS]).any(dim=1).nonzero().flatten().tolist() == [5]
    assert torch.equal(before[TYPES], after[TYPES])


def test_a_killed_lora_run_ends_with_the_weights_of_an_undisturbed_one(
    small_folder: Path, lora_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed), plant("step", 4, raise_killed):
        train("mlm", small_folder, tmp_path / "run", "--train_only lora")
    halfway = load_run(tmp_path / "run")  # the checkpoint reads as any run
    assert halfway.path.endswith("checkpoint-3")
    assert weights_folder(str(tmp_path / "run")) == Path(halfway.path)  # and others may start from it
    train("mlm", small_folder, tmp_path / "run", "--train_only lora --resume_from_checkpoint")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (lora_run / "model.safetensors").read_bytes()
    assert not (tmp_path / "run/lora.safetensors").exists()


def raise_killed() -> None:
    raise Killed


def vote(folder: Path, out: Path, more: str = "") -> Path:
    text = f"--corpus {folder}/corpus --output_dir {out} --report_to none --train_only votes {more}"
    config: Any = parse_args(["mlm", *text.split()])
    return run_mlm(config)


def test_votes_take_no_steps_and_leave_the_transformer_as_it_was(
    small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At first the transformer is untrained and adds nothing; then it starts from that run."""
    first = vote(small_folder, tmp_path / "first", "--model_arch tiny")
    assert load_run(first).model.direct_labels.share_p2.abs().sum() == 0
    assert json.loads((first / "metrics.json").read_text())["cell_type"]["alone"]["accuracy"] > 0.9
    second = vote(small_folder, tmp_path / "second", f"--pretrained_model_path {first}")
    before, after = weights(first), weights(second)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("direct_"))
    assert not list(second.glob("checkpoint-*"))
    with caplog.at_level("INFO", logger="perturbgene"):
        vote(small_folder, tmp_path / "second", f"--pretrained_model_path {first} --resume_from_checkpoint")
    assert "is finished: nothing to resume" in caplog.text


def test_a_run_without_votes_is_refused(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no genes' votes"):
        train("mlm", small_folder, tmp_path / "run", "--train_only votes")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_only head", "without a pretrained model it is random.*--pretrained_model_path"),
        ("--train_only lora", "without a pretrained model it is random.*--pretrained_model_path"),
        ("--train_only votes --direct_path never", "nothing would learn"),
        ("--train_only votes --early_stopping_patience 2", "nothing to stop"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: str, message: str, small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse_args(["mlm", *f"--corpus {small_folder}/corpus --output_dir {tmp_path}/run {flags}".split()])


def test_lora_without_peft_says_what_to_install(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perturbgene.cli.training.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install peft"):
        train("mlm", small_folder, tmp_path / "run", "--train_only lora")
