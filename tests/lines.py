"""A line of docs/robustness.md whose test is a function of its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What is done, what comes of it, and the test that shows it."""

    id: str
    what: str
    outcome: str
    test: str
