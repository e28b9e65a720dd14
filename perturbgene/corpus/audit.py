"""The last step: what a reader of scores should know about a corpus, and the manifest that says what it holds.

Owns the findings and the content of `manifest.json`; leaves reading it back to `manifest`. Letters: g genes, t tables.
"""

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbgene import __version__
from perturbgene.corpus.manifest import BY_CELL, MANIFEST_VERSION
from perturbgene.corpus.panel import CorpusGenes
from perturbgene.corpus.spool import DealtCells
from perturbgene.corpus.statistics import Statistics
from perturbgene.corpus.survey import Plan, Survey, path_of
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import listed

#: Most labels and most donors of the table that the manifest holds for each phenotype.
MOST_SHOWN = 40


def find(
    plan: Plan, survey: Survey, statistics: Statistics, genes: CorpusGenes, dealt: DealtCells | None
) -> list[str]:  # fmt: skip
    """Return the findings, each with what was found, why it matters and what to do; before cells are dealt, not all."""
    findings = [*_about_genes(plan, survey, genes), *_about_files(plan, survey)]
    for category, of_split in statistics.labels.items():
        findings += _about_labels(category, of_split, survey)
    return [*findings, *_about_cells(plan, dealt)] if dealt else findings


def _about_cells(plan: Plan, dealt: DealtCells) -> Iterator[str]:
    for split, copies in dealt.num_copies.items():
        if copies:
            yield (
                f"{copies:,} of {dealt.num_kept[split]:,} {split} cells are exact copies of another {split} cell, so "
                "each counts more than once; remove repeated cells, or files that hold the same cells."
            )
    if dealt.num_shared:
        yield (
            f"{dealt.num_shared:,} of {dealt.num_kept['eval']:,} eval cells are exact copies of a training cell, so "
            "scores are optimistic; remove the copies, or split by a column that keeps them together (--split_by)."
        )
    for split, num_dropped in dealt.num_dropped.items():
        if num_dropped:
            yield (
                f"{num_dropped:,} {split} cells express fewer than {plan.config.min_genes} panel genes and were "
                "dropped, so they are neither learned from nor scored; lower --min_genes to keep them."
            )


def _about_genes(plan: Plan, survey: Survey, genes: CorpusGenes) -> Iterator[str]:
    given = plan.config.panel or plan.config.like
    if genes.num_given_missing:
        yield (
            f"{genes.num_given_missing:,} of {len(genes.panel):,} genes of panel {given} are in no file, "
            "so nothing is learned about them; they stay in the panel, unmeasured. Check their names."
        )
    num_tables_g = genes.measured_tg.sum(axis=0)
    lacks_g = (num_tables_g > 0) & (num_tables_g < len(genes.measured_tg))
    if lacks_g.any():
        lacks_t = genes.measured_tg[:, lacks_g].sum(axis=1) < lacks_g.sum()
        files = [path_of(survey.sources[index]) for index in np.flatnonzero(lacks_t[survey.table_of_source])]
        yield (
            f"{lacks_g.sum():,} of {len(lacks_g):,} panel genes are not measured in all files "
            f"({listed(sorted(files), most=3)} lack some): they are unknown in those cells, so a model may tell files "
            "apart by them; give a --panel of shared genes to leave them out."
        )
    num_measured_t = genes.measured_tg.sum(axis=1)
    has_few_t = num_measured_t < plan.config.min_gene_coverage * len(genes.panel)
    for table in np.flatnonzero(has_few_t | (np.array(genes.remedies) != "")):
        files = sorted(path_of(survey.sources[index]) for index in np.flatnonzero(survey.table_of_source == table))
        effect = "so its cells are short and teach little" if has_few_t[table] else "so its other genes are unknown"
        yield (
            f"{listed(files, most=3)}: {num_measured_t[table]:,} of {len(genes.panel):,} panel genes are measured "
            f"({num_measured_t[table] / len(genes.panel):.1%}), {effect}; "
            f"{genes.remedies[table] or 'leave it out if it measures no more.'}"
        )


def _about_files(plan: Plan, survey: Survey) -> Iterator[str]:
    """Return what files lack or mix, and what is known of the units that the split keeps whole."""
    for column in dict.fromkeys(column for file in survey.files for column in file.lacks):
        indices = [index for index, file in enumerate(survey.files) if column in file.lacks]
        files = listed(sorted(path_of(survey.sources[index]) for index in indices), most=3)
        num_cells = sum(survey.files[index].num_cells for index in indices)
        alike = sorted({survey.files[index].lacks[column] for index in indices} - {""})
        remedy = (
            f"rename obs[{alike[0]!r}] if it is the same" if alike else "add the column to these files if it is known"
        )
        effect = "their labels are absent: they do not teach it"
        if column == survey.split_by:
            effect = "they are kept together as if they were one"
        yield f"obs[{column!r}] is not in {files}, so for these {num_cells:,} cells {effect}; {remedy}."
    scales = {file.scale.name: path_of(source) for source, file in zip(survey.sources, survey.files, strict=True)}
    if len(scales) > 1:
        named = ", ".join(f"{name} in {path}" for name, path in sorted(scales.items()))
        yield (
            f"the files are on {len(scales)} scales ({named}): all are brought to log1p of counts per 10,000; if "
            "one was recognized wrongly, choose its counts with --layer, or bring the files to one scale."
        )
    if survey.split_by == BY_CELL:
        yield (
            "the split is by cell: cells of one donor are on both sides, so scores are optimistic; name the donor "
            "column with --split_by."
        )
    elif num_missing := sum(file.units[""] for file in survey.files if survey.split_by not in file.lacks):
        yield (
            f"{num_missing:,} cells have no {survey.split_by}: they stay together as if they were one, so donors among "
            f"them are not kept apart; fill in obs[{survey.split_by!r}]."
        )
    for twins in near_duplicates(set(survey.units) - {""}):
        if 0 < len(plan.eval_units & set(twins)) < len(twins):
            yield (
                f"{survey.split_by}: {listed(twins)} differ in case, plural or punctuation only and are on both sides "
                "of the split, so scores are optimistic if they are one; give them one spelling."
            )


def _about_labels(category: str, of_split: Mapping[str, Mapping[str, int]], survey: Survey) -> Iterator[str]:
    if missing := survey.missing[category]:
        spellings = ", ".join(f"{count:,} {text or 'empty'!r}" for text, count in sorted(missing.items()))
        yield (
            f"{category}: {sum(missing.values()):,} of {survey.num_cells:,} cells have a missing label ({spellings}), "
            f"so they do not teach {category}; if one is a real label, rename it or drop it from --missing_labels."
        )
    if new := sorted(set(of_split["eval"]) - {"", *of_split["train"]}):
        yield (
            f"{category}: {listed(new)} occur in eval cells only and cannot be predicted, so their cells count as "
            "errors or are left out; hold out other cells with --eval_donors or another --seed."
        )
    labels = sorted(set(of_split["train"]) - {""})
    if len(labels) == 1:
        yield (
            f"{category}: every labeled training cell is {labels[0]!r}, so there is nothing to tell apart and its "
            "scores mean nothing; add cells of other labels, or leave it out of --phenotypes."
        )
    alone = list[str]()
    if survey.split_by != BY_CELL:
        alone = sorted(label for label, units in survey.units_of_label[category].items() if len(units) == 1)
    if unscored := [label for label in labels if label not in of_split["eval"] and label not in alone]:
        remedy = "raise --eval_fraction, or give another --seed"
        if survey.split_by != BY_CELL:
            remedy = "hold out cells that have them with --eval_donors, or raise --eval_fraction"
        yield (
            f"{category}: {listed(unscored)} occur in training cells only, so nothing is known of how well they are "
            f"predicted; {remedy}."
        )
    for twins in near_duplicates(set(of_split["train"]) | set(of_split["eval"])):
        yield (
            f"{category}: {listed(twins)} differ in case, plural or punctuation only, so they are learned as different "
            "labels; give them one spelling."
        )
    numbers, names = set[str](), set[str]()
    for source, file in zip(survey.sources, survey.files, strict=True):
        kinds = {label.replace(".", "", 1).isdecimal() for label in file.units_of_label[category]}
        if kinds:
            (numbers if kinds == {True} else names).add(path_of(source))
    if numbers and names:
        yield (
            f"{category}: labels are numbers in {listed(sorted(numbers), most=3)} and names in "
            f"{listed(sorted(names), most=3)}, so one kind of cell may have two labels; give all files names."
        )
    if len(alone) == len(survey.units_of_label[category]) > 1:
        yield (
            f"{category}: every label comes from one {survey.split_by} only (confounded), so nothing tells labels and "
            f"{survey.split_by} apart and no score is to be trusted; add cells in which they do not go together."
        )
    elif alone:
        yield (
            f"{category}: {listed(alone)} come from one {survey.split_by} only (confounded), so a model may learn the "
            f"{survey.split_by} instead of the label; do not trust their scores, or add cells of others."
        )


def near_duplicates(labels: Iterable[str]) -> list[list[str]]:
    """Return groups of labels that differ only in case, plural or punctuation, each sorted.

    Example:
        >>> near_duplicates(["B cell", "b-cells", "Bcell", "T cell", "CD4+ T", "CD4 T", "stage 1 1", "stage 11"])
        [['B cell', 'Bcell', 'b-cells']]
    """
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        # A sign after a letter or digit is part of the name: CD4+ and CD4- are different cells.
        words = re.findall(r"\w+(?:[+-](?!\w))?", label.casefold().replace("_", " "))
        singular = " ".join(re.sub(r"(?<=\w{3})s$", "", re.sub(r"(?<=\w{3})ies$", "y", word)) for word in words)
        is_number = re.fullmatch(r"[-+]?\d*[.]?\d+", label)
        groups.setdefault(label if is_number else re.sub(r"(?<!\d) | (?!\d)", "", singular), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def by_donor(cells: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return how the labels of a phenotype and the donors go together, for the manifest.

    Args:
        cells: Label -> donor -> cells; the donor is '' where it is not known.

    Returns:
        `nmi`: mutual information of label and donor, over the lesser of their entropies (Vinh, Epps and Bailey 2010,
        J Mach Learn Res 11, NMI_min), of cells with both: 1 if one determines the other, which `label_tells_donor` and
        `donor_tells_label` say; None with fewer than two labels or donors. `num_labels`, `num_donors`: how many there
        are. `cells`: of the `labels` and `donors` that have most, shape (labels, donors). `donors_of_label`: number of
        donors of every label.

    Example:
        >>> found = by_donor({"B": {"d1": 2, "d2": 2}, "T": {"d1": 2, "d2": 2}, "NK": {"d1": 4}})
        >>> found["labels"], found["donors"], found["cells"], round(found["nmi"], 3)
        (['B', 'NK', 'T'], ['d1', 'd2'], [[2, 2], [4, 0], [2, 2]], 0.274)
    """
    triples = [(label, donor, n) for label, of in cells.items() for donor, n in of.items() if donor]
    table = pd.DataFrame(triples, columns=["label", "donor", "cells"]).astype({"cells": "int64"})
    sums = {name: table.groupby(name)["cells"].sum() for name in ("label", "donor")}
    entropy = {name: _entropy(sums[name].to_numpy()) for name in sums}
    least = min(entropy.values())
    shown = {name: sorted(sums[name].nlargest(MOST_SHOWN).index) for name in sums}
    return {
        "nmi": round((sum(entropy.values()) - _entropy(table["cells"].to_numpy())) / least, 6) if least > 0 else None,
        "label_tells_donor": least > 0 and len(table) == len(sums["label"]),
        "donor_tells_label": least > 0 and len(table) == len(sums["donor"]),
        "num_labels": len(sums["label"]), "num_donors": len(sums["donor"]),
        "labels": shown["label"], "donors": shown["donor"],
        "donors_of_label": {label: len(of.keys() - {""}) for label, of in sorted(cells.items())},
        "cells": [[cells[label].get(donor, 0) for donor in shown["donor"]] for label in shown["label"]],
    }  # fmt: skip


def _entropy(counts: np.ndarray) -> float:
    share = counts / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def describe(
    plan: Plan, survey: Survey, statistics: Statistics, genes: CorpusGenes, tokenizer: GeneTokenizer,
    dealt: DealtCells, *, shards: Mapping[str, Sequence[Mapping[str, Any]]], findings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of `manifest.json`."""
    units = {"train": sorted(set(survey.units) - plan.eval_units), "eval": sorted(plan.eval_units & set(survey.units))}
    return {
        "manifest_version": MANIFEST_VERSION,
        "perturbgene_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": [
            {"path": path_of(source), "cells": file.num_cells, "values": file.scale.name, "gene_table": int(table),
             "dropped": dropped, "library_sizes": sizes, "notes": list(file.notes)}
            for source, file, table, dropped, sizes in zip(
                survey.sources, survey.files, survey.table_of_source, dealt.dropped_of_file, dealt.sizes_of_file,
                strict=True,
            )
        ],
        **({"where": list(plan.config.where)} if plan.config.where else {}),
        "gene_tables": genes.reports,
        "values": "counts" if plan.as_counts else "log1p_cp10k",
        "num_genes": len(tokenizer.panel),
        "hvg_flavor": "given" if plan.config.panel else plan.flavor,
        "bin_edges": tokenizer.bin_edges.to_json(tokenizer.genes) if tokenizer.bin_edges.is_shared else "per gene",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "split": {
            "by": survey.split_by,
            "seed": plan.config.seed,
            "eval_fraction": plan.config.eval_fraction,
            **(units if survey.split_by != BY_CELL else {}),
        },
        "phenotypes": {
            category: {
                split: {label or "(missing)": count for label, count in sorted(counts.items())}
                for split, counts in of_split.items()
            }
            for category, of_split in statistics.labels.items()
        },
        "by_donor": {} if survey.split_by == BY_CELL else {
            category: by_donor(survey.units_of_label[category]) for category in statistics.labels
        },
        "dropped": {"min_genes": plan.config.min_genes, **dealt.num_dropped},
        "copies": {**dealt.num_copies, "eval_of_train": dealt.num_shared},
        "missing_labels": {category: dict(sorted(survey.missing[category].items())) for category in statistics.labels},
        "shards": shards,
        "audit": list(findings),
    }  # fmt: skip
