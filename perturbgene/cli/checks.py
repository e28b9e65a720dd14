"""Checks of settings that need no data: ranges, edges, paths, repeats and what cannot be given together.

Owns the single checks; leaves to each dataclass of `verbs` which of them apply. Letters: e edges.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbgene.cli.flags import Flag
from perturbgene.errors import InputError, listed


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


def check_suffix(output: str, *suffixes: str, verb: str) -> None:
    """Refuse an output in a form that the verb does not write.

    Raises:
        InputError: Another suffix, or a .parquet file without pyarrow.
    """
    suffix = Path(output).suffix
    if suffix not in suffixes:
        raise InputError(f"output is {output!r}, but {verb} writes {' or '.join(suffixes)} files. Change --output.")
    if suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise InputError("a .parquet file needs pyarrow. Name a .csv file, or pip install 'perturbgene[parquet]'.")


def check_not_both(config: object, first: str, second: str) -> None:
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


def check_question(ask: Sequence[str], given: Sequence[str]) -> None:
    """Refuse a phenotype that is asked twice, or asked and given.

    Raises:
        InputError: Names the phenotypes.
    """
    check_no_repeats(ask, flag="ask")
    if both := sorted(set(ask) & set(given)):
        raise InputError(f"{listed(both)} cannot be asked and given at once. Remove it from --ask or --given.")
