"""Options: one dataclass field is a flag, a YAML key, a default, a help text and an entry of the manual page.

Owns `Flag`, how it is declared, and the checks that need no data; reading text into options is in `parsing`.
Letters: e edges.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from perturbgene.errors import InputError, listed

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

IN_OUT, TASK, DATA, GENES = "Input and output", "Task", "Data", "Genes and bins"
MODEL, TRAINING, RUNNING, ARGUMENTS = "Model", "Training", "Running", "transformers.TrainingArguments"
#: Headings of a manual page, in their order.
GROUPS = (IN_OUT, TASK, DATA, GENES, MODEL, TRAINING, RUNNING, ARGUMENTS)


#: Endings that no folder has which we write.
FILE_ENDINGS = (".h5ad", ".h5", ".zarr", ".csv", ".tsv", ".txt", ".parquet", ".json", ".yaml", ".png", ".html")


@dataclass(frozen=True)
class Flag:
    """One flag of the command line and key of the YAML file."""

    name: str  # of the field; the flag is --name
    kinds: tuple[type, ...]  # types that a value may have, NoneType among them if it may be none
    default: Any = None  # value if neither flag nor YAML gives one
    help: str = ""  # one or two sentences for the manual page
    group: str = TASK  # heading of the manual page that lists it
    item: type = str  # type of the items of a list
    choices: tuple[str, ...] = ()  # the only values that are allowed; empty for any
    within: str = ""  # interval of allowed numbers such as "[0, 1)"; empty for any
    excludes: tuple[str, ...] = ()  # options that answer the same question
    is_required: bool = False  # an empty value is refused
    is_positional: bool = False  # required, and may be given without its flag, in the order of declaration
    is_path: bool = False  # files or folders that must exist before the command starts
    may_be_on_hub: bool = False  # a path that may also be the name of a model on the Hugging Face Hub
    suffixes: tuple[str, ...] = ()  # endings of the files that an output may have; empty for any
    is_folder: bool = False  # a folder to write, which has no ending of a file
    is_unique: bool = False  # the values of a list must differ
    is_increasing: bool = False  # numbers must be positive and each above the one before
    is_named: bool = False  # each value must read NAME or NAME=VALUE, and the names must differ
    keeps_commas: bool = False  # a list is not split at commas, since labels and donors may contain them
    none_is_text: bool = False  # the word `none` is a value like any other, since a label may have this name
    bare: Any = None  # value if the flag is given without one; None if it needs a value

    @property
    def spelling(self) -> str:
        """The name as users write it: `from_` is ``--from``, a word that Python keeps for itself."""
        return self.name.rstrip("_")

    @property
    def is_list(self) -> bool:
        """True if the flag takes all values up to the next flag."""
        return list in self.kinds


def option(default: Any, help: str, **traits: Any) -> Any:
    """Declare a dataclass field that is a flag; ``traits`` are further attributes of `Flag`."""
    metadata = {"help": help, "is_required": traits.get("is_positional", False), **traits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def once(function: FunctionT) -> FunctionT:
    """Keep what a function returns of each class; mypy takes dataclasses for unhashable under `functools.cache`."""
    return cast(FunctionT, functools.cache(function))


@once
def own_flags(config_class: type[Any]) -> dict[str, Flag]:
    """Return the flags of a verb's dataclass by name; a class may name the `group` of the fields that it declares."""
    hints = typing.get_type_hints(config_class)
    flags = {}
    for declared in dataclasses.fields(config_class):
        if "help" not in declared.metadata:
            continue
        hint = hints[declared.name]
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = tuple(str if get_origin(member) is Literal else get_origin(member) or member for member in members)
        item = next((get_args(member)[0] for member in members if get_origin(member) is list), str)
        choices = next((get_args(member) for member in (*members, item) if get_origin(member) is Literal), ())
        owner = next(base for base in config_class.__mro__ if declared.name in vars(base).get("__annotations__", {}))
        factory = declared.default_factory
        default = declared.default if factory is dataclasses.MISSING else factory()
        traits = {"bare": True if bool in kinds else None, "group": vars(owner).get("group", TASK)}
        traits |= {"item": str if choices else item, "choices": choices, **declared.metadata}
        flags[declared.name] = Flag(declared.name, kinds, default, **traits)
    return flags


def check_flag(value: Any, flag: Flag) -> None:
    """Refuse a value that the option's traits do not allow."""
    values = value if isinstance(value, list) else [value]
    if flag.is_required and value in (None, "", []):
        way = f"{flag.name.upper()} after the verb, or --{flag.name}" if flag.is_positional else f"--{flag.name}"
        raise InputError(f"{flag.name} is missing. Give {way} ({flag.help})")
    low, _, high = flag.within.partition(", ")
    for number in values if flag.within and value is not None else []:
        is_above = number >= float(low[1:]) if low[0] == "[" else number > float(low[1:])
        is_below = number <= float(high[:-1]) if high[-1] == "]" else number < float(high[:-1])
        if not (is_above and is_below):
            raise InputError(f"{flag.name} is {number}, but it must be in {flag.within}. Change --{flag.name}.")
    if flag.is_folder and Path(value or ".").suffix in FILE_ENDINGS:
        raise InputError(f"{flag.name} is {value!r}, but a folder is written. Give another --{flag.name}.")
    if flag.suffixes and value and Path(value).suffix not in flag.suffixes:
        known = " or ".join(flag.suffixes)
        raise InputError(f"{flag.name} is {value!r}, but it must end in {known}. Change --{flag.name}.")
    if flag.is_unique:
        check_no_repeats(values, flag=flag.name)
    if flag.is_named:
        named_values(values, flag=flag.name)
    if flag.is_increasing:
        check_edges(values)


def check_edges(edges_e: Sequence[float], *, owner: str = "bin_edges") -> None:
    """Refuse bin edges that are not finite, positive and increasing."""
    for i, edge in enumerate(edges_e):
        if not 0 < edge < float("inf"):
            raise InputError(
                f"{owner} must be finite and above 0, but edge {i} is {edge:g}; bin 0 means not expressed. "
                "Remove it from --bin_edges."
            )
        if i and edge <= edges_e[i - 1]:
            raise InputError(
                f"{owner} must increase, but edge {i} ({edge:g}) does not exceed edge {i - 1} "
                f"({edges_e[i - 1]:g}). Sort and deduplicate --bin_edges."
            )


def check_no_repeats(names: Sequence[str], *, flag: str) -> None:
    """Refuse a list that names something twice."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{flag} names {listed(repeated)} more than once. Keep one of each in --{flag}.")


def named_values(entries: Sequence[str], *, flag: str) -> dict[str, str | None]:
    """Read entries ``name`` or ``name=value``.

    Example:
        >>> named_values(["tissue=lung", "sex"], flag="given")
        {'tissue': 'lung', 'sex': None}
    """
    pairs = [entry.partition("=") for entry in entries]
    for name, equals, value in pairs:
        if not name.strip() or (equals and not value.strip()):
            raise InputError(f"{flag} has {name + equals + value!r}, but must be NAME or NAME=VALUE. Correct --{flag}.")
    check_no_repeats([name.strip() for name, _, _ in pairs], flag=flag)
    return {name.strip(): value.strip() if equals else None for name, equals, value in pairs}


def entries_of(values: Mapping[str, Any]) -> list[str]:
    """Write a mapping as entries NAME or NAME=VALUE, several where it has several values for a name.

    Example:
        >>> entries_of({"tissue": None, "cell_type": ("T", "B"), "age": 3})
        ['tissue', 'cell_type=T', 'cell_type=B', 'age=3']
    """
    is_one = {name: isinstance(value, str) or not isinstance(value, Iterable) for name, value in values.items()}
    pairs = [(name, one) for name, value in values.items() for one in ([value] if is_one[name] else value)]
    return [name if one is None else f"{name}={one}" for name, one in pairs]


def conditions(where: Mapping[str, Any] | Sequence[str]) -> dict[str, list[str]]:
    """Read which cells are meant: entries COLUMN=VALUE, or a mapping from columns to a value or values.

    Example:
        >>> conditions(["cell_type=T, CD4+", "cell_type=B", "disease=normal"])
        {'cell_type': ['T, CD4+', 'B'], 'disease': ['normal']}
        >>> conditions({"cell_type": ["T", "B"], "disease": "normal"})
        {'cell_type': ['T', 'B'], 'disease': ['normal']}
    """
    found: dict[str, list[str]] = {}
    where = entries_of(where) if isinstance(where, Mapping) else [where] if isinstance(where, str) else where
    for entry in where:
        column, _, value = (part.strip() for part in str(entry).partition("="))
        if not column or not value:
            raise InputError(
                f'where has {entry!r}, but must be COLUMN=VALUE, e.g. cell_type="CD4 T". Correct --where; repeat the '
                "column for another value of it."
            )
        found.setdefault(column, []).append(value)
    return found


def check_question(ask: Sequence[str], given: Iterable[str], *, flag: str = "ask") -> None:
    """Refuse a phenotype that is asked twice, or both asked and given."""
    check_no_repeats(ask, flag=flag)
    if both := sorted(set(ask) & set(given)):
        raise InputError(f"{listed(both)} cannot be both asked and given. Remove it from --{flag} or --given.")
