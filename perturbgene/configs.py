"""Settings of every verb: one dataclass per verb, one field = one flag = one help text = one default.

Owns reading a command line, and is the door to `settings`, where flags, values, checks, YAML files and manual pages
lie; leaves reading data files to the data layer. Imports neither torch nor transformers until training arguments are
asked for.
"""

import re
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.checks import check_question
from perturbgene.cli.flags import GROUPS, Flag, advice, members, own_flags, training_flags, usage_positionals
from perturbgene.cli.lookup import GONE_IN_V5, find_flag, find_negatable
from perturbgene.cli.manual import manual_page, overview
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.values import BOOLEAN_WORDS, NONE_WORDS, convert
from perturbgene.cli.verbs import (
    CONFIGS,
    AttributeConfig,
    ClsConfig,
    CounterfactualConfig,
    DownloadConfig,
    EmbedConfig,
    EvaluateConfig,
    MlmConfig,
    PerturbConfig,
    PredictConfig,
    PrepareConfig,
)
from perturbgene.cli.yaml_files import build_config, load_config, yaml_values
from perturbgene.errors import InputError, did_you_mean, listed

__all__ = [
    "CONFIGS",
    "GONE_IN_V5",
    "GROUPS",
    "AttributeConfig",
    "BaseConfig",
    "ClsConfig",
    "CounterfactualConfig",
    "DownloadConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "HelpRequested",
    "MlmConfig",
    "PerturbConfig",
    "PredictConfig",
    "PrepareConfig",
    "TrainingConfig",
    "check_question",
    "find_flag",
    "load_config",
    "overview",
    "own_flags",
    "parse_args",
    "training_flags",
]


class HelpRequested(Exception):
    """The user asked for a help page; carries its text for the caller to print."""


def is_flag(token: str) -> bool:
    """Whether a token starts a flag; negative numbers and a lone dash are values.

    Example:
        >>> [is_flag(token) for token in ("--seed", "-x", "-1e-3", "-")]
        [True, True, False, False]
    """
    return token.startswith("-") and token != "-" and not re.fullmatch(r"-\.?\d\S*|-inf|-nan", token)


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
