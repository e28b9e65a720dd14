"""The roads of docs/transfer.md, walked as they are written there, on small real cells."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import perturbgene as pg
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.main import main
from tests.small_run import three_types

PAGE = (Path(__file__).parents[2] / "docs/transfer.md").read_text(encoding="utf-8")
SHORT = "--max_steps 1 --max_length 40 --no_bf16 --report_to none"
#: Appended to commands that take long.
LESS = {"mlm": SHORT, "cls": SHORT, "evaluate": "--no_baselines --no_report", "predict": "--no_report"}
TYPES = {"B cell", "NK cell", "monocyte"}


class Walk(NamedTuple):
    """A folder in which the commands of a road ran, and what they said."""

    folder: Path
    text: str

    def labels(self, file: str, phenotype: str = "cell_type") -> list[str]:
        """Return the answers in a file that `predict` wrote."""
        return ad.read_h5ad(self.folder / file).obs[f"predicted_{phenotype}"].astype(str).tolist()

    def scores(self, run: str) -> dict:
        return json.loads((self.folder / run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small run, its corpus, and the files that the page names."""
    import scanpy

    folder = tmp_path_factory.mktemp("roads")
    (folder / "runs").mkdir()
    (folder / "runs/mlm").symlink_to(small_folder / "runs/mlm")
    (folder / "corpus").symlink_to(small_folder / "corpus")
    (folder / "moved").mkdir()
    shutil.copytree(small_folder / "runs/mlm", folder / "moved/mlm")
    settings = (folder / "moved/mlm/run.yaml").read_text()
    (folder / "moved/mlm/run.yaml").write_text(settings.replace(str(small_folder), "/gone"))
    cells = three_types()
    rng = np.random.default_rng(0)
    cells = cells[rng.permutation(cells.n_obs)].copy()
    bare, few, more, new = cells[:60].copy(), cells[60:140].copy(), cells[140:220].copy(), cells[220:].copy()
    bare.obs, new.obs = bare.obs[["donor_id"]], new.obs[[]]
    few.obs["cell_type"] = few.obs["cell_type"].astype(object).where(np.arange(few.n_obs) % 2 == 0)
    whole = scanpy.datasets.pbmc68k_reduced()
    dendritic = whole[whole.obs["bulk_labels"] == "Dendritic"].raw.to_adata()[:30]
    dendritic.obs = more.obs[:30].assign(cell_type="dendritic cell").set_axis(dendritic.obs_names)
    disease = more.copy()
    disease.obs["disease"] = np.resize(["normal", "ill"], more.n_obs)
    genes = GeneTokenizer.from_pretrained(small_folder / "corpus").genes
    panel, mouse = more[:, list(genes[40:190])].copy(), more.copy()
    mouse.var_names = more.var_names.str.capitalize()
    pairs = zip(mouse.var_names, more.var_names, strict=True)
    (folder / "orthologs.csv").write_text("mouse,human\n" + "".join(f"{one},{other}\n" for one, other in pairs))
    files = {"unlabeled": bare, "few": few, "more": more, "new_cells": new, "disease": disease, "panel": panel}
    for name, one in {**files, "mouse": mouse, "new_type": ad.concat([more, dendritic])}.items():
        one.write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.fixture
def walk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Walk:
    """Run the commands of the road that the test's parameter names, unless an earlier test has walked it."""
    monkeypatch.chdir(folder)
    [block] = re.findall(rf"^## \({request.param}\).*?```bash\n(.*?)```", PAGE, flags=re.S | re.M)
    with caplog.at_level("INFO", logger="perturbgene"):
        for command in block.splitlines():
            words = shlex.split(command, comments=True)[1:]
            if words:
                assert main([*words, *LESS.get(words[0], "").split()]) == 0, command
    return Walk(folder, caplog.text)


def road(letter: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("walk", [letter], indirect=True)


@road("a")
def test_few_labels_after_many_cells_without(walk: Walk) -> None:
    unlabeled, _, few = walk.text.partition("corpus written to few")
    assert re.search(r"genes: \d+ kept, \d+ fresh, 0 dropped; labels: 0 kept, 3 fresh .*; bins: kept; head: fresh", few)
    assert "votes" not in unlabeled
    assert pg.load_run("runs/unlabeled").tokenizer.phenotypes == {}
    assert set(walk.labels("a.h5ad")) <= TYPES
    labeled = ad.read_h5ad(walk.folder / "few/eval/shard_00000.h5ad").obs["cell_type"]
    assert walk.scores("runs/few")["cell_type"]["classifier"]["n"] == labeled.notna().sum() < len(labeled)


@road("b")
def test_more_cells_of_the_same_labels_lose_nothing(walk: Walk) -> None:
    assert "labels: 5 kept, 0 fresh, 0 dropped; bins: kept; head: kept" in walk.text
    assert re.search(r"genes: 200 kept, \d+ fresh, 0 dropped", walk.text)
    card = (walk.folder / "runs/more/README.md").read_text()
    assert "Its weights started from runs/mlm:" in card and "- labels: 5 kept, 0 fresh, 0 dropped" in card
    own = pg.load_run("runs/mlm").tokenizer
    assert pg.load_run("runs/more").tokenizer.genes[:200] == own.genes
    assert walk.scores("runs/more")["cell_type"]["alone"]["accuracy"] > 0.7  # after one step
    assert set(walk.labels("b.h5ad")) <= TYPES


@road("c")
def test_a_new_cell_type_joins_the_others(walk: Walk) -> None:
    assert walk.text.count("labels: 5 kept, 1 fresh ('cell_type dendritic cell'), 0 dropped") == 2
    for run in ("runs/new_type", "runs/from_files"):
        types = pg.load_run(run).tokenizer.phenotypes["cell_type"]
        assert types == ("B cell", "NK cell", "monocyte", "dendritic cell")
    answers = ad.read_h5ad(walk.folder / "c.h5ad")
    assert answers.obsm["predicted_cell_type_probabilities"].shape[1] == 4
    assert set(walk.labels("c.h5ad")) <= {*TYPES, "dendritic cell"}


@road("d")
def test_a_new_phenotype_is_answered_and_old_ones_are_known(walk: Walk) -> None:
    assert "labels: 5 kept, 2 fresh ('disease ill', 'disease normal'), 0 dropped" in walk.text
    assert set(walk.labels("d.h5ad", "disease")) <= {"ill", "normal"}
    run = pg.load_run("runs/disease")
    assert run.tokenizer.phenotypes["tissue"] == ("blood", "lung")
    assert run.tokenizer.included_phenotypes == ("cell_type", "disease")


@road("e")
def test_a_targeted_panel_is_answered_with_and_without_training(walk: Walk) -> None:
    assert "genes: 149 kept, 0 fresh, 51 dropped" in walk.text  # no cell expresses one of the 150
    truth = ad.read_h5ad(walk.folder / "panel.h5ad").obs["cell_type"].astype(str).to_numpy()
    assert np.mean(np.array(walk.labels("e.h5ad")) == truth) > 0.7
    assert set(walk.labels("panel_predicted.h5ad")) <= TYPES
    assert len(pg.load_run("runs/panel").tokenizer.genes) == 149


@road("f")
def test_another_species_is_read_by_a_table_as_if_it_had_our_names(walk: Walk) -> None:
    asked = pg.predict(walk.folder / "more.h5ad", "runs/mlm", ask="cell_type")
    ours = ad.read_h5ad(walk.folder / "f.h5ad").obsm["predicted_cell_type_probabilities"]
    theirs = asked.obsm["predicted_cell_type_probabilities"]
    pd.testing.assert_frame_equal(pd.DataFrame(ours), pd.DataFrame(theirs))
    assert "columns renamed by --gene_map, names that the file lacks: 1" in walk.text  # the header
    assert re.search(r"genes: 200 kept, \d+ fresh, 0 dropped", walk.text)
    assert set(walk.labels("mouse_predicted.h5ad")) <= TYPES


@road("g")
def test_a_classifier_starts_from_a_classifier(walk: Walk) -> None:
    assert "head: fresh (the run predicts cell_type)" in walk.text
    assert pg.load_run("runs/tissues").class_labels == ["blood", "lung"]
    assert "labels: 5 kept, 1 fresh ('cell_type dendritic cell'), 0 dropped; bins: kept; head: kept" in walk.text
    assert set(walk.labels("g.h5ad")) <= {*TYPES, "dendritic cell"}


@road("h")
def test_a_moved_run_answers_and_teaches_without_its_corpus(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(walk.labels("h.h5ad")) <= TYPES
    assert (walk.folder / "moved/mlm/evaluation/metrics.json").exists()
    assert "weights from moved/mlm: genes: 200 kept" in walk.text
    assert main(["evaluate", "moved/mlm"]) == 2
    assert (
        "its corpus '/gone/corpus', as run.yaml says, but they are not there. Give --corpus" in capsys.readouterr().err
    )
