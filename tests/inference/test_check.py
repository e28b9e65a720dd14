"""The preflight says what the verbs would say: it accepts what they accept, and refuses what they refuse."""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import perturbgene as pg
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.sources import H5adFile
from perturbgene.faq import pointer
from perturbgene.inference.check import CheckReport, check
from perturbgene.main import main


@pytest.fixture
def cells(small_folder: Path) -> ad.AnnData:
    return ad.read_h5ad(small_folder / "cells.h5ad")


@pytest.fixture
def run(small_folder: Path) -> str:
    return str(small_folder / "runs" / "mlm")


def written(cells: ad.AnnData, path: Path) -> str:
    cells.write_h5ad(path)
    return str(path)


def test_a_file_is_described_and_accepted_for_a_run(cells: ad.AnnData, run: str, tmp_path: Path) -> None:
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[:5, cells.obs.columns.get_loc("cell_type")] = "unknown"
    cells.obs.iloc[5:7, cells.obs.columns.get_loc("cell_type")] = "neuron"
    report = check(written(cells, tmp_path / "in.h5ad"), run)
    (file,) = report.files
    assert report.ok and report.target == f"the run {run}"
    assert (file.form, file.cells, file.columns, file.matrix) == ("h5ad", 255, 765, "X, csr")
    assert "200 of 200 panel genes found (100.0%)" in file.genes
    assert file.labels["cell_type"][""] == 5 and file.labels["cell_type"]["neuron"] == 2
    least, median, most = file.genes_per_cell or []
    assert least == np.diff(cells.X.indptr).min() and most == np.diff(cells.X.indptr).max() and least < median < most
    assert any("2 cells have a cell_type that the vocabulary lacks ('neuron')" in line for line in report.look_at)


def test_texts_of_the_table_begin_below_each_other_whatever_the_names_of_columns(
    cells: ad.AnnData, tmp_path: Path
) -> None:
    cells.obs["author_cell_type"] = cells.obs["cell_type"]
    lines = str(check(written(cells, tmp_path / "in.h5ad"))).splitlines()
    starts = {
        re.fullmatch(r"  (cells|obs \w+) +(.*)", line).start(2) for line in lines if re.match("  (cells|obs )", line)
    }  # type: ignore[union-attr]
    assert len(starts) == 1 and starts.pop() > len("  obs author_cell_type")


def test_the_table_and_the_json_say_the_same(
    cells: ad.AnnData, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(cells, tmp_path / "in.h5ad")
    assert main(["check", path, "--run", run]) == 0
    table = capsys.readouterr().out
    assert re.search(r"cells +255\n", table) and table.endswith(f"Accepted for the run {run}.\n")
    assert main(["check", path, "--run", run, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] and content["files"][0]["cells"] == 255 and content["files"][0]["genes"] in table


def _negative(cells: ad.AnnData) -> None:
    cells.X = cells.X.toarray() - 1


def _late_infinity(cells: ad.AnnData) -> None:
    cells.X.data[-1] = np.inf


def _other_genes(cells: ad.AnnData) -> None:
    cells.var_names = [f"other{number}" for number in range(cells.n_vars)]


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        pytest.param(_negative, [], id="z-scores"),
        pytest.param(_late_infinity, [], id="infinity in the last cell"),
        pytest.param(_other_genes, [], id="no gene of the panel"),
        pytest.param(lambda cells: None, ["--layer", "nowhere"], id="no such layer"),
        pytest.param(lambda cells: None, ["--where", "tissue=nowhere"], id="no such cell"),
    ],
)
def test_what_predict_refuses_is_refused_with_the_same_words_and_exit_code(
    cells: ad.AnnData, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, flags: list[str]
) -> None:
    change(cells)
    path = written(cells, tmp_path / "in.h5ad")
    assert main(["predict", run, path, "--output", str(tmp_path / "out.h5ad"), *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert main(["check", path, "--run", run, "--json", *flags]) == 2
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert printed.err.splitlines()[-1] == said == f"error: {content['refused']}{pointer(content['refused'])}"
    assert not content["ok"] and content["files"][0]["path"] == path


def test_a_file_that_is_no_anndata_is_refused(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.csv").write_text("cell,CD3E\nc,1\n")
    assert main(["check", str(tmp_path / "cells.csv"), "--run", run]) == 2
    printed = capsys.readouterr()
    assert "REFUSED for the run" in printed.out and "read_csv" in printed.err


def test_many_files_are_opened_three_times_each_one_at_a_time_and_what_they_share_is_said_once(
    cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening is what many small files cost, and HDF5 closes a file the later, the more are open."""
    cells.X.data = np.ceil(cells.X.data)
    for number in range(4):
        written(cells[number * 60 : number * 60 + 60], tmp_path / f"{number}.h5ad")
    opened, most_open, open_file = Counter[str](), 0, H5adFile._open
    before = h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)

    def counted(self: H5adFile) -> h5py.File:
        nonlocal most_open
        file = open_file(self)
        opened[self.path] += 1
        most_open = max(most_open, h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) - before)
        return file

    monkeypatch.setattr(H5adFile, "_open", counted)
    report = check(str(tmp_path))
    assert report.ok
    (line,) = [line for line in report.look_at if "few genes" in line]
    assert line.startswith(f"{tmp_path}/0.h5ad (and 3 more): it has few genes"), line
    assert sorted(opened.values())[:2] == [3, 3], opened  # one or two of them also say which donors and genes there are
    assert most_open <= 4, "two files, with two handles each"


def test_each_file_is_described_though_the_first_is_refused(cells: ad.AnnData, tmp_path: Path) -> None:
    cells.obs["size"] = np.arange(len(cells)) / 7
    paths = [written(cells, tmp_path / "a.h5ad"), written(cells[:200].copy(), tmp_path / "b.h5ad")]
    report = check(paths, phenotypes=["size"], split_by="donor_id")
    assert report.refused and f"{paths[0]}: obs['size'] holds 255 different numbers" in report.refused
    assert [(file.cells, file.scale != "", len(file.labels["size"])) for file in report.files] == [
        (255, True, 255),
        (200, True, 200),
    ]


def test_without_a_run_the_findings_are_those_of_prepare(cells: ad.AnnData, tmp_path: Path) -> None:
    cells.obs["tissue"] = ["" if index < 7 else tissue for index, tissue in enumerate(cells.obs["tissue"])]
    path = written(cells, tmp_path / "in.h5ad")
    report = pg.check(path, phenotypes=["cell_type", "tissue"], split_by="donor_id")
    corpus = Corpus.open(pg.prepare(path, tmp_path / "corpus", phenotypes=["cell_type", "tissue"], split_by="donor_id"))
    assert isinstance(report, CheckReport) and report.ok and report.target == "prepare"
    assert set(corpus.manifest["audit"]) <= set(report.look_at) and corpus.manifest["audit"]
    (file,) = report.files
    assert file.donors == {f"D{number}": 64 - (number == 3) for number in range(4)}
    assert file.labels["tissue"] == {"blood": 124, "lung": 124, "": 7}
    assert "hold out 1 of 4 donor_id for evaluation" in report.will
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "in.h5ad"], "nothing else is left"


def test_without_phenotypes_the_columns_that_could_be_ones_are_listed(cells: ad.AnnData) -> None:
    cells.obs["name"] = [f"cell {number}" for number in range(cells.n_obs)]
    cells.obs["score"] = np.linspace(0, 1, cells.n_obs)
    assert [*check(cells).files[0].labels] == ["cell_type", "tissue", "donor_id"]


def test_what_prepare_refuses_is_refused(cells: ad.AnnData, tmp_path: Path) -> None:
    other = cells.copy()
    _other_genes(other)
    report = check([cells, other])
    assert not report.ok and [file.form for file in report.files] == ["memory", "memory"]
    assert "share" in (report.refused or "")


def test_what_the_package_says_later_is_printed_again(cells: ad.AnnData, run: str) -> None:
    package = logging.getLogger("perturbgene")
    before = package.propagate, package.level, list(package.handlers)
    check(cells, run)
    assert (package.propagate, package.level, list(package.handlers)) == before
