"""`perturbgene` with its weights spread over processes without a GPU: run under torchrun with ACCELERATE_USE_FSDP=true.

accelerate drops FSDP without a word where processes have no accelerator, though `fully_shard` of torch works on the CPU
with gloo: `AcceleratorState` looks for it under MULTI_GPU and its like only. This gives it there what it has on GPUs.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from perturbgene.main import cli

_as_it_comes = AcceleratorState.__init__


def _with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
    _as_it_comes(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    cli()
