"""The errors a user may see, and the helpers that raise them.

Owns `InputError`, two other errors and the words that messages share; knows nothing of cells, files or models.
"""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """A user's mistake: says what was given, why it is impossible, and what to do.

    The command line prints it in one line without a traceback and exits with code 2.
    """


class FilesRefusedError(InputError):
    """Files that `check` looked at would be refused.

    Args:
        message: Why.
        report: All that it found, which the command line prints all the same.
    """

    def __init__(self, message: str, *, report: str) -> None:
        super().__init__(message)
        self.report = report


class RunFailedError(RuntimeError):
    """A run cannot continue, and not because of its settings: the disk is full, or the loss is NaN.

    The command line prints it in one line without a traceback and exits with code 3.
    """


class StoppedError(Exception):
    """A run was asked to stop and ended early, with everything saved.

    Args:
        message: Where it stopped and how to continue.
        exit_code: 128 + the number of the signal.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def listed(items: Iterable[object], *, most: int = 5) -> str:
    """Join the first items for a message and count the rest, e.g. ``'a', 'b' and 3 more``."""
    shown = list(items)
    text = ", ".join(repr(item) for item in shown[:most])
    return f"{text} and {len(shown) - most:,} more" if len(shown) > most else text


def did_you_mean(given: str, known: Sequence[str], *, otherwise: str | None = None) -> str:
    """Suggest the nearest known name, in whatever case; if none is near, return `otherwise` or list the known ones.

    Example:
        >>> did_you_mean("cd3d", ["CD3E", "CD3D"]), did_you_mean("lung", ["blood"])
        ("Did you mean 'CD3D'?", "Known: 'blood'.")
    """
    in_any_case = {name.casefold(): name for name in reversed(known)}
    near = difflib.get_close_matches(given.casefold(), in_any_case, n=1)
    if near:
        return f"Did you mean {in_any_case[near[0]]!r}?"
    if otherwise is not None:
        return otherwise
    return f"Known: {listed(known, most=12)}." if known else "None is known."
