"""The last step: what a reader of scores should know about a corpus, and the manifest that says what it holds.

Owns the findings and the content of `manifest.json`; leaves reading it back to `manifest`. Letters: g genes, t tables.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perturbgene import __version__
from perturbgene.corpus.manifest import BY_CELL, MANIFEST_VERSION
from perturbgene.corpus.panel import CorpusGenes
from perturbgene.corpus.statistics import Statistics
from perturbgene.corpus.survey import SPLITS, Plan, Survey
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import listed
from perturbgene.urls import shown_path


def find(
    plan: Plan, survey: Survey, statistics: Statistics, genes: CorpusGenes, hashes: Mapping[str, np.ndarray],
    dropped: Mapping[str, int],
) -> list[str]:  # fmt: skip
    """Return the findings, each with what was found, why it matters and what to do."""
    findings = _about_genes(plan, survey, genes)
    if survey.split_by == BY_CELL:
        findings.append(
            "the split is by cell: cells of one donor are on both sides, so scores are optimistic; name the donor "
            "column with --split_by."
        )
    elif num_missing := survey.units[""]:
        findings.append(
            f"{num_missing:,} cells have no {survey.split_by}: they stay together as if they were one, so donors among "
            f"them are not kept apart; fill in obs[{survey.split_by!r}]."
        )
    for category, of_split in statistics.labels.items():
        findings += _about_labels(category, of_split, survey)
    for split, hash_n in hashes.items():
        if (copies := len(hash_n) - len(np.unique(hash_n))) > 0:
            findings.append(
                f"{copies:,} of {len(hash_n):,} {split} cells are exact copies of another {split} cell, so each counts "
                "more than once; remove repeated cells, or files that hold the same cells."
            )
    if (shared := np.isin(hashes["eval"], hashes["train"]).sum()) > 0:
        findings.append(
            f"{shared:,} of {len(hashes['eval']):,} eval cells are exact copies of a training cell, so scores are "
            "optimistic; remove the copies, or split by a column that keeps them together (--split_by)."
        )
    for split in SPLITS:
        if dropped[split]:
            findings.append(
                f"{dropped[split]:,} {split} cells express fewer than {plan.config.min_genes} panel genes and were "
                "dropped, so they are neither learned from nor scored; lower --min_genes to keep them."
            )
    return findings


def _about_genes(plan: Plan, survey: Survey, genes: CorpusGenes) -> list[str]:
    findings = []
    if genes.num_given_missing:
        findings.append(
            f"{genes.num_given_missing:,} of {len(genes.panel):,} genes of panel {plan.config.panel} are in no file, "
            "so nothing is learned about them; they stay in the panel, unmeasured. Check their names."
        )
    num_tables_g = genes.measured_tg.sum(axis=0)
    lacks_g = (num_tables_g > 0) & (num_tables_g < len(genes.measured_tg))
    if lacks_g.any():
        lacks_t = genes.measured_tg[:, lacks_g].sum(axis=1) < lacks_g.sum()
        files = [path_of(survey.sources[index]) for index in np.flatnonzero(lacks_t[survey.table_of_source])]
        findings.append(
            f"{lacks_g.sum():,} of {len(lacks_g):,} panel genes are not measured in all files "
            f"({listed(sorted(files), most=3)} lack some): they are unknown in those cells, so a model may tell files "
            "apart by them; give a --panel of shared genes to leave them out."
        )
    return findings


def _about_labels(category: str, of_split: Mapping[str, Mapping[str, int]], survey: Survey) -> list[str]:
    findings = []
    if missing := survey.missing[category]:
        spellings = ", ".join(f"{count:,} {text or 'empty'!r}" for text, count in sorted(missing.items()))
        findings.append(
            f"{category}: {sum(missing.values()):,} of {survey.num_cells:,} cells have a missing label ({spellings}), "
            f"so they do not teach {category}; if one is a real label, rename it or drop it from --missing_labels."
        )
    if new := sorted(set(of_split["eval"]) - {"", *of_split["train"]}):
        findings.append(
            f"{category}: {listed(new)} occur in eval cells only and cannot be predicted, so their cells count as "
            "errors or are left out; hold out other donors with --eval_donors."
        )
    alone = sorted(label for label, units in survey.units_of_label[category].items() if len(units) == 1)
    if alone:
        findings.append(
            f"{category}: {listed(alone)} come from one {survey.split_by} only (confounded), so a model may learn the "
            f"{survey.split_by} instead of the label; do not trust their scores, or add cells of others."
        )
    return findings


def describe(
    plan: Plan, survey: Survey, statistics: Statistics, genes: CorpusGenes, tokenizer: GeneTokenizer, *,
    shards: Mapping[str, Sequence[Mapping[str, Any]]], findings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of `manifest.json`."""
    units = {
        "train": sorted(set(survey.units) - plan.eval_units),
        "eval": sorted(plan.eval_units & set(survey.units)),
    }
    return {
        "manifest_version": MANIFEST_VERSION,
        "perturbgene_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": [
            {"path": path_of(source), "cells": file.num_cells, "values": "counts" if file.is_counts else "log",
             "gene_table": int(table)}
            for source, file, table in zip(survey.sources, survey.files, survey.table_of_source, strict=True)
        ],
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
        "missing_labels": {category: dict(sorted(survey.missing[category].items())) for category in statistics.labels},
        "shards": shards,
        "audit": list(findings),
    }  # fmt: skip


def path_of(source: Any) -> str:
    """Return the path of an input for a reader, without passwords."""
    return shown_path(source) if isinstance(source, str | Path) else "AnnData"
