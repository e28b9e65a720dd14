"""The configuration of a GeneBERT model, and the presets of sizes.

Owns every setting of the model and its checks; leaves what the settings do to the layers and heads.
"""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from perturbgene.errors import InputError, did_you_mean
from perturbgene.files import check_format
from perturbgene.forms import misfit

#: Values of ``--model_arch`` -> layers, hidden size, heads; all other settings are the defaults of `GeneBertConfig`.
#: One head of 64 answers as well as four of 16 and takes a fifth less time on a CPU (docs/experiments.md).
PRESETS = {"tiny": (2, 64, 1), "small": (4, 256, 4), "base": (12, 768, 12), "large": (24, 1024, 16)}
ATTENTION_KERNELS = ("auto", "matmul", "sdpa", "varlen", "flash")
NORM_POSITIONS = ("post", "branch")
#: Of a run's weights: 2 has votes that are solved and shares; of before, without a number, they were trained together.
RUN_FORMAT = 2


class GeneBertConfig(PreTrainedConfig):
    """All settings of a GeneBERT model; a value outside its allowed range raises an InputError."""

    model_type = "genebert"

    vocab_size: int = 16  # v input ids: special tokens, then phenotype labels, then bins
    type_vocab_size: int = 16  # token types: 0 special, 1..P phenotype categories, then one per gene
    hidden_size: int = 256  # h, a multiple of num_attention_heads
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024  # width inside the feed-forward part
    #: On embeddings and both residual branches; never on attention weights, which would rule out the fast kernels.
    dropout: float | int = 0.1
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02  # standard deviation of fresh linear weights
    embedding_range: float | None = None  # the same of embeddings; None means initializer_range
    layer_norm_eps: float = 1e-12
    #: "branch" normalizes what each residual branch adds and the final hidden states, so a gene that says little can
    #: keep a short vector. "post" normalizes the embeddings and each residual sum, as DistilBERT does.
    norm_position: str = "branch"
    #: If above 0, each gene embedding is multiplied by a learned gain per expression bin, which starts at
    #: 1 + range * (level - 1). 0 disables the gain: word plus type embedding, as in BERT.
    bin_gain_range: float | int = 1.0
    #: Expression that each bin represents, relative to the mean: 0 for bin_0, then ascending; None: evenly from 0 to 2.
    bin_levels: list[float] | None = None
    direct_path: bool = False  # add a linear term in the expressed genes to the logits of labels, see `DirectPath`
    pad_token_id: int = 3  # only used for padded batches without an attention mask
    first_bin_id: int = 4  # id of bin_0; lower ids are special tokens or phenotype labels
    #: The [start, stop) range of label ids of phenotype types 1, 2, ..., P, in this order.
    phenotype_id_ranges: list[list[int]] = field(default_factory=list)
    phenotype_loss_weight: float | int = 1.0
    gene_loss_weight: float | int = 0.3
    class_weights: list[float] | None = None  # one per class of the classifier; None means equal weights
    phenotype_category: str | None = None  # that a classifier predicts
    most_genes: int | None = None  # of a cell, that the transformer reads outside of training; None: all, see `encode`
    tokenizer_fingerprint: str | None = None  # of the tokenizer that the weights were trained with
    run_format: int = RUN_FORMAT
    #: "auto" picks the fastest kernel for device and precision; "matmul" and "sdpa" run anywhere, "varlen" and "flash"
    #: need CUDA and half precision. Not saved, because it depends on the machine.
    attention_kernel: str = "auto"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Convert ranges to plain lists and check the settings."""
        self.phenotype_id_ranges = [[int(start), int(stop)] for start, stop in self.phenotype_id_ranges]
        folder = kwargs.get("name_or_path")
        super().__post_init__(**kwargs)
        check_format(f"{folder}/config.json" if folder else "config.json", self.run_format, reads=RUN_FORMAT)
        check_choice("norm_position", self.norm_position, NORM_POSITIONS)
        check_choice("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} cannot be split into {self.num_attention_heads} attention heads. "
                "Choose --num_attention_heads that divides it."
            )
        if not 0 <= self.bin_gain_range <= 1:
            raise InputError(f"bin_gain_range is {self.bin_gain_range}, but must be in 0..1. Choose 0 or 1.")
        for name in ("bin_levels", "class_weights"):
            if wrong := misfit(getattr(self, name), (type(None), [float]), at=name):
                raise InputError(
                    f"{wrong}, but one for each bin or class is needed. Restore the run as it was written."
                )
        if self.bin_levels is not None and len(self.bin_levels) != self.vocab_size - self.first_bin_id:
            raise InputError(
                f"bin_levels holds {len(self.bin_levels)} numbers for {self.vocab_size - self.first_bin_id} bins. "
                "Take the levels from the tokenizer."
            )
        for start, stop in self.phenotype_id_ranges:
            if not 0 <= start < stop <= self.first_bin_id:
                raise InputError(
                    f"phenotype_id_ranges holds [{start}, {stop}), which is empty or reaches beyond first_bin_id "
                    f"({self.first_bin_id}). Take the ranges from the tokenizer."
                )

    @property
    def first_label_id(self) -> int:
        """Id of the first phenotype label; ``first_bin_id`` ends the labels."""
        return min((start for start, _ in self.phenotype_id_ranges), default=self.first_bin_id)

    def check_size(self, folder: Path) -> None:
        """Raise an InputError if a folder's weights are too few for this model, before memory is taken for it."""
        h = self.hidden_size
        tables = (self.vocab_size + self.type_vocab_size) * h
        least = 2 * (tables + self.num_hidden_layers * h * (4 * h + 2 * self.intermediate_size))  # in half precision
        held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if least > held:
            raise InputError(
                f"{folder}/config.json describes a model of at least {least:,} bytes, but its weights have {held:,}. "
                "Restore the folder as training wrote it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings to save, without the kernel, so that a run folder from a GPU loads on a laptop."""
        settings = super().to_dict()
        settings.pop("attention_kernel", None)
        return settings


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise an InputError if a setting does not have one of the allowed values."""
    if value not in allowed:
        raise InputError(f"{name} cannot be {value!r}. {did_you_mean(value, allowed)}")


def load_preset(name: str) -> dict[str, Any]:
    """Return the sizes of a preset, as arguments of ``GeneBertConfig``."""
    check_choice("--model_arch", name, tuple(PRESETS))
    layers, hidden, heads = PRESETS[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * hidden}
