"""Values of settings: from the text of a flag, or what YAML has read, to the type of the field.

Owns conversion and its refusals; leaves ranges and what settings mean together to `checks` and `verbs`.
"""

import difflib
import json
import re
import types
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from perturbgene.cli.flags import Flag, advice, members
from perturbgene.errors import InputError

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
