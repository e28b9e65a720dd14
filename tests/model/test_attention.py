"""Attention: every kernel gives the same numbers and gradients, within each cell only."""

import pytest
import torch
from torch import Tensor

from perturbgene.errors import InputError
from perturbgene.model.attention import attention
from perturbgene.model.heads import (
    GeneBertForPhenotypicMLM,
)
from perturbgene.model.layers import GeneBertModel
from perturbgene.model.packing import Packing
from tests.random_models import LENGTHS, build, encoder_inputs, make_cells, packed, tiny_config


def random_qkv(lengths: list[int], *, heads: int = 2, head_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, sum(lengths), heads, head_size).unbind(0)
    return q, k, v


def packing_of(lengths: list[int]) -> Packing:
    return Packing.of(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), lengths=lengths)


def test_explicit_matmuls_equal_sdpa() -> None:
    (q, k, v), where = random_qkv(LENGTHS), packing_of(LENGTHS)
    gate = torch.randn(sum(LENGTHS))
    for gate_l in (None, gate):
        outs = [
            attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate_l)
            for kernel in ("matmul", "sdpa")
        ]
        torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[32, 64], [31, 33], [1, 65]], ids=["blocks", "around blocks", "one token"])
def test_rounding_cells_up_to_blocks_changes_no_result(lengths: list[int]) -> None:
    parts, where = [part.requires_grad_() for part in random_qkv(lengths)], packing_of(lengths)
    outs = [attention(*parts, queries=where, keys=where, kernel=kernel) for kernel in ("matmul", "sdpa")]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)
    by_kernel = [torch.autograd.grad(out.square().sum(), parts) for out in outs]
    torch.testing.assert_close(by_kernel[0], by_kernel[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_rows_of_no_cell_get_no_output_and_no_gradient(kernel: str) -> None:
    q, k, v = (part.requires_grad_() for part in random_qkv([5, 3, 4]))
    where = packing_of([5, 3])
    out = attention(q, k, v, queries=where, keys=where, kernel=kernel)
    assert (out[8:] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert (gradient[8:] == 0).all()
        assert (gradient[:8] != 0).all()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, queries: list[int], keys: list[int]) -> Tensor:
    """Attention of each cell by its formula, left to autograd."""
    outs = []
    for q_chd, k_chd, v_chd in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        logits = torch.einsum("qhd,khd->hqk", q_chd, k_chd) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v_chd))
    return torch.cat(outs)


@pytest.mark.parametrize("queries", [[3, 1, 5], [1, 0, 2]], ids=["every token asks", "some tokens ask, one cell none"])
def test_the_backward_pass_of_explicit_matmuls_is_that_of_the_formula(queries: list[int]) -> None:
    keys = [3, 1, 5]
    _, k, v = (part.double().requires_grad_() for part in random_qkv(keys, head_size=4))
    q = torch.randn(sum(queries), 2, 4, dtype=torch.double, requires_grad=True)
    gate = torch.randn(sum(keys), dtype=torch.double, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        asks, knows = packing_of(queries), packing_of(keys)
        return attention(q, k, v, queries=asks, keys=knows, kernel="matmul", key_log_gate_l=gate)

    assert torch.autograd.gradcheck(attend, (q, k, v, gate))
    ours = torch.autograd.grad(attend(q, k, v, torch.zeros_like(gate)).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(plain_attention(q, k, v, queries=queries, keys=keys).square().sum(), (q, k, v))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-10)


@pytest.mark.bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_explicit_matmuls_equal_those_of_sdpa(dtype: torch.dtype) -> None:
    parts, where = [part.to(dtype).requires_grad_() for part in random_qkv(LENGTHS)], packing_of(LENGTHS)
    by_kernel = []
    for kernel in ("matmul", "sdpa"):
        out = attention(*parts, queries=where, keys=where, kernel=kernel)
        by_kernel.append(torch.autograd.grad(out.square().sum(), parts))
    for ours, theirs in zip(*by_kernel, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


def test_a_gate_alone_gets_its_gradient_from_explicit_matmuls() -> None:
    (q, k, v), where = random_qkv(LENGTHS), packing_of(LENGTHS)
    gate = torch.zeros(sum(LENGTHS), requires_grad=True)
    out = attention(q, k, v, queries=where, keys=where, kernel="matmul", key_log_gate_l=gate)
    (screen,) = torch.autograd.grad(out.square().sum(), gate)
    assert screen.shape == gate.shape and screen.abs().sum() > 0


def test_attention_of_one_cell_by_hand() -> None:
    q = torch.tensor([[[1.0]]])
    k = torch.tensor([[[0.0]], [[2.0]]]).log1p()  # logits log(1) and log(3)
    v = torch.tensor([[[4.0]], [[8.0]]])
    one, two = packing_of([1]), packing_of([2])
    assert attention(q, k, v, queries=one, keys=two).item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    gate = torch.tensor([3.0, 1.0]).log()  # equal odds
    assert attention(q, k, v, queries=one, keys=two, key_log_gate_l=gate).item() == pytest.approx(6.0)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_the_gate_is_differentiable_and_zero_has_no_effect(kernel: str) -> None:
    (q, k, v), where = random_qkv([3, 5]), packing_of([3, 5])
    gate = torch.zeros(8, requires_grad=True)
    gated = attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate)
    torch.testing.assert_close(gated, attention(q, k, v, queries=where, keys=where, kernel=kernel), atol=1e-6, rtol=0)
    gated.square().sum().backward()
    assert gate.grad is not None and (gate.grad != 0).all()
    step = torch.zeros(8)
    step[4] = 1e-2
    sums = [
        attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=sign * step).square().sum()
        for sign in (1, -1)
    ]
    assert gate.grad[4].item() == pytest.approx(((sums[0] - sums[1]) / 2e-2).item(), rel=1e-2)


@pytest.mark.bf16
def test_bf16_autocast_stays_close_to_float32_and_takes_explicit_matmuls() -> None:
    model, batch = build(GeneBertForPhenotypicMLM, initializer_range=0.05), packed(make_cells())
    with torch.no_grad():
        exact = model(**batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**batch)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, atol=0.02, rtol=0)


def test_a_gpu_kernel_on_cpu_says_what_to_use_instead() -> None:
    model = build(GeneBertModel, attention_kernel="varlen")
    with pytest.raises(InputError, match="Use 'auto'"):
        model(**encoder_inputs(packed(make_cells())))


def test_flash_without_flash_attn_is_refused_when_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="flash_attn, which is not installed"):
        GeneBertModel(tiny_config(attention_kernel="flash"))
    with pytest.raises(InputError, match="flash_attn, which is not installed"):
        GeneBertModel(tiny_config(attn_implementation="flash_attention_2"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_varlen_on_a_gpu_equals_sdpa(gated: bool) -> None:
    q, k, v = (part.cuda().bfloat16() for part in random_qkv(LENGTHS))
    where = Packing.of(packing_of(LENGTHS).cu_seqlens.cuda(), lengths=LENGTHS)
    gate = torch.randn(sum(LENGTHS), device="cuda") if gated else None
    outs = [
        attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate)
        for kernel in ("varlen", "sdpa")
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=2e-2, rtol=2e-2)
