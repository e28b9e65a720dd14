"""What a setting says about itself: a dataclass field is a flag, a YAML key and an entry of the manual page.

Owns `Flag` and how it is declared, collected and spelt; leaves reading values to `values`. Imports transformers only
when its training arguments are asked for.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

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
    def spelling(self) -> str:
        """The name as users write it: a field that Python's grammar keeps from its name ends in "_"."""
        return self.name.rstrip("_")

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


def own_flags(config_class: type[Any]) -> dict[str, Flag]:
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


def usage_positionals(config_class: type[Any]) -> Iterator[str]:
    """Positionals as the usage line shows them."""
    for flag in own_flags(config_class).values():
        if flag.is_positional:
            yield f"{flag.name.upper()}{' ...' if flag.is_list else ''}"
