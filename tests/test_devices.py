"""bfloat16 is used where the device has it, and refused with a reason elsewhere, as on a CPU with AVX2 only."""

import pytest
import torch

from perturbgene import devices
from perturbgene.configs import parse_args
from perturbgene.devices import check_bfloat16, has_bfloat16, has_fast_bfloat16
from perturbgene.errors import InputError

MLM = ["mlm", "--corpus", "corpus", "--output_dir", "run", "--use_cpu"]


@pytest.fixture(params=["this machine", "avx2"])
def has_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has bfloat16: what it says of itself, and False."""
    if request.param == "avx2":
        monkeypatch.setattr(devices, "has_bfloat16", lambda device_type: False)
    return devices.has_bfloat16("cpu")


@pytest.mark.bf16
def test_the_answer_is_onednns_own() -> None:
    x, bias = torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    if has_bfloat16("cpu"):
        assert torch.ops.mkldnn._linear_pointwise(x, x, bias, "none", [], "").tolist() == [[4, 4], [4, 4]]
    else:
        assert not has_fast_bfloat16("cpu")
        with pytest.raises(RuntimeError, match="could not create a primitive descriptor"):
            torch.ops.mkldnn._linear_pointwise(x, x, bias, "none", [], "")


@pytest.mark.bf16
def test_training_in_bfloat16_is_refused_where_the_cpu_has_none(has_it: bool) -> None:
    config = parse_args([*MLM, "--bf16"])
    if has_it:
        assert config.training_arguments().bf16
    else:
        with pytest.raises(InputError, match="--bf16 needs bfloat16, but this cpu has none .it has no AVX-512"):
            config.training_arguments()


@pytest.mark.parametrize(
    ("gain", "hidden_size", "is_fast"), [(2.1, 256, True), (2.1, None, True), (2.1, 64, False), (0.6, 256, False)]
)
def test_bfloat16_is_fast_where_products_are_and_the_model_is_wide(
    monkeypatch: pytest.MonkeyPatch, gain: float, hidden_size: int | None, is_fast: bool
) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device_type: True)
    monkeypatch.setattr(devices, "_gain_of_bfloat16", lambda: gain)
    assert has_fast_bfloat16("cpu", hidden_size=hidden_size) is is_fast
    assert has_fast_bfloat16("cuda", hidden_size=64)


@pytest.mark.bf16
def test_products_are_timed_in_both_precisions() -> None:
    if has_bfloat16("cpu"):
        assert 0.01 < devices._gain_of_bfloat16() < 100


@pytest.mark.bf16
def test_left_to_itself_training_takes_bfloat16_only_where_it_is_fast(has_it: bool) -> None:
    assert parse_args(MLM).training_arguments().bf16 == devices.has_fast_bfloat16("cpu")
    assert has_it or not devices.has_fast_bfloat16("cpu")


def test_a_device_without_bfloat16_is_named_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device_type: False)
    with pytest.raises(InputError, match="--bf16 needs bfloat16, but this cuda has none .too old.. Leave out --bf16"):
        check_bfloat16("cuda", flag="--bf16")
