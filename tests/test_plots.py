"""Figures: written whole, titled with n, free of global plotting state."""

import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from perturbgene.plots import (
    cells_figure,
    certainty_figure,
    confusion_figure,
    deletion_figure,
    effects_figure,
    expression_figure,
    loss_figure,
    pairs_figure,
    save_figure,
)


def table_of(num_classes: int, *, names: list[str] | None = None) -> pd.DataFrame:
    labels = names or [f"class {number}" for number in range(num_classes)]
    return pd.DataFrame(np.eye(num_classes, dtype=np.int64) * 2, index=labels, columns=labels)


HISTORY = pd.DataFrame(
    {"step": [1, 2, 2], "loss": [3.0, 2.0, None], "eval_loss": [None, None, 2.5], "lr": [0.1, 0.1, 0.1]}
)


@pytest.mark.parametrize("num_classes", [1, 2, 10, 70])
def test_a_confusion_of_any_size_becomes_a_picture(num_classes, tmp_path):
    path = save_figure(confusion_figure(table_of(num_classes), title="cell_type"), tmp_path / "a.png", dots_per_inch=50)
    assert image.imread(path).ndim == 3


def test_a_confusion_of_thousands_of_classes_stays_a_picture_of_reasonable_size(tmp_path):
    figure = confusion_figure(table_of(3000), title="donor")
    path = save_figure(figure, tmp_path / "a.png", dots_per_inch=30)
    assert max(image.imread(path).shape) * 150 / 30 < 10_000


def test_a_confusion_without_classes_becomes_a_picture(tmp_path):
    assert save_figure(confusion_figure(table_of(0), title="empty"), tmp_path / "a.png").exists()


def test_the_title_of_a_confusion_holds_the_number_of_cells():
    assert confusion_figure(table_of(700), title="cell_type").axes[0].get_title() == "cell_type\nn = 1,400 cells"


def test_the_title_of_a_confusion_of_genes_does_not_count_cells():
    title = confusion_figure(table_of(2), title="bins", unit="masked genes").axes[0].get_title()
    assert title == "bins\nn = 4 masked genes"


def test_rows_of_a_confusion_are_true_classes():
    axes = confusion_figure(table_of(2), title="cell_type").axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")


def test_colour_is_the_share_of_the_true_class():
    table = pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"])
    shown = confusion_figure(table, title="t").axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, [[0.75, 0.25], [0.0, 0.0]])


@pytest.mark.parametrize(("num_classes", "num_texts"), [(25, 25), (26, 0)])
def test_counts_are_written_up_to_25_classes(num_classes, num_texts):
    assert len(confusion_figure(table_of(num_classes), title="t").axes[0].texts) == num_texts


NAMES = ["$x^", "a_b{", "naïve T cell", "x" * 200, "<b>&amp;", "100%", r"\frac"]


def test_labels_are_drawn_as_they_are_spelt(tmp_path):
    figure = confusion_figure(table_of(len(NAMES), names=NAMES), title="t")
    assert save_figure(figure, tmp_path / "a.png").exists()


@pytest.mark.parametrize("draw", [confusion_figure, loss_figure])
def test_a_title_is_drawn_as_it_is_spelt(draw, tmp_path):
    table = table_of(2) if draw is confusion_figure else HISTORY
    assert save_figure(draw(table, title=r"run $\nothing{$"), tmp_path / "a.png").exists()


def test_long_labels_keep_both_ends():
    axes = confusion_figure(table_of(1, names=["a" * 30 + "b" * 30]), title="t").axes[0]
    label = axes.get_yticklabels()[0].get_text()
    assert (len(label), label[0], label[-1]) == (40, "a", "b")


def test_losses_are_on_a_logarithmic_axis_unless_one_is_zero():
    assert loss_figure(HISTORY, title="mlm").axes[0].get_yscale() == "log"
    assert loss_figure(HISTORY.replace(2.0, 0.0), title="mlm").axes[0].get_yscale() == "linear"


def test_a_map_names_the_eight_labels_with_most_cells_and_draws_all(tmp_path):
    labels = pd.Series(np.repeat([f"type {k}" for k in range(12)], np.arange(12, 0, -1)))
    places_n2 = np.random.default_rng(0).normal(size=(len(labels), 2))
    figure = cells_figure(places_n2, labels, pd.Series(np.linspace(0, 1, len(labels))), title="$")
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["others", *(f"type {k}" for k in range(8))]
    assert sum(len(drawn.get_offsets()) for drawn in figure.axes[0].collections) == len(labels)
    assert save_figure(figure, tmp_path / "a.png", dots_per_inch=30).exists()


@pytest.mark.parametrize("measured_b", [None, np.array([0.5, 1.0])])
def test_how_sure_answers_are_is_drawn_with_and_without_known_labels(measured_b, tmp_path):
    figure = certainty_figure(np.array([3, 1]), np.array([1.0, 0.25]), np.array([0.4, 0.8]), measured_b, title="t")
    assert figure.get_suptitle() == "t\nn = 4 cells"
    assert len(figure.axes[1].lines) == 1 + (measured_b is not None)
    assert save_figure(figure, tmp_path / "a.png", dots_per_inch=30).exists()


def test_a_loss_figure_is_written(tmp_path):
    assert image.imread(save_figure(loss_figure(HISTORY, title="mlm"), tmp_path / "loss.png")).ndim == 3


def test_the_title_of_a_loss_figure_holds_the_number_of_steps():
    assert loss_figure(HISTORY, title="mlm").axes[0].get_title() == "mlm\nn = 2 steps"


def test_a_loss_figure_draws_losses_only():
    labels = [line.get_label() for line in loss_figure(HISTORY, title="mlm").axes[0].lines]
    assert labels == ["loss", "eval loss"]


def test_a_loss_and_its_evaluation_share_a_colour():
    training, evaluation = loss_figure(HISTORY, title="mlm").axes[0].lines
    assert (training.get_color(), evaluation.get_linestyle()) == (evaluation.get_color(), "--")


def test_an_empty_history_becomes_a_picture(tmp_path):
    assert save_figure(loss_figure(pd.DataFrame(columns=["step", "loss"]), title="mlm"), tmp_path / "a.png").exists()


def test_a_loss_that_is_not_finite_becomes_a_picture(tmp_path):
    history = pd.DataFrame({"step": [1, 2], "loss": [np.inf, 1.0]})
    assert save_figure(loss_figure(history, title="mlm"), tmp_path / "a.png").exists()


def test_no_global_plotting_state_is_touched(tmp_path):
    before = set(sys.modules)
    save_figure(confusion_figure(table_of(3), title="t"), tmp_path / "a.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert "matplotlib.pyplot" in before or pyplot is None
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf", "a"])
def test_the_ending_chooses_the_format(name, tmp_path):
    heads = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", "": b"\x89PNG"}
    path = save_figure(loss_figure(HISTORY, title="mlm"), tmp_path / "new" / name)
    assert path.read_bytes().startswith(heads[path.suffix])


def test_a_failed_picture_leaves_the_older_one(tmp_path, monkeypatch):
    figure = loss_figure(HISTORY, title="mlm")
    (tmp_path / "a.png").write_text("older")

    def full_disk(target: str, **_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, tmp_path / "a.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.png", "older")]


def effects(*, p_value: float | None, groups: tuple[str, ...] = ("all",)) -> pd.DataFrame:
    """Make effects of 30 genes in each group, the last the strongest."""
    rows = [
        {"perturbation": f"G{i}", "group": group, "effect": i / 10 - 1, "method": "exact" if i % 2 else "screened"}
        for group in groups
        for i in range(30)
    ]
    return pd.DataFrame(rows).assign(p_value=p_value, q_value=p_value)


@pytest.mark.parametrize(("p_value", "label"), [(0.01, "-log10 p"), (None, "distance")])
def test_effects_are_a_volcano_with_p_values_and_a_rank_plot_without(p_value, label) -> None:
    table = effects(p_value=np.nan if p_value is None else p_value)
    axes = effects_figure(table, title="knock out", effect="distance").axes[0]
    assert axes.get_ylabel() == label
    names = [text.get_text() for text in axes.texts]
    assert len(names) == 12 and "G29" in names


def test_each_group_has_a_panel_and_the_title_counts_those_left_out() -> None:
    table = effects(p_value=np.nan, groups=tuple(f"type {i}" for i in range(8)))
    figure = effects_figure(table, title="knock out", effect="distance")
    assert len(figure.axes) == 6
    assert "n = 30 perturbations (2 more groups in the table)" in figure.get_suptitle()


def test_names_of_near_effects_do_not_lie_over_each_other() -> None:
    table = effects(p_value=np.nan).assign(effect=np.repeat([1.0, -1.0], 15))
    axes = effects_figure(table, title="knock out", effect="distance").axes[0]
    heights = sorted(text.xyann[1] for text in axes.texts if text.get_ha() == "left")
    assert len(heights) > 2 and np.diff(heights).min() > 0.01


def test_a_deletion_curve_shows_both_orders() -> None:
    curves = pd.DataFrame(
        {"share_removed": [0.0, 0.5, 1.0], "attributed": [3.0, -2.0, -3.0], "random": [3.0, 2.0, -3.0]}
    )
    axes = deletion_figure(curves, title="50 cells").axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, -2.0, -3.0], [3.0, 2.0, -3.0]]


def test_a_map_has_a_panel_for_the_label_and_each_gene(tmp_path) -> None:
    places_n2, labels = np.random.default_rng(0).normal(size=(20, 2)), pd.Series(["$B$", "T"] * 10, name="cell_type")
    genes = pd.DataFrame({"CD79A": np.arange(20.0), "$odd$": np.zeros(20)})
    figure = expression_figure(places_n2, labels, genes, title="knock-outs")
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["cell_type", "CD79A", r"\$odd\$"]
    assert image.imread(save_figure(figure, tmp_path / "a.png", dots_per_inch=30)).ndim == 3
    assert expression_figure(places_n2, None, genes[[]], title="no gene of the panel").get_suptitle()


def test_pairs_have_the_line_on_which_both_are_equal() -> None:
    x, y = np.array([0.0, 2.0]), np.array([-1.0, 1.0])
    axes = pairs_figure(x, y, title="t", x_label="screened", y_label="exact").axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[-1.0, 2.0]] and "n = 2 genes" in axes.get_title()
