"""Operations are counted as by hand, and a peak is a speed that the machine was seen to reach."""

import pytest
import torch

from benchmarks.flops import PEAK_SIDES, flops_of_batch, forward_flops, measured_peak
from perturbgene.model import GeneBertConfig

torch.set_num_threads(1)


def sizes(*, layers: int) -> GeneBertConfig:
    return GeneBertConfig(
        hidden_size=2, num_attention_heads=1, intermediate_size=3, num_hidden_layers=layers, vocab_size=5
    )


def test_one_layer_of_one_cell_by_hand() -> None:
    keys_values = 4 * 2 * (2 * 4)  # 4 tokens, 2 -> 4
    query_out = 1 * 2 * (2 * 2 + 2 * 2)  # one read: 2 -> 2 twice
    feed_forward = 1 * 2 * (2 * 3 + 3 * 2)
    attention = 1 * 2 * (2 * 4 + 4 * 2)  # one query of size 2 against 4 keys, then 4 weights on values of size 2
    head = 1 * 2 * (2 * 2 + 2 * 5)
    expected = keys_values + query_out + feed_forward + attention + head
    assert forward_flops(sizes(layers=1), [4], num_reads=1) == expected == 164


def test_a_layer_below_the_last_works_on_every_token() -> None:
    more = [forward_flops(sizes(layers=layers), [4, 3], num_reads=1) for layers in (1, 2)]
    projections = 7 * 2 * (2 * 6 + 2 * 2 + 2 * 3 + 3 * 2)
    attention = 2 * 2 * (4 * 4 + 3 * 3) * 2
    assert more[1] - more[0] == projections + attention == 592


def test_reading_every_token_makes_the_last_layer_a_full_one() -> None:
    head = 7 * 2 * (2 * 2 + 2 * 5)
    one, two = (forward_flops(sizes(layers=layers), [4, 3], num_reads=7) - head for layers in (1, 2))
    assert two == 2 * one


def test_a_training_step_is_three_forward_passes_and_an_empty_batch_none() -> None:
    assert flops_of_batch(sizes(layers=1), [4], num_reads=1) == 3 * 164
    assert flops_of_batch(sizes(layers=1), [], num_reads=0) == 0


@pytest.mark.bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_peak_lies_within_what_a_core_can_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEAK_SIDES, "cpu", 128)
    assert 1e7 < measured_peak("cpu", dtype, seconds=0.01) < 1e14
