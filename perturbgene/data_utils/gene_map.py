"""A user's table of gene names: what files call a gene, and what the panel calls it (orthologs, old symbols, probes).

Owns reading the table and renaming the columns of a file; leaves matching names to a panel to `genes`. Letters: c
columns.
"""

import csv
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perturbgene.data_utils.genes import GeneNames, clean_gene
from perturbgene.data_utils.remote import local_path
from perturbgene.errors import InputError, listed
from perturbgene.urls import shown_path

_REMEDY = "Give a .csv or .tsv of two columns: name in the file, name in the panel."


class Renaming(NamedTuple):
    """What a file calls its genes after a table renamed them; what was done, '' without a table; and its log level."""

    names: GeneNames
    text: str = ""
    level: int = logging.INFO


@dataclass(frozen=True)
class GeneMap:
    """Names of genes in files, and in the panel.

    Args:
        path: The table, for messages.
        target_of: Name in a file -> name in the panel, both as `clean_gene` spells them.
        ambiguous: Names that the table gives several names in the panel; they rename nothing.
    """

    path: str
    target_of: Mapping[str, str]
    ambiguous: tuple[str, ...] = ()

    def rename(self, names: GeneNames) -> Renaming:
        """Rename the columns whose name, id or symbol (tried in this order) is in the table; others stay as they are.

        Names are replaced once, all at the same time: a table may swap two names.

        Returns:
            The names, where a renamed column has no further ids and symbols.

        Raises:
            InputError: The table has no name of the file, neither in its first column nor in its second.

        Example:
            >>> names = GeneNames(np.array(["Cd3e", "Lyz2"]), ids=(), symbols=())
            >>> GeneMap("orthologs.csv", {"Cd3e": "CD3E", "Gm1": "GM1"}).rename(names).text
            '1 columns renamed by --gene_map, names that the file lacks: 1'
        """
        columns = [[clean_gene(name) for name in names_c] for names_c in (names.own_c, *names.ids, *names.symbols)]
        found = [next((name for name in of if name in self.target_of), "") for of in zip(*columns, strict=True)]
        is_renamed_c = np.array([name != "" for name in found], dtype=bool)
        known = {name for names_c in columns for name in names_c}
        if not is_renamed_c.any():
            if known.isdisjoint(self.target_of.values()):
                raise InputError(
                    f"gene_map {self.path} renames nothing: the file's genes are {listed(names.own_c, most=3)}, the "
                    f"first column of the table has {listed(self.target_of, most=3)}. Correct the table or --gene_map."
                )
            text = (
                f"--gene_map {self.path} renames nothing: the file has names of its second column only, as if it were "
                "renamed already or the columns were swapped"
            )
            return Renaming(names, text, logging.WARNING)
        own_c = np.where(is_renamed_c, [self.target_of.get(name, "") for name in found], names.own_c).astype(object)
        ids, symbols = (
            tuple(np.where(is_renamed_c, "", names_c).astype(object) for names_c in group) for group in names[1:]
        )
        targets = [self.target_of[name] for name in found if name]
        chained = {self.target_of[name] for name in found if name and self.target_of[name] != name}
        chained = {name for name in chained & set(found) if self.target_of[name] != name}
        several = [name for name in self.ambiguous if name in known]
        counts = {
            "those that share a gene with another one": len(targets) - len(set(targets)),
            "names that the file lacks": len(self.target_of.keys() - known),
            "new names that the table renames, too (each column is renamed once)": len(chained),
            f"names of several genes, which rename nothing ({listed(several, most=3)})": len(several),
        }
        parts = [
            f"{len(targets):,} columns renamed by --gene_map",
            *(f"{what}: {n:,}" for what, n in counts.items() if n),
        ]
        level = logging.WARNING if chained else logging.INFO
        return Renaming(GeneNames(own_c, ids, symbols), ", ".join(parts), level)


def read_gene_map(path: str | Path | None) -> GeneMap | None:
    """Read a table of gene names: two columns, separated by tabs or commas; a header is a name that no file has.

    Rows without a second name, and lines that begin with #, are skipped.

    Raises:
        InputError: It cannot be read, is no table of two columns, or has no row with both names.
    """
    if path is None:
        return None
    local = local_path(path)
    try:
        return _read(local, os.stat(local).st_mtime_ns, shown_path(str(path)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"gene_map {shown_path(str(path))} cannot be read ({error}). {_REMEDY}") from error


@lru_cache(maxsize=2)
def _read(path: str, changed: int, shown: str) -> GeneMap:
    """Read the table once, as long as it stays as it is."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise InputError(f"gene_map {shown} is no text. {_REMEDY}")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    targets: dict[str, set[str]] = {}
    for row in csv.reader(lines, delimiter="\t" if "\t" in "".join(lines[:1]) else ","):
        if len(row) != 2:
            raise InputError(f"gene_map {shown} has a row of {len(row)} columns ({listed(row, most=4)}). {_REMEDY}")
        name, target = map(clean_gene, row)
        if name and target:
            targets.setdefault(name, set()).add(target)
    if not targets:
        raise InputError(f"gene_map {shown} has no row with two names. {_REMEDY}")
    ambiguous = tuple(name for name, found in targets.items() if len(found) > 1)
    return GeneMap(shown, {name: next(iter(found)) for name, found in targets.items() if len(found) == 1}, ambiguous)
