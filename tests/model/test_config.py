"""Configuration and presets: what is refused, what survives saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from perturbgene.configs import MlmConfig
from perturbgene.errors import InputError
from perturbgene.model.config import GeneBertConfig, load_preset
from perturbgene.model.heads import (
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
)
from perturbgene.model.layers import GeneBertModel
from tests.random_models import (
    build,
    encoder_inputs,
    make_cells,
    padded,
    tiny_config,
)


@pytest.mark.parametrize(
    ("kernel", "message"), [("xyz", "Known: 'auto'"), ("varlem", "Did you mean 'varlen'")], ids=["unknown", "typo"]
)
def test_an_unknown_attention_kernel_is_refused(kernel: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(attention_kernel=kernel)


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (GeneBertModel, AutoModel),
        (GeneBertForPhenotypicMLM, AutoModelForMaskedLM),
        (GeneBertForClassification, AutoModelForSequenceClassification),
    ],
)
@pytest.mark.parametrize("norm_position", ["post", "branch"])
def test_a_loaded_model_equals_the_saved_one(
    model_class: type, auto_class: Any, norm_position: str, tmp_path: Path
) -> None:
    saved = build(model_class, norm_position=norm_position)
    saved.save_pretrained(tmp_path)
    batch = encoder_inputs(padded(make_cells()))
    for loader in (model_class, auto_class):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, weight in saved.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
        with torch.no_grad():
            assert torch.equal(saved(**batch)[0], loaded.eval()(**batch)[0])


def test_a_classifier_takes_the_encoder_of_a_masked_model(tmp_path: Path) -> None:
    masked = build(GeneBertForPhenotypicMLM)
    masked.save_pretrained(tmp_path)
    classifier = GeneBertForClassification.from_pretrained(tmp_path, num_labels=4)
    for name, weight in masked.genebert.state_dict().items():
        assert torch.equal(weight, classifier.genebert.state_dict()[name]), name
    assert classifier.classifier.out_features == 4


def test_the_configuration_survives_saving_but_for_the_kernel(tmp_path: Path) -> None:
    names = {0: "B", 1: "T"}
    config = tiny_config(attention_kernel="sdpa", class_weights=[1.0, 2.0, 3.0], tokenizer_fingerprint="ab12")
    config.id2label, config.label2id = names, {"B": 0, "T": 1}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GeneBertConfig)
    assert loaded.attention_kernel == "auto"
    assert loaded.id2label == names and loaded.num_labels == 2
    for name, value in config.to_dict().items():
        assert name == "_name_or_path" or loaded.to_dict()[name] == value, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bin_gain_range": 1.5}, "bin_gain_range is 1.5"),
        ({"bin_levels": [0.0, 1.0]}, "bin_levels holds 2 numbers for 5 bins"),
        ({"norm_position": "pre"}, "norm_position cannot be 'pre'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "cannot be split into 4 attention heads"),
        ({"phenotype_id_ranges": [[4, 6], [6, 99]]}, "reaches beyond first_bin_id"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("tiny", 2, 64, 1), ("small", 4, 256, 4), ("base", 12, 768, 12), ("large", 24, 1024, 16)],
)
def test_presets_have_their_sizes(name: str, layers: int, width: int, heads: int) -> None:
    config = GeneBertConfig(**load_preset(name))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)


def test_a_default_configuration_is_what_commands_train() -> None:
    config = GeneBertConfig()
    assert config.gene_loss_weight == MlmConfig.gene_loss_weight
    assert config.phenotype_loss_weight == MlmConfig.phenotype_loss_weight


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'small'"):
        load_preset("smal")
