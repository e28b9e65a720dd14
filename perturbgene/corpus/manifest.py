"""A corpus on disk: its manifest, read once, and where its shards are.

Owns the manifest's name and version and what other commands ask of it; leaves what goes into it to `audit`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbgene.data_utils.opening import FileList
from perturbgene.errors import InputError, listed
from perturbgene.files import check_format, read_json
from perturbgene.forms import misfit

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1

_COUNTS = {str: int}
#: What other commands read in a manifest.
_FORM = {
    "shards": {split: [{"file": str, "cells": int}] for split in ("train", "eval")},
    "split": {"by": str, "seed": int},
    "audit": [str],
    "inputs": [{"path": str, "cells": int, "values": str, "gene_table": int}],
    "gene_tables": [{str: {"count": int}}],
    "phenotypes": {str: {"train": _COUNTS, "eval": _COUNTS}},
    "missing_labels": {str: _COUNTS},
    "num_genes": int,
    "values": str,
}

#: The page that says what a corpus holds.
REPORT_FILE = "report.html"

#: The value of `split_by` that splits single cells, by a hash of their names.
BY_CELL = "cell"


@dataclass(frozen=True)
class Corpus:
    """A folder that `prepare` has written. `Corpus.open` reads the manifest; pass the object on instead of the path."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Read the manifest of a corpus folder, which no newer version may have written."""
        path = Path(folder) / MANIFEST_FILE
        try:
            manifest = read_json(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is not a corpus ({error}). Make one with `perturbgene prepare`.") from error
        if isinstance(manifest, dict):
            check_format(path, manifest.get("manifest_version"), reads=MANIFEST_VERSION)
        if not isinstance(manifest, dict) or not {"shards", "split"} <= set(manifest):
            raise InputError(f"{path} is not that of a corpus. Make one with `perturbgene prepare`.")
        if wrong := misfit(manifest, _FORM, at="manifest"):
            raise InputError(f"{path} is damaged: {wrong}. Restore it as it was written, or run prepare again.")
        files = [Path(shard["file"]) for shards in manifest["shards"].values() for shard in shards]
        if outside := [str(file) for file in files if file.is_absolute() or ".." in file.parts]:
            raise InputError(f"{path} names shards outside of its folder: {listed(outside)}. Run prepare again.")
        return cls(Path(folder), manifest)

    def paths(self, split: str) -> FileList:
        """Return the shards of one split, "train" or "eval", with their sizes; they must all exist."""
        shards = self.manifest["shards"][split]
        files = FileList(str(self.folder / shard["file"]) for shard in shards)
        files.sizes = tuple(int(shard["cells"]) for shard in shards)
        if missing := [path for path in files if not Path(path).exists()]:
            raise InputError(f"{listed(missing)} of corpus {self.folder} does not exist. Run prepare again.")
        return files

    def sums(self) -> dict[str, tuple[int | None, int, str]]:
        """Return size, latest time of writing and SHA-256 of each shard, by its path.

        The manifest is written after the shards, in nanoseconds; one of an older version knows no sizes.
        """
        written = (self.folder / MANIFEST_FILE).stat().st_mtime_ns
        shards = [shard for split in self.manifest["shards"].values() for shard in split if "sha256" in shard]
        return {str(self.folder / shard["file"]): (shard.get("bytes"), written, shard["sha256"]) for shard in shards}

    @property
    def split_by(self) -> str | None:
        """The obs column that the split keeps whole, such as the donor; None where cells were split one by one."""
        by = str(self.manifest["split"]["by"])
        return None if by == BY_CELL else by
