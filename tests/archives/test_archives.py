"""Files of every release are read by this one: corpora, runs, checkpoints and results, as `make` wrote them then."""

import shutil
from contextlib import closing
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import perturbgene as pg
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.opening import open_source
from perturbgene.inference.run import facts_of
from perturbgene.main import main

ARCHIVES = sorted(path.parent for path in Path(__file__).parent.glob("*/cells.h5ad"))
#: Another CPU adds in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of one release's archive, so that nothing changes it."""
    return Path(shutil.copytree(request.param, tmp_path_factory.mktemp("archive") / "files"))


@pytest.fixture(autouse=True)
def _paths_are_those_of_the_archive(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(archive)


def same_arrays(found: ad.AnnData, then: ad.AnnData) -> None:
    """Expect all arrays of obsm that an archive has."""
    assert then.obsm
    for name, array in then.obsm.items():
        np.testing.assert_allclose(found.obsm[name], array, **TOLERANCE, err_msg=name)


def test_there_are_archives() -> None:
    assert ARCHIVES


def test_a_corpus_is_read(archive: Path) -> None:
    corpus = Corpus.open("corpus")
    assert corpus.manifest["tokenizer_fingerprint"] == pg.GeneTokenizer.from_pretrained("corpus").fingerprint
    assert sum(corpus.paths("train").sizes or ()) > sum(corpus.paths("eval").sizes or ()) > 0


@pytest.mark.parametrize("name", ["mlm", "cls"])
def test_a_run_answers_as_then(archive: Path, name: str) -> None:
    then = ad.read_h5ad(f"{name}.h5ad")
    options = {"ask": ["cell_type", "tissue"], "ood": True} if name == "mlm" else {}
    found = pg.predict(ad.read_h5ad("cells.h5ad"), model=name, device="cpu", **options)
    same_arrays(found, then)
    for column in then.obs.select_dtypes("number").filter(regex=r"^(?!.*percentile)"):  # which magnify differences
        np.testing.assert_allclose(found.obs[column], then.obs[column], **TOLERANCE, err_msg=column)
    assert found.obs.columns.tolist() == then.obs.columns.tolist()
    with closing(open_source(f"{name}.h5ad")) as source:
        assert facts_of(source)["run"] == name


def test_a_run_embeds_as_then(archive: Path) -> None:
    found = pg.embed(ad.read_h5ad("cells.h5ad"), model="mlm", device="cpu")
    same_arrays(found, ad.read_h5ad("embedded.h5ad"))


def test_training_continues_from_a_checkpoint(archive: Path) -> None:
    steps = max(int(path.name.removeprefix("checkpoint-")) for path in Path("mlm").glob("checkpoint-*"))
    shutil.copytree("mlm", "resumed")
    words = ["mlm", "--config", "resumed/run.yaml", "--output_dir", "resumed", "--max_steps", str(steps + 2)]
    assert main([*words, "--save_steps", "2", "--eval_steps", "2", "--resume_from_checkpoint"]) == 0
    assert Path(f"resumed/checkpoint-{steps + 2}").is_dir()


def test_another_run_starts_from_it(archive: Path) -> None:
    words = ["mlm", "--corpus", "corpus", "--output_dir", "next", "--pretrained_model_path", "mlm", "--max_steps", "1"]
    assert main([*words, "--no_bf16", "--report_to", "none", "--eval_strategy", "no"]) == 0
    assert pg.load_run("next", device="cpu").tokenizer == pg.load_run("mlm", device="cpu").tokenizer
