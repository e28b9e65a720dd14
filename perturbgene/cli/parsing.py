"""The command line: words and YAML files in, a verb's checked settings or its manual page out.

Owns reading; every option is declared in `base`, `training` and `verbs`. Imports neither torch nor transformers: the
fields of `transformers.TrainingArguments` are read from its source file.
"""

import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
import textwrap
import types
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from perturbgene.cli.base import SETTINGS_FORMAT, BaseConfig
from perturbgene.cli.options import ARGUMENTS, GROUPS, IN_OUT, Flag, check_no_repeats, once, own_flags
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.verbs import CONFIGS
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import check_format

ConfigT = TypeVar("ConfigT", bound=BaseConfig)

HELP_WIDTH = 100
NONE_WORDS = ("none", "null")
BOOLEAN_WORDS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
#: Types in the order in which a value is tried: the strictest first.
KINDS = (dict, list, bool, int, float, str)

CONFIG_FLAG = Flag("config", (str,), None, "YAML file with settings, named like the flags; flags override it.", IN_OUT)
HELP_FLAGS = (
    CONFIG_FLAG,
    Flag("help", (bool,), None, "Show this page (also -h).", IN_OUT),
    Flag("debug", (bool,), None, "Show the traceback of an error.", IN_OUT),
)
HELP_ALL_FLAG = Flag(
    "help-all", (bool,), None, "Also show the fields of transformers.TrainingArguments, which are all flags.", IN_OUT
)
#: What PyYAML raises on text that it cannot read: its own errors, and Python's, from 2026-99-99 or 3,000 brackets.
YAML_ERRORS = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError)
#: Names from older versions of transformers that people still type.
RENAMED = {
    "evaluation_strategy": "It is now called --eval_strategy.",
    "logging_dir": "TensorBoard logs are in the folder `runs` of --output_dir.",
    "no_cuda": "It is now called --use_cpu.",
    "overwrite_output_dir": "Choose another --output_dir, or continue with --resume_from_checkpoint.",
    "warmup_ratio": "Give the ratio to --warmup_steps: a number below 1 is a share of all steps.",
}


class HelpRequested(Exception):
    """The user asked for a help page; carries its text for the caller to print."""


@functools.cache
def training_flags() -> dict[str, Flag]:
    """Return the fields of `transformers.TrainingArguments` as flags, read from its source without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    known = {kind.__name__: kind for kind in KINDS} | {"None": types.NoneType, "Literal": types.NoneType}
    flags = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        name = ast.unparse(node.target)
        words = {keyword.arg: keyword.value for keyword in node.value.keywords}
        metadata = dict(_literal(words.get("metadata")) or {})
        members = [part.partition("[")[0] for part in ast.unparse(node.annotation).split(" | ")]
        kinds = tuple(dict.fromkeys(known[member] for member in members if member in known))
        kinds = kinds if set(kinds) - {types.NoneType} else (dict, *kinds)  # a class of theirs is given as JSON
        flags[name] = Flag(
            name, kinds, _literal(words.get("default")), " ".join(metadata.get("help", "").split()), ARGUMENTS,
            choices=tuple(metadata.get("choices") or ()), bare=True if bool in kinds else metadata.get("const"),
        )  # fmt: skip
    return flags


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a literal in source code, None for anything that would have to be run."""
    if isinstance(node, ast.Dict):
        keys = (key.value if isinstance(key, ast.Constant) else None for key in node.keys)
        return {key: _literal(value) for key, value in zip(keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


@once
def known_flags(config_class: type[BaseConfig]) -> dict[str, Flag]:
    """Return everything that a verb understands, by the names that may be typed."""
    own = own_flags(config_class)
    spelled = {flag.spelling: flag for flag in own.values()}
    training = training_flags() if issubclass(config_class, TrainingConfig) else {}
    return {**training, **own, **spelled, CONFIG_FLAG.name: CONFIG_FLAG}


def find_flag(name: str, config_class: type[BaseConfig], *, where: str) -> Flag:
    """Look up a flag of a verb; the `InputError` says whether it is gone or another verb's, or what comes nearest."""
    known, verb = known_flags(config_class), config_class.verb
    if name in known:
        return known[name]
    if name in RENAMED and issubclass(config_class, TrainingConfig):
        raise InputError(f"{where} is gone from transformers 5. {RENAMED[name]}")
    if verbs := [other for other, other_class in CONFIGS.items() if name in own_flags(other_class)]:
        raise InputError(
            f"{where} is a setting of {' and '.join(verbs)}, not of {verb}. Remove it, or see `perturbgene {verb} -h`."
        )
    hint = did_you_mean(name, list(known), otherwise=f"See `perturbgene {verb} -h` for all.")
    raise InputError(f"{where} is unknown to {verb}. {hint}")


def split_commas(text: str) -> list[str]:
    """Split at commas, but not within braces (``shard_{0,1}.h5ad``) nor before a space (``T cell, CD4``).

    Example:
        >>> split_commas("a_{0,1}.h5ad,b.h5ad")
        ['a_{0,1}.h5ad', 'b.h5ad']
    """
    parts = re.split(r",(?![^{]*})(?!\s)", text)
    return [part.strip() for part in parts if part.strip()] or [text]


def to_kind(value: Any, kind: Any, flag: Flag) -> Any:
    """Turn a value into one type; a ValueError has the rest of the sentence "the value ..."."""
    if kind is list:
        items = value if isinstance(value, list | tuple) else [value]
        if not flag.keeps_commas:
            items = [part for item in items for part in (split_commas(item) if isinstance(item, str) else [item])]
        return [to_kind(item, flag.item, flag) for item in items]
    if flag.choices:
        value = "no" if value is False and "no" in flag.choices else value  # YAML reads a bare `no` as False
        if value not in flag.choices:
            hint = did_you_mean(str(value), flag.choices, otherwise="")
            raise ValueError(f"is not one of its choices{hint and f' (d{hint[1:]})'}")
        return value
    if kind is bool:
        if str(value).lower() not in BOOLEAN_WORDS:
            raise ValueError("is neither true nor false")
        return BOOLEAN_WORDS[str(value).lower()]
    if kind is dict:
        with suppress(json.JSONDecodeError):
            value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError("is not a JSON object such as '{\"name\": 1}'")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is not text (put it in quotes)" if kind is str else "is not a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("is too large")
    if kind is str or isinstance(value, int):
        return kind(value)
    try:
        number = float(value)  # text too, since YAML does not recognize 1e-4
    except ValueError as error:
        raise ValueError("is not a number") from error
    if kind is int and not number.is_integer():
        raise ValueError("is not a whole number")
    return kind(number)


def convert(value: Any, flag: Flag, *, where: str) -> Any:
    """Turn text, a list of texts or a YAML value into the type of the flag; `where` names the source in the message."""
    word = str(value).lower()
    if types.NoneType in flag.kinds and (value is None or (word in NONE_WORDS and not flag.none_is_text)):
        return None
    if flag.bare is not None and bool not in flag.kinds and word in ("true", "false"):
        return flag.bare if word == "true" else None
    if isinstance(value, list) and len(value) == 1 and str in flag.kinds:
        value = value[0]
    kinds = [kind for kind in KINDS if kind in flag.kinds]
    if isinstance(value, str) and str in kinds:
        is_json = dict in kinds and value.lstrip().startswith("{")
        kinds = [dict] if is_json else [kind for kind in kinds if kind not in (dict, list)]
    problem = "is empty" if value is None else ""
    for kind in kinds if value is not None else []:
        try:
            return to_kind(value, kind, flag)
        except ValueError as error:
            problem = problem or str(error)
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    raise InputError(f"{where} was given {shown!r}, which {problem}. {advice(flag)}")


def is_flag(token: str) -> bool:
    """Return whether a word starts a flag; negative numbers and a lone dash are values.

    Example:
        >>> [is_flag(token) for token in ("--seed", "-x", "-1e-3", "-")]
        [True, True, False, False]
    """
    return token.startswith("-") and token != "-" and not re.fullmatch(r"-\.?\d\S*|-inf|-nan", token)


def take_values(flag: Flag, rest: deque[str], *, where: str) -> Any:
    """Take the values of a flag from the words that follow it."""
    values: list[str] = []
    while rest and not is_flag(rest[0]) and (flag.is_list or not values):
        if bool in flag.kinds and rest[0].lower() not in (*BOOLEAN_WORDS, *NONE_WORDS):
            break
        values.append(rest.popleft())
    if values:
        return values if flag.is_list else values[0]
    if flag.bare is not None:
        return flag.bare
    raise InputError(f"{where} needs a value, but none follows. {advice(flag)}")


def scan(tokens: Sequence[str], config_class: type[BaseConfig]) -> tuple[dict[str, Any], list[str]]:
    """Sort words into values by flag name, already of the right type, and words without a flag."""
    values: dict[str, Any] = {}
    positionals: list[str] = []
    rest = deque(tokens)
    while rest:
        token = rest.popleft()
        if token == "--":
            positionals += rest
            break
        if not is_flag(token):
            positionals.append(token)
            continue
        shown, equals, text = token.partition("=")
        name = shown.lstrip("-").replace("-", "_")
        negated = known_flags(config_class).get(name.removeprefix("no_")) if name.startswith("no_") else None
        if negated and bool in negated.kinds:
            if equals:
                raise InputError(f"{shown} takes no value, but was given {text!r}. Write --{negated.spelling} {text}.")
            values[negated.name] = False
            continue
        flag = find_flag(name, config_class, where=shown)
        values[flag.name] = convert(text if equals else take_values(flag, rest, where=shown), flag, where=shown)
    return values, positionals


def find_verb(tokens: Sequence[str]) -> int:
    """Return the index of the verb; it may follow flags (``--seed 1 mlm``), and is no flag's value if another fits."""
    if tokens and not is_flag(tokens[0]):
        if tokens[0] in CONFIGS:
            return 0
        raise InputError(f"{tokens[0]!r} is not a verb. {did_you_mean(tokens[0], list(CONFIGS))} See `perturbgene -h`.")
    candidates = [i for i, token in enumerate(tokens) if token in CONFIGS]
    if not candidates:
        raise InputError(f"The verb is missing. Give one of {listed(CONFIGS, most=20)}; see `perturbgene -h`.")
    free = [i for i in candidates if not is_flag(tokens[i - 1]) or "=" in tokens[i - 1]]
    return (free or candidates)[0]


def parse_args(argv: Sequence[str] | None = None) -> BaseConfig:
    """Read a command line into the settings of its verb: flags override YAML, and YAML overrides defaults.

    Raises:
        InputError: Something given is impossible; the message names the flag.
        HelpRequested: A help page was asked for.

    Example:
        >>> parse_args(["predict", "runs/mlm", "in.h5ad", "--output", "out.h5ad", "--given", "sex"]).given_labels
        {'sex': None}
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    flags = set(tokens[: tokens.index("--")] if "--" in tokens else tokens)
    wants_all = bool({"--help-all", "--help_all"} & flags)
    wants_help = wants_all or bool({"-h", "--help"} & flags)
    if wants_help and not flags & set(CONFIGS):
        raise HelpRequested(overview())
    verb_index = find_verb(tokens)
    config_class = CONFIGS[tokens[verb_index]]
    if wants_help:
        raise HelpRequested(manual_page(config_class, with_training_flags=wants_all))
    before, words = scan(tokens[:verb_index], config_class)
    after, more_words = scan(tokens[verb_index + 1 :], config_class)
    words += more_words
    given = before
    for flag in (flag for flag in own_flags(config_class).values() if flag.is_positional and words):
        given[flag.name], words = (words, []) if flag.is_list else (words[0], words[1:])
    if words:
        takes = usage_positionals(config_class) or "no argument without a flag"
        raise InputError(
            f"{listed(words)} belongs to no flag, but {config_class.verb} takes {takes}. "
            f"Put a flag before it, or see `perturbgene {config_class.verb} -h`."
        )
    given |= after
    path = given.pop("config", None)
    from_file = read_yaml(path, config_class)[1] if path is not None else {}
    return build_config(config_class, {**from_file, **given})


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently keep the last, and references.

    Nine lines that each repeat the line before ten times are a value of a billion words.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it refers to *{self.peek_event().anchor}, so write that value again in full")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        check_no_repeats([str(key.value) for key, _ in node.value], flag="config")
        return super().construct_mapping(node, deep=deep)


def settings_in(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file as they are written there, with the verb if it names one.

    Raises:
        InputError: The file cannot be read, is not plain YAML, or was written by a newer perturbgene.
    """
    try:
        settings = _StrictLoader(Path(path).read_text(encoding="utf-8")).get_single_data() or {}
    except OSError as error:
        raise InputError(
            f"config is {str(path)!r}, which cannot be read ({error.strerror}). Correct --config."
        ) from error
    except InputError:
        raise
    except YAML_ERRORS as error:
        raise InputError(f"config is {str(path)!r}, which is not plain YAML: {error}. Correct the file.") from error
    if not isinstance(settings, dict):
        raise InputError(f"config is {str(path)!r}, which has no `name: value` lines. Correct the file.")
    check_format(path, settings.pop("format_version", None), reads=SETTINGS_FORMAT)
    return settings


def read_yaml(path: str | Path, expected: type[BaseConfig] | None = None) -> tuple[type[BaseConfig], dict[str, Any]]:
    """Return the class and the typed settings of a YAML file, which must name its verb if no class is expected."""
    settings = settings_in(path)
    verb = settings.pop("verb", expected.verb if expected else None)
    if expected and verb != expected.verb:
        raise InputError(
            f"config {str(path)!r} is for the verb {verb!r}, not for {expected.verb!r}. "
            "Call that verb, or remove the line `verb:` and what does not fit."
        )
    if str(verb) not in CONFIGS:
        raise InputError(f"{str(path)!r} does not name its verb. Add a line such as `verb: mlm`.")
    values = {}
    for key, value in settings.items():
        where = f"{key} in {path}"
        flag = find_flag(str(key), CONFIGS[verb], where=where)
        if flag is CONFIG_FLAG:
            raise InputError(f"{where} would make one file name another. Put all settings into one file.")
        values[flag.name] = convert(value, flag, where=where)
    return CONFIGS[verb], values


def build_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make the dataclass; values without a field of their own go to ``training_overrides``."""
    own = own_flags(config_class)
    fields = {name: value for name, value in values.items() if name in own}
    overrides = {name: value for name, value in values.items() if name not in own}
    return config_class(**fields, **({"training_overrides": overrides} if overrides else {}))


def config_of(config_class: type[ConfigT], settings: Mapping[str, Any]) -> ConfigT:
    """Make the settings of a verb from values that have their types, and check them against this machine."""
    config = build_config(config_class, settings)
    config.check_machine()
    return config


def load_config(path: str | Path) -> BaseConfig:
    """Read what `BaseConfig.save` wrote; the file must name its verb."""
    return build_config(*read_yaml(path))


def metavar(flag: Flag) -> str:
    """Return what a value looks like on the manual page: its choices, NUMBER, TEXT, ...; empty for a boolean."""
    names = {bool: "", int: "INTEGER", float: "NUMBER", str: "TEXT", dict: "JSON"}
    kind = next((kind for kind in flag.kinds if kind in KINDS), str)
    shown = "|".join(flag.choices) or names[flag.item if kind is list else kind]
    return f"{shown} ..." if kind is list else shown


def advice(flag: Flag) -> str:
    """Return the last sentence of an error message: what to give."""
    shown = metavar(flag).removesuffix(" ...")
    return f"Give --{flag.spelling} {f'one of {shown}' if flag.choices else shown or 'true or false'}."


def usage_positionals(config_class: type[BaseConfig]) -> str:
    """Return the arguments without a flag as the usage line shows them."""
    flags = (flag for flag in own_flags(config_class).values() if flag.is_positional)
    return " ".join(f"{flag.name.upper()}{' ...' if flag.is_list else ''}" for flag in flags)


def describe_flag(flag: Flag) -> str:
    """Return the entry of the manual page: the flag, and below it help, default and range."""
    default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    default = str(default).lower() if isinstance(default, bool) else default
    notes = ["required"] if flag.is_required else [f"default {default}"] if default not in (None, "") else []
    low, _, high = flag.within.partition(", ")
    words = f"{'at least' if low.startswith('[') else 'above'} {low[1:]}" if high == "inf)" else f"in {flag.within}"
    notes += [words] if flag.within else []
    notes += ["separate values with spaces; commas are kept"] if flag.keeps_commas and flag.is_list else []
    value = metavar(flag)
    if len(value) > HELP_WIDTH - 30:
        notes.append(f"one of {', '.join(flag.choices)}")
        value = "NAME"
    text = textwrap.fill(flag.help + (f" ({'; '.join(notes)})" if notes else ""), HELP_WIDTH - 8)
    return f"  --{flag.spelling} {value}".rstrip() + "\n" + textwrap.indent(text, " " * 8)


def manual_page(config_class: type[BaseConfig], *, with_training_flags: bool = False) -> str:
    """Return the manual page of a verb: what it does, usage, an example, options by group with their defaults."""
    flags = [*own_flags(config_class).values(), *HELP_FLAGS]
    if issubclass(config_class, TrainingConfig):
        flags.append(HELP_ALL_FLAG)
    if with_training_flags:
        names = {flag.name for flag in flags}
        more = (flag for flag in known_flags(config_class).values() if flag.group == ARGUMENTS)
        flags += [flag for flag in more if flag.name not in names]
    usage = " ".join(["perturbgene", config_class.verb, usage_positionals(config_class), "[--flag value ...]"])
    summary, _, about = (inspect.getdoc(config_class) or "").partition("\n\n")
    parts = [
        f"perturbgene {config_class.verb}: {summary}",
        textwrap.indent(textwrap.fill(about, HELP_WIDTH - 2), "  "),
        f"Usage\n  {' '.join(usage.split())}",
        f"Example\n  {config_class.example}",
    ]
    for group in GROUPS:
        if entries := [describe_flag(flag) for flag in flags if flag.group == group]:
            parts.append("\n".join([group, *entries]))
    parts.append(
        "Write true or false as --flag, --flag false or --no_flag, and a list as --flag a b c or --flag a,b,c (unless\n"
        "its entry says otherwise). Everything after a lone -- is an argument without a flag."
    )
    return "\n\n".join(parts)


def overview() -> str:
    """Return the page of the program: its verbs and where to read more."""
    width = max(map(len, CONFIGS)) + 2
    pages = {verb: inspect.getdoc(config_class) or "" for verb, config_class in CONFIGS.items()}
    verbs = [f"  {verb:<{width}}{page.splitlines()[0]}" for verb, page in pages.items()]
    examples = [f"  {config_class.example}" for verb, config_class in CONFIGS.items() if verb != "download"]
    parts = [
        "perturbgene: language models of single cells, from h5ad files to predictions.",
        "Usage\n  perturbgene VERB [ARGUMENT ...] [--flag value ...]\n  perturbgene VERB -h",
        "\n".join(["Verbs", *verbs]),
        "\n".join(["Examples, from files to predictions", *examples]),
        "Every verb reads settings from --config FILE.yaml; flags override the file, and the file overrides defaults.\n"
        "--version shows the version, and --debug shows the traceback of an error.",
    ]
    return "\n\n".join(parts)
