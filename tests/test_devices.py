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


@pytest.mark.bf16
def test_left_to_itself_training_takes_bfloat16_only_where_it_is_fast(has_it: bool) -> None:
    assert parse_args(MLM).training_arguments().bf16 == devices.has_fast_bfloat16("cpu")
    assert has_it or not devices.has_fast_bfloat16("cpu")


def test_a_device_without_bfloat16_is_named_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device_type: False)
    with pytest.raises(InputError, match="--bf16 needs bfloat16, but this cuda has none .too old.. Leave out --bf16"):
        check_bfloat16("cuda", flag="--bf16")
