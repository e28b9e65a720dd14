"""The verbs as Python functions: the names of the command line, and values as a notebook writes them.

Owns how keywords are read and how mistakes in them are reported; leaves the work to the functions of the rooms.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.options import Flag, check_flag, entries_of, named_values, own_flags
from perturbgene.cli.parsing import known_flags
from perturbgene.cli.verbs import CONFIGS
from perturbgene.errors import InputError, did_you_mean

#: Other names of parameters: those of the command line for what is positional here, and names of older versions.
OTHER_NAMES = {
    "input": "adata", "run": "model", "phenotypes": "phenotype", "away": "from_", "eval_data_paths": "eval_paths",
    "train_data_paths": "train_paths",
}  # fmt: skip


def as_function(function: Callable[..., Any], verb: str) -> Callable[..., Any]:
    """Let a function of a room read its keywords as the command of a verb does.

    One name may be given where a list is meant, any iterable in place of a list, and "NAME=LABEL" in place of a
    mapping. What `**reading` of the function takes are the options of `ReadingConfig`; other `**settings` are all
    options of the verb.

    Raises:
        TypeError: On a call with an unknown keyword; it names the nearest one.
        InputError: On a call with a value that the option does not allow.
    """
    flags, signature = own_flags(CONFIGS[verb]), inspect.signature(function)
    named = {name: it for name, it in signature.parameters.items() if it.kind is not inspect.Parameter.VAR_KEYWORD}
    rest = next(iter(signature.parameters.keys() - named.keys()), "")
    names = ("batch_size", *(it.name for it in fields(ReadingConfig))) if rest == "reading" else flags if rest else ()
    options = [flags[name] for name in names if name in flags and name not in named]
    takes = {*named, *(flag.name for flag in options)}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = {}
        accepted = takes | (known_flags(CONFIGS[verb]).keys() - {"config"} if rest == "settings" else set())
        for given, value in kwargs.items():
            name = given if given in accepted else OTHER_NAMES.get(given, given)
            if name not in accepted:
                hint = did_you_mean(given, sorted(accepted))
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {given!r}. {hint}")
            values[name] = _as_given(value, flags[name], is_option=name not in named) if name in flags else value
        return function(*args, **values)

    more = [inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=flag.default) for flag in options]
    kept = [it for name, it in signature.parameters.items() if name != rest or rest == "settings"]
    at = len(named)
    call.__signature__ = signature.replace(parameters=[*kept[:at], *more, *kept[at:]])  # type: ignore[attr-defined]
    return call


def _as_given(value: Any, flag: Flag, *, is_option: bool) -> Any:
    """Bring a value to the type of its option; `is_option` is False where a function has a mapping instead of text."""
    if isinstance(value, Mapping) and is_option:
        value = entries_of(value)
    if isinstance(value, Mapping) or value is None:
        return value
    if flag.is_named and not is_option:
        return named_values(_as_list(value), flag=flag.name)
    value = str(value) if isinstance(value, Path) else value
    if flag.is_list:
        value = _as_list(value)
    elif isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    for item in _as_list(value) if flag.choices else []:
        if item not in flag.choices:
            raise InputError(f"{flag.name} is {item!r}. {did_you_mean(str(item), flag.choices)}")
    try:
        check_flag(value, flag)
    except TypeError as error:
        raise InputError(f"{flag.name} is {value!r}, which is of a wrong type ({error}). {flag.help}") from error
    return value


def _as_list(value: Any) -> list[Any]:
    """Return the items of an iterable, and anything else, text too, as the only item."""
    return [value] if isinstance(value, str | Path) or not isinstance(value, Iterable) else list(value)
