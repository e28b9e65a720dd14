"""Manual pages: one of each verb, one of the program, made from what the settings say of themselves.

Owns their layout; every word about a setting stands where the setting is declared.
"""

import textwrap
from enum import Enum

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.flags import GROUPS, Flag, metavar, own_flags, training_flags, usage_positionals
from perturbgene.cli.lookup import CONFIG_FLAG, DEBUG_FLAG, HELP_ALL_FLAG, HELP_FLAG
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.verbs import CONFIGS

HELP_WIDTH = 100


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
    title = f"  --{flag.spelling} {value}".rstrip()
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
