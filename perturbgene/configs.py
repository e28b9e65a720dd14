"""Settings of every verb: one dataclass per verb, one field = one flag = one help text = one default.

Owns flags, YAML files, help pages and the checks that need no data; leaves reading files to the data layer.
Imports neither torch nor transformers until training arguments are asked for.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
import textwrap
import types
import typing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml

from perturbgene.errors import InputError, did_you_mean, listed

if TYPE_CHECKING:
    from transformers import TrainingArguments

Normalization = Literal["auto", "none", "log1p_cp10k"]
Truncation = Literal["variable", "expressed", "random"]
HvgFlavor = Literal["auto", "seurat", "seurat_v3"]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]
ConfigT = TypeVar("ConfigT", bound="BaseConfig")

GROUPS = (
    "Input and output",
    "Task",
    "Data",
    "Genes and bins",
    "Model",
    "Training",
    "Running",
    "transformers.TrainingArguments",
)
NONE_WORDS = ("none", "null")
BOOLEAN_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
HELP_WIDTH = 100
# Never written to a dump: a run folder is shared, an access token is not.
SECRETS = ("hub_token",)
GONE_IN_V5 = {
    "evaluation_strategy": "It is called --eval_strategy now.",
    "warmup_ratio": "Give the ratio to --warmup_steps: a number below 1 is a share of all steps.",
    "overwrite_output_dir": "Choose another --output_dir, or continue with --resume_from_checkpoint.",
    "logging_dir": "TensorBoard logs lie in a folder `runs` within --output_dir.",
    "save_safetensors": "Weights are always written as safetensors; leave it out.",
    "no_cuda": "It is called --use_cpu now.",
    "use_mps_device": "Apple GPUs are used when present; --use_cpu avoids them.",
    "use_ipex": "Leave it out; --bf16 is what makes CPU training fast.",
    "per_gpu_train_batch_size": "It is called --per_device_train_batch_size now.",
    "per_gpu_eval_batch_size": "It is called --per_device_eval_batch_size now.",
    "group_by_length": "It is called --train_sampling_strategy group_by_length now.",
    "include_inputs_for_metrics": "It is called --include_for_metrics inputs now.",
    "fp16_backend": "Leave it out; --fp16 or --bf16 is enough.",
    "half_precision_backend": "Leave it out; --fp16 or --bf16 is enough.",
    "push_to_hub_token": "It is called --hub_token now.",
    "push_to_hub_model_id": "It is called --hub_model_id now.",
    "dispatch_batches": "Each rank reads its own rows; leave it out.",
    "split_batches": "Each rank reads its own rows; leave it out.",
    "torchdynamo": "It is called --torch_compile_backend now.",
}


class HelpRequested(Exception):
    """The user asked for a help page; carries its text for the caller to print."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags: what a field says about itself


@dataclass(frozen=True)
class Flag:
    """One flag of the command line and key of the YAML file.

    Attributes:
        name: Field name; the flag is ``--name``.
        kind: Type annotation of the field.
        default: Value when neither flag nor YAML gives one.
        help: One or two sentences for the manual page.
        group: Heading under which the page lists it.
        within: Interval such as ``"[0, 1)"`` in which numbers must lie; empty for any.
        is_required: An empty value is refused.
        is_positional: May also be given without its flag, in the order of declaration.
        keeps_commas: Values of a list are never cut at commas (labels and donors may contain them).
        bare: Value of the flag when it stands alone; None when it needs a value.
    """

    name: str
    kind: Any
    default: Any = None
    help: str = ""
    group: str = "Task"
    within: str = ""
    is_required: bool = False
    is_positional: bool = False
    keeps_commas: bool = False
    bare: Any = None

    @property
    def is_list(self) -> bool:
        """Whether the flag takes all values up to the next flag."""
        return any(get_origin(kind) is list or kind is list for kind in members(self.kind))


def option(default: Any, *, help: str, group: str = "Task", **traits: Any) -> Any:
    """Declare a dataclass field that is a flag; ``traits`` are further attributes of `Flag`."""
    metadata = {"help": help, "group": group, **traits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def members(kind: Any) -> tuple[Any, ...]:
    """Split a union into its members; any other type is its own only member."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def default_of(declared: dataclasses.Field) -> Any:
    """Default value of a dataclass field, made afresh when it has a factory."""
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return None if declared.default is dataclasses.MISSING else declared.default


def own_flags(config_class: "type[BaseConfig]") -> dict[str, Flag]:
    """Flags made from the fields of a verb's dataclass, by name."""
    kinds = typing.get_type_hints(config_class)
    flags = {}
    for declared in dataclasses.fields(config_class):
        if "help" not in declared.metadata:
            continue
        kind = kinds[declared.name]
        bare = True if bool in members(kind) else None
        traits = {"bare": bare, **declared.metadata}
        flags[declared.name] = Flag(declared.name, kind, default_of(declared), **traits)
    return flags


@functools.cache
def training_flags() -> dict[str, Flag]:
    """Flags made from the fields of `transformers.TrainingArguments`, by name (imports transformers)."""
    from transformers import TrainingArguments

    kinds = typing.get_type_hints(TrainingArguments)
    flags = {}
    for declared in dataclasses.fields(TrainingArguments):
        kind = kinds[declared.name]
        if choices := tuple(declared.metadata.get("choices") or ()):
            kind = Literal[choices] | None
        bare = True if bool in members(kind) else declared.metadata.get("const")
        text = " ".join(str(declared.metadata.get("help", "")).split())
        flags[declared.name] = Flag(declared.name, kind, default_of(declared), text, GROUPS[-1], bare=bare)
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Values: from text or YAML to the type of the field


def to_choice(value: Any, choices: Sequence[Any]) -> Any:
    """Accept one of a few values; YAML reads a bare ``no`` as False, so False stands for "no"."""
    value = "no" if value is False and "no" in choices and False not in choices else value
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"is not among its choices{hint}")


def to_bool(value: Any) -> bool:
    """Accept true/false, yes/no, on/off, 1/0."""
    word = str(value).lower()
    if word in BOOLEAN_WORDS:
        return BOOLEAN_WORDS[word]
    raise ValueError("is neither true nor false")


def to_int(value: Any) -> int:
    """Accept whole numbers, also as ``1e4``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = to_float(value)
    if not number.is_integer():
        raise ValueError("is not a whole number")
    return int(number)


def to_float(value: Any) -> float:
    """Accept numbers; YAML leaves ``1e-4`` a string, so strings are read as numbers."""
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError("is not a number")


def to_text(value: Any) -> str:
    """Accept text and numbers; what YAML has read as true, as a date or as a mapping must be quoted there."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError("is not text (put it in quotes)")


def to_mapping(value: Any) -> dict[str, Any]:
    """Accept a mapping, or JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if isinstance(value, dict):
        return value
    raise ValueError("is not a JSON object such as '{\"name\": 1}'")


def split_commas(text: str) -> list[str]:
    """Cut at commas, but not within braces (``shard_{0,1}.h5ad``) nor before a space (``T cell, CD4``).

    Example:
        >>> split_commas("a_{0,1}.h5ad,b.h5ad")
        ['a_{0,1}.h5ad', 'b.h5ad']
    """
    parts = re.split(r",(?![^{]*})(?!\s)", text)
    return [part.strip() for part in parts if part.strip()] or [text]


def to_list(value: Any, item_kind: Any, *, keeps_commas: bool = False) -> list[Any]:
    """Accept several values, one value, or values joined by commas."""
    items = value if isinstance(value, list | tuple) else [value]
    if not keeps_commas:
        items = [part for item in items for part in (split_commas(item) if isinstance(item, str) else [item])]
    return [to_kind(item, item_kind) for item in items]


def to_kind(value: Any, kind: Any, *, keeps_commas: bool = False) -> Any:
    """Turn a value into one simple type; raises ValueError with the rest of the sentence "the value ..."."""
    if get_origin(kind) is Literal:
        return to_choice(value, get_args(kind))
    if get_origin(kind) is list or kind is list:
        item_kind = (get_args(kind) or (str,))[0]
        return to_list(value, item_kind, keeps_commas=keeps_commas)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return to_choice(value, [member.value for member in kind])
    simple: dict[Any, Callable[[Any], Any]] = {bool: to_bool, int: to_int, float: to_float, str: to_text}
    return simple.get(kind, to_mapping)(value)


def ordered_kinds(value: Any, kind: Any) -> list[Any]:
    """Members of a union in the order in which to try them on this value, the strictest first."""
    kinds = [member for member in members(kind) if member is not types.NoneType]
    if isinstance(value, str) and str in kinds:
        kinds = [member for member in kinds if get_origin(member) is not list]
    if any(isinstance(member, type) and issubclass(member, Enum) for member in kinds):
        return [member for member in kinds if member is not str]
    is_json = isinstance(value, str) and value.lstrip().startswith("{")
    mappings = [member for member in kinds if is_json and to_kind_rank(member) == 1]
    return mappings or sorted(kinds, key=to_kind_rank)


def to_kind_rank(kind: Any) -> int:
    """Rank of a type among those that a value may have: choices, mappings, lists, then simple types, text last."""
    if get_origin(kind) is Literal:
        return 0
    simple = [list, bool, int, float, str]
    base = get_origin(kind) or kind
    return 2 + simple.index(base) if base in simple else 1


def convert(value: Any, flag: Flag, *, where: str) -> Any:
    """Turn text or a YAML value into the type of the flag.

    Args:
        value: Text, list of texts, or what YAML has read.
        flag: The flag that the value belongs to.
        where: Who gave it, for the message: ``--name``, or ``name in run.yaml``.

    Raises:
        InputError: The value does not fit the type.
    """
    is_optional = types.NoneType in members(flag.kind)
    if is_optional and (value is None or str(value).lower() in NONE_WORDS):
        return None
    if flag.bare is not None and bool not in members(flag.kind) and str(value).lower() in ("true", "false"):
        return flag.bare if to_bool(value) else None
    if isinstance(value, list) and len(value) == 1 and str in members(flag.kind):
        value = value[0]
    message = "is empty" if value is None else ""
    for kind in ordered_kinds(value, flag.kind) if value is not None else []:
        try:
            return to_kind(value, kind, keeps_commas=flag.keeps_commas)
        except ValueError as error:
            message = message or str(error)
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    raise InputError(f"{where} was given {shown!r}, which {message}. {advice(flag)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def lies_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval.

    Example:
        >>> lies_within(1.0, "[0, 1)"), lies_within(0.0, "[0, 1)")
        (False, True)
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_above = value >= low if interval[0] == "[" else value > low
    return is_above and (value <= high if interval[-1] == "]" else value < high)


def check_flag(value: Any, flag: Flag) -> None:
    """Refuse an empty value where one is required, and numbers outside their interval.

    Raises:
        InputError: Either of these.
    """
    if flag.is_required and value in (None, "", []):
        way = f"{flag.name.upper()} after the verb, or --{flag.name}" if flag.is_positional else f"--{flag.name}"
        raise InputError(f"{flag.name} is missing. Give {way} ({flag.help})")
    numbers = value if isinstance(value, list) else [value]
    for number in numbers if flag.within else []:
        if number is not None and not lies_within(number, flag.within):
            raise InputError(f"{flag.name} is {number}, but it must lie in {flag.within}. Change --{flag.name}.")


def check_edges(edges_e: Sequence[float]) -> None:
    """Refuse bin edges that are not finite, positive and increasing.

    Raises:
        InputError: Names the first edge at fault.
    """
    for i, edge in enumerate(edges_e):
        if not lies_within(edge, "(0, inf)"):
            raise InputError(
                f"bin_edges must be finite and above 0, but edge {i} is {edge:g}; bin 0 means not expressed. "
                "Remove it from --bin_edges."
            )
        if i and edge <= edges_e[i - 1]:
            raise InputError(
                f"bin_edges must increase, but edge {i} ({edge:g}) does not exceed edge {i - 1} "
                f"({edges_e[i - 1]:g}). Sort and deduplicate --bin_edges."
            )


def check_exists(path: str | None, *, flag: str) -> None:
    """Refuse a local path that does not exist; URLs are left to those who open them.

    Raises:
        InputError: Nothing lies there.
    """
    if path and "://" not in path and not Path(path).exists():
        raise InputError(f"{flag} is {path!r}, but nothing lies there. Correct the path given to --{flag}.")


def check_not_both(config: "BaseConfig", first: str, second: str) -> None:
    """Refuse two settings that answer the same question.

    Raises:
        InputError: Both are set.
    """
    if getattr(config, first) and getattr(config, second):
        raise InputError(
            f"{first} and {second} are both given, but they answer the same question. Remove --{first} or --{second}."
        )


def check_no_repeats(names: Sequence[str], *, flag: str) -> None:
    """Refuse a list that names something twice.

    Raises:
        InputError: Names the repeated ones.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{flag} names {listed(repeated)} more than once. Keep one of each in --{flag}.")


def looks_like_hub_id(name: str) -> bool:
    """Whether a name reads ``owner/model`` and its first part is no folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).parent.is_dir()


def named_values(entries: Sequence[str], *, flag: str) -> dict[str, str | None]:
    """Read entries ``name`` or ``name=value``.

    Example:
        >>> named_values(["tissue=lung", "sex"], flag="given")
        {'tissue': 'lung', 'sex': None}

    Raises:
        InputError: A side of ``=`` is empty, or a name comes twice.
    """
    pairs = [entry.partition("=") for entry in entries]
    for name, equals, value in pairs:
        if not name.strip() or (equals and not value.strip()):
            raise InputError(f"{flag} holds {name + equals + value!r}, but reads NAME or NAME=VALUE. Correct --{flag}.")
    check_no_repeats([name.strip() for name, _, _ in pairs], flag=flag)
    return {name.strip(): value.strip() if equals else None for name, equals, value in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every verb's settings can do: be checked, dumped and read again."""

    verb: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    about: ClassVar[str] = ""
    example: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse settings that cannot be; subclasses add checks across fields.

        Raises:
            InputError: What was given, why it cannot be, and which flag to change.
        """
        for flag in own_flags(type(self)).values():
            check_flag(getattr(self, flag.name), flag)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, overrides of TrainingArguments beside the verb's own, without secrets."""
        settings = {name: getattr(self, name) for name in own_flags(type(self))}
        settings.update(getattr(self, "training_overrides", {}))
        return {name: _without_password(value) for name, value in settings.items() if name not in SECRETS}

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; ``--config`` on it gives an equal configuration."""
        return yaml.safe_dump({"verb": self.verb, **self.to_dict()}, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, by way of a temporary name."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(temporary, path)


def _without_password(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_password(item) for item in value]
    return re.sub(r"(://[^/\s:@]+):[^/\s@]+@", r"\1:***@", value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class MatrixOptions(BaseConfig):
    """Where in an h5ad file the values and gene ids stand (prepare, mlm, cls, predict)."""

    layer: str | None = option(None, help="Layer to read in place of X; `raw` means .raw.", group="Genes and bins")
    gene_id_column: str | None = option(
        None, help="Column of var with the gene ids, in place of var_names.", group="Genes and bins"
    )


@dataclass(frozen=True, kw_only=True)
class BinOptions(MatrixOptions):
    """Which genes are used and how their values become bins (prepare, mlm, cls)."""

    panel: str | None = option(
        None, help="Genes to use: a text file with one id per line, or a run's tokenizer.", group="Genes and bins"
    )
    num_top_genes: int | None = option(
        None,
        help="Keep this many of the most variable genes; none keeps all.",
        group="Genes and bins",
        within="[1, inf)",
    )
    normalization: Normalization = option(
        "auto", help="auto recognises raw counts and takes log1p of counts per 10,000.", group="Genes and bins"
    )
    bin_edges: list[float] = option(
        [], help="Increasing edges of the bins; a value on an edge joins the upper bin.", group="Genes and bins"
    )
    bin_edges_path: str | None = option(
        None, help="JSON file with a list of edges, or gene -> edges.", group="Genes and bins"
    )

    def check(self) -> None:
        super().check()
        check_edges(self.bin_edges)
        check_not_both(self, "bin_edges", "bin_edges_path")
        check_exists(self.bin_edges_path, flag="bin_edges_path")
        check_exists(self.panel, flag="panel")


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(BaseConfig):
    """How a trained model is run on cells (evaluate, predict)."""

    run: str = option(
        "", help="Run folder of mlm or cls.", group="Input and output", is_required=True, is_positional=True
    )
    batch_size: int = option(64, help="Cells per batch.", group="Running", within="[1, inf)")
    device: str = option("auto", help="auto, cpu, mps, cuda or cuda:N.", group="Running")

    def check(self) -> None:
        super().check()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(
                f"device is {self.device!r}, which is none of auto, cpu, mps, cuda and cuda:N. Change --device."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions(BinOptions):
    """Which cells are read and how they become tokens (mlm, cls)."""

    corpus: str | None = option(
        None, help="Folder made by `prepare`; brings shards, vocabulary, panel and bins.", group="Data"
    )
    train_data_paths: list[str] = option(
        [], help="Training files: paths, globs, brace patterns (shard_{0..43}.h5ad) or URLs.", group="Data"
    )
    eval_data_paths: list[str] = option(
        [], help="Evaluation files, written like the training files; with a corpus, they replace its own.", group="Data"
    )
    vocab_path: str | None = option(None, help="JSON file {category: [labels]} of the phenotypes.", group="Data")
    included_phenotypes: list[str] = option(
        [], help="Phenotypes in a cell's sequence, in this order; none named means all of the vocabulary.", group="Data"
    )
    max_length: int = option(
        2048, help="Longest sequence in tokens, [CLS] and [EOS] included.", group="Data", within="[3, inf)"
    )
    truncation: Truncation = option(
        "variable", help="Genes that stay in a cell longer than --max_length.", group="Data"
    )
    pad_to_multiple_of: int | None = option(
        None, help="Pad lengths to a multiple of this; tensor cores like 8.", group="Data", within="[1, inf)"
    )
    shard_size: int | None = option(
        None, help="Cells per shard; only compared with the sizes read from the files.", group="Data", within="[1, inf)"
    )
    allow_overlap: bool = option(
        False, help="Go on although a file or cell is in both training and evaluation.", group="Data"
    )
    min_gene_coverage: float = option(
        0.5, help="Stop when a file has less than this share of the panel.", group="Genes and bins", within="[0, 1]"
    )

    @property
    def has_eval_data(self) -> bool:
        """Whether there are cells to evaluate on."""
        return bool(self.corpus or self.eval_data_paths)

    def check(self) -> None:
        super().check()
        check_not_both(self, "corpus", "train_data_paths")
        check_exists(self.vocab_path, flag="vocab_path")
        if not self.corpus and not self.train_data_paths:
            raise InputError(
                "Neither corpus nor train_data_paths is given, so there are no cells. "
                "Give --corpus DIR (made by `perturbgene prepare`) or --train_data_paths."
            )
        check_no_repeats(self.included_phenotypes, flag="included_phenotypes")
        least = 2 + 1 + len(self.included_phenotypes)
        if self.max_length < least:
            raise InputError(
                f"max_length is {self.max_length}, but [CLS], {least - 3} phenotypes, one gene and [EOS] need "
                f"{least} tokens. Raise --max_length."
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseConfig):
    """Size of the model and where its first weights come from (mlm, cls)."""

    model_arch: Literal["tiny", "small", "base", "large"] = option(
        "small", help="Preset of sizes; the flags below change single ones.", group="Model"
    )
    pretrained_model_path: str | None = option(
        None, help="Run folder or hub id whose weights and sizes to start from.", group="Model"
    )
    num_hidden_layers: int | None = option(None, help="Layers.", group="Model", within="[1, inf)")
    num_attention_heads: int | None = option(None, help="Attention heads per layer.", group="Model", within="[1, inf)")
    hidden_size: int | None = option(None, help="Size of a token's vector.", group="Model", within="[1, inf)")
    intermediate_size: int | None = option(
        None, help="Size within the feed-forward part.", group="Model", within="[1, inf)"
    )
    dropout: float | None = option(
        None, help="Dropout after embeddings and sublayers; never on attention weights.", group="Model", within="[0, 1)"
    )
    norm_position: Literal["pre", "post"] | None = option(
        None, help="LayerNorm before or after each sublayer.", group="Model"
    )
    attn_implementation: Literal["auto", "matmul", "sdpa", "varlen", "flash"] = option(
        "auto", help="How attention is computed; auto takes the fastest that the device has.", group="Model"
    )
    use_flash_attn: bool = option(False, help="The same as --attn_implementation flash.", group="Model")

    def check(self) -> None:
        super().check()
        name, heads, hidden = self.pretrained_model_path, self.num_attention_heads, self.hidden_size
        if name and not looks_like_hub_id(name):
            check_exists(name, flag="pretrained_model_path")
        sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "norm_position")
        for size in sizes if name else ():
            if getattr(self, size) is not None:
                raise InputError(
                    f"{size} is given, but the model of --pretrained_model_path has its own. Remove --{size}."
                )
        if heads and hidden and hidden % heads:
            raise InputError(
                f"hidden_size is {hidden}, which {heads} heads cannot share equally. Choose a --hidden_size that is "
                "a multiple of --num_attention_heads."
            )
        if self.use_flash_attn and self.attn_implementation not in ("auto", "flash"):
            raise InputError(f"use_flash_attn contradicts attn_implementation {self.attn_implementation}. Remove one.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(BaseConfig):
    """How long, how fast and on what to train (mlm, cls); every other TrainingArguments field is an override."""

    output_dir: str = option(
        "", help="Run folder: weights, tokenizer, settings and metrics.", group="Input and output", is_required=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        help="Checkpoint folder to continue from; alone, the newest valid one in --output_dir (`latest`).",
        group="Input and output",
        bare="latest",
    )
    learning_rate: float = option(5e-4, help="Peak learning rate of AdamW.", group="Training", within="(0, inf)")
    per_device_train_batch_size: int = option(
        32, help="Cells per step and device.", group="Training", within="[1, inf)"
    )
    per_device_eval_batch_size: int = option(
        64, help="Cells per evaluation batch and device.", group="Training", within="[1, inf)"
    )
    gradient_accumulation_steps: int = option(
        1, help="Batches added up before each step.", group="Training", within="[1, inf)"
    )
    num_train_epochs: float = option(10.0, help="Passes over the training cells.", group="Training", within="(0, inf)")
    max_steps: int = option(
        -1,
        help="Stop after this many steps, whatever the epochs; -1 for no limit.",
        group="Training",
        within="[-1, inf)",
    )
    lr_scheduler_type: Schedule = option("cosine", help="Course of the learning rate.", group="Training")
    warmup_steps: float = option(
        0.1, help="Steps of rising learning rate; below 1, a share of all steps.", group="Training", within="[0, inf)"
    )
    weight_decay: float = option(0.01, help="Decoupled weight decay.", group="Training", within="[0, inf)")
    max_grad_norm: float = option(1.0, help="Gradients are clipped to this norm.", group="Training", within="[0, inf)")
    bf16: bool | None = option(
        None, help="Half precision (bfloat16). Unset (`none`): on where the device computes it fast.", group="Training"
    )
    use_cpu: bool = option(False, help="Stay on the CPU although there is a GPU.", group="Training")
    seed: int = option(42, help="Fixes weights, order of cells and masks.", group="Training", within="[0, 4294967295]")
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = option(
        "auto", help="When to evaluate; auto: by steps if --eval_steps is given, else each epoch.", group="Training"
    )
    eval_steps: float | None = option(
        None, help="Steps between evaluations; below 1, a share of all steps.", group="Training", within="(0, inf)"
    )
    eval_on_start: bool = option(
        True, help="Evaluate before the first step, so that a broken evaluation shows at once.", group="Training"
    )
    save_strategy: Literal["auto", "no", "steps", "epoch", "best"] = option(
        "auto", help="When to write a checkpoint; auto: by --save_steps if given, else as evaluated.", group="Training"
    )
    save_steps: float | None = option(
        None, help="Steps between checkpoints; below 1, a share of all steps.", group="Training", within="(0, inf)"
    )
    save_total_limit: int | None = option(
        2, help="Checkpoints to keep, the best one among them.", group="Training", within="[1, inf)"
    )
    logging_steps: float = option(
        10, help="Steps between logged values; below 1, a share of all steps.", group="Training", within="(0, inf)"
    )
    report_to: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "trackio", "none", "all"]
    ] = option(["tensorboard"], help="Where logs go besides the terminal.", group="Training")
    dataloader_num_workers: int = option(
        0,
        help="Processes that read cells; the cells and masks do not depend on it.",
        group="Training",
        within="[0, inf)",
    )

    def check(self) -> None:
        super().check()
        for name in ("eval", "save"):
            strategy, steps = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if steps is not None and strategy not in ("auto", "steps"):
                raise InputError(
                    f"{name}_steps is {steps:g}, but {name}_strategy is {strategy}, which pays no heed to steps. "
                    f"Remove --{name}_steps or --{name}_strategy."
                )
            if strategy == "steps" and steps is None:
                raise InputError(f"{name}_strategy is steps, but their number is missing. Give --{name}_steps.")
        if self.max_steps == 0:
            raise InputError("max_steps is 0, which trains nothing. Give --max_steps 1 or more, or -1 for no limit.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(DataOptions, ModelOptions, TrainOptions):
    """What mlm and cls share; ``training_overrides`` holds the TrainingArguments fields that are no own flag."""

    best_metric: ClassVar[str] = "eval_loss"

    training_overrides: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.eval_strategy not in ("auto", "no") and not self.has_eval_data:
            raise InputError(
                f"eval_strategy is {self.eval_strategy}, but there is nothing to evaluate on. "
                "Give --eval_data_paths or --corpus, or remove --eval_strategy."
            )
        if self.corpus or self.pretrained_model_path:
            return
        if not self.bin_edges and not self.bin_edges_path:
            raise InputError(
                "Bin edges are missing: a corpus or a pretrained model would bring them, but none is given. "
                "Give --bin_edges 0.5 1 2 4, or --bin_edges_path."
            )

    def training_arguments(self) -> "TrainingArguments":
        """Build the `transformers.TrainingArguments`, overrides last (imports transformers).

        Raises:
            InputError: transformers refuses the combination.
        """
        from transformers import TrainingArguments

        settings = {**self._training_settings(), **self.training_overrides}
        if metric := settings["metric_for_best_model"]:
            settings.setdefault("greater_is_better", not metric.endswith("loss"))
        if isinstance(mesh := settings.get("parallelism_config"), dict):
            from accelerate import ParallelismConfig

            settings["parallelism_config"] = ParallelismConfig(**mesh)
        try:
            return TrainingArguments(**settings)
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise InputError(f"The training flags were refused by transformers: {error}") from error

    def _training_settings(self) -> dict[str, Any]:
        known = training_flags()
        settings = {name: getattr(self, name) for name in own_flags(type(self)) if name in known}
        use_cpu, bf16 = self._device_settings()
        return {
            **settings,
            **self._schedule_settings(),
            "use_cpu": use_cpu,
            "bf16": bf16,
            "logging_nan_inf_filter": False,  # True logs 0.0 while the weights are NaN
            "remove_unused_columns": False,
            "disable_tqdm": not sys.stderr.isatty(),
            "label_names": ["labels"],
            "include_num_input_tokens_seen": "no",
        }

    def _schedule_settings(self) -> dict[str, Any]:
        """When to evaluate and save; the best checkpoint is loaded where both happen together."""
        evaluates: str = self.eval_strategy
        if evaluates == "auto":
            evaluates = "no" if not self.has_eval_data else "steps" if self.eval_steps else "epoch"
        saves: str = self.save_strategy
        if saves == "auto":
            saves = "steps" if self.save_steps else "epoch" if evaluates == "no" else evaluates
        save_steps = self.save_steps or self.eval_steps or 500
        is_multiple = saves != "steps" or (save_steps / (self.eval_steps or save_steps)).is_integer()
        is_together = saves == "best" or (saves == evaluates and is_multiple)
        return {
            "eval_strategy": evaluates,
            "save_strategy": saves,
            "save_steps": save_steps,
            "eval_on_start": self.eval_on_start and evaluates != "no",
            "load_best_model_at_end": evaluates != "no" and is_together,
            "metric_for_best_model": self.best_metric if evaluates != "no" else None,
        }

    def _device_settings(self) -> tuple[bool, bool]:
        """Whether to stay on the CPU and whether to compute in bfloat16; without an accelerator, both by the CPU."""
        import torch

        use_cpu = self.training_overrides.get("use_cpu", self.use_cpu) or not torch.accelerator.is_available()
        if self.bf16 is not None:
            return use_cpu, self.bf16
        if self.training_overrides.get("fp16"):
            return use_cpu, False
        if use_cpu:
            return use_cpu, bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        return use_cpu, torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(BinOptions):
    """Settings of `prepare`."""

    verb: ClassVar[str] = "prepare"
    summary: ClassVar[str] = "Turn h5ad files into a corpus to train on."
    about: ClassVar[str] = (
        "Harmonises genes to one ranked panel, normalises, fits bins, collects the phenotype vocabulary, splits by "
        "donor and writes shuffled shards with a manifest and an audit of the split."
    )
    example: ClassVar[str] = (
        "perturbgene prepare cells.h5ad --output corpus --phenotypes cell_type tissue --split_by donor_id"
    )

    inputs: list[str] = option(
        [],
        help="h5ad files: paths, globs or brace patterns.",
        group="Input and output",
        is_required=True,
        is_positional=True,
    )
    output: str = option("", help="Corpus folder to write.", group="Input and output", is_required=True)
    overwrite: bool = option(False, help="Replace a corpus that is already there.", group="Input and output")
    phenotypes: list[str] = option(
        [], help="Columns of obs that become phenotypes; NAME=COLUMN renames one (cell_type=bulk_labels)."
    )
    split_by: str | None = option(
        None,
        help="Column of obs that keeps together what belongs together, or `cell`; "
        "none means donor_id where there is one, else cells with a warning.",
    )
    eval_fraction: float = option(0.2, help="Share of donors (or cells) held out for evaluation.", within="(0, 1)")
    eval_donors: list[str] = option([], help="Donors to hold out, by name, in place of a share.", keeps_commas=True)
    seed: int = option(0, help="Fixes the split and the shuffle.", within="[0, 4294967295]")
    num_bins: int = option(
        8, help="Quantile bins to fit on the expressed values.", group="Genes and bins", within="[1, inf)"
    )
    per_gene_bins: bool = option(False, help="Fit the bins of each gene by itself.", group="Genes and bins")
    min_genes: int = option(1, help="Drop cells with fewer expressed genes.", group="Genes and bins", within="[0, inf)")
    shard_size: int = option(10000, help="Cells per shard.", group="Input and output", within="[1, inf)")
    hvg_flavor: HvgFlavor = option(
        "auto",
        help="Ranks genes by dispersion of log values (seurat) or by variance of counts (seurat_v3), as scanpy does; "
        "auto takes seurat_v3 for counts.",
        group="Genes and bins",
    )
    num_processes: int = option(
        0, help="Processes that work at once; 0 takes every core.", group="Running", within="[0, inf)"
    )
    scheduler: str | None = option(
        None, help="Address of a Dask scheduler (tcp://...) whose workers do the work.", group="Running"
    )

    @property
    def phenotype_columns(self) -> dict[str, str]:
        """Column of obs for each phenotype, in the order given."""
        return {name: column or name for name, column in named_values(self.phenotypes, flag="phenotypes").items()}

    def check(self) -> None:
        super().check()
        check_not_both(self, "bin_edges", "per_gene_bins")
        check_no_repeats(self.eval_donors, flag="eval_donors")
        named_values(self.phenotypes, flag="phenotypes")
        if self.eval_donors and self.split_by == "cell":
            raise InputError(
                "eval_donors needs a split by donor, but split_by is cell. Give the donor column to --split_by."
            )


@dataclass(frozen=True, kw_only=True)
class MlmConfig(TrainingConfig):
    """Settings of `mlm`."""

    verb: ClassVar[str] = "mlm"
    summary: ClassVar[str] = "Train by masking genes and phenotypes."
    about: ClassVar[str] = (
        "Hides some genes' bins and some phenotypes of every cell and learns to tell them from the rest, so that one "
        "model answers any question: which phenotype, given which others. Every field of "
        "transformers.TrainingArguments is a flag too (--help-all)."
    )
    example: ClassVar[str] = (
        "perturbgene mlm --corpus corpus --output_dir runs/mlm --model_arch small --num_train_epochs 20"
    )

    gene_mask_prob: float = option(0.15, help="Share of a cell's expressed genes that are hidden.", within="[0, 1]")
    phenotype_mask_prob: float = option(
        0.5, help="Share of the phenotypes in a sequence that are asked (hidden).", within="[0, 1]"
    )
    absent_prob: float = option(0.1, help="Share of phenotypes that leave the sequence.", within="[0, 1]")
    unexpressed_ratio: float = option(
        0.5,
        help="Genes not expressed that are asked too, as a share of the hidden expressed ones; the answer is bin_0.",
        within="[0, inf)",
    )
    phenotype_loss_weight: float = option(1.0, help="Weight of the phenotypes' mean loss.", within="[0, inf)")
    gene_loss_weight: float = option(0.3, help="Weight of the genes' mean loss.", within="[0, inf)")

    def check(self) -> None:
        super().check()
        asked = self.phenotype_mask_prob * (1 - self.absent_prob)
        if not self.phenotype_loss_weight * asked and not self.gene_loss_weight * self.gene_mask_prob:
            raise InputError(
                "Nothing is hidden that has a weight, so there is nothing to learn. Raise --phenotype_mask_prob and "
                "--phenotype_loss_weight, or --gene_mask_prob and --gene_loss_weight."
            )
        if not (self.corpus or self.pretrained_model_path or self.vocab_path):
            raise InputError(
                "The phenotype vocabulary is missing: a corpus or a pretrained model would bring it, but none is "
                "given. Give --vocab_path."
            )


@dataclass(frozen=True, kw_only=True)
class ClsConfig(TrainingConfig):
    """Settings of `cls`."""

    verb: ClassVar[str] = "cls"
    summary: ClassVar[str] = "Train a classifier of one phenotype."
    about: ClassVar[str] = (
        "Learns one phenotype from a cell's genes and, if wanted, its other phenotypes; best started from an mlm run. "
        "Every field of transformers.TrainingArguments is a flag too (--help-all)."
    )
    example: ClassVar[str] = (
        "perturbgene cls --corpus corpus --output_dir runs/cls --phenotype_category cell_type "
        "--pretrained_model_path runs/mlm"
    )
    best_metric: ClassVar[str] = "eval_macro_f1"

    phenotype_category: str = option("", help="Phenotype to classify.", is_required=True)
    binary_label: str | None = option(None, help="Tell this label from all others, in place of all classes.")
    balanced_dataset: bool = option(
        False, help="Classes count as they come; otherwise a class weighs inversely to its training cells."
    )

    def check(self) -> None:
        super().check()
        if self.phenotype_category in self.included_phenotypes:
            raise InputError(
                f"included_phenotypes holds {self.phenotype_category!r}, which is the phenotype to classify: the model "
                "would be given the answer. Remove it from --included_phenotypes."
            )


def check_question(ask: Sequence[str], given: Sequence[str]) -> None:
    """Refuse a phenotype that is asked twice, or asked and given.

    Raises:
        InputError: Names the phenotypes.
    """
    check_no_repeats(ask, flag="ask")
    if both := sorted(set(ask) & set(given)):
        raise InputError(f"{listed(both)} cannot be asked and given at once. Remove it from --ask or --given.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(QuestionOptions):
    """Settings of `evaluate`."""

    verb: ClassVar[str] = "evaluate"
    summary: ClassVar[str] = "Score a run on held-out cells, beside its baselines."
    about: ClassVar[str] = (
        "Asks each phenotype alone, with the others given and all at once; writes accuracy, macro F1, confusion "
        "matrices and gene-bin scores beside the majority class and a logistic regression on the same cells."
    )
    example: ClassVar[str] = "perturbgene evaluate runs/mlm --corpus corpus"

    corpus: str | None = option(
        None, help="Corpus whose evaluation cells to use; none means the run's own data.", group="Input and output"
    )
    eval_data_paths: list[str] = option(
        [], help="Evaluation files in place of a corpus: paths, globs, brace patterns.", group="Input and output"
    )
    output: str | None = option(None, help="Folder to write; none means RUN/evaluation.", group="Input and output")
    ask: list[str] = option([], help="Phenotypes to ask; none named means each of the vocabulary.")
    given: list[str] = option([], help="Phenotypes given with each question; none named means every standard set.")
    baselines: bool = option(True, help="Majority class and logistic regression beside the model.")

    def check(self) -> None:
        super().check()
        check_not_both(self, "corpus", "eval_data_paths")
        check_no_repeats(self.given, flag="given")
        check_question(self.ask, self.given)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(QuestionOptions, MatrixOptions):
    """Settings of `predict`."""

    verb: ClassVar[str] = "predict"
    summary: ClassVar[str] = "Fill phenotypes into new cells."
    about: ClassVar[str] = (
        "Reads any h5ad whose genes overlap the run's panel, asks for phenotypes and writes the answers with their "
        "probabilities to obs; no label column is needed and the order of cells stays."
    )
    example: ClassVar[str] = (
        "perturbgene predict runs/mlm new.h5ad --output out.h5ad --ask cell_type --given tissue=lung"
    )

    input: str = option(
        "", help="h5ad file with the cells.", group="Input and output", is_required=True, is_positional=True
    )
    output: str = option("", help="h5ad file to write.", group="Input and output", is_required=True)
    overwrite: bool = option(False, help="Replace an output that is already there.", group="Input and output")
    ask: list[str] = option([], help="Phenotypes to predict; none named means all that are not given.")
    given: list[str] = option(
        [], help="Known phenotypes: NAME reads obs, NAME=LABEL says it of all cells.", keeps_commas=True
    )
    min_gene_coverage: float = option(
        0.5, help="Stop when the file has less than this share of the panel.", group="Genes and bins", within="[0, 1]"
    )

    @property
    def given_labels(self) -> dict[str, str | None]:
        """Label of each given phenotype, None where it is read from obs."""
        return named_values(self.given, flag="given")

    def check(self) -> None:
        super().check()
        check_question(self.ask, list(self.given_labels))
        if Path(self.output).absolute() == Path(self.input).absolute():
            raise InputError(f"output is {self.output!r}, the input itself, which must stay as it is. Change --output.")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(BaseConfig):
    """Settings of `download`."""

    verb: ClassVar[str] = "download"
    summary: ClassVar[str] = "Fetch data sets, resuming where a download broke off."
    about: ClassVar[str] = "Fetches a known set of shards, or any URLs; resumes, retries and compares checksums."
    example: ClassVar[str] = "perturbgene download tabula-sapiens --output_dir data --num_shards 4"

    known_sources: ClassVar[tuple[str, ...]] = ("tabula-sapiens",)

    sources: list[str] = option(
        [], help="tabula-sapiens, or URLs.", group="Input and output", is_required=True, is_positional=True
    )
    output_dir: str = option(".", help="Folder to write.", group="Input and output")
    base_url: str | None = option(None, help="Where the shards of tabula-sapiens lie, in place of the usual place.")
    num_shards: int = option(48, help="First shards to fetch of tabula-sapiens.", within="[1, 48]")
    checksums: str | None = option(None, help="File with lines `SHA256  NAME`.", group="Input and output")
    retries: int = option(5, help="Attempts after a dropped connection.", within="[0, inf)")
    overwrite: bool = option(False, help="Fetch again what is already there.", group="Input and output")

    def check(self) -> None:
        super().check()
        check_exists(self.checksums, flag="checksums")
        for source in self.sources:
            if source not in self.known_sources and "://" not in source:
                raise InputError(
                    f"{source!r} is neither a URL nor a known set. {did_you_mean(source, self.known_sources)}"
                )


CONFIGS: dict[str, type[BaseConfig]] = {
    config_class.verb: config_class
    for config_class in (PrepareConfig, MlmConfig, ClsConfig, EvaluateConfig, PredictConfig, DownloadConfig)
}

# ---------------------------------------------------------------------------------------------------------------------
# Command line


CONFIG_FLAG = Flag("config", str, None, "YAML file with settings by flag name; flags win over it.", GROUPS[0])
HELP_FLAG = Flag("help", bool, None, "Show this page and leave (also -h).", GROUPS[0], bare=True)
DEBUG_FLAG = Flag("debug", bool, None, "Show the traceback of an error.", GROUPS[0], bare=True)
HELP_ALL_FLAG = Flag("help-all", bool, None, "Show also every field of TrainingArguments.", GROUPS[0], bare=True)


def is_flag(token: str) -> bool:
    """Whether a token starts a flag; negative numbers and a lone dash are values.

    Example:
        >>> [is_flag(token) for token in ("--seed", "-x", "-1e-3", "-")]
        [True, True, False, False]
    """
    return token.startswith("-") and token != "-" and not re.fullmatch(r"-\.?\d\S*|-inf|-nan", token)


def find_flag(name: str, config_class: type[BaseConfig], *, where: str) -> Flag:
    """Look a flag up among a verb's own and, for training, among those of TrainingArguments.

    Raises:
        InputError: It is of another verb, gone, or unknown; says what comes nearest.
    """
    known = {CONFIG_FLAG.name: CONFIG_FLAG, **own_flags(config_class)}
    if name in known:
        return known[name]
    if issubclass(config_class, TrainingConfig):
        if name in GONE_IN_V5:
            raise InputError(f"{where} is gone from transformers 5. {GONE_IN_V5[name]}")
        known |= training_flags()
        if name in known:
            return known[name]
    verbs = [verb for verb, other in CONFIGS.items() if name in own_flags(other)]
    if verbs:
        raise InputError(
            f"{where} is a setting of {' and '.join(verbs)}, not of {config_class.verb}. "
            f"Remove it, or see `perturbgene {config_class.verb} -h`."
        )
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"See `perturbgene {config_class.verb} -h` for all."
    raise InputError(f"{where} is unknown to {config_class.verb}. {hint}")


def find_negatable(name: str, config_class: type[BaseConfig], *, where: str) -> tuple[Flag, bool]:
    """Look a flag up, also as ``no_NAME``; returns it and whether it was negated."""
    stem = name.removeprefix("no_")
    if stem != name and name not in GONE_IN_V5:
        known = own_flags(config_class)
        known = training_flags() if stem not in known and issubclass(config_class, TrainingConfig) else known
        if stem in known and bool in members(known[stem].kind):
            return known[stem], True
    return find_flag(name, config_class, where=where), False


def take_values(flag: Flag, rest: deque[str], *, where: str) -> Any:
    """Take the values of a flag from the tokens that follow it.

    Raises:
        InputError: The flag needs a value and none follows.
    """
    values: list[str] = []
    while rest and not is_flag(rest[0]) and (flag.is_list or not values):
        if flag.bare is True and rest[0].lower() not in (*BOOLEAN_WORDS, *NONE_WORDS) and bool in members(flag.kind):
            break
        values.append(rest.popleft())
    if values:
        return values if flag.is_list else values[0]
    if flag.bare is not None:
        return flag.bare
    raise InputError(f"{where} needs a value, but none follows. {advice(flag)}")


def scan(tokens: Sequence[str], config_class: type[BaseConfig]) -> tuple[dict[str, Any], list[str]]:
    """Sort tokens into values by flag name, already of the right type, and positionals."""
    values: dict[str, Any] = {}
    positionals = []
    rest = deque(tokens)
    while rest:
        token = rest.popleft()
        if token == "--":
            continue
        if not is_flag(token):
            positionals.append(token)
            continue
        shown, equals, text = token.partition("=")
        flag, is_negated = find_negatable(shown.lstrip("-").replace("-", "_"), config_class, where=shown)
        if is_negated and equals:
            raise InputError(f"{shown} takes no value, but was given {text!r}. Write --{flag.name} {text}.")
        raw = False if is_negated else text if equals else take_values(flag, rest, where=shown)
        values[flag.name] = convert(raw, flag, where=shown)
    return values, positionals


def assign_positionals(tokens: Sequence[str], config_class: type[BaseConfig]) -> dict[str, Any]:
    """Give positionals to their fields in the order of declaration; a list takes all that remain.

    Raises:
        InputError: There are more than the verb takes.
    """
    rest = list(tokens)
    values: dict[str, Any] = {}
    for flag in (flag for flag in own_flags(config_class).values() if flag.is_positional):
        if rest:
            values[flag.name] = rest if flag.is_list else rest.pop(0)
            rest = [] if flag.is_list else rest
    if rest:
        takes = " ".join(usage_positionals(config_class)) or "no argument without a flag"
        raise InputError(
            f"{listed(rest)} belongs to no flag, but {config_class.verb} takes {takes}. "
            f"Put a flag before it, or see `perturbgene {config_class.verb} -h`."
        )
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        check_no_repeats([str(key) for key in keys], flag="config")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of settings.

    Raises:
        InputError: The file is missing, is no YAML, or is no mapping.
    """
    try:
        settings = _UniqueKeyLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise InputError(
            f"config is {str(path)!r}, which cannot be read ({error.strerror}). Correct --config."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config is {str(path)!r}, which is no plain YAML: {error}. Correct the file.") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InputError(f"config is {str(path)!r}, which holds no `name: value` lines. Correct the file.")
    return settings


def yaml_values(path: str | Path, config_class: type[BaseConfig]) -> dict[str, Any]:
    """Settings of a YAML file, of the right types.

    Raises:
        InputError: A key is unknown, a value does not fit, or the file is of another verb.
    """
    settings = read_yaml(path)
    verb = settings.pop("verb", config_class.verb)
    if verb != config_class.verb:
        raise InputError(
            f"config {str(path)!r} is of the verb {verb!r}, not of {config_class.verb!r}. "
            "Call that verb, or remove the line `verb:` and what does not fit."
        )
    values = {}
    for key, value in settings.items():
        where = f"{key} in {path}"
        flag = find_flag(str(key), config_class, where=where)
        if flag is CONFIG_FLAG:
            raise InputError(f"{where} would have one file name another. Put all settings into one file.")
        values[flag.name] = convert(value, flag, where=where)
    return values


def build_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make the dataclass; what is no field of its own goes to ``training_overrides``."""
    own = own_flags(config_class)
    fields = {name: value for name, value in values.items() if name in own}
    overrides = {name: value for name, value in values.items() if name not in own}
    return config_class(**fields, **({"training_overrides": overrides} if overrides else {}))


def load_config(path: str | Path) -> BaseConfig:
    """Read what `BaseConfig.save` wrote.

    Raises:
        InputError: The file does not say its verb, or does not fit it.
    """
    verb = read_yaml(path).get("verb")
    if verb not in CONFIGS:
        raise InputError(f"{str(path)!r} does not say its verb. Add a line such as `verb: mlm`.")
    return build_config(CONFIGS[verb], yaml_values(path, CONFIGS[verb]))


def find_verb(tokens: Sequence[str]) -> int:
    """Index of the verb; it may follow flags (``--seed 1 mlm``) but not be the value of one if another will do.

    Raises:
        InputError: There is none.
    """
    if tokens and not is_flag(tokens[0]):
        if tokens[0] in CONFIGS:
            return 0
        raise InputError(f"{tokens[0]!r} is no verb. {did_you_mean(tokens[0], list(CONFIGS))} See `perturbgene -h`.")
    candidates = [i for i, token in enumerate(tokens) if token in CONFIGS]
    if not candidates:
        raise InputError(f"The verb is missing. Give one of {listed(CONFIGS, most=20)}; see `perturbgene -h`.")
    free = [i for i in candidates if not is_flag(tokens[i - 1]) or "=" in tokens[i - 1]]
    return (free or candidates)[0]


def parse_args(argv: Sequence[str] | None = None) -> BaseConfig:
    """Read a command line into the settings of its verb: flag over YAML over default.

    Args:
        argv: Tokens after the program's name; those of this process by default.

    Returns:
        The configuration of the verb, checked.

    Raises:
        InputError: Something given cannot be; the message names the flag.
        HelpRequested: A help page was asked for, or nothing was given.

    Example:
        >>> parse_args(["predict", "runs/mlm", "in.h5ad", "--output", "out.h5ad", "--given", "sex"]).given_labels
        {'sex': None}
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    wants_all = bool({"--help-all", "--help_all"} & set(tokens))
    wants_help = wants_all or bool({"-h", "--help"} & set(tokens))
    if wants_help and not set(tokens) & set(CONFIGS):
        raise HelpRequested(overview())
    verb_index = find_verb(tokens)
    config_class = CONFIGS[tokens[verb_index]]
    if wants_help:
        raise HelpRequested(manual_page(config_class, with_training_flags=wants_all))
    before, more = scan(tokens[:verb_index], config_class)
    after, positionals = scan(tokens[verb_index + 1 :], config_class)
    given = {**before, **assign_positionals(more + positionals, config_class), **after}
    path = given.pop("config", None)
    from_file = yaml_values(path, config_class) if path is not None else {}
    return build_config(config_class, {**from_file, **given})


# ---------------------------------------------------------------------------------------------------------------------
# Manual pages


def metavar(flag: Flag) -> str:
    """What stands for the value on the manual page: choices, NUMBER, TEXT, ...; empty for a boolean."""
    kinds = [kind for kind in members(flag.kind) if kind is not types.NoneType]
    kind = next((kind for kind in kinds if get_origin(kind) is Literal), kinds[0])
    item = (get_args(kind) or (str,))[0] if get_origin(kind) is list or kind is list else kind
    if get_origin(item) is Literal:
        shown = "|".join(str(choice) for choice in get_args(item))
    elif isinstance(item, type) and issubclass(item, Enum):
        shown = "|".join(str(member.value) for member in item)
    else:
        shown = {bool: "", int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(item, "JSON")
    return f"{shown} ..." if item is not kind else shown


def advice(flag: Flag) -> str:
    """Last sentence of a refusal: what the flag takes."""
    shown = metavar(flag).removesuffix(" ...")
    return f"Give --{flag.name} one of {shown}." if "|" in shown else f"Give --{flag.name} {shown or 'true or false'}."


def usage_positionals(config_class: type[BaseConfig]) -> Iterator[str]:
    """Positionals as the usage line shows them."""
    for flag in own_flags(config_class).values():
        if flag.is_positional:
            yield f"{flag.name.upper()}{' ...' if flag.is_list else ''}"


def describe_flag(flag: Flag) -> str:
    """Entry of the manual page: the flag, and beneath it help, default and range."""
    default = flag.default.value if isinstance(flag.default, Enum) else flag.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    shown = shown.lower() if default is None or isinstance(default, bool) else shown
    notes = ["required"] if flag.is_required else [f"default {shown}"] if shown and flag.default is not None else []
    notes += [f"in {flag.within}"] if flag.within else []
    value = metavar(flag)
    if len(value) > HELP_WIDTH - 30:
        notes.append(f"one of {value.replace('|', ', ')}")
        value = "NAME"
    text = flag.help + (f" ({'; '.join(notes)})" if notes else "")
    title = f"  --{flag.name} {value}".rstrip()
    lead = " " * 8
    return f"{title}\n" + textwrap.fill(text, HELP_WIDTH, initial_indent=lead, subsequent_indent=lead)


def manual_page(config_class: type[BaseConfig], *, with_training_flags: bool = False) -> str:
    """Manual page of a verb: what it does, usage, an example, options by group with their defaults."""
    is_training = issubclass(config_class, TrainingConfig)
    own = own_flags(config_class)
    flags = list(own.values()) + [CONFIG_FLAG, HELP_FLAG, DEBUG_FLAG] + ([HELP_ALL_FLAG] if is_training else [])
    if is_training and with_training_flags:
        flags += [flag for flag in training_flags().values() if flag.name not in own]
    usage = " ".join(["perturbgene", config_class.verb, *usage_positionals(config_class), "[--flag value ...]"])
    parts = [
        f"perturbgene {config_class.verb}: {config_class.summary}",
        textwrap.fill(config_class.about, HELP_WIDTH, initial_indent="  ", subsequent_indent="  "),
        f"Usage\n  {usage}",
        f"Example\n  {config_class.example}",
    ]
    for group in GROUPS:
        if entries := [describe_flag(flag) for flag in flags if flag.group == group]:
            parts.append("\n".join([group, *entries]))
    parts.append("Booleans: --flag, --flag false or --no_flag. Lists: --flag a b c or --flag a,b,c.")
    return "\n\n".join(parts)


def overview() -> str:
    """Page of the program: its verbs and where to read on."""
    verbs = [f"  {verb:<10}{config_class.summary}" for verb, config_class in CONFIGS.items()]
    examples = [f"  {config_class.example}" for config_class in CONFIGS.values() if config_class.verb != "download"]
    parts = [
        "perturbgene: language models of single cells, from h5ad files to predictions.",
        "Usage\n  perturbgene VERB [ARGUMENT ...] [--flag value ...]\n  perturbgene VERB -h",
        "\n".join(["Verbs", *verbs]),
        "\n".join(["Example, from files to predictions", *examples]),
        "Every verb reads --config FILE.yaml; a flag wins over the file, the file over the default.\n"
        "--version shows the version, --debug the traceback of an error.",
    ]
    return "\n\n".join(parts)
