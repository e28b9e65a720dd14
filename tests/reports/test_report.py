"""Reports of a real run: what `evaluate` and `predict` write, and what a browser shows of it."""

import itertools
import json
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbgene.errors import InputError
from perturbgene.inference.evaluate import ROW_NAMES
from perturbgene.inference.evaluated_cells import CELLS_FILE
from perturbgene.main import main
from perturbgene.reports.answers import of_evaluation, read_evaluation
from perturbgene.reports.labels import Phenotype
from perturbgene.reports.report import report
from tests.reports.test_corpus import FLAGS

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated on all cells, most of which it has seen, and predictions; both with reports."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copytree(small_folder / "runs/mlm", folder / "run")
    cells, run = folder / "cells.h5ad", str(folder / "run")
    without_map = ad.read_h5ad(small_folder / "cells.h5ad")
    without_map.obsm.clear()
    without_map.write_h5ad(cells)
    flags = ["--eval_data_paths", str(cells), "--calibrate", "--output", str(folder / "scores")]
    flags += ["--train_data_paths", str(small_folder / "corpus/train/*.h5ad")]
    assert main(["evaluate", run, *flags]) == 0
    assert main(["predict", run, str(cells), "--output", str(folder / "out.h5ad"), "--abstain", "0.9", "--ood"]) == 0
    return folder


@pytest.fixture(scope="module")
def phenotype(folder: Path) -> Phenotype:
    """The cell types of the evaluation."""
    return next(one for one in read_evaluation(folder / "scores").phenotypes if one.name == "cell_type")


def test_verbs_write_a_page_and_its_figures(folder: Path) -> None:
    for name in ("scores/report", "out.report"):
        assert "Read this first" in (folder / f"{name}.html").read_text()
        assert all((folder / f"{name}.{figure}.png").exists() for figure in ("map", "cell_type", "tissue"))


def test_predictions_say_how_often_the_run_is_right_beside_a_baseline(folder: Path) -> None:
    page = (folder / "out.report.html").read_text()
    for name in ("cell_type", "tissue"):
        text = rf"{name}: the run is right in [\d.]+ % of \d+ held-out cells, most frequent label in [\d.]+ %\. It was"
        assert re.search(text, page), name


def test_no_report_leaves_it_out(folder: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(folder / "out.h5ad")[:20].copy()
    cells.write_h5ad(tmp_path / "in.h5ad")
    words = ["predict", str(folder / "run"), str(tmp_path / "in.h5ad"), "--output", str(tmp_path / "out.h5ad")]
    assert main([*words, "--no_report"]) == 0
    assert not list(tmp_path.glob("*.html"))


def test_only_chosen_cells_are_on_the_map(folder: Path, tmp_path: Path) -> None:
    words = ["predict", str(folder / "run"), str(folder / "cells.h5ad"), "--output", str(tmp_path / "out.zarr")]
    assert main([*words, "--where", "tissue=lung"]) == 0
    page = (tmp_path / "out.report.html").read_text()
    assert "UMAP of the run&#39;s embedding of a sample of 127 of 255 cells" in page
    assert "128 cells have no answer" in page


def test_a_report_is_written_again_with_the_same_content(folder: Path) -> None:
    before = (folder / "scores/report.html").read_bytes()
    assert main(["report", str(folder / "scores")]) == 0
    assert (folder / "scores/report.html").read_bytes() == before


def test_the_cells_have_the_scores_of_the_evaluation(folder: Path, phenotype: Phenotype) -> None:
    results = json.loads((folder / "scores/metrics.json").read_text())["cell_type"]
    for name, scores in results.items():
        column = "predicted_cell_type" if name == "alone" else f"predicted_cell_type.{name}"
        assert np.nanmean(phenotype.right_n(column)) == pytest.approx(scores["accuracy"]), name
    found, calibration = phenotype.reliability(), results["alone"]["calibration"]
    assert found is not None and found["n"] == calibration["n"]
    assert found["before"] == pytest.approx(calibration["ece_before"], abs=1e-6)
    assert found["after"] == pytest.approx(calibration["ece_after"], abs=1e-6)


def test_the_winner_is_marked_and_donors_have_intervals(phenotype: Phenotype) -> None:
    rows = phenotype.score_rows()
    assert [row["name"] for row in rows if row["best"]] and sum(row["best"] for row in rows) == 1
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)
    assert [row["donor"] for row in phenotype.donor_rows() if "coverage" in row]


def test_every_number_of_the_page_is_in_one_table(folder: Path) -> None:
    table = pd.read_csv(folder / "scores/report.tables.csv")
    results = json.loads((folder / "scores/metrics.json").read_text())["cell_type"]
    own = table[table["phenotype"] == "cell_type"]
    accuracy = own[own["table"].isin(["scores", "given"]) & (own["measure"] == "accuracy")].set_index("row")["value"]
    names = {name: ROW_NAMES[name].removeprefix("(baseline) ").removesuffix(" given") for name in results}
    assert accuracy.drop("nothing given").to_dict() == pytest.approx(
        {names[name]: scores["accuracy"] for name, scores in results.items()}
    )
    assert own[own["table"] == "confusion"]["value"].sum() == results["alone"]["n"]
    assert own[(own["table"] == "thresholds") & (own["row"] == "0.00")]["value"].iloc[0] == 1
    assert {"types", "donors", "reliability", "embedding"} <= set(own["table"])
    assert not table["value"].isna().all() and set(pd.read_csv(folder / "out.report.tables.csv")["table"])


def test_a_wrong_label_is_first_among_those_to_check(folder: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(folder / "cells.h5ad")
    types_n = cells.obs["cell_type"].astype(str).to_numpy()
    row = int(np.flatnonzero(types_n == "monocyte")[3])
    types_n[row] = "B cell"
    cells.obs["cell_type"] = types_n
    cells.write_h5ad(tmp_path / "in.h5ad")
    words = ["predict", str(folder / "run"), str(tmp_path / "in.h5ad"), "--output", str(tmp_path / "out.h5ad")]
    assert main([*words, "--audit", "--ask", "cell_type"]) == 0
    table = pd.read_csv(tmp_path / "out.report.cells.csv")
    first = table[table["why"] == "improbable label"].iloc[0]
    assert first[["cell", "label", "answer"]].tolist() == [cells.obs_names[row], "B cell", "monocyte"]
    assert first["label_probability"] < 0.1 and (table["why"] == "unsure answer").sum() == cells.n_obs
    page = (tmp_path / "out.report.html").read_text()
    assert "Labels to check first" in page and "check these labels first." in page


def test_genes_that_speak_for_a_label_are_on_the_page(folder: Path, tmp_path: Path) -> None:
    for name in ("metrics.json", "cells.h5ad"):
        shutil.copy(folder / "scores" / name, tmp_path / name)
    row = {"phenotype": "cell_type", "label": "B cell", "num_cells": 90, "gene": "<CD79A>", "support": 1.5}
    pd.DataFrame([{**row, "mean_in": 2, "mean_out": 0.25}]).to_csv(tmp_path / "markers.csv", index=False)
    assert "&lt;CD79A&gt; 1.50 (2.00, 0.25)" in report(tmp_path).read_text()
    table = pd.read_csv(tmp_path / "report.tables.csv").query("table == 'markers' and measure == 'support'")
    assert table[["row", "value"]].values.tolist() == [["B cell: <CD79A>", 1.5]]


def test_scib_metrics_and_the_difference_over_donors_are_on_the_page_where_they_were_computed(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "scores/cells.h5ad", tmp_path / "cells.h5ad")
    results = json.loads((folder / "scores/metrics.json").read_text())
    results["embedding"]["cell_type"]["run"] |= {"scib Total": 0.777, "scib KMeans ARI": 0.5}
    results["cell_type"]["alone"]["difference"] = {"mean": 0.012, "low": -0.03, "high": 0.054, "num_donors": 7}
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    page = report(tmp_path).read_text()
    said = "over 7 donors, its accuracy minus that of logistic regression is +0.012 (95 % interval -0.030 to +0.054)"
    assert said in page and "over 7 donors" not in report(folder / "scores").read_text()
    assert "scIB: total" in page and "0.777" in page and "scIB" not in report(folder / "scores").read_text()
    table = pd.read_csv(tmp_path / "report.tables.csv").query("measure == 'scib KMeans ARI'")
    assert table[["row", "value"]].values.tolist() == [["run", 0.5]]


def test_an_evaluation_knows_how_probable_each_true_label_is(folder: Path, phenotype: Phenotype) -> None:
    audit_n = phenotype.obs["audit_cell_type_probability"].to_numpy()
    assert np.all((audit_n == phenotype.probability_n) == (phenotype.right_n() == 1))
    is_doubted_n = (audit_n < 0.5) & (phenotype.right_n() == 0)
    assert set(phenotype.doubted_labels()["cell"]) == set(phenotype.obs.index[is_doubted_n])


def test_training_cells_are_reported_first(folder: Path) -> None:
    findings = of_evaluation(folder / "scores").findings
    assert any("are training cells of the run, so scores are too good" in text for text in findings[:4])


def test_findings_of_the_corpus_are_reported(folder: Path) -> None:
    assert any(text.startswith("Corpus: ") for text in of_evaluation(folder / "scores").findings)


def test_faults_of_the_corpus_are_flags_of_the_evaluation_and_a_clean_corpus_has_none(
    folder: Path, corpora: dict[str, Path]
) -> None:
    settings = folder / "run/run.yaml"
    before = settings.read_text()
    for name, corpus in corpora.items():
        settings.write_text(re.sub("(?m)^corpus: .*$", f"corpus: {corpus}", before))
        found = [text for text in of_evaluation(folder / "scores").findings if text.startswith("Corpus: ")]
        wanted = [text for where, text in FLAGS.values() if where == name]
        assert bool(found) == bool(wanted) and all(any(text in one for one in found) for text in wanted)
    settings.write_text(before)


def test_donors_that_were_trained_on_are_named(folder: Path) -> None:
    findings = of_evaluation(folder / "scores").findings
    assert any(
        "donors ('D" in text and "are called like donors that the run was trained on" in text for text in findings
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report {run}", "holds no evaluated cells. Run `perturbgene evaluate"),
        ("report {cells}", "was not written by `perturbgene predict`"),
        ("report {folder}/missing", "there is no such file or folder"),
        ("report {folder}/scores --output page.txt", "must end in .html"),
    ],
)
def test_what_cannot_be_reported_is_refused(words: str, message: str, folder: Path, small_folder: Path, capsys) -> None:
    places = {"run": folder / "run", "cells": small_folder / "cells.h5ad", "folder": folder}
    assert main(words.format(**places).split()) == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_of_before_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "scores/metrics.json", tmp_path / "metrics.json")
    with pytest.raises(Exception, match="Run `perturbgene evaluate"):
        report(tmp_path)
    assert not (tmp_path / CELLS_FILE).exists()


def test_clusters_are_on_the_page_with_what_most_of_their_cells_are_called(folder: Path, tmp_path: Path) -> None:
    words = ["predict", str(folder / "run"), str(folder / "cells.h5ad"), "--output", str(tmp_path / "out.h5ad")]
    assert main([*words, "--majority_by", "tissue", "--ask", "cell_type"]) == 0
    page = (tmp_path / "out.report.html").read_text()
    assert "Labels by majority within clusters" in page and "another label than the cell&#39;s own in" in page
    table = pd.read_csv(tmp_path / "out.report.tables.csv").query("table == 'clusters' and measure == 'n'")
    assert sorted(table["row"]) == ["blood", "lung"] and table["value"].sum() == 255


def test_the_map_of_the_file_is_kept(folder: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(folder / "out.h5ad")
    cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2))
    cells.write_h5ad(tmp_path / "out.h5ad")
    assert "The file&#39;s own X_umap: all 255 cells." in report(tmp_path / "out.h5ad").read_text()


# -- files that others have changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", "{}"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"cell_type": {"alone": {}}}'),
        ("metrics.json", '{"cell_type": {"alone": {"accuracy": "high", "n": 3}}}'),
        ("coverage.csv", "a,b\n1,2\n"),
        ("markers.csv", ""),
    ],
)
def test_an_evaluation_that_others_have_changed_is_refused(file: str, text: str, folder: Path, tmp_path: Path) -> None:
    for name in ("metrics.json", "cells.h5ad"):
        shutil.copy(folder / "scores" / name, tmp_path / name)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=r"does not hold what evaluate writes \(.*Run evaluate again"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_predictions_without_a_column_are_refused(folder: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(folder / "out.h5ad")[:5].copy()
    del cells.obs["predicted_cell_type_probability"]
    cells.obsm["X_umap"] = np.zeros((5, 2))
    cells.write_h5ad(tmp_path / "out.h5ad")
    with pytest.raises(InputError, match="does not hold what its command writes .*predicted_cell_type_probability"):
        report(tmp_path / "out.h5ad")


@pytest.mark.parametrize("name", ["report.tables.csv", "report.map.png"])
def test_a_table_or_figure_of_somebody_else_is_left_alone(name: str, folder: Path, tmp_path: Path) -> None:
    for own in ("metrics.json", "cells.h5ad"):
        shutil.copy(folder / "scores" / own, tmp_path / own)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} exists, but no report that it belongs to. Move it"):
        report(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "report.html").exists()


# -- in a browser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scores/report.html", "out.report.html"])
def test_a_browser_shows_the_page_without_errors_or_requests(folder: Path, name: str, shown) -> None:
    with shown(folder / name) as page:
        assert_colors_switch(page)
        assert_the_threshold_moves(page)
        for width, height in SIZES.values():
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def assert_colors_switch(page) -> None:
    """Choose each column, press a label by keyboard, and point at the middle of a cell."""
    for column in page.locator("#color option").all():
        page.select_option("#color", column.get_attribute("value"))
        assert page.get_attribute("#cells", "data-drawn") == column.text_content()
    page.select_option("#color", "0")
    first = page.locator("#legend button").first
    first.focus()
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement === document.querySelectorAll('#legend button')[1]")
    page.keyboard.press("Tab")  # one stop, however many labels there are
    assert page.evaluate("document.activeElement.className") == "threshold"
    box = page.locator("#cells").bounding_box()
    seen = set()
    for across, down in itertools.product(np.linspace(0.05, 0.95, 25), np.linspace(0.05, 0.95, 15)):
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        seen.add(page.text_content("#hover"))
        if len(seen) > 2:
            break
    assert len(seen) > 2


def assert_the_threshold_moves(page) -> None:
    """Raise the threshold by keyboard: fewer cells keep a label, and bars below it fade."""
    slider = page.locator(".threshold").first
    slider.focus()
    page.keyboard.press("Home")
    low = page.text_content("#p0-reading")
    page.keyboard.press("End")
    high = page.text_content("#p0-reading")
    assert low.startswith("0.00: 100.0 % of the cells") and high.startswith("0.99: ") and low[5:] != high[5:]
    assert page.locator("#p0 .bar.below").count() == 99


def test_a_browser_shows_a_corpus_on_a_phone_and_unfolds_it_for_paper(
    corpora: dict[str, Path], tmp_path: Path, shown
) -> None:
    path = report(corpora["planted"], output=tmp_path / "look.html")
    with shown(path, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert '- region "Cells of each batch"' in page.locator("body").aria_snapshot()
        assert page.locator(".less").first.is_hidden()
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".less").first.is_visible() and page.locator("details:not([open])").count() == 0
