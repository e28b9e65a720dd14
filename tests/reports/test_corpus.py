"""The page of a corpus: planted faults are flags on it, and it says what an older manifest does not hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from perturbgene.cli.verbs import PrepareConfig
from perturbgene.corpus.audit import by_donor
from perturbgene.corpus.manifest import MANIFEST_FILE, Corpus
from perturbgene.corpus.prepare import prepare, rehearse
from perturbgene.corpus.survey import survey_files
from perturbgene.corpus.workers import Workers
from perturbgene.errors import InputError
from perturbgene.main import main
from perturbgene.reports.corpus import NOT_KNOWN, corpus_report, of_corpus
from perturbgene.reports.report import report
from tests.corpus.test_prepare import cells, counts
from tests.reports.test_page import ODD_LABELS

#: Planted fault -> the corpus that has it, and words of its finding.
FLAGS = {
    "donor on both sides": ("by cell", "cells of one donor are on both sides, so scores are optimistic"),
    "copies": ("planted", "2 of 30 train cells are exact copies of another train cell"),
    "copies on both sides": ("planted", "2 of 20 eval cells are exact copies of a training cell"),
    "phenotype equal to the donor": ("planted", "batch: every label comes from one donor_id only (confounded)"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_planted_fault_is_a_flag_of_the_audit_and_of_the_page(flag: str, corpora: dict[str, Path]) -> None:
    corpus, text = corpora[FLAGS[flag][0]], FLAGS[flag][1]
    assert any(text in finding for finding in Corpus.open(corpus).manifest["audit"])
    assert any(text in finding for finding in of_corpus(corpus).findings)


def test_a_clean_corpus_has_no_flag(corpora: dict[str, Path]) -> None:
    page = corpus_report(corpora["clean"]).read_text()
    assert "Nothing was found that should change how you read this page" in page
    assert 'class="bad"' not in page and "Confounded" not in page


def test_phenotypes_and_donors_that_determine_each_other_are_marked_in_words(corpora: dict[str, Path]) -> None:
    found = {one["name"]: one for one in of_corpus(corpora["planted"]).sections["phenotypes"]}
    assert {name: one["is_bad"] for name, one in found.items()} == {"cell_type": False, "batch": True, "sex": True}
    assert "1.00. Every label comes from one donor_id only" in found["batch"]["text"]
    assert "1.00. Every donor_id has one label, as of sex" in found["sex"]["text"]
    assert "the fewest: 2" in found["sex"]["text"]


def test_labels_and_donors_that_are_independent_share_no_information() -> None:
    even = by_donor({label: {"d1": 5, "d2": 5, "": 9} for label in "xyz"})
    assert (even["nmi"], even["label_tells_donor"], even["donor_tells_label"]) == (0, False, False)
    assert even["donors_of_label"] == {"x": 2, "y": 2, "z": 2}


def test_only_labels_and_donors_with_most_cells_are_listed() -> None:
    many = by_donor({f"type {at:03d}": {f"d{at:03d}": at + 1, "x": 1000} for at in range(90)})
    assert (many["num_labels"], many["num_donors"]) == (90, 91)
    assert len(many["donors_of_label"]) == 90
    assert np.shape(many["cells"]) == (40, 40) and "d089" in many["donors"] and "d050" not in many["donors"]


def test_cells_donors_and_library_sizes_are_counted(tmp_path: Path) -> None:
    first, second = (
        cells(np.array([[1, 9, 0], [0, 20, 0], [10, 20, 0], [0, 0, 0]] * 2)),
        cells(counts(10, 3), prefix="x"),
    )
    second.X = second.X.multiply(1e4 / second.X.sum(axis=1)).log1p().tocsr()
    options = {"phenotypes": ["cell_type"], "eval_donors": ["a"], "bin_edges": [1.0], "min_genes": 1}
    manifest = Corpus.open(prepare([first, second], tmp_path / "corpus", **options)).manifest
    by_scale = {one["values"]: one for one in manifest["inputs"]}
    assert by_scale["counts"]["library_sizes"] == [10, 12.5, 20, 27.5, 30] and by_scale["counts"]["dropped"] == 2
    assert by_scale["log1p of counts per 10,000"]["library_sizes"] == []
    found = manifest["by_donor"]["cell_type"]
    assert np.sum(found["cells"]) == 18 and found["donors"] == [*"abcde"]


# -- older corpora, odd names -------------------------------------------------------------------------------------


def test_an_older_corpus_has_a_page_that_says_what_is_not_known(corpora: dict[str, Path], tmp_path: Path) -> None:
    manifest = json.loads((corpora["planted"] / MANIFEST_FILE).read_text())
    for name in ("by_donor", "dropped", "copies"):
        del manifest[name]
    for one in manifest["inputs"]:
        del one["library_sizes"], one["dropped"], one["notes"]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert corpus_report(tmp_path).read_text().count(NOT_KNOWN) == 4  # three phenotypes, and cells


def test_a_manifest_that_lacks_something_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    manifest = json.loads((corpora["clean"] / MANIFEST_FILE).read_text())
    del manifest["hvg_flavor"]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match="manifest.json does not hold what prepare writes .*'hvg_flavor'.*Run prepare again"
    ):
        corpus_report(tmp_path)


def test_labels_stay_text(tmp_path: Path) -> None:
    made = prepare(cells(counts(60), cell_type=np.resize(ODD_LABELS, 60)), tmp_path / "a", phenotypes=["cell_type"])
    page = corpus_report(made).read_text()
    assert page.count("<script") == 2 and "&lt;/script&gt;&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page


# -- the commands and the folder ----------------------------------------------------------------------------------


def test_prepare_writes_the_page_unless_told_not_to_and_report_writes_it_again(tmp_path: Path, capsys) -> None:
    cells(counts(30)).write_h5ad(tmp_path / "cells.h5ad")
    words = ["prepare", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "made")]
    assert main([*words, "--no_report"]) == 0 and not (tmp_path / "made/report.html").exists()
    assert main([*words, "--overwrite"]) == 0
    page = tmp_path / "made/report.html"
    before = page.read_bytes()
    assert f"report: {page}" in capsys.readouterr().out
    page.unlink()
    assert main(["report", str(tmp_path / "made")]) == 0 and page.read_bytes() == before
    assert main(["report", str(tmp_path / "made"), "--output", str(tmp_path / "look.html")]) == 0
    assert (tmp_path / "look.html").read_bytes() == before
    assert main([*words, "--overwrite", "--no_report"]) == 0 and not page.exists()


def test_overwrite_leaves_a_page_of_somebody_else_alone(tmp_path: Path) -> None:
    made = prepare(cells(counts(20)), tmp_path / "corpus")
    (made / "report.html").write_text("<html>mine")
    with pytest.raises(InputError, match=r"files that prepare did not write \('report.html'\)"):
        prepare(cells(counts(20)), made, overwrite=True)
    with pytest.raises(InputError, match="exists and is not a report"):
        report(made)


def test_unfinished_work_is_continued_with_or_without_a_report(tmp_path: Path) -> None:
    keys = set()
    for wants_report in (True, False):
        config = PrepareConfig(inputs=["x"], output="y", report=wants_report)
        sources = [cells(counts(20))]
        found = dict(enumerate(survey_files(sources, config, Workers()).files))
        keys.add(rehearse(sources, config, tmp_path / str(wants_report), found)[1].key)
    assert len(keys) == 1


def test_numbers_of_the_page_are_text_that_opens_offline(corpora: dict[str, Path]) -> None:
    page = corpus_report(corpora["planted"]).read_text()
    assert re.findall(r"default-src (\S+?);", page) == ["'none'"]
    assert not re.findall(r'\s(?:src|href|style|on\w+)="', page.split("<script", 1)[0])
