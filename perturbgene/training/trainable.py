"""Which weights learn: `--train_only`.

Owns freezing, the low-rank updates of LoRA (Hu et al. 2021, arXiv:2106.09685) and how they are saved; `peft` computes
them. Leaves votes and shares to `votes`. Letters: v input ids, t token types.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

#: Rank of the updates, their scale (alpha / rank multiplies them), and the layers of the encoder that get one: all of
#: its matrices.
RANK, ALPHA = 8, 16
ADAPTED = ("qkv", "attention_out", "ffn_in", "ffn_out")
#: File of a checkpoint with what its weights, in which updates are merged, no longer show.
ADAPTER_FILE = "lora.safetensors"
_ADAPTER = "default"  # peft's own name for the only one


class LowRank:
    """LoRA on the encoder of a model; the weights of all other verbs have the updates merged into them.

    Args:
        model: A masked model or a classifier; its encoder is frozen and gets the updates.
    """

    def __init__(self, model: Any) -> None:
        from peft import LoraConfig, LoraModel
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(ADAPTED))
        self.model, self._encoder = model, LoraModel(model.genebert, config, _ADAPTER)
        self._layers: dict[str, Any] = {n: part for n, part in model.named_modules() if isinstance(part, LoraLayer)}

    def _own_state(self) -> dict[str, Tensor]:
        """Return the original weights of the adapted layers and their updates."""
        return {
            f"{name}.{key}": tensor
            for name, layer in self._layers.items()
            for key, tensor in layer.state_dict().items()
        }

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Return the weights of the plain model that gives the same answers."""
        own = self._own_state()
        state = {key: tensor for key, tensor in self.model.state_dict().items() if key not in own}
        for name, layer in self._layers.items():
            state[f"{name}.weight"] = own[f"{name}.base_layer.weight"] + layer.get_delta_weight(_ADAPTER)
            state[f"{name}.bias"] = own[f"{name}.base_layer.bias"]
        return state

    def save(self, folder: Path) -> None:
        """Write what a run needs to continue, in addition to the merged weights."""
        save_file({key: tensor.contiguous() for key, tensor in self._own_state().items()}, folder / ADAPTER_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        state = load_file(folder / ADAPTER_FILE)
        for key, tensor in self._own_state().items():  # they share memory with the weights
            tensor.copy_(state[key])

    def merge(self) -> None:
        """Turn the model into the plain one, in place."""
        self._encoder.merge_and_unload()


def choose_weights(model: Any, train_only: str, *, is_new: Mapping[str, Tensor]) -> LowRank | None:
    """Let only some weights of a model learn.

    Args:
        model: A masked model or a classifier.
        train_only: "all"; "head", which freezes embeddings and encoder; or "lora", which freezes them except for
            low-rank updates and the embeddings of what is new.
        is_new: Name of an embedding -> True for the rows that did not come from the run that training starts from,
            (v,) and (t,).

    Returns:
        The updates of "lora".
    """
    if train_only == "all":
        return None
    model.genebert.requires_grad_(False)
    adapters, num_new = LowRank(model) if train_only == "lora" else None, 0
    parameters = dict(model.named_parameters())
    for name, is_new_n in is_new.items():
        num_new += int(is_new_n.sum())
        if adapters is not None and is_new_n.any():
            _learn_rows(parameters[name], is_new_n)
    if num_new and adapters is None:
        logger.warning(
            "--train_only head: %s new genes, labels and bins keep the embeddings that they start with. To let them "
            "learn too, give --train_only lora.", f"{num_new:,}",
        )  # fmt: skip
    learning = sum(weight.numel() for weight in parameters.values() if weight.requires_grad)
    every = sum(weight.numel() for weight in parameters.values())
    logger.info("--train_only %s: %s of %s weights learn", train_only, f"{learning:,}", f"{every:,}")
    return adapters


def _learn_rows(weight: Tensor, is_new_n: Tensor) -> None:
    """Let only some rows of an embedding learn. AdamW does not move weights whose gradient and decay are 0."""
    weight.requires_grad_(True)
    weight.register_hook(lambda grad: grad * is_new_n.to(grad.device)[:, None])
