"""The errors a user may see, and the helpers that raise them.

Owns `InputError` with its two kinds, two other errors, which errors of the system are the machine's, and the words
that messages share; knows nothing of cells, files or models.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Sequence

#: Exit code of what is the machine's fault, or of a run that cannot go on.
EXIT_FAILED = 3


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


class NewerFormatError(InputError):
    """A file of ours is in a format that came after this version, so it is neither damaged nor foreign."""


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


_MEMORY = "Free memory, or lower what is held at once (--batch_tokens, --tokens_per_batch, --num_processes)"
_PROCESS = "Look for the first error above, or in the system's log: the system ends processes when memory runs out"
#: Errors of the system that other input would not have avoided -> what helps.
_FAULTS = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room within the quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the network file system",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Wait until the machine has fewer open files",
    errno.ENOMEM: _MEMORY,
}
#: Errors of the system that come from a path as it was given.
_MISTAKES = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
#: How HDF5 and safetensors, which have errors of their own, give the number of the system's error.
_NUMBER = re.compile(r"(?:os error|errno =|\[Errno) (\d+)")
#: Words in errors of torch and the standard library -> what helps.
_WORDS = {
    r"</torch_.*(No space left|File too large|Cannot allocate)": "Allow more shared memory (--shm-size of Docker)",
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread|failed to map"
    r"|could not create a primitive": _MEMORY,
    r"DataLoader worker \(pid|terminated abruptly": _PROCESS,
    r"Connection closed by peer|Connection reset by peer|Timed out waiting|remote process exited": _PROCESS,
}


def system_error(error: BaseException) -> RunFailedError | InputError | None:
    """Say in one line what an error of the system, or an error that one has caused, was about.

    Returns:
        `RunFailedError` if the machine is at fault (a full disk, no memory, too many open files, a killed process),
        `InputError` if a path cannot be used, and None for any other error.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (found := _NUMBER.search(str(cause))):
            number = int(found[1])
        name = getattr(cause, "filename", None)
        advice = _FAULTS.get(number or 0)
        if advice is None and isinstance(cause, MemoryError):
            advice = _MEMORY
        if advice is None and isinstance(cause, RuntimeError | ImportError):
            advice = next((help for words, help in _WORDS.items() if re.search(words, str(cause))), None)
        reason = os.strerror(number) if number else original_text(cause).rstrip(".") or "memory ran out"
        doing = "".join(f" {note}" for note in getattr(error, "__notes__", ())[-1:])
        if advice is not None:
            return RunFailedError(f"{reason}{f': {name}' if name else doing}. {advice}")
        if cause is error and number in _MISTAKES and name:
            return InputError(f"{name} cannot be used ({reason})")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def raise_if_machine(error: BaseException) -> None:
    """Raise an error again if it is the machine's, so that nobody blames the file that was being read.

    HDF5 does not say that memory ran out; a small piece that cannot be had does.
    """
    if isinstance(system_error(error), RunFailedError):
        raise error
    try:
        bytearray(1 << 24)
    except MemoryError as short:
        raise short from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory, of whatever device, was too small; torch has no type for that of the CPU."""
    failure = system_error(error)
    return isinstance(failure, RunFailedError) and _MEMORY in str(failure)


def original_text(error: BaseException) -> str:
    """Return the message of an error in one line; of one that torch brings from a loader worker, without its traceback.

    Example:
        >>> original_text(ValueError("Caught ValueError in DataLoader worker process 0.\\n...\\nValueError: bad\\n"))
        'bad'
    """
    text = str(error)
    if " in DataLoader worker process " in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(line.strip() for line in text.splitlines() if line.strip())  # blanks may be what is wrong


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
