"""The data files of a run: whether they still hold what `prepare` wrote and what the run began with.

Owns `data_files.json` in the run folder and all comparisons with it. Size and time of a file are compared first, its
content only where they differ. Stores of zarr and URLs are not looked at.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from perturbgene.corpus.manifest import Corpus
from perturbgene.errors import InputError, listed
from perturbgene.files import read_json, sha256_of, write_json

DATA_FILE = "data_files.json"


class _State(NamedTuple):
    """What a file was: its size, its time of writing in nanoseconds, and its sum where one is known."""

    bytes: int | None
    time: int
    sha256: str | None


def _change(path: str, then: _State, *, is_time_known: bool = True) -> str | None:
    """Return how a file differs from what it was; None if it does not. Without a known time, `then` has the latest."""
    now = os.stat(path)
    if then.bytes is not None and now.st_size != then.bytes:
        return f"it has {now.st_size:,} bytes instead of {then.bytes:,}"
    if now.st_mtime_ns == then.time or (not is_time_known and now.st_mtime_ns < then.time):
        return None
    if then.sha256 is None:
        return "it was written again"
    return None if sha256_of(path) == then.sha256 else "its content is another"


class DataFiles:
    """The files that a run reads; what they are is noted when this is made, before the run opens them.

    Args:
        folder: The run folder.
        paths: Files of training and evaluation cells.
        corpus: The corpus whose shards some of them are; its manifest has their sums.
    """

    def __init__(self, folder: str | Path, paths: Sequence[str], corpus: Corpus | None) -> None:
        self.record = Path(folder) / DATA_FILE
        self._prepared = {path: _State(*entry) for path, entry in (corpus.sums() if corpus else {}).items()}
        self._now = {path: self._state(path) for path in paths if os.path.isfile(path)}

    def _state(self, path: str) -> _State:
        status, prepared = os.stat(path), self._prepared.get(path)
        return _State(status.st_size, status.st_mtime_ns, prepared and prepared.sha256)

    def _recorded(self) -> dict[str, _State]:
        with suppress(OSError, ValueError, TypeError, AttributeError):
            return {path: _State(*entry) for path, entry in read_json(self.record).items()}
        return {}

    def check_start(self, *, may_change: bool, is_resumed: bool) -> list[str]:
        """Compare the files with what the run began with, or with what `prepare` wrote; then record what they are.

        Returns:
            What changed, if it may.

        Raises:
            InputError: Names the files that changed.
        """
        recorded = self._recorded() if is_resumed else {}
        changes = {}
        for path, now in self._now.items():
            if path in recorded:
                change, source = _change(path, recorded[path]), "since the run began"
            elif path in self._prepared:
                change, source = _change(path, self._prepared[path], is_time_known=False), "since `prepare` wrote it"
            else:
                continue
            if change:
                changes[path] = f"{path} changed {source}: {change}"
                self._now[path] = now._replace(sha256=sha256_of(path))
            elif path in recorded:
                self._now[path] = now._replace(sha256=recorded[path].sha256)
        if changes and not may_change:
            raise InputError(
                f"{_few(changes)}. Restore what was there, or train a new run on what `prepare` writes now; "
                "--allow_changed takes it as it is."
            )
        write_json(self.record, self._now)
        return list(changes.values())

    def changes(self) -> list[str]:
        """Return how the files differ from what the run noted of them; files that it does not know are left out."""
        recorded = {os.path.realpath(path): then for path, then in self._recorded().items()}
        known = {path: recorded[real] for path in self._now if (real := os.path.realpath(path)) in recorded}
        changes = {path: _change(path, then) for path, then in known.items()}
        return [f"{path} changed since the run read it: {change}" for path, change in changes.items() if change]

    def were_read_by(self, run: str | Path, paths: Sequence[str]) -> bool:
        """Return whether a run noted one of these files as its own: by its name, or by its sum where both have one."""
        recorded = DataFiles(run, (), None)._recorded()
        known = {os.path.realpath(path) for path in recorded} | {then.sha256 for then in recorded.values()} - {None}
        names = [
            name for path in paths if path in self._now for name in (os.path.realpath(path), self._now[path].sha256)
        ]
        return not known.isdisjoint(names)

    def check(self) -> None:
        """Compare the files with what they were when the run, or its last part, started; missing ones are left out.

        Raises:
            InputError: Names the files that changed.
        """
        changes = {}
        for path, then in self._now.items():
            with suppress(FileNotFoundError):  # what the run has read of it was right
                if change := _change(path, then):
                    changes[path] = f"{path} changed while the run read it: {change}"
                else:
                    self._now[path] = then._replace(time=os.stat(path).st_mtime_ns)
        if changes:
            raise InputError(
                f"{_few(changes)}. Nothing more is saved, since the weights may come from both; checkpoints are of "
                "before. Restore what was there and continue with --resume_from_checkpoint, or start a new run."
            )


def _few(changes: Mapping[str, Any]) -> str:
    """Return the first change, and the names of the other files."""
    first, *others = changes.values()
    return f"{first} (so did {listed(list(changes)[1:])})" if others else first
