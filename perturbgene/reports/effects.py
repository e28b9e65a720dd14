"""What a page says of knock-outs and counterfactuals: ranked effects, the null, and the cells that were edited.

Owns reading what `perturb` and `counterfactual` have written; leaves scores to `trust`, cells to `expression` and HTML
to `page`. Letters: q effects of a group, m cells on the map.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.cli.base import ReadingConfig
from perturbgene.counterfactuals.counterfactual import NULL_CELLS
from perturbgene.data_utils.opening import open_source
from perturbgene.errors import InputError
from perturbgene.files import check_format, read_json
from perturbgene.inference.held_out import about_q, about_untrained
from perturbgene.inference.run import RESULT_FORMAT, facts_of
from perturbgene.inference.streaming import ALL, LOW_COVERAGE
from perturbgene.perturbation.cells import DONOR_COLUMN
from perturbgene.perturbation.edits import ALL_GENES
from perturbgene.perturbation.statistics import NUM_MATCHED
from perturbgene.plots import expression_figure, pairs_figure
from perturbgene.reports.expression import read_map
from perturbgene.reports.page import Chart, Page, even_ends, map_data
from perturbgene.reports.trust import REAL_SCREEN, about_scores, read_scores, score_rows

#: Most groups with a section, most rows of a table, dots of a chart and names next to them, and genes on the map.
MOST_GROUPS, MOST_ROWS, MOST_POINTS, MOST_NAMES, MOST_GENES = 8, 40, 1_500, 10, 6
#: What each kind of perturbation is called, and what a gene then is.
KINDS = {
    "knock_out": ("Knock-outs", "knocked out"),
    "over_express": ("Over-expression", "over-expressed"),
    "set_bin": ("Set bins", "set to a bin"),
}
#: Below it an effect counts as beyond the null.
SURE = 0.05
#: Smallest p that a volcano shows.
LEAST_P = 1e-30
#: Half of a 95 % interval in standard errors.
NORMAL_95 = 1.96
#: Width of the drawing of an interval, without its margins.
BAR_WIDTH, BAR_MARGIN = 200, 4


@dataclass(frozen=True)
class Edits:
    """What `perturb` or `counterfactual` has written, in common terms.

    Args:
        path: The output.
        facts: What it records of its question.
        table: A row per gene and group, the strongest first: `group`, `name`, `effect`, `low`, `high`, `null_mean`,
            `p_value`, `q_value`, `other` (the number to compare with, or NaN), `is_screened`.
        texts: What stands in the further columns of the page's table, the same rows.
        effect, interval, other: What these columns are, with units.
        category: Phenotype that effects are about, or "".
        given: Phenotypes that are given.
        reading: How the cells were read.
    """

    path: Path
    facts: Mapping[str, Any]
    table: pd.DataFrame
    texts: pd.DataFrame
    effect: str
    interval: str
    other: str
    category: str
    given: Sequence[str]
    reading: Mapping[str, Any]

    @property
    def phenotypes(self) -> list[str]:
        """The phenotypes in play, the one that effects are about first."""
        return [*([self.category] if self.category else []), *(name for name in self.given if name != self.category)]


def plain(value: Any) -> Any:
    """Return a fact as it was before `provenance` wrote what is no text, number or list as JSON."""
    if isinstance(value, str) and (value == "null" or value[:1] in ("{", "[")):
        with suppress(ValueError):
            return json.loads(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


# -- perturb ------------------------------------------------------------------------------------------------------


def read_perturbation(path: Path) -> Edits:
    """Read a table of `perturb` with its record.

    Raises:
        InputError: One of the files is missing, damaged or not written by `perturb`.
    """
    record = path.with_suffix(".json")
    try:
        facts = read_json(record)
        as_text = {"perturbation": str, "group": str}  # also where a gene is called NA
        known = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, converters=as_text)
        num_donors = int(known["num_donors"].max() if len(known) else 0)
        facts = {"num_donors": num_donors, **facts, "effect": str(facts["effect"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} was not written by `perturbgene perturb`, with {record.name} ({error}).") from error
    check_format(record, facts.get("format_version"), reads=RESULT_FORMAT)
    names = {"perturbation": "name", "ci_low": "low", "ci_high": "high", "screened_effect": "other"}
    known = known.rename(columns=names).assign(is_screened=known["method"] == "screened")
    if "other" not in known:
        known["other"] = np.nan
    texts = {
        "ordinary genes": known["null_mean"],
        "p": known["p_value"], "q": known["q_value"], "cells": known["num_cells"], "donors": known["num_donors"],
        "computed": known["method"],
    }  # fmt: skip
    given = [str(entry).partition("=")[0] for entry in plain(facts.get("given", []))]
    towards = plain(facts.get("towards")) or ""
    names_of_reading = [declared.name for declared in dataclasses.fields(ReadingConfig)]
    reading = {name: plain(facts[name]) for name in names_of_reading if name in facts}
    unit = "nats" if towards else "cosine distance"
    return Edits(
        path, facts, known, pd.DataFrame(texts), f"effect ({unit})", "95 % over donors", "screened effect",
        towards.partition("=")[0].strip(), given, reading,
    )  # fmt: skip


# -- counterfactual -----------------------------------------------------------------------------------------------


def read_changes(path: Path) -> Edits | None:
    """Read what `counterfactual` has written; None if the file is something else.

    Raises:
        InputError: There is no such file, it cannot be read, or an earlier version has written it.
    """
    with closing(open_source(str(path))) as source:
        facts = facts_of(source)
        if facts.get("verb") != "counterfactual":
            return None
        rows = source.table("obs").reset_index(drop=True)
    if "reading" not in facts:
        raise InputError(f"{path} does not say how its cells were read. Run `perturbgene counterfactual` again.")
    facts = {name: plain(value) for name, value in facts.items()}
    rows = rows.iloc[np.argsort(-rows["change"].abs().to_numpy(), kind="stable")].reset_index(drop=True)
    wide = NORMAL_95 * rows["standard_error"]
    known = pd.DataFrame(
        {
            "group": rows["group"].astype(str), "name": rows["symbol"].astype(str), "effect": rows["change"],
            "low": rows["change"] - wide, "high": rows["change"] + wide, "null_mean": rows["null_mean"],
            "p_value": rows["p_value"], "q_value": rows["q_value"], "other": rows["observed"], "is_screened": False,
        }
    )  # fmt: skip
    texts = {"gene": "gene", "observed": "observed", "null_mean": "meaningless changes", "null_sd": "their spread"}
    texts |= {"p_value": "p", "q_value": "q", "share_expressed": "share expressing", "n_cells": "cells"}
    if (rows["gene"].astype(str) == known["name"]).all():
        texts.pop("gene")
    return Edits(
        path, facts, known, rows[list(texts)].rename(columns=texts), "change (log1p counts per 10,000)",
        "95 % over cells and masks", "observed difference", str(facts["set"]).partition("=")[0].strip(),
        list(facts["given"]), facts["reading"],
    )  # fmt: skip


# -- the page -----------------------------------------------------------------------------------------------------


def of_perturbation(path: Path, *, device: str) -> Page:
    """Return the page about a table of `perturb`; raises InputError as `read_perturbation` does."""
    edits = read_perturbation(path)
    facts, table = edits.facts, edits.table
    (kind, done), num_names = KINDS[str(facts["kind"])], table["name"].nunique()
    towards, from_ = plain(facts["towards"]), plain(facts["from_"])
    aim = f"{towards} (against {from_ or 'all other labels'}) in" if towards else "the state of"
    num_donors = int(facts["num_donors"])
    donors = f" of {num_donors} donor{'s' * (num_donors > 1)}" if num_donors else ""
    cells = f"{int(facts['num_cells']):,} cells{donors}" if "num_cells" in facts else "the cells"
    where = f" with {' and '.join(facts['where'])}" if facts.get("where") else ""
    sentence = (
        f"{facts['run']} was asked what happens to {aim} {cells}{where} if each of {num_names:,} genes or "
        f"combinations is {done}. An effect is a {facts['effect']}."
    )
    findings = [
        *([] if towards else about_untrained(str(facts["run"]))),
        *about_scores(str(facts["run"]), edits.phenotypes if towards else []),
        f"Nothing here compares the effects with cells in which these genes really are {done}: they are what the "
        "run answers about edited cells, and a gene that goes with a state looks like one that causes it.",
        REAL_SCREEN["label" if towards else "state"],
    ]
    return _page(edits, f"{kind}: {towards or 'the state of cells'}", sentence, findings, _null_of(edits), device)


def of_changes(edits: Edits, *, device: str) -> Page:
    """Return the page about what `counterfactual` has written, as `read_changes` returns it."""
    facts, table = edits.facts, edits.table
    given = [f"{name} = {label or 'as in obs'}" for name, label in facts["given"].items()]
    num_cells = int(edits.texts.loc[table["group"] == table["group"].iloc[0], "cells"].max()) if len(table) else 0
    sentence = (
        f"{facts['run']} was asked how {table['name'].nunique():,} genes change if {num_cells:,} cells are set to "
        f"{facts['set']}, given {', '.join(given) or 'nothing but their genes'}."
    )
    num_labeled = int(facts.get("num_labeled", 0))
    agreement = facts["agreement"]
    first = agreement.iloc[0] if len(agreement) else None
    text = f"No cell here has {facts['set']}, so nothing checks the changes."
    if num_labeled and first is not None and np.isfinite(first["spearman"]):
        text = (
            f"{num_labeled:,} cells really have {facts['set']}: the rank correlation of predicted and observed changes "
            f"is {first['spearman']:.2f} over {int(first['num_genes']):,} genes (1: the same order; 0: none in common)."
        )
    run = str(facts["run"])
    findings = [*about_untrained(run), *about_scores(run, edits.phenotypes), text, REAL_SCREEN["counterfactual"]]
    return _page(edits, f"Set to {facts['set']}", sentence, findings, _null_of_changes(edits), device)


def _null_of(edits: Edits) -> list[str]:
    """Say what the effects of `perturb` are compared with."""
    facts, screen = edits.facts, plain(edits.facts.get("screen"))
    if edits.table["p_value"].isna().all():
        if facts.get("doubt"):
            return [about_q(str(facts["doubt"]), is_shown=False)]
        if int(facts["num_donors"]) < 2:
            return ["There is no p: it needs two donors or more (--donor), since cells of one donor are no replicates."]
        return ["There is no p: too few other genes were computed to say what an ordinary one does."]
    if screen:
        which = f"the screened effects of the {NUM_MATCHED} genes that are expressed about as often"
        scale = screen.get("scale")
        which += f", times {scale:.2f} for exact effects" if scale is not None and np.isfinite(scale) else ""
    elif list(facts["genes"]) == [ALL_GENES]:
        which = f"the effects of the {NUM_MATCHED} genes that change in about as many cells"
    else:
        which = f"the effects of {int(facts['num_controls'])} random genes, changed in the same way"
    shown = [about_q(str(facts["doubt"]), is_shown=True)] if facts.get("doubt") else []
    return [
        *shown,
        f"p asks whether a gene is an outlier among ordinary ones: {which}. Their mean is the dashed mark in the table "
        "(ordinary genes). q is p after Benjamini and Hochberg; rows with q < 0.05 are marked.",
    ]


def _null_of_changes(edits: Edits) -> list[str]:
    """Say what the changes of `counterfactual` are compared with."""
    num_null, doubts = int(edits.facts["num_null"]), plain(edits.facts.get("doubts")) or {}
    texts = [about_q(doubt, is_shown=bool(edits.facts["show_q"])) for doubt in dict.fromkeys(doubts.values())]
    if not num_null:
        return [*texts, "There is no null (--num_null 0), so there are no p and q."]
    return [
        *texts,
        f"Changes are compared with {num_null} meaningless ones: the label's vector is moved as far in a random "
        f"direction, in up to {NULL_CELLS} cells of each group. Their mean is the dashed mark in the table. p asks "
        "whether a change is one more of them; it says that the run ties the gene to the label, not that it is right.",
    ]


def _page(edits: Edits, title: str, sentence: str, findings: list[str], null: list[str], device: str) -> Page:
    """Return the page: findings, scores and agreement, the cells, the groups, and the screen."""
    facts, table = edits.facts, edits.table
    if table["p_value"].isna().all():
        findings.append(null[0])
    if float(facts["gene_coverage"]) < LOW_COVERAGE:
        findings.append(f"The cells were measured with {100 * float(facts['gene_coverage']):.0f} % of the run's genes.")
    groups = list(table["group"].unique())
    sections: dict[str, Any] = {
        "scores": score_rows(read_scores(str(facts["run"]))[0], edits.phenotypes), "null": null,
        "agreement": facts["agreement"].to_dict("records") if "agreement" in facts else [],
        "effect": edits.effect, "interval": edits.interval, "columns": list(edits.texts.columns),
        "groups": [_group(edits, name, number) for number, name in enumerate(groups[:MOST_GROUPS])], "screen": None,
    }  # fmt: skip
    figures: dict[str, Any] = {}
    is_pair = (table["other"].notna() & table["effect"].notna() & ~table["is_screened"]).to_numpy()
    if is_pair.any():
        pairs = table[is_pair]
        labels = {"x_label": edits.other, "y_label": edits.effect}
        name = "observed" if "agreement" in facts else "screen"
        figures[name] = pairs_figure(pairs["other"].to_numpy(), pairs["effect"].to_numpy(), title=title, **labels)
        if "agreement" not in facts:
            chart = _pairs_chart("Exact against screened effects", pairs, edits)
            sections["screen"] = {"chart": chart, "text": _about_screen(facts)}
    data, note = _add_map(edits, figures, title=title, device=device)
    num_more = max(0, len(groups) - MOST_GROUPS)
    notes = [f"{num_more:,} more groups are in {edits.path.name}."] if num_more else []
    texts = (title, sentence, findings)
    return Page("effects.html.jinja", *texts, sections, {"map": data}, figures, map_note=note, notes=notes)


def _about_screen(facts: Mapping[str, Any]) -> str:
    """Say how good the screen was, in words of `perturb`."""
    screen = plain(facts.get("screen")) or {}
    if screen.get("spearman") is None:
        return "The screen was not checked on random genes."
    return (
        f"On {int(screen['num_genes'])} random genes, screened and exact effects have a rank correlation of "
        f"{screen['spearman']:.3f}; the top quarter of the screen contains {100 * screen['recall']:.0f} % of the exact "
        f"top eighth (25 % by chance); exact effects are {screen['scale']:.2f} times as large."
    )


def _add_map(edits: Edits, figures: dict[str, Any], *, title: str, device: str) -> tuple[dict[str, Any] | None, str]:
    """Read the cells again, add their figure, and return the data of the map and its note."""
    facts, single = edits.facts, edits.table["name"].str.split("+").explode()
    names = list(dict.fromkeys(single))[:MOST_GENES]
    columns = [edits.category, plain(facts.get("groupby")), plain(facts.get("donor")) or DONOR_COLUMN]
    found = read_map(
        str(facts["input"]), str(facts["run"]), columns=[name for name in dict.fromkeys(columns) if name],
        genes=names, device=device, reading=edits.reading,
    )  # fmt: skip
    if not len(found.places_m2):
        return None, found.note
    labels = found.labels.iloc[:, 0] if found.labels.shape[1] else None
    figures["map"] = expression_figure(found.places_m2, labels, found.genes, title=title)
    order = np.random.default_rng(0).permutation(len(found.places_m2))  # no label is drawn on top of all others
    colors = found.labels.join(found.genes.add_prefix("expression of ")).iloc[order]
    return map_data(found.places_m2[order], colors), found.note


# -- a group ------------------------------------------------------------------------------------------------------


def _group(edits: Edits, name: str, number: int) -> dict[str, Any]:
    """Return the section of a group: its charts and the table of its strongest effects."""
    is_own = ((edits.table["group"] == name) & edits.table["effect"].notna()).to_numpy()
    own, texts = edits.table[is_own], edits.texts[is_own]
    shown = own.head(MOST_ROWS)
    ends = shown[["low", "high", "effect", "null_mean"]].to_numpy(dtype=float)
    span = (float(np.nanmin(ends)), float(np.nanmax(ends))) if np.isfinite(ends).any() else (0.0, 1.0)
    rows = [
        _row(row, list(further), span) for row, further in zip(
            shown.to_dict("records"), texts.head(MOST_ROWS).itertuples(index=False), strict=True
        )
    ]  # fmt: skip
    num_sure, has_q = int((own["q_value"] < SURE).sum()), own["q_value"].notna().any()
    sure = f"; {num_sure:,} have q < 0.05" if has_q else ""
    charts, points = [], _thinned(own)
    if len(own):
        charts.append(_volcano(points, edits))
        if "agreement" in edits.facts and own["other"].notna().any():
            charts.append(_pairs_chart("Predicted against observed changes", points, edits))
    drawn = "all of them" if len(points) == len(own) else f"the {len(points):,} strongest and some of the others"
    dots = "Orange: q < 0.05. Hollow: screened only. " if has_q or own["is_screened"].any() else ""
    return {
        "id": f"g{number}", "title": "Ranked effects" if name == ALL else name, "rows": rows, "charts": charts,
        "caption": f"The strongest {len(rows):,} of {len(own):,} genes or combinations{sure}",
        "ends": [f"{end:.3g}" for end in span],
        "note": f"{dots}Drawn are {drawn}; the table has the strongest as text.",
    }  # fmt: skip


def _thinned(own: pd.DataFrame) -> pd.DataFrame:
    """Return at most `MOST_POINTS` effects, the most important first: sure and strong ones, and some of the others."""
    own = own.iloc[np.argsort(-(own["q_value"] < SURE).to_numpy().astype(int), kind="stable")]
    if len(own) <= MOST_POINTS:
        return own
    num_first = MOST_POINTS * 2 // 3
    rest = np.linspace(num_first, len(own) - 1, MOST_POINTS - num_first).astype(int)
    return own.iloc[[*range(num_first), *rest]]


def _row(row: Mapping[str, Any], further: list[Any], span: tuple[float, float]) -> dict[str, Any]:
    """Return a row of the table, with the places of its interval, effect and null in the drawing."""

    def place(value: float) -> float | None:
        share = (value - span[0]) / max(span[1] - span[0], 1e-300)
        return round(BAR_MARGIN + BAR_WIDTH * share, 1) if np.isfinite(share) else None

    bar = {"low": place(row["low"]), "high": place(row["high"]), "at": place(row["effect"]), "kind": _kind(row)}
    bar["null"] = place(row["null_mean"])
    interval = f"{row['low']:.3g} to {row['high']:.3g}" if np.isfinite([row["low"], row["high"]]).all() else ""
    return {
        "name": row["name"], "effect": f"{row['effect']:.3g}", "interval": interval, "bar": bar,
        "is_hit": row["q_value"] < SURE, "cells": [_text(value) for value in further],
    }  # fmt: skip


def _text(value: Any) -> str:
    """Write an entry of a table: three digits of a number, thousands apart of a count, nothing for a missing one."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{value:.3g}" if np.isfinite(value) else ""


def _kind(row: Mapping[str, Any]) -> str:
    """Return the classes of a dot: how sure it is, and whether it was only screened."""
    sure = "plain" if np.isnan(row["q_value"]) else "hit" if row["q_value"] < SURE else "miss"
    return f"{sure} screened" if row["is_screened"] else sure


def _volcano(points: pd.DataFrame, edits: Edits) -> Chart:
    """Return effects against their p, or by rank if there is none."""
    effect, p = points["effect"].to_numpy(dtype=float), points["p_value"].to_numpy(dtype=float)
    if not np.isfinite(p).any():
        order = np.argsort(-effect, kind="stable")
        rank = np.empty(len(effect))
        rank[order] = np.arange(1, len(effect) + 1)
        return _points_chart("Effects by rank", "rank", edits.effect, rank, effect, points)
    height = -np.log10(np.maximum(p, LEAST_P))
    is_known = np.isfinite(height)
    return _points_chart("Volcano", edits.effect, "-log10 p", effect[is_known], height[is_known], points[is_known])


def _pairs_chart(title: str, points: pd.DataFrame, edits: Edits) -> Chart:
    """Return effects against the number to compare them with, and the line on which both are equal."""
    points = _thinned(points[points["other"].notna() & points["effect"].notna()])
    x, y = points["other"].to_numpy(dtype=float), points["effect"].to_numpy(dtype=float)
    chart = _points_chart(title, edits.other, edits.effect, x, y, points)
    low, high = max(chart.left, chart.low), min(chart.right, chart.top)
    chart.add_line("both equal", [low, high], [low, high])
    return chart


def _points_chart(title: str, x_label: str, y_label: str, x: np.ndarray, y: np.ndarray, points: pd.DataFrame) -> Chart:
    """Return a chart of genes; pointing at one reads its name and numbers."""
    (left, right), (low, top) = even_ends(x), even_ends(y)
    chart = Chart(title, x_label, y_label, low, top, left, right)
    names, rows = list(points["name"]), points.to_dict("records")
    texts = [
        ", ".join(
            f"{text} {row[key]:.3g}"
            for key, text in (("effect", "effect"), ("p_value", "p"), ("q_value", "q"), ("other", x_label))
            if np.isfinite(row[key]) and (key != "other" or x_label not in ("rank", "-log10 p"))
        )
        for row in rows
    ]
    said = [f"{name}: {text}" for name, text in zip(names, texts, strict=True)]
    chart.add_points(x, y, said, [_kind(row) for row in rows], names[:MOST_NAMES])
    return chart
