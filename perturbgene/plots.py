"""Figures: tables in, matplotlib figures out.

Owns every picture and is the only module that knows the plotting library; knows nothing of cells, models or metrics.
Letters: k classes.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_CLASSES_WITH_COUNTS = 25
# More names would overlap at the largest size; their axis counts classes instead.
MOST_CLASSES_WITH_NAMES = 300
LARGEST_SIDE_INCHES = 42.0
MOST_LETTERS_IN_A_LABEL = 40
# Okabe & Ito (2008), "Color Universal Design": eight hues that stay apart under colour-blindness.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def confusion_figure(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw a confusion matrix: rows are true classes, colour is the share of the row, text is the count.

    Args:
        table: Counts, true classes as rows and predicted classes as columns, shape (k, k).
        title: First line of the title; the number of cells is added.

    Returns:
        The figure; counts are written into the squares up to 25 classes.
    """
    counts_kk = table.to_numpy(dtype=np.float64)
    share_kk = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1.0)
    num_classes = max(len(table), 1)
    font_size = 9.0 if num_classes <= MOST_CLASSES_WITH_COUNTS else 6.5
    side = np.clip(0.42 * num_classes, 2.6, 10.0) if num_classes <= MOST_CLASSES_WITH_COUNTS else 0.13 * num_classes + 3
    side = min(float(side), LARGEST_SIDE_INCHES)
    figure = _empty_figure(width=side + 4.0, height=side + 2.6)
    axes = figure.add_subplot()
    if counts_kk.size:
        axes.imshow(share_kk, cmap="cividis", vmin=0.0, vmax=1.0, aspect="equal", interpolation="nearest")
    _label_classes(axes, table, font_size=font_size)
    if num_classes <= MOST_CLASSES_WITH_COUNTS:
        _write_counts(axes, counts_kk, share_kk=share_kk)
    axes.set_title(f"{_plain(title)}\nn = {int(counts_kk.sum()):,} cells", fontsize=11)
    bar = figure.colorbar(ScalarMappable(Normalize(0.0, 1.0), cmap="cividis"), ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    return figure


def loss_figure(history: pd.DataFrame, *, title: str) -> Figure:
    """Draw losses against the optimiser step: training as lines, evaluation dashed with dots.

    Args:
        history: A `step` column, and one column per part whose name holds "loss" (`loss`, `gene_loss`, `eval_loss`,
            ...); missing entries are steps at which that part was not logged. Other columns are left out.
        title: First line of the title; the number of steps is added.

    Returns:
        The figure; a part and its evaluation (`eval_` before its name) share a colour.
    """
    figure = _empty_figure(width=7.0, height=4.2)
    axes = figure.add_subplot()
    numeric = history.select_dtypes("number")
    columns = [str(name) for name in numeric.columns if "loss" in str(name)]
    parts = list(dict.fromkeys(_part(name) for name in columns))
    for name in columns:
        values = history[["step", name]].dropna()
        axes.plot(
            values["step"],
            values[name],
            label=name.replace("_", " "),
            color=OKABE_ITO[parts.index(_part(name)) % len(OKABE_ITO)],
            linestyle="--" if name.startswith("eval_") else "-",
            marker="o" if name.startswith("eval_") or len(values) == 1 else None,
            markersize=3.5,
        )
    steps = int(history["step"].max()) if len(history) else 0
    axes.set(xlabel="optimiser step", ylabel="loss (nats)", title=f"{_plain(title)}\nn = {steps:,} steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if columns:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def save_figure(figure: Figure, path: Path | str, *, dots_per_inch: int = 150) -> Path:
    """Write the figure to a temporary name and rename it, so that a half picture never lies under `path`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture_format = target.suffix.lstrip(".") or "png"
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        figure.savefig(temporary, format=picture_format, dpi=dots_per_inch)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600; a picture is for everyone who may read the folder
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def changes_figure(
    table: pd.DataFrame, *, title: str, value: str, most_genes: int = 15, most_groups: int = 6
) -> Figure:
    """Draw the genes that rise and fall most as bars, with what chance would do and what was observed.

    Args:
        table: Columns `group`, `symbol`, `change`, `null_mean`, `null_sd`, `q_value` and `observed`, as
            `counterfactual` returns.
        title: First line of the title.
        value: What a change is, with its unit.
        most_genes: So many of the largest rises and falls each.
        most_groups: So many groups get a panel; the title counts the others.
    """
    groups = list(dict.fromkeys(table["group"]))
    shown = groups[:most_groups]
    columns = max(1, min(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = _empty_figure(width=1.0 + 4.6 * columns, height=1.6 + 0.19 * 2 * most_genes * rows)
    for index, group in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        part = table[table["group"] == group].sort_values("change")
        is_many = len(part) > 2 * most_genes
        _draw_changes(axes, pd.concat([part.head(most_genes), part.tail(most_genes)]) if is_many else part)
        axes.set_title(f"{_shortened(group)}, n = {len(part):,} genes", fontsize=9)
        axes.set_xlabel(value, fontsize=9)
    hidden = f" ({len(groups) - len(shown)} more groups in the table)" if len(groups) > len(shown) else ""
    figure.suptitle(f"{_plain(title)}{hidden}", fontsize=11)
    if shown:
        found = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_changes(axes: Axes, table: pd.DataFrame) -> None:
    """Draw bars of changes, grey where q >= 0.05, with the null's 95 % range and the observed difference."""
    height = np.arange(len(table))
    is_hit = (table["q_value"] < 0.05).to_numpy()
    for is_kind, label, color in ((is_hit, "q < 0.05", OKABE_ITO[1]), (~is_hit, "q >= 0.05 or no null", "#BBBBBB")):
        if is_kind.any():
            axes.barh(height[is_kind], table["change"][is_kind], color=color, label=label, height=0.75)
    axes.errorbar(
        table["null_mean"], height, xerr=1.96 * table["null_sd"], fmt="none", ecolor="#000000", elinewidth=0.7,
        label="meaningless change, 95 %",
    )  # fmt: skip
    axes.set_yticks(height, labels=[_shortened(name) for name in table["symbol"]], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.axvline(0.0, color="#666666", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_xlim()
    margin = 0.03 * (high - low)
    observed = table["observed"].to_numpy()
    is_inside = (observed >= low) & (observed <= high)
    for is_kind, marker in ((observed < low, "<"), (observed > high, ">"), (is_inside, "o")):
        places = np.clip(observed[is_kind], low - margin, high + margin)
        (dots,) = axes.plot(places, height[is_kind], marker, color=OKABE_ITO[0], markersize=3.5)
    dots.set_label("observed (an arrow: beyond the axis)")
    axes.set_xlim(low - 2 * margin, high + 2 * margin)


def _empty_figure(*, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _part(name: str) -> str:
    return name.removeprefix("eval_").removeprefix("train_")


def _label_classes(axes: Axes, table: pd.DataFrame, *, font_size: float) -> None:
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(table) > MOST_CLASSES_WITH_NAMES:
        axes.set(xlabel="predicted (number of the class)", ylabel="true (number of the class)")
        return
    axes.set_xticks(
        np.arange(table.shape[1]),
        labels=[_shortened(name) for name in table.columns],
        rotation=90 if table.shape[1] > MOST_CLASSES_WITH_COUNTS else 45,
        ha="center" if table.shape[1] > MOST_CLASSES_WITH_COUNTS else "right",
        rotation_mode="default" if table.shape[1] > MOST_CLASSES_WITH_COUNTS else "anchor",
        fontsize=font_size,
    )
    axes.set_yticks(np.arange(table.shape[0]), labels=[_shortened(name) for name in table.index], fontsize=font_size)


def _write_counts(axes: Axes, counts_kk: np.ndarray, *, share_kk: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(counts_kk), strict=True):
        # The dark half of cividis needs white letters, the bright half black ones.
        axes.text(
            column,
            row,
            f"{int(counts_kk[row, column]):,}",
            ha="center",
            va="center",
            fontsize=8 if counts_kk.max() < 10_000 else 6,
            color="white" if share_kk[row, column] < 0.5 else "black",
        )


def _shortened(name: object) -> str:
    text = str(name)
    if len(text) > MOST_LETTERS_IN_A_LABEL:
        # Cell types often differ only at their ends ("... T cell", "... T cell, naive"), so the middle goes.
        text = f"{text[: MOST_LETTERS_IN_A_LABEL // 2]}…{text[1 - MOST_LETTERS_IN_A_LABEL // 2 :]}"
    return _plain(text)


def _plain(text: str) -> str:
    """Keep $ from starting mathematical text."""
    return text.replace("$", r"\$")
