"""What a page says of a corpus: labels by donor, what was dropped or repeated, files and genes.

Owns tables and sentences, which come from the manifest alone, also from one of an older version; leaves counting to
`corpus.audit` and HTML to `page`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perturbgene.cli.verbs import PrepareConfig
from perturbgene.corpus.manifest import BY_CELL, MANIFEST_FILE, REPORT_FILE, Corpus
from perturbgene.corpus.panel import MEANING
from perturbgene.errors import listed
from perturbgene.files import claimed
from perturbgene.reports.page import Page, read_as_written, write_page

#: Most labels, files and tables of genes that the page lists: those with most cells.
MOST_LABELS, MOST_FILES, MOST_TABLES = 100, 60, 10
#: What a page of a corpus says that was written before the manifest held something.
NOT_KNOWN = "This corpus was prepared before that was written down; prepare it again to see it."


def is_corpus(folder: Path) -> bool:
    """Return whether a folder is one that `prepare` has written."""
    return (folder / MANIFEST_FILE).is_file() and (folder / "train").is_dir()


def corpus_report(folder: Path, *, output: str | Path | None = None) -> Path:
    """Write the page about a corpus, by default into its folder; return where it is.

    Raises:
        InputError: The manifest is damaged or not of this version, or the page cannot be written.
    """
    target = Path(output) if output else folder / REPORT_FILE
    with claimed(target, flag="output"):
        with read_as_written(folder / MANIFEST_FILE, verb="prepare"):
            page = of_corpus(folder)
        write_page(page, target)
    return target


def report_of(config: PrepareConfig) -> str:
    """Write the report of what `prepare` has just written."""
    return f"report: {corpus_report(Path(config.output).expanduser())}"


def of_corpus(folder: Path) -> Page:
    """Return the page about a corpus; raises InputError as `Corpus.open` does."""
    manifest = Corpus.open(folder).manifest
    cells = {split: sum(shard["cells"] for shard in shards) for split, shards in manifest["shards"].items()}
    names = list(manifest["phenotypes"])
    sections = {
        "facts": _facts(manifest, cells),
        "phenotypes": [_phenotype(name, number, manifest) for number, name in enumerate(names)],
        "left_out": _left_out(manifest, cells),
        "files": _files(manifest),
        "num_files": len(manifest["inputs"]),
        "tables": _tables(manifest),
        "num_tables": len(manifest["gene_tables"]),
        "not_known": NOT_KNOWN,
    }
    sentence = (
        f"{sum(cells.values()):,} cells of {_many(len(manifest['inputs']), 'file')} with {manifest['num_genes']:,} "
        f"genes, {'labeled by ' + ', '.join(names) if names else 'without labels'}: {cells['train']:,} to learn from "
        f"and {cells['eval']:,} held out."
    )
    return Page("corpus.html.jinja", f"Corpus {folder.name}", sentence, manifest["audit"], sections, data={})


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _facts(manifest: Mapping[str, Any], cells: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return what holds of the whole corpus, as pairs of a name and a text."""
    split, edges, units = manifest["split"], manifest["bin_edges"], "single cells"
    if split["by"] != BY_CELL:
        units = f"{split['by']}: {len(split['train']):,} to learn from, {len(split['eval']):,} held out"
    ranked = "given" if manifest["hvg_flavor"] == "given" else f"ranked as by {manifest['hvg_flavor']}"
    facts = [
        ("cells", f"{cells['train']:,} to learn from, {cells['eval']:,} held out"),
        ("split by", units),
        ("genes", f"{manifest['num_genes']:,} ({ranked})"),
        ("values", manifest["values"].replace("_", " ")),
        ("edges of bins", edges if isinstance(edges, str) else ", ".join(f"{edge:.3g}" for edge in edges)),
        ("prepared", f"{manifest['created']}, version {manifest['perturbgene_version']}, seed {split['seed']}"),
    ]
    return [*facts, ("only cells with", ", ".join(manifest["where"]))] if "where" in manifest else facts


# -- phenotypes ---------------------------------------------------------------------------------------------------


def _phenotype(name: str, number: int, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels of a phenotype, and how they and the donors go together."""
    of_split = manifest["phenotypes"][name]
    together = manifest.get("by_donor", {}).get(name)
    donors_of = together["donors_of_label"] if together else {}
    total = Counter(of_split["train"]) + Counter(of_split["eval"])
    shown = sorted(total, key=lambda label: (-total[label], label))[:MOST_LABELS]
    rows = [
        {"label": label, **{split: of.get(label, 0) for split, of in of_split.items()}, "donors": donors_of.get(label)}
        for label in shown
    ]
    text, is_bad = _confounding(manifest, together)
    return {
        "name": name, "id": f"p{number}", "rows": rows, "more": len(total) - len(rows), "has_donors": bool(donors_of),
        "text": text, "is_bad": is_bad, "matrix": _matrix(together, manifest["split"]) if together else None,
    }  # fmt: skip


def _confounding(manifest: Mapping[str, Any], together: Mapping[str, Any] | None) -> tuple[str, bool]:
    """Say how labels and donors go together, and whether one of them determines the other."""
    by = manifest["split"]["by"]
    if together is None:
        unknown = f"How labels and {by} go together: {NOT_KNOWN}"
        return ("Cells were split one by one, so no donor is known (--split_by)." if by == BY_CELL else unknown), False
    if together["nmi"] is None:
        few = f"{_many(together['num_labels'], 'label')} and {together['num_donors']:,} {by}"
        return f"{few}: there is nothing to compare.", False
    text = f"Normalized mutual information of label and {by}: {together['nmi']:.2f}."
    if together["label_tells_donor"]:
        return f"{text} Every label comes from one {by} only: nothing tells them apart, so trust no score.", True
    if together["donor_tells_label"]:
        fewest = min(count for count in together["donors_of_label"].values() if count)
        return (
            f"{text} Every {by} has one label, as of sex or disease: what is learned may be the {by}. Trust scores on "
            f"held-out {by} only, which are as sure as there are many of each label (the fewest: {fewest:,}).",
            True,
        )
    return f"{text} 0: independent; 1: one determines the other. Few cells of each {by} raise it by chance.", False


def _matrix(together: Mapping[str, Any], split: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of cells, labels as rows and donors as columns, those to learn from first."""
    held_out = set(split["eval"])
    order = sorted(range(len(together["donors"])), key=lambda at: together["donors"][at] in held_out)
    rows = []
    for label, counts in zip(together["labels"], together["cells"], strict=True):
        shade = [int(np.ceil(10 * count / max(sum(counts), 1))) for count in counts]
        cells = [{"count": counts[at], "shade": shade[at]} for at in order]
        rows.append({"label": label, "cells": cells})
    donors = [{"name": together["donors"][at], "is_held_out": together["donors"][at] in held_out} for at in order]
    more = {"labels": together["num_labels"] - len(rows), "donors": together["num_donors"] - len(donors)}
    return {"donors": donors, "rows": rows, "more": more}


# -- cells, files, genes ------------------------------------------------------------------------------------------


def _left_out(manifest: Mapping[str, Any], cells: Mapping[str, int]) -> list[dict[str, Any]] | None:
    """Return how many cells are dropped, repeated or without a label, by reason; None if it was not written down."""
    dropped, copies = manifest.get("dropped"), manifest.get("copies")
    if dropped is None or copies is None:
        return None
    few = f"dropped: fewer than {dropped['min_genes']} genes of the corpus expressed"
    rows = [
        {"text": few, "train": dropped["train"], "eval": dropped["eval"]},
        {"text": "exact copies of another cell of the same side", "train": copies["train"], "eval": copies["eval"]},
        {"text": "exact copies of a cell to learn from", "train": None, "eval": copies["eval_of_train"]},
    ]
    for name, of_split in manifest["phenotypes"].items():
        counts = {split: of_split[split].get("(missing)", 0) for split in of_split}
        spellings = listed([text or "empty" for text in manifest["missing_labels"][name]])
        rows.append({"text": f"without {name}" + (f" ({spellings})" if spellings else ""), **counts})
    return rows


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each file, most cells first."""
    rows = []
    for one in sorted(manifest["inputs"], key=lambda one: -one["cells"])[:MOST_FILES]:
        row = {"name": Path(one["path"]).name, "cells": one["cells"], "scale": one["values"]}
        row |= {"dropped": one.get("dropped"), "notes": one.get("notes", [])}
        sizes: Sequence[float] = one.get("library_sizes") or ()
        rows.append({**row, "sizes": [f"{size:,.0f}" for size in sizes] or [""] * 5})
    return rows


def _tables(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what became of the columns of each table of genes, those with most cells first."""
    inputs, tables = manifest["inputs"], []
    for number, found in enumerate(manifest["gene_tables"]):
        files = [one for one in inputs if one["gene_table"] == number]
        rows = [{"kind": kind, "meaning": MEANING[kind], **found[kind]} for kind in MEANING if kind in found]
        names = listed([Path(one["path"]).name for one in files], most=3)
        tables.append({"files": names, "cells": sum(one["cells"] for one in files), "rows": rows})
    return sorted(tables, key=lambda table: -table["cells"])[:MOST_TABLES]
