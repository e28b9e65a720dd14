"""Small random models and batches for the tests of `perturbgene.model`, padded and packed."""

from typing import Any

import torch
from torch import Tensor, nn

from perturbgene.model.config import GeneBertConfig

torch.set_num_threads(1)

PAD, FIRST_BIN, NUM_IDS, NUM_TYPES = 3, 9, 14, 20
LENGTHS = [7, 4, 9, 4, 5, 12, 3, 6]
PHENOTYPE_RANGES = [[4, 6], [6, 9]]  # two categories: ids 4..5 and 6..8; bins are 9..13


def tiny_config(**settings: Any) -> GeneBertConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "dropout": 0.0,
    }
    ids = {"vocab_size": NUM_IDS, "type_vocab_size": NUM_TYPES, "first_bin_id": FIRST_BIN}
    defaults = {
        "phenotype_id_ranges": PHENOTYPE_RANGES,
        "classifier_dropout": 0.0,
        "initializer_range": 0.3,
        "num_labels": 3,
        "bin_gain_range": 0,
        "direct_path": True,
    }
    return GeneBertConfig(**{**sizes, **ids, **defaults, **settings})


def build(model_class: type, **settings: Any) -> Any:
    """Make a model whose every weight, LayerNorms and biases included, is random and the same each time."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**settings))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, mean=1.0 if "norm.weight" in name else 0.0, std=0.2)
    for name, votes_tk in model.named_buffers():
        if name.endswith("votes_tk"):
            nn.init.normal_(votes_tk, std=0.2)
    return model.eval()


def make_cells(lengths: list[int] = LENGTHS) -> list[dict[str, Tensor]]:
    """Cells of [CLS], one slot of each category, and genes; the slots and every second gene are masked and labelled."""
    draw = torch.Generator().manual_seed(1)
    cells = []
    for length in lengths:
        genes = 3 + torch.randperm(NUM_TYPES - 3, generator=draw)[: length - 3].sort().values
        bins = torch.randint(FIRST_BIN, NUM_IDS, (length - 3,), generator=draw)
        types = torch.cat([torch.tensor([0, 1, 2]), genes])
        truth = torch.cat([torch.tensor([0, 4 + length % 2, 6 + length % 3]), bins])
        is_labelled = (torch.arange(length) > 0) & ((torch.arange(length) < 3) | (torch.arange(length) % 2 == 0))
        cells.append(
            {
                "input_ids": torch.where(is_labelled, 2, truth),
                "token_type_ids": types,
                "labels": torch.where(is_labelled, truth, -100),
            }
        )
    return cells


def padded(cells: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"input_ids": PAD, "token_type_ids": 0, "labels": -100}
    batch = {
        name: nn.utils.rnn.pad_sequence([cell[name] for cell in cells], batch_first=True, padding_value=fill[name])
        for name in fill
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}


def packed(cells: list[dict[str, Tensor]]) -> dict[str, Any]:
    lengths = [len(cell["input_ids"]) for cell in cells]
    labels = torch.cat([cell["labels"] for cell in cells])
    positions = (labels != -100).nonzero().squeeze(1)
    return {
        "input_ids": torch.cat([cell["input_ids"] for cell in cells]),
        "token_type_ids": torch.cat([cell["token_type_ids"] for cell in cells]),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "lengths": lengths,
        "label_positions": positions,
        "labels": labels[positions],
    }


def encoder_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("labels", "label_positions")}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], *, atol: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
