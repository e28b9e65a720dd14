"""The first layer's attention of cells without some of their tokens, made from that of the whole cells.

Owns the exact downdate of attention and putting it in the first layer's place; leaves what is removed, and all further
layers, to `readouts`. Without keys J, a query whose weights over the keys are p and whose output is o = sum_j p_j v_j
has the output (o - sum_J p_j v_j) / (1 - sum_J p_j): for a cell of l tokens that is l times as cheap as attention anew,
and equal but for rounding. Deeper layers see other inputs in every copy and have no such short cut. Letters: l tokens,
j removed tokens, h hidden size, d size of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.eval_utils import inference_mode, model_device

#: From so many copies of a cell on, attending once in the whole cell is worth while.
LEAST_COPIES = 4
#: With less attention left than this on other tokens, rounding tells: attention is then made anew.
LEAST_REST = 0.05
#: Attention weights that are held at once.
MOST_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass(frozen=True)
class _Cell:
    """What the first layer of a whole cell compared and gave, in float32, heads first.

    Args:
        q_hld: Queries, scaled, shape (heads, l, d).
        k_hld: Keys.
        v_hld: Values.
        out_hld: Attention's output.
        log_sum_hl: Logarithm of each softmax's denominator, shape (heads, l).
    """

    q_hld: Tensor
    k_hld: Tensor
    v_hld: Tensor
    out_hld: Tensor
    log_sum_hl: Tensor

    def without(self, removed_j: Tensor, kept_l: Tensor) -> Tensor | None:
        """Return the output at the kept tokens when some are gone, (l, h); None where little attention is left."""
        logit_hlj = self.q_hld @ self.k_hld[:, removed_j].transpose(1, 2)
        weight_hlj = (logit_hlj - self.log_sum_hl[..., None]).exp_()[:, kept_l]
        rest_hl1 = 1 - weight_hlj.sum(dim=2, keepdim=True)
        if rest_hl1.amin() < LEAST_REST:
            return None
        out_hld = (self.out_hld[:, kept_l] - weight_hlj @ self.v_hld[:, removed_j]) / rest_hl1
        return out_hld.transpose(0, 1).flatten(1)  # (heads, l, d) -> (l, h)


class FirstLayer:
    """The first layer of cells of which several copies run, each without some tokens.

    Args:
        model: Whose layer.
        block: The whole cells.
    """

    def __init__(self, model: torch.nn.Module, block: TokenBlock) -> None:
        self.base, self.block = cast(Any, model).genebert, block
        self.cells: dict[int, _Cell] = {}

    @contextmanager
    def without(self, cell_m: np.ndarray, removed_m: Sequence[np.ndarray]) -> Iterator[None]:
        """Let the model's first layer attend by downdate while it runs these copies, packed in this order.

        Args:
            cell_m: Row of the block of each copy, shape (m,).
            removed_m: Places of the tokens that each copy lacks, within its cell.
        """
        with inference_mode(self.base):
            out_lh = self._outputs(cell_m, removed_m)
        if out_lh is None:
            yield
            return
        layer = self.base.layers[0]
        layer.attend = partial(_attend, layer, out_lh)
        try:
            yield
        finally:
            del layer.attend

    def _outputs(self, cell_m: np.ndarray, removed_m: Sequence[np.ndarray]) -> Tensor | None:
        self.cells = {cell: known for cell, known in self.cells.items() if cell in cell_m}
        parts = []
        for cell, removed in zip(cell_m.tolist(), removed_m, strict=True):
            if cell not in self.cells:
                self.cells[cell] = self._attended(cell)
            kept = np.delete(np.arange(self.cells[cell].k_hld.shape[1]), removed)
            removed_j, kept_l = (torch.from_numpy(at).to(model_device(self.base)) for at in (removed, kept))
            out_lh = self.cells[cell].without(removed_j, kept_l)
            if out_lh is None:
                return None
            parts.append(out_lh)
        return torch.cat(parts)

    def _attended(self, cell: int) -> _Cell:
        layer, device = self.base.layers[0], model_device(self.base)
        ids_l, types_l = (torch.from_numpy(np.asarray(values)).to(device) for values in self.block.cell(cell))
        hidden_lh = self.base.embeddings(ids_l, types_l)
        x_lh = layer.attention_norm(hidden_lh) if layer.norm_position == "pre" else hidden_lh
        q_hld, k_hld, v_hld = (x.float().transpose(0, 1).contiguous() for x in layer.queries_keys_values(x_lh, None))
        q_hld *= q_hld.shape[-1] ** -0.5
        heads, length, _ = q_hld.shape
        at_once = max(1, MOST_WEIGHTS["cpu" if device.type == "cpu" else "cuda"] // (heads * length))
        out_hld, log_sum_hl = torch.empty_like(v_hld), q_hld.new_empty(heads, length)
        for start in range(0, length, at_once):
            some = slice(start, start + at_once)
            logit_hal = torch.bmm(q_hld[:, some], k_hld.transpose(1, 2))
            log_sum_hl[:, some] = logit_hal.logsumexp(dim=2)
            out_hld[:, some] = torch.bmm(logit_hal.sub_(log_sum_hl[:, some, None]).exp_(), v_hld)
        return _Cell(q_hld, k_hld, v_hld, out_hld, log_sum_hl)


def _attend(
    layer: Any, out_lh: Tensor, x_lh: Tensor, packing: object, reads_m: Tensor | None, gate_l: Tensor | None
) -> Tensor:
    """Stand in for `GeneBertLayer.attend`."""
    assert gate_l is None and len(x_lh) >= len(out_lh)
    out_lh = F.pad(out_lh, (0, 0, 0, len(x_lh) - len(out_lh)))  # rows by which the model rounds batches up
    out = out_lh if reads_m is None else out_lh.index_select(0, reads_m)
    return cast(Tensor, layer.attention_out(out.to(x_lh.dtype)))
