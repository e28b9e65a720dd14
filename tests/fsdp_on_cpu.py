"""Weights spread over processes without a GPU, for what starts with ACCELERATE_USE_FSDP=true in its environment.

accelerate drops FSDP without a word where processes have no accelerator, though `fully_shard` of torch works on the CPU
with gloo: `AcceleratorState` looks for it under MULTI_GPU and its like only. This gives it there what it has on GPUs.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GeneBertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip

_as_it_comes = AcceleratorState.__init__


def _with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
    _as_it_comes(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = self.distributed_type


def allow_fsdp() -> None:
    """Let accelerate use FSDP2 in this process, with what `accelerate launch --use_fsdp --fsdp_version 2` sets."""
    os.environ.update(FSDP)
    AcceleratorState.__init__ = _with_fsdp
