"""What of a long piece of work is done: one line per finished file, with its checksum.

Owns the journal in the folder of unfinished work and the rule that only listed, unchanged files count; knows nothing of
what the files hold.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Journal:
    """The finished files of one folder; its first line names the settings they were made with.

    Args:
        folder: Where the files lie.
        settings: Fingerprint of everything the files depend on.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder, self.settings = folder, settings
        self.path = folder / JOURNAL_FILE
        self._done: dict[str, dict[str, Any]] = {}

    def begin(self) -> None:
        """Start an empty journal."""
        self.path.write_text(json.dumps({"settings": self.settings}) + "\n", encoding="utf-8")

    def resume(self) -> bool:
        """Read what is done; False when the journal belongs to other settings.

        A half-written last line is dropped, and so is a file that is missing or differs from its checksum.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [_parsed(line) for line in lines]
        if not entries or entries[0].get("settings") != self.settings:
            return False
        for entry in entries[1:]:
            path = self.folder / str(entry.get("file", ""))
            if path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
                self._done[entry["file"]] = entry
        self.begin()
        for entry in self._done.values():
            self._append(entry)
        return True

    def __contains__(self, file: str) -> bool:
        return file in self._done

    def __getitem__(self, file: str) -> dict[str, Any]:
        return self._done[file]

    def __len__(self) -> int:
        return len(self._done)

    def add(self, entry: dict[str, Any]) -> None:
        """List a finished file: `file`, `bytes`, `sha256` and what else is worth knowing of it."""
        self._done[entry["file"]] = entry
        self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    """Read one line; one that was cut off by a crash says nothing."""
    try:
        entry = json.loads(line) if line.endswith("\n") else {}
    except json.JSONDecodeError:
        return {}
    return entry if isinstance(entry, dict) else {}


def entry_of(path: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Describe a finished file for the journal."""
    relative = path.relative_to(folder).as_posix()
    return {"file": relative, "bytes": path.stat().st_size, "sha256": sha256_of(path), **more}


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` to write to before renaming: no other process uses it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
