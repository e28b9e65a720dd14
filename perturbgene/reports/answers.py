"""What a page says about an evaluation or about predictions: which cells, and the sentences at its top.

Owns reading what `evaluate` and `predict` have written; leaves phenotypes to `labels`, places of cells to `layout` and
HTML to `page`. Letters: n cells, m cells on the map.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.cli.verbs import PredictConfig
from perturbgene.configs import load_config
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.opening import FileList, open_source
from perturbgene.data_utils.sources import StoredCells
from perturbgene.errors import InputError, listed
from perturbgene.files import read_json
from perturbgene.inference.baselines import NAMES
from perturbgene.inference.classifiers import sample
from perturbgene.inference.evaluate import COVERAGE_FILE, MARKERS_FILE
from perturbgene.inference.evaluated_cells import CELLS_FILE, DONOR, EMBEDDING, column_name
from perturbgene.inference.majority import BY_EMBEDDING, CLUSTER_COLUMN
from perturbgene.inference.predict import about_majority
from perturbgene.inference.run import facts_of, load_run
from perturbgene.inference.starts import embedding_of
from perturbgene.inference.streaming import LOW_COVERAGE, open_cells
from perturbgene.plots import cells_figure, certainty_figure
from perturbgene.reports.labels import Phenotype
from perturbgene.reports.layout import umap_layout
from perturbgene.reports.page import Page, map_data
from perturbgene.reports.statistics import Thresholds
from perturbgene.reports.tables import cell_table, number_table
from perturbgene.reports.trust import about_scores
from perturbgene.training.transfer import quiet
from perturbgene.training.votes import READING

#: Most cells on the map, and most that are embedded for it: embedding a cell takes as long as one question about it.
MOST_CELLS, MOST_EMBEDDED = 20_000, 2_000
#: Where the slider starts if `predict` did not abstain.
THRESHOLD = 0.5
#: A label of a lower probability is worth a sentence.
DOUBTED = 0.1
#: Percentile among held-out cells above which a cell counts as unusual; one in a hundred held-out cells is above it.
UNUSUAL = 99
#: Columns of a phenotype that may color the map, as what stands before and after its name.
COLORS = (("predicted_", ""), ("", ""), ("predicted_", "_probability"))


def answers_page(
    title: str,
    sentence: str,
    findings: Sequence[str],
    phenotypes: Sequence[Phenotype],
    *,
    rows_m: np.ndarray,
    places_m2: np.ndarray,
    columns: Sequence[str],
    map_note: str,
    notes: Sequence[str] = (),
    embedding: Sequence[Mapping[str, Any]] = (),
) -> Page:
    """Return the page about answers, with its figures `map` and one named after each phenotype.

    Args:
        title, sentence: What was asked of which cells.
        findings: Sentences that a reader must not miss.
        phenotypes: The sections.
        rows_m, places_m2: Which cells are on the map, and where.
        columns: Columns of `obs` that may color the map, the first one first.
        map_note: How the map was made.
        notes: Sentences at the end.
        embedding: Rows of the table that compares embeddings.
    """
    obs, figures = phenotypes[0].obs.iloc[rows_m], {}
    data: dict[str, Any] = {"phenotypes": [one.data() for one in phenotypes], "map": None}
    if len(obs):
        order = np.random.default_rng(0).permutation(len(obs))  # no label is drawn on top of all others
        obs, places_m2 = obs.iloc[order], places_m2[order]
        data["map"] = map_data(places_m2, obs[list(columns)])
        color = f"predicted_{phenotypes[0].column}"
        figures["map"] = cells_figure(places_m2, obs[color], obs[f"{color}_probability"], title=title)
    for one in phenotypes:
        found = Thresholds.of(one.probability_n, one.right_n() if one.is_evaluated else None)
        curves = (found.count_b, found.coverage_b, found.expected_b, found.measured_b)
        figures[one.column.replace("/", "_")] = certainty_figure(*curves, title=one.name)
    contents = [one.content(number) for number, one in enumerate(phenotypes)]
    tables = {"tables": number_table(phenotypes, contents, embedding), "cells": cell_table(phenotypes)}
    sections = {"phenotypes": contents, "embedding": embedding}
    return Page("answers.html.jinja", title, sentence, findings, sections, data, figures, tables, map_note, notes)


# -- an evaluation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has written into a folder."""

    results: Mapping[str, Any]  # as in metrics.json
    obs: pd.DataFrame  # of cells.h5ad
    facts: Mapping[str, Any]
    states_nh: np.ndarray | None  # NaN where a cell was not embedded
    phenotypes: Sequence[Phenotype]


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `evaluate` has written.

    Raises:
        InputError: A file is missing or was not written by this version.
    """
    try:
        results = read_json(folder / "metrics.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no scores ({error}). Run `perturbgene evaluate` again.") from error
    with closing(open_source(str(folder / CELLS_FILE))) as source:
        assert isinstance(source, StoredCells)
        obs, facts = source.table("obs"), facts_of(source)
        states_nh = source.element(f"obsm/{EMBEDDING}")
    coverage, markers = (
        pd.read_csv(folder / file, keep_default_na=False, na_values=[""]) if (folder / file).exists() else None
        for file in (COVERAGE_FILE, MARKERS_FILE)
    )
    phenotypes = []
    for name, scores in results.items():
        if name in ("genes", "embedding") or f"predicted_{column_name(name)}" not in obs:
            continue
        own, genes = (None if table is None else table[table["phenotype"] == name] for table in (coverage, markers))
        phenotypes.append(
            Phenotype(name, obs, column_name(name), scores, coverage=own, markers=genes, is_evaluated=True)
        )
    return Evaluation(results, obs, facts, states_nh, phenotypes)


def of_evaluation(folder: Path) -> Page:
    """Return the page about an evaluation; raises InputError as `read_evaluation` does."""
    read = read_evaluation(folder)
    obs, facts, phenotypes, states_nh = read.obs, read.facts, read.phenotypes, read.states_nh
    embedded = np.zeros(0, dtype=int) if states_nh is None else np.flatnonzero(np.isfinite(states_nh).all(axis=1))
    num_cells, names = int(facts["num_cells"]), [one.name for one in phenotypes]
    kept = f"Thresholds, confusion and reliability are of {_some(len(obs), num_cells)}."
    donors = f", donors: {obs[DONOR].nunique():,}" if DONOR in obs else ""
    columns = [f"{pre}{one.column}{end}" for one in phenotypes for pre, end in COLORS]
    return answers_page(
        f"{', '.join(names)} of held-out cells",
        f"{facts['run']} was asked for {', '.join(names)} of {num_cells:,} held-out cells{donors}.",
        [
            *_about_scores(phenotypes),
            *_about_evaluated_cells(facts, obs),
            *_about_labels(obs, {one.name: one.column for one in phenotypes}),
            *_about_corpus(str(facts["run"]), donors=set(obs[DONOR].astype(str)) if DONOR in obs else set()),
        ],
        phenotypes,
        rows_m=embedded,
        places_m2=np.zeros((0, 2)) if states_nh is None else umap_layout(states_nh[embedded]),
        columns=[*columns, DONOR] if DONOR in obs else columns,
        map_note=f"UMAP of the run's embedding of {_some(len(embedded), num_cells)}, with no phenotype given.",
        notes=[kept] if len(obs) < num_cells else [],
        embedding=_embedding_rows(read.results),
    )


def _embedding_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each phenotype and embedding."""
    names = {"pca": "principal components"}
    return [
        {"phenotype": name, "embedding": names.get(kind, kind), "best": False, **scores}
        for name, of in results.get("embedding", {}).items()
        for kind, scores in of.items()
    ]


def _about_scores(phenotypes: Sequence[Phenotype]) -> list[str]:
    """Say of each phenotype who answers best."""
    sentences = []
    for one in phenotypes:
        own, scores = next(iter(one.scores.items()))
        best = next((name for name, other in one.scores.items() if other.get("best")), own)
        text = f"{one.name}: the run is right in {100 * scores['accuracy']:.1f} % of the cells"
        if best != own:
            num_more = round((one.scores[best]["accuracy"] - scores["accuracy"]) * scores["n"])
            text += f", {NAMES.get(best, best)} in {100 * one.scores[best]['accuracy']:.1f} % ({num_more:,} more)"
        elif scores.get("best"):
            text += ", at least as many as every baseline"
        if over := scores.get("difference"):
            text += (
                f"; over {over['num_donors']} donors, its accuracy minus that of {NAMES['logistic_regression']} is "
                f"{over['mean']:+.3f} (95 % interval {over['low']:+.3f} to {over['high']:+.3f})"
            )
        if scores.get("calibration", {}).get("is_at_limit"):
            text += "; its probabilities say almost nothing and are not to be trusted"
        sentences.append(f"{text}.")
    return sentences


def _about_evaluated_cells(facts: Mapping[str, Any], obs: pd.DataFrame) -> list[str]:
    """Say what makes the scores look better or less sure than they are."""
    sentences = _about_genes(facts)
    if num_seen := int(facts["num_training_cells"]):
        sentences.append(f"{num_seen:,} of the cells are training cells of the run, so scores are too good.")
    if (num_donors := obs[DONOR].nunique() if DONOR in obs else 0) < 3:
        which = f"come from {num_donors} donor{'s' * (num_donors > 1)}" if num_donors else "name no donor"
        sentences.append(f"The cells {which}, so nothing says how much scores differ between donors.")
    return sentences


def _about_genes(facts: Mapping[str, Any]) -> list[str]:
    coverage = float(facts["gene_coverage"])
    if coverage >= LOW_COVERAGE:
        return []
    return [
        f"The cells were measured with {100 * coverage:.0f} % of the run's genes: answers are less sure than they look."
    ]


def _about_corpus(run: str, *, donors: set[str]) -> list[str]:
    """Say which donors were trained on, and what `prepare` found in the corpus of the run, as far as it is there."""
    with suppress(InputError, OSError):
        if path := getattr(load_config(Path(run) / "run.yaml"), "corpus", None):
            manifest = Corpus.open(path).manifest
            sentences = [f"Corpus: {finding}" for finding in manifest["audit"]]
            if seen := sorted(donors & set(manifest["split"].get("train", ()))):
                named = f"{len(seen):,} of {len(donors):,} donors ({listed(seen, most=3)})"
                text = "are called like donors that the run was trained on. If they are the same, scores are too good."
                sentences.insert(0, f"{named} {text}")
            return sentences
    return []


# -- predictions --------------------------------------------------------------------------------------------------


def of_predictions(path: Path, *, device: str, reading: Mapping[str, Any]) -> Page:
    """Read what `predict` has written, and embed a sample of its cells unless the file has a map.

    Raises:
        InputError: The file was not written by `predict`.
    """
    with closing(open_source(str(path))) as source:
        facts = facts_of(source)
        if not isinstance(source, StoredCells) or "calibration" not in facts:
            raise InputError(f"{path} was not written by `perturbgene predict`. Give its output, or a run folder.")
        facts = {**facts, **{name: json.loads(facts[name]) for name in ("calibration", "given")}}
        obs, names = source.table("obs"), list(facts["calibration"])
        answered_n = obs[f"predicted_{names[0]}"].notna().to_numpy()
        rows_m, places_m2, note = _map_of_predictions(source, facts, answered_n, device=device, reading=reading)
    threshold = float(facts.get("abstain", THRESHOLD))
    by = str(facts.get("majority_by", ""))
    clusters = CLUSTER_COLUMN if by == BY_EMBEDDING else by
    phenotypes = [Phenotype(name, obs, name, threshold=threshold, clusters=clusters) for name in names]
    given = [f"{name} = {label or 'as in obs'}" for name, label in facts["given"].items()]
    known = ", ".join(given) or "nothing but their genes"
    first = [
        it
        for name in names
        for it in (
            f"predicted_{name}",
            f"majority_{name}",
            f"predicted_{name}_probability",
            f"ood_{name}_score_percentile",
        )
    ]
    own = ("predicted_", "majority_", "ood_", "audit_")
    rest = [str(name) for name in obs.columns if not str(name).startswith(own)]
    return answers_page(
        f"{', '.join(names)} of {path.name}",
        f"{facts['run']} was asked for {', '.join(names)} of {len(obs):,} cells, given {known}.",
        _about_predictions(facts, obs, names), phenotypes, rows_m=rows_m, places_m2=places_m2,
        columns=[name for name in [*first, *rest] if name in obs], map_note=note,
    )  # fmt: skip


def _map_of_predictions(
    source: StoredCells, facts: Mapping[str, Any], answered_n: np.ndarray, *, device: str, reading: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return which cells are on the map, their places, and how it was made: from the file, or by embedding a sample."""
    own = [name for name in ("X_umap", EMBEDDING) if f"obsm/{name}" in source.file]
    answered = np.flatnonzero(answered_n)
    rows_m = answered[sample(len(answered), most=MOST_CELLS if own else MOST_EMBEDDED, seed=0)]
    shown = _some(len(rows_m), len(answered_n))
    if own:
        points_mc = np.asarray(source.element(f"obsm/{own[0]}"), dtype=np.float64)[rows_m]
        kept = np.isfinite(points_mc).all(axis=1)
        places_m2 = points_mc[kept][:, :2] if own[0] == "X_umap" else umap_layout(points_mc[kept])
        text = "The file's own X_umap" if own[0] == "X_umap" else "UMAP of the file's own X_perturbgene"
        return rows_m[kept], places_m2, f"{text}: {shown}."
    reading = {**reading, "where": ()}  # rows are those of the whole file
    try:
        run = load_run(str(facts["run"]), device=device)
        with quiet(READING):
            dataset = open_cells(FileList([source.path]), run, {}, tokenizer=run.tokenizer.reading([]), **reading)
        states_mh = embedding_of(run, dataset, rows_m, batch_tokens=PredictConfig.batch_tokens)
    except InputError as error:
        return rows_m[:0], np.zeros((0, 2)), f"There is no map, because the cells could not be embedded: {error}"
    return rows_m, umap_layout(states_mh), f"UMAP of the run's embedding of {shown}, with no phenotype given."


def _about_predictions(facts: Mapping[str, Any], obs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Say what a reader of predictions must not miss."""
    sentences = _about_genes(facts)
    if num_empty := int(obs[f"predicted_{names[0]}"].isna().sum()):
        sentences.append(f"{num_empty:,} cells have no answer: they express no gene of the run, or were left out.")
    for name in names:
        sentences += about_scores(str(facts["run"]), [name])
        if str(facts["calibration"][name]).startswith("uncalibrated"):
            sentences.append(f"{name}: probabilities are {facts['calibration'][name]}, so they may be too high.")
        if f"majority_{name}" in obs:
            sentences.append(f"{about_majority(name, obs)}.")
        percentile_n = obs.get(f"ood_{name}_score_percentile")
        if percentile_n is not None:
            sentences.append(
                f"{name}: {100 * float((percentile_n > UNUSUAL).mean()):.1f} % of the cells are more unusual than "
                f"{UNUSUAL} % of the run's held-out cells; 1 % would be usual."
            )
    return [*sentences, *_about_labels(obs, {name: name for name in names})]


def _about_labels(obs: pd.DataFrame, columns: Mapping[str, str]) -> list[str]:
    """Say how many cells have a label that the run finds improbable; `columns` has each phenotype's name in `obs`."""
    audits = {name: obs.get(f"audit_{column}_probability") for name, column in columns.items()}
    counts = {name: int((audit_n < DOUBTED).sum()) for name, audit_n in audits.items() if audit_n is not None}
    return [
        f"{name}: {count:,} cell{'s have' if count > 1 else ' has'} a label of probability below {DOUBTED}: check "
        f"these labels first."
        for name, count in counts.items()
        if count
    ]


def _some(num_shown: int, num_cells: int) -> str:
    """Say how many cells are shown."""
    return f"all {num_cells:,} cells" if num_shown == num_cells else f"a sample of {num_shown:,} of {num_cells:,} cells"
