"""Figures: tables in, matplotlib figures out.

Owns every picture and is the only module that imports matplotlib; knows nothing of cells, models or metrics.
Letters: k classes, or names in a figure.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from perturbgene.files import whole_file

MOST_CLASSES_WITH_COUNTS = 25
# More names would overlap at the largest size; their axis counts classes instead.
MOST_CLASSES_WITH_NAMES = 300
LARGEST_SIDE_INCHES = 42.0
MOST_LETTERS_IN_A_LABEL = 40
MOST_GROUPS = 6  # that get a panel; the title counts the others
MOST_NAMES = 12  # of the strongest perturbations in a panel
MOST_CHANGES = 15  # largest rises, and largest falls, in a panel
# Okabe & Ito (2008), "Color Universal Design": eight hues that color-blind people can tell apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# How sure an effect is, and its color if it is screened and if it is exact.
EFFECT_COLORS = (
    ("q >= 0.05, ", "#999999", "#999999"), ("q < 0.05, ", OKABE_ITO[1], OKABE_ITO[1]), ("", OKABE_ITO[5], OKABE_ITO[0]),
)  # fmt: skip


def confusion_figure(table: pd.DataFrame, *, title: str, unit: str = "cells") -> Figure:
    """Draw a confusion matrix: rows are true classes, color is the share of the row, text is the count.

    Args:
        table: Counts, true classes as rows and predicted classes as columns, shape (k, k); up to 25 are written.
        title: First line of the title; the number of cells is added.
        unit: What is counted, if not cells.
    """
    counts_kk = table.to_numpy(dtype=np.float64)
    share_kk = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1.0)
    num_classes = max(len(table), 1)
    is_small = num_classes <= MOST_CLASSES_WITH_COUNTS
    side = float(np.clip(0.42 * num_classes, 2.6, 10.0)) if is_small else 0.13 * num_classes + 3
    side = min(side, LARGEST_SIDE_INCHES)
    figure = Figure(figsize=(side + 4.0, side + 2.6), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    if counts_kk.size:
        axes.imshow(share_kk, cmap="cividis", vmin=0.0, vmax=1.0, aspect="equal", interpolation="nearest")
    if num_classes > MOST_CLASSES_WITH_NAMES:
        axes.set(xlabel="predicted (number of the class)", ylabel="true (number of the class)")
    else:
        turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_small else {"rotation": 90}
        size = 9.0 if is_small else 6.5
        axes.set_xticks(range(len(table.columns)), [_shortened(name) for name in table.columns], fontsize=size, **turn)
        axes.set_yticks(range(len(table)), [_shortened(name) for name in table.index], fontsize=size)
    for row, column in zip(*np.nonzero(counts_kk), strict=True) if is_small else []:
        # The dark half of cividis needs white letters, the bright half black ones.
        color = "white" if share_kk[row, column] < 0.5 else "black"
        size = 8 if counts_kk.max() < 10_000 else 6
        text = f"{int(counts_kk[row, column]):,}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    axes.set_title(f"{_plain(title)}\nn = {int(counts_kk.sum()):,} {unit}", fontsize=11)
    bar = figure.colorbar(ScalarMappable(Normalize(0.0, 1.0), cmap="cividis"), ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    return figure


def loss_figure(history: pd.DataFrame, *, title: str) -> Figure:
    """Draw losses over optimizer steps: training as lines, evaluation in the same color, dashed with dots.

    Args:
        history: A `step` column, and one column per part whose name contains "loss" (`loss`, `gene_loss`, `eval_loss`,
            ...); missing entries are steps at which that part was not logged. Other columns are ignored.
        title: First line of the title; the number of steps is added.
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    columns = [str(name) for name in history.select_dtypes("number").columns if "loss" in str(name)]
    part_of = {name: name.removeprefix("eval_").removeprefix("train_") for name in columns}
    colors = dict(zip(dict.fromkeys(part_of.values()), OKABE_ITO * len(columns), strict=False))
    for name in columns:
        values = history[["step", name]].dropna()
        is_evaluation = name.startswith("eval_")
        axes.plot(
            values["step"], values[name], label=name.replace("_", " "), color=colors[part_of[name]], markersize=3.5,
            linestyle="--" if is_evaluation else "-", marker="o" if is_evaluation or len(values) == 1 else None,
        )  # fmt: skip
    steps = int(history["step"].max()) if len(history) else 0
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", title=f"{_plain(title)}\nn = {steps:,} steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if (history[columns].stack() > 0).all() and columns:  # parts differ tenfold, and a linear axis flattens the small
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if columns:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def effects_figure(table: pd.DataFrame, *, title: str, effect: str) -> Figure:
    """Draw effects of perturbations: a volcano plot if there are p-values, otherwise effects by rank.

    Args:
        table: Columns `perturbation`, `group`, `effect`, `method` ("exact" or "screened"), `p_value` and `q_value`.
        title: Title; the number of perturbations is added.
        effect: What the effect is, with its unit.
    """
    num_groups = table["group"].nunique()

    def draw(axes: Axes, name: str, part: pd.DataFrame) -> None:
        axes.set_title(f"{_shortened(name)}, n = {len(part):,}" if num_groups > 1 else "", fontsize=10)
        is_volcano = part["p_value"].notna().any()
        part = part[part["p_value" if is_volcano else "effect"].notna()]
        if is_volcano:
            x, y = part["effect"].to_numpy(), -np.log10(np.maximum(part["p_value"].to_numpy(), 1e-30))
            sure = np.where(part["q_value"] < 0.05, "q < 0.05, ", "q >= 0.05, ")
            axes.set(xlabel=effect, ylabel="-log10 p")
        else:
            part = part.sort_values("effect", ascending=False)
            x, y = np.arange(1, len(part) + 1), part["effect"].to_numpy()
            sure = np.full(len(part), "")
            axes.axhline(0.0, color="#999999", linewidth=0.6)
            axes.set(xlabel="rank", ylabel=effect)
        for kind, screened, exact in EFFECT_COLORS:
            for method, marker, color in (("screened", "x", screened), ("exact", "o", exact)):
                chosen = (sure == kind) & (part["method"] == method).to_numpy()
                if chosen.any():
                    axes.scatter(x[chosen], y[chosen], s=14, marker=marker, color=color, label=f"{kind}{method}")
        _name_strongest(axes, part, x, y)

    num_perturbations = table.loc[table["effect"].notna(), "perturbation"].nunique()
    title = f"{title}\nn = {num_perturbations:,} perturbations"
    return _panel_figure(table, draw, title=title, base=(2.0, 1.4), panel=(5.0, 3.8), legend_columns=4)


def _name_strongest(axes: Axes, table: pd.DataFrame, x: np.ndarray, y: np.ndarray) -> None:
    """Write the names of the strongest effects next to their dots, on the free side and without overlap."""
    order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")[:MOST_NAMES]
    if not len(order):
        return
    names, middle, low = table["perturbation"].to_numpy(), (x.min() + x.max()) / 2, float(y.min())
    step = max(float(y.max()) - low, 1e-12) / 22
    for is_left in (True, False):
        rows = [row for row in order[np.argsort(-y[order], kind="stable")] if bool(x[row] < middle) == is_left]
        # From the top down each name is at least one step below the last; names below the lowest dot move up again.
        placed_k = y[rows].astype(np.float64)
        for k in range(1, len(rows)):
            placed_k[k] = min(placed_k[k], placed_k[k - 1] - step)
        placed_k = np.maximum(placed_k, low + step * np.arange(len(rows))[::-1])
        for row, height in zip(rows, placed_k, strict=True):
            axes.annotate(
                _shortened(names[row]), (x[row], y[row]), xytext=(14 if is_left else -14, height), fontsize=7,
                textcoords=("offset points", "data"), ha="left" if is_left else "right", va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "#666666"},
            )  # fmt: skip


def deletion_figure(curves: pd.DataFrame, *, title: str) -> Figure:
    """Draw what is left of a label's log-odds while genes are removed, strongest first and in random order.

    Args:
        curves: Columns `share_removed` (0..1), `attributed` and `random`: mean log-odds in nats.
        title: Title, with the number of cells.
    """
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="share of the cell's genes removed", ylabel="mean log-odds of the predicted label (nats)"
    )
    for name, label, color, style in (
        ("attributed", "most supporting genes first", OKABE_ITO[1], "-o"),
        ("random", "random order", OKABE_ITO[0], "--o"),
    ):
        axes.plot(curves["share_removed"], curves[name], style, color=color, markersize=3, label=label)
    axes.set_title(_plain(title), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def changes_figure(table: pd.DataFrame, *, title: str, value: str) -> Figure:
    """Draw the genes that rise and fall most as bars, with what chance would do and what was observed.

    Bars are gray if q >= 0.05; lines are the 95 % range of chance, and dots the observed difference.

    Args:
        table: Columns `group`, `symbol`, `change`, `null_mean`, `null_sd`, `q_value` and `observed`, as
            `counterfactual` returns.
        title: First line of the title.
        value: What a change is, with its unit.
    """

    def draw(axes: Axes, name: str, part: pd.DataFrame) -> None:
        axes.set_title(f"{_shortened(name)}, n = {len(part):,} genes", fontsize=9)
        axes.set_xlabel(value, fontsize=9)
        part = part.sort_values("change")
        if len(part) > 2 * MOST_CHANGES:
            part = pd.concat([part.head(MOST_CHANGES), part.tail(MOST_CHANGES)])
        height, is_hit = np.arange(len(part)), (part["q_value"] < 0.05).to_numpy()
        hits = ((is_hit, "q < 0.05", OKABE_ITO[1]), (~is_hit, "q >= 0.05 or not tested", "#BBBBBB"))
        for is_kind, label, color in hits:
            if is_kind.any():
                axes.barh(height[is_kind], part["change"][is_kind], color=color, label=label, height=0.75)
        axes.errorbar(
            part["null_mean"], height, xerr=1.96 * part["null_sd"], fmt="none", ecolor="#000000", elinewidth=0.7,
            label="95 % range of changes that mean nothing",
        )  # fmt: skip
        axes.set_yticks(height, labels=[_shortened(symbol) for symbol in part["symbol"]], fontsize=7)
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(0.0, color="#666666", linewidth=0.6)
        low, high = axes.get_xlim()
        margin = 0.03 * (high - low)
        observed = part["observed"].to_numpy()
        is_inside = (observed >= low) & (observed <= high)
        for is_kind, marker in ((observed < low, "<"), (observed > high, ">"), (is_inside, "o")):
            places = np.clip(observed[is_kind], low - margin, high + margin)
            (dots,) = axes.plot(places, height[is_kind], marker, color=OKABE_ITO[0], markersize=3.5)
        dots.set_label("observed difference (arrow: outside the axis)")
        axes.set_xlim(low - 2 * margin, high + 2 * margin)

    panel = (4.6, 0.19 * 2 * MOST_CHANGES)
    return _panel_figure(table, draw, title=title, base=(1.0, 1.6), panel=panel, legend_columns=1)


def cells_figure(places_n2: np.ndarray, labels: pd.Series, probability: pd.Series, *, title: str) -> Figure:
    """Draw a map of cells twice: by label, of which those with most cells are named, and by probability.

    Args:
        places_n2: Where each cell is.
        labels, probability: Of the same cells.
        title: First line of the title; the number of cells is added.
    """
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    by_label, by_probability = figure.subplots(1, 2)
    size, counts = float(np.clip(20_000 / max(len(labels), 1), 1, 16)), labels.value_counts()
    named = list(counts[counts > 0].index[: len(OKABE_ITO)])
    for name, color in [(None, "#BBBBBB"), *zip(named, OKABE_ITO, strict=False)]:
        is_drawn_n = (~labels.isin(named) if name is None else labels == name).to_numpy()
        if is_drawn_n.any():
            text = "others" if name is None else _shortened(name)
            by_label.scatter(*places_n2[is_drawn_n].T, s=size, color=color, label=text, linewidths=0)
    by_label.legend(frameon=False, fontsize=7, markerscale=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    drawn = by_probability.scatter(*places_n2.T, s=size, c=probability, cmap="viridis", vmin=0, vmax=1, linewidths=0)
    figure.colorbar(drawn, ax=by_probability, label="probability of the answer")
    for axes in (by_label, by_probability):
        axes.set(xticks=[], yticks=[], aspect="equal")
    figure.suptitle(f"{_plain(title)}\nn = {len(labels):,} cells", fontsize=11)
    return figure


def certainty_figure(
    count_b: np.ndarray, coverage_b: np.ndarray, expected_b: np.ndarray, measured_b: np.ndarray | None, *, title: str
) -> Figure:
    """Draw how sure answers are, and what is left of them, and how good that is, if the least sure are left out.

    Args:
        count_b: Number of cells by probability, in bins of equal width from 0 to 1.
        coverage_b, expected_b, measured_b: Share of cells above the lower end of each bin, their mean probability, and
            the share of them that is right, if that is known.
        title: First line of the title; the number of cells is added.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    histogram, curve = figure.subplots(1, 2)
    histogram.bar(
        np.arange(len(count_b)) / len(count_b), count_b, width=1 / len(count_b), align="edge", color=OKABE_ITO[0]
    )
    histogram.set(xlabel="probability of the answer", ylabel="cells", xlim=(0, 1))
    curve.plot(coverage_b, expected_b, color=OKABE_ITO[0], label="expected from the probabilities")
    if measured_b is not None:
        curve.plot(coverage_b, measured_b, "--", color=OKABE_ITO[1], label="measured on these cells")
    curve.set(xlabel="share of cells that keep a label", ylabel="accuracy of these", xlim=(0, 1.02))
    curve.legend(frameon=False, fontsize=8)
    for axes in (histogram, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_plain(title)}\nn = {int(count_b.sum()):,} cells", fontsize=11)
    return figure


def expression_figure(places_n2: np.ndarray, labels: pd.Series | None, genes: pd.DataFrame, *, title: str) -> Figure:
    """Draw a map of cells once by label, and once by the expression of each gene.

    Args:
        places_n2: Where each cell is.
        labels: Of the same cells, if they have any.
        genes: Log1p counts per 10,000, a column for each gene.
        title: First line of the title; the number of cells is added.
    """
    num_panels = genes.shape[1] + (labels is not None)
    columns = min(4, max(1, num_panels))
    rows = max(1, -(-num_panels // columns))
    figure = Figure(figsize=(1.0 + 3.2 * columns, 0.8 + 2.9 * rows), layout="constrained")
    panels: list[Any] = [figure.add_subplot(rows, columns, at + 1, xticks=[], yticks=[]) for at in range(num_panels)]
    size = float(np.clip(20_000 / max(len(places_n2), 1), 1, 16))
    if labels is not None:
        axes, counts = panels.pop(0), labels.astype(str).value_counts()
        named = list(counts.index[: len(OKABE_ITO)])
        for name, color in [(None, "#BBBBBB"), *zip(named, OKABE_ITO, strict=False)]:
            is_drawn_n = (~labels.astype(str).isin(named) if name is None else labels.astype(str) == name).to_numpy()
            if is_drawn_n.any():
                text = "others" if name is None else _shortened(name)
                axes.scatter(*places_n2[is_drawn_n].T, s=size, color=color, label=text, linewidths=0)
        axes.set_title(_shortened(labels.name), fontsize=10)
        axes.legend(frameon=False, fontsize=6, markerscale=1.5)
    for axes, name in zip(panels, genes.columns, strict=True):
        drawn = axes.scatter(*places_n2.T, s=size, c=genes[name], cmap="viridis", linewidths=0)
        figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=7)
        axes.set_title(_shortened(name), fontsize=10)
    figure.suptitle(f"{_plain(title)}\nn = {len(places_n2):,} cells, log1p counts per 10,000", fontsize=11)
    return figure


def pairs_figure(x: np.ndarray, y: np.ndarray, *, title: str, x_label: str, y_label: str) -> Figure:
    """Draw one number of each gene against another, with the line on which both are equal.

    Args:
        x, y: The numbers, finite, of the same genes.
        title: First line of the title; the number of genes is added.
        x_label, y_label: What they are, with units.
    """
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    if len(x):
        ends = (min(x.min(), y.min()), max(x.max(), y.max()))
        axes.plot(ends, ends, color="#999999", linewidth=0.7, linestyle="--")
    axes.scatter(x, y, s=12, color=OKABE_ITO[0], linewidths=0)
    axes.set_title(f"{_plain(title)}\nn = {len(x):,} genes", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def network_figure(
    places: Mapping[str, tuple[float, float]], links: Sequence[tuple[str, str]], *, title: str
) -> Figure:
    """Draw a network of genes.

    Args:
        places: Where each gene is.
        links: Pairs of genes.
        title: First line of the title; the number of genes is added.
    """
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[])
    for a, b in links:
        axes.plot(*zip(places[a], places[b], strict=True), color="#BBBBBB", linewidth=0.8, zorder=1)
    for name, (x, y) in places.items():
        axes.plot(x, y, "o", color=OKABE_ITO[0], markersize=4)
        axes.annotate(_shortened(name), (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{_plain(title)}\nn = {len(places):,} genes", fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path | str, *, dots_per_inch: int = 150) -> Path:
    """Write the figure, whole or not at all; the ending of the path decides the format, PNG if there is none."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".") or "png", dpi=dots_per_inch)
    return target


def _panel_figure(
    table: pd.DataFrame, draw: Callable[[Axes, str, pd.DataFrame], None], *, title: str,
    base: tuple[float, float], panel: tuple[float, float], legend_columns: int,
) -> Figure:  # fmt: skip
    """Draw the first groups of a table in panels of a size, at most three in a row, with one legend below all."""
    groups = table["group"].unique()
    num_panels = max(1, min(len(groups), MOST_GROUPS))
    columns = min(3, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(base[0] + panel[0] * columns, base[1] + panel[1] * rows), layout="constrained")
    for index, group in enumerate(groups[:MOST_GROUPS]):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, group, table[table["group"] == group])
    hidden = f" ({len(groups) - MOST_GROUPS} more groups in the table)" if len(groups) > MOST_GROUPS else ""
    figure.suptitle(f"{_plain(title)}{hidden}", fontsize=11)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
        figure.legend([*handles.values()], [*handles], ncols=legend_columns, **style)
    return figure


def _shortened(name: object) -> str:
    text = str(name)
    if len(text) > MOST_LETTERS_IN_A_LABEL:
        # Cell types often differ only at their ends ("... T cell", "... T cell, naive"), so the middle goes.
        text = f"{text[: MOST_LETTERS_IN_A_LABEL // 2]}…{text[1 - MOST_LETTERS_IN_A_LABEL // 2 :]}"
    return _plain(text)


def _plain(text: str) -> str:
    """Keep $ from starting mathematical text."""
    return text.replace("$", r"\$")
