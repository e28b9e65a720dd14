"""Lines of docs/robustness.md: those that have a test of their own, and those that one test works through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Line:
    """What is done, what comes of it, and the test that shows it."""

    id: str
    what: str
    outcome: str
    test: str


@dataclass(frozen=True)
class Checked(Line):
    """A line of a list that one test works through; without a check, `test` names the test of another file."""

    test: str = ""
    check: Callable[[Any], object] | None = None
    is_sampled: bool = False  # part of `make test`


def params(lines: Sequence[Checked]) -> list[Any]:
    """Return the lines with a check as parameters of a test; those that `make test` leaves out are marked."""
    checked = [one for one in lines if one.check]
    return [pytest.param(one, id=one.id, marks=() if one.is_sampled else pytest.mark.faults) for one in checked]
