"""The one error a user may see, and the helpers that raise it.

Owns `InputError` and the small checks shared by every floor; knows nothing of cells, files or models.
"""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """A user's mistake: says what was given, why it cannot be, and what to do.

    The command line prints it in one line without a traceback and exits with code 2.
    """


def listed(items: Iterable[object], *, most: int = 5) -> str:
    """Join the first items for a message and count the rest, e.g. ``'a', 'b' and 3 more``."""
    shown = list(items)
    text = ", ".join(repr(item) for item in shown[:most])
    return f"{text} and {len(shown) - most:,} more" if len(shown) > most else text


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """Suggest the nearest known name, or list the known ones when none is near."""
    near = difflib.get_close_matches(given, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {listed(known, most=12)}." if known else "None is known."
