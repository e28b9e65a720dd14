"""Forms that values read from JSON must have, so that a damaged file is found when it is read and not when it is used.

Owns finding where a value differs from its form; leaves reading to `files`, and what to do about it to the reader.
"""

import math
from typing import Any

#: Larger numbers fit no integer of numpy or torch.
_MOST = 2**63
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def misfit(value: Any, form: Any, *, at: str = "it") -> str | None:
    """Say where a value differs from a form; None if it fits.

    A form is a type, a tuple of forms of which one must fit (the last is named if none does), `[form]` for a list,
    `{str: form}` for an object with any names, or `{"name": form}` for one that has at least these names. Numbers must
    be finite, and whole ones below 2^63.

    Example:
        >>> misfit({"genes": ["CD3E", 1]}, {"genes": [str]})
        "it['genes'][1] is not text"
    """
    if isinstance(form, tuple):
        misfits = [misfit(value, one, at=at) for one in form]
        return None if None in misfits else misfits[-1]
    if isinstance(form, list):
        if not isinstance(value, list | tuple):
            return f"{at} is not a list"
        inner = [(item, form[0], f"{at}[{index}]") for index, item in enumerate(value)]
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{at} is not an object"
        if missing := [name for name in form if name is not str and name not in value]:
            return f"{at} lacks {missing[0]!r}"
        named = {name: form[str] for name in value} if str in form else form
        inner = [(value[name], named[name], f"{at}[{name!r:.80}]") for name in named]
    else:
        return None if _is_of(value, form) else f"{at} is not {_WORDS[form]}"
    return next((found for item, one, place in inner if (found := misfit(item, one, at=place))), None)


def _is_of(value: Any, kind: type) -> bool:
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and (abs(value) < _MOST if isinstance(value, int) else math.isfinite(value))
    return isinstance(value, kind)
