"""Pages about knock-outs and counterfactuals: how far to believe them, a planted gene, and what a browser shows."""

import itertools
import json
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbgene.errors import InputError
from perturbgene.files import write_json
from perturbgene.inference.run import Run
from perturbgene.main import main
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM
from perturbgene.reports.effects import of_changes, of_perturbation, read_changes
from perturbgene.reports.page import Chart
from perturbgene.reports.report import report
from perturbgene.reports.trust import REAL_SCREEN
from perturbgene.training.train import tokenizer_facts
from tests.nine_genes import a_tokenizer
from tests.reports.test_report import SIZES
from tests.untrained import save, save_score

PLANTED, ODD = "PLANTED", ["</script><b>odd", "=HYPERLINK(A1)", "NA"]
GENES = [*ODD, *(f"G{at}" for at in range(3, 39)), PLANTED]
DOCS = Path(__file__).parents[2] / "docs/perturbation.md"


def planted_run() -> Run:
    """A run in which one gene votes for B cells far more than any other matters."""
    tokenizer = a_tokenizer(genes=GENES, max_length=64)
    torch.manual_seed(0)
    config = GeneBertConfig(
        **tokenizer_facts(tokenizer), direct_path=True, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, norm_position="branch", initializer_range=0.2, embedding_range=0.5,
    )  # fmt: skip
    model = GeneBertForPhenotypicMLM(config).eval()
    assert model.direct_labels is not None
    votes_tk = torch.zeros_like(model.direct_labels.votes_tk)
    votes_tk[tokenizer.first_gene_type + GENES.index(PLANTED), 0] = 2.0  # 0 is the B cell
    model.direct_labels.votes_tk.copy_(votes_tk)
    return Run(model, tokenizer, "planted")


def some_cells() -> ad.AnnData:
    """120 cells of 6 donors; each gene is expressed in half of them."""
    random = np.random.default_rng(0)
    values_ng = random.integers(1, 5, (120, len(GENES))) * (random.random((120, len(GENES))) < 0.5)
    obs = pd.DataFrame({"donor_id": [f"d{at % 6}" for at in range(120)]}, index=[f"cell_{at}" for at in range(120)])
    obs["cell_type"] = np.where(np.arange(120) % 2, "B cell", "T cell")
    return ad.AnnData(sparse.csr_matrix(values_ng.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knock-outs of a planted run, `ko.csv`, and what the small run says of cells set to another type, `out.h5ad`."""
    folder = tmp_path_factory.mktemp("effects")
    save(planted_run(), folder / "run")
    save_score(folder / "run", "cell_type", accuracy=0.9)
    some_cells().write_h5ad(folder / "cells.h5ad")
    words = ["perturb", str(folder / "run"), str(folder / "cells.h5ad"), "--output", str(folder / "ko.csv")]
    flags = ["--towards", "cell_type=B cell", "--top_k", "8", "--num_controls", "16", "--device", "cpu"]
    assert main([*words, "--genes", "all", *flags]) == 0
    words = ["counterfactual", str(small_folder / "runs/mlm"), str(small_folder / "cells.h5ad")]
    flags = ["--output", str(folder / "out.h5ad"), "--num_passes", "1", "--num_null", "5", "--given", "nothing"]
    assert main([*words, "--set", "cell_type=B cell", *flags]) == 0
    return folder


def test_the_planted_gene_is_first_and_beyond_the_null(folder: Path) -> None:
    page = of_perturbation(folder / "ko.csv", device="cpu")
    [group] = page.sections["groups"]
    first = group["rows"][0]
    assert first["name"] == PLANTED and first["is_hit"] and float(first["effect"]) < 0
    assert sum(row["is_hit"] for row in group["rows"]) == 1
    low, high = (float(end) for end in first["interval"].split(" to "))
    assert low < float(first["effect"]) < high
    assert first["bar"]["low"] < first["bar"]["at"] < first["bar"]["high"] < first["bar"]["null"]
    assert f"expression of {PLANTED}" in [column["name"] for column in page.data["map"]["columns"]]


def test_a_reader_first_learns_how_far_to_believe_it(folder: Path) -> None:
    page = of_perturbation(folder / "ko.csv", device="cpu")
    assert "the run is right in 90.0 % of 100 held-out cells, most frequent label in 50.0 %" in page.findings[0]
    assert "It was never evaluated" in page.findings[0]
    assert (
        "Nothing here compares the effects with cells in which these genes really are knocked out" in page.findings[1]
    )
    assert page.findings[2] == REAL_SCREEN["label"]
    text = (folder / "ko.report.html").read_text()
    assert text.index("On a real CRISPR screen") < text.index('id="trust"') < text.index('id="map"')


def test_an_evaluated_run_shows_its_baselines(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    scores = {"n": 40, "accuracy": 0.8, "macro_f1": 0.7, "majority_share": 0.5}
    better = {**scores, "accuracy": 0.85, "best": True}
    (tmp_path / "run/evaluation").mkdir()
    write_json(tmp_path / "run/evaluation/metrics.json", {"cell_type": {"alone": scores, "ridge": better}})
    page = of_perturbation(moved(folder, tmp_path, run=str(tmp_path / "run")), device="cpu")
    assert page.findings[0] == "cell_type: the run is right in 80.0 % of 40 held-out cells, ridge in 85.0 %."
    assert [row["name"] for row in page.sections["scores"] if row["best"]] == ["ridge"]
    page = of_perturbation(moved(folder, tmp_path, run="elsewhere"), device="cpu")
    assert page.findings[0].startswith("The run was never scored on cell_type of held-out cells")


def moved(folder: Path, target: Path, **changes: object) -> Path:
    """Copy the knock-outs, with some entries of their record changed."""
    record = json.loads((folder / "ko.json").read_text())
    write_json(target / "ko.json", {**record, **changes})
    return shutil.copy(folder / "ko.csv", target / "ko.csv")


def test_without_p_the_page_says_why(folder: Path, tmp_path: Path) -> None:
    path = moved(folder, tmp_path, doubt="the run is not better than the most frequent label", input="moved.h5ad")
    table = pd.read_csv(path, keep_default_na=False)
    table[["p_value", "q_value"]] = np.nan
    table.to_csv(path, index=False)
    page = of_perturbation(path, device="cpu")
    assert "No p and q: the run is not better than the most frequent label." in page.findings[3]
    assert page.data["map"] is None and "the cells cannot be read" in page.map_note
    [chart] = page.sections["groups"][0]["charts"]
    assert chart.title == "Effects by rank"


def test_changes_are_shown_with_the_agreement_that_the_verb_found(folder: Path) -> None:
    edits = read_changes(folder / "out.h5ad")
    assert edits is not None
    page, agreement = of_changes(edits, device="cpu"), edits.facts["agreement"]["spearman"].iloc[0]
    num_labeled = int((ad.read_h5ad(edits.facts["input"]).obs["cell_type"] == "B cell").sum())
    assert page.findings[1].startswith(f"{num_labeled:,} cells really have cell_type=B cell")
    assert f"changes is {agreement:.2f} over" in page.findings[1] and page.findings[2] == REAL_SCREEN["counterfactual"]
    table = pd.read_csv(folder / "out.csv")
    strongest = table.loc[table["change"].abs().idxmax()]
    row = page.sections["groups"][0]["rows"][0]
    assert row["name"] == strongest["symbol"] and row["effect"] == f"{strongest['change']:.3g}"
    assert len(page.sections["groups"][0]["charts"]) == 2


def test_changes_without_cells_that_have_the_label_say_so(folder: Path) -> None:
    edits = read_changes(folder / "out.h5ad")
    assert edits is not None
    edits.facts["num_labeled"] = 0  # type: ignore[index]
    assert of_changes(edits, device="cpu").findings[1].startswith("No cell here has cell_type=B cell")


def test_verbs_write_figures_too_and_a_report_again_is_the_same(folder: Path) -> None:
    for name, figure in (("ko.csv", "screen"), ("out.h5ad", "observed")):
        stem = name.split(".")[0]
        assert (folder / f"{stem}.report.map.png").exists() and (folder / f"{stem}.report.{figure}.png").exists()
        before = (folder / f"{stem}.report.html").read_bytes()
        assert report(folder / name).read_bytes() == before


def test_no_report_leaves_it_out_and_parts_do_not_depend_on_it(folder: Path, tmp_path: Path) -> None:
    words = ["perturb", str(folder / "run"), str(folder / "cells.h5ad"), "--output", str(tmp_path / "one.parquet")]
    assert main([*words, "--genes", PLANTED, "--device", "cpu", "--no_report"]) == 0
    assert not list(tmp_path.glob("*.html"))
    page = of_perturbation(tmp_path / "one.parquet", device="cpu")
    assert page.findings[0].startswith("The effects are on no label") and page.findings[2] == REAL_SCREEN["state"]


def test_names_of_genes_stay_text(folder: Path) -> None:
    text = (folder / "ko.report.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<b>odd" not in text
    assert "&lt;/script&gt;&lt;b&gt;odd" in text and "=HYPERLINK(A1)" in text
    names = [row["name"] for row in of_perturbation(folder / "ko.csv", device="cpu").sections["groups"][0]["rows"]]
    assert set(ODD) <= set(names)


def test_what_perturb_did_not_write_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="was not written by `perturbgene perturb`, with a.json"):
        report(tmp_path / "a.csv")
    write_json(tmp_path / "a.json", {"version": "0.1.0"})
    with pytest.raises(InputError, match="was not written by `perturbgene perturb`"):
        report(tmp_path / "a.csv")


def test_figures_of_the_real_screen_are_those_of_the_manual() -> None:
    rows = {
        line.split("|")[1].strip(): re.findall(r"0\.\d\d", line)
        for line in DOCS.read_text().splitlines()
        if "|" in line
    }
    [table], [label], [change] = (
        [found for name, found in rows.items() if start in name]
        for start in ("a table, no model", "`perturb`: knock-outs that lead", "`counterfactual`: the label set")
    )
    for kind, found in (("label", [*label, *table]), ("state", label), ("counterfactual", [*change, *table])):
        assert set(found) == set(re.findall(r"0\.\d\d", REAL_SCREEN[kind])) - {"0.04"}, kind


def test_names_next_to_points_do_not_overlap() -> None:
    chart = Chart("t", "x", "y")
    names = [f"gene {at}" for at in range(30)]
    chart.add_points(np.linspace(0, 0.2, 30), np.full(30, 0.5), names, ["plain"] * 30, names)
    drawn = [(point["x"], len(point["name"])) for point in chart.points if point["name"]]
    assert 1 < len(drawn) < 5 and chart.points[0]["name"] == "gene 0"
    assert all(right - left > 6 * length for (left, length), (right, _) in itertools.pairwise(drawn))


@pytest.mark.parametrize("name", ["ko.report.html", "out.report.html"])
def test_a_browser_shows_effects_without_errors_or_requests(folder: Path, name: str, shown) -> None:
    with shown(folder / name) as page:
        for column in page.locator("#color option").all():
            page.select_option("#color", column.get_attribute("value"))
            assert page.get_attribute("#cells", "data-drawn") == column.text_content()
        chart = page.locator(".chart").first
        dot = chart.locator(".point").last  # the strongest is drawn on top
        dot.scroll_into_view_if_needed()
        box = dot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        first = page.locator(".effects tbody th").first.text_content()
        assert chart.locator("output").text_content().startswith(f"{first}: effect ")
        for width, height in SIZES.values():
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
