"""Runs by their name on the Hugging Face Hub, and by transformers' Auto classes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import perturbgene as pg
from perturbgene.configs import parse_args
from perturbgene.errors import InputError
from perturbgene.hub import local_run
from perturbgene.model import GeneBertForPhenotypicMLM
from perturbgene.training.train import tokenizer_facts
from perturbgene.training.transfer import start_from


@pytest.fixture
def hub_cache(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub without a network, in which `lab/pbmc` is the small run."""
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--lab--pbmc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots/abc").symlink_to(small_folder / "runs/mlm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return repository / "snapshots/abc"


def test_a_run_on_the_hub_is_its_folder_in_the_cache(hub_cache: Path) -> None:
    assert local_run("lab/pbmc") == hub_cache


def test_a_run_on_the_hub_is_loaded_like_a_folder(hub_cache: Path, small_folder: Path) -> None:
    run = pg.load_run("lab/pbmc", device="cpu")
    assert run.tokenizer == pg.GeneTokenizer.from_pretrained("lab/pbmc")
    assert run.settings is not None
    predicted = [
        pg.predict(small_folder / "cells.h5ad", model, ask="cell_type").obs["predicted_cell_type"].tolist()
        for model in ("lab/pbmc", small_folder / "runs/mlm")
    ]
    assert predicted[0] == predicted[1]


def test_a_corpus_and_a_new_run_follow_a_run_on_the_hub(hub_cache: Path, small_folder: Path) -> None:
    corpus = pg.prepare(small_folder / "cells.h5ad", "like", phenotypes=["cell_type"], like="lab/pbmc", split_by="cell")
    ours, theirs = (pg.GeneTokenizer.from_pretrained(path) for path in (corpus, "lab/pbmc"))
    assert ours.genes[: len(theirs.genes)] == theirs.genes and ours.phenotypes == theirs.phenotypes
    config: Any = SimpleNamespace(pretrained_model_path="lab/pbmc", attn_implementation="auto")
    start = start_from(GeneBertForPhenotypicMLM, config, ours, seed=0, **tokenizer_facts(ours))
    assert start.lines[1] == "labels: 5 kept, 0 fresh, 0 dropped" and start.has_head


def test_a_command_takes_a_run_on_the_hub() -> None:
    parse_args(["embed", "lab/pbmc", __file__, "--output", "out.h5ad"]).check_machine()


def test_a_run_that_is_neither_here_nor_on_the_hub_is_refused(hub_cache: Path) -> None:
    with pytest.raises(InputError, match="'lab/none' does not exist here, and cannot be fetched .*Correct the path"):
        pg.load_run("lab/none")


def test_the_evaluation_of_a_run_on_the_hub_needs_an_output() -> None:
    from perturbgene.inference.evaluate import run_evaluate

    with pytest.raises(InputError, match="is on the Hugging Face Hub, .* Give --output"):
        run_evaluate(parse_args(["evaluate", "lab/pbmc"]))  # type: ignore[arg-type]


def test_auto_classes_load_a_run_after_the_package_is_imported_which_imports_no_torch(small_folder: Path) -> None:
    lines = """
        import sys, perturbgene
        assert "torch" not in sys.modules
        from transformers import AutoTokenizer, AutoModelForMaskedLM
        print(AutoTokenizer.from_pretrained(sys.argv[1]), type(AutoModelForMaskedLM.from_pretrained(sys.argv[1])))
    """
    code = "\n".join(line.strip() for line in lines.splitlines())
    command = [sys.executable, "-c", code, small_folder / "runs/mlm"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "GeneTokenizer(200 genes" in ended.stdout
    assert "GeneBertForPhenotypicMLM" in ended.stdout


def test_a_run_and_its_tokenizer_show_what_they_are(small_folder: Path) -> None:
    run = pg.load_run(small_folder / "runs/mlm", device="cpu")
    bins = run.tokenizer.bin_edges.num_edges
    tokenizer = f"GeneTokenizer(200 genes, cell_type (3 labels), tissue (2 labels), {bins} bins of expression)"
    assert repr(run.tokenizer) == tokenizer
    assert repr(run) == f"Run({run.path!r}: mlm, 1 x 32, on cpu; {tokenizer})"


def test_the_genes_of_a_run_on_the_hub_may_be_the_panel(hub_cache: Path, small_folder: Path) -> None:
    corpus = pg.prepare(small_folder / "cells.h5ad", "made", phenotypes="cell_type", panel="lab/pbmc")
    known = pg.GeneTokenizer.from_pretrained("lab/pbmc").genes
    assert pg.GeneTokenizer.from_pretrained(corpus).genes == known
