"""Small real inputs that several test files share: a four-gene tokenizer, hand-made cells, and PBMC cells."""

import gc
import hashlib
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import sparse

from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.training.votes import Choice, choose

FOUR_GENES = ("CD3E", "MS4A1", "NKG7", "LYZ")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking all imported modules again after every training."""
    gc.collect()
    gc.freeze()


#: Test files whose figures are drawn as users see them.
DRAWN = ("test_plots", "test_manuals")
SAVE = Figure.savefig


@pytest.fixture(autouse=True, scope="module")
def _figures_are_empty_but_in_few_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Save an empty figure in place of each one: drawing takes most of the time of `evaluate` on few cells."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in DRAWN:
            patch.setattr(Figure, "savefig", lambda figure, *args, **options: SAVE(Figure((1, 1)), *args, **options))
            patch.setattr("perturbgene.eval_utils.confusion_figure", lambda table, **titles: Figure((1, 1)))
        yield


#: Test files in which commands write reports, as they do for users.
REPORTED = ("test_report", "test_effects", "test_outputs", "test_corpus")


@pytest.fixture(autouse=True, scope="module")
def _reports_are_left_out_but_in_few_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write no report after a command: laying cells out takes longer than asking about so few."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in REPORTED:
            patch.setattr("perturbgene.main.write_report", lambda config: None)
        yield


#: Test files in which every training chooses the penalty of its votes anew.
CHOSEN_ANEW = ("test_votes", "test_repeatable")


@cache
def _choose_once() -> Callable[..., Choice]:
    """Return `choose` of votes that keeps what it found, for this process."""
    known = dict[bytes, Choice]()

    def choose_once(expression_ng: sparse.csr_matrix, label_n: np.ndarray, **options: Any) -> Choice:
        key = hashlib.sha256(pickle.dumps((expression_ng, label_n, sorted(options.items())))).digest()
        if key not in known:
            known[key] = choose(expression_ng, label_n, **options)
        return known[key]

    return choose_once


@pytest.fixture(autouse=True, scope="module")
def _penalties_are_chosen_once_for_the_same_cells(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cross-validate votes once per set of cells: it takes most of a small training, and many train on the same."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in CHOSEN_ANEW:
            patch.setattr("perturbgene.training.votes.choose", _choose_once())
        yield


@pytest.fixture(autouse=True)
def _messages_are_seen_as_before() -> Iterator[None]:
    """Undo what a command line that pretends to be one of several processes does to our messages."""
    logger = logging.getLogger("perturbgene")
    level = logger.level
    yield
    logger.setLevel(logging.INFO if level == logging.NOTSET else level)


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of one test."""
    monkeypatch.setattr(Figure, "savefig", SAVE)


def _adata(
    values_ng: Any,
    *,
    genes: Sequence[str] = FOUR_GENES,
    obs: dict[str, Any] | None = None,
    var: dict[str, Any] | None = None,
) -> ad.AnnData:
    matrix = values_ng if sparse.issparse(values_ng) else sparse.csr_matrix(np.atleast_2d(np.asarray(values_ng)))
    names = [f"cell_{row}" for row in range(matrix.shape[0])]
    return ad.AnnData(matrix, obs=pd.DataFrame(obs or {}, index=names), var=pd.DataFrame(var or {}, index=list(genes)))


@pytest.fixture
def make_adata() -> Callable[..., ad.AnnData]:
    """Return a function: rows of values (n, g) -> AnnData with CSR X, over four genes by default."""
    return _adata


@pytest.fixture
def write_h5ad(tmp_path: Path) -> Callable[..., str]:
    """Return a function: rows of values (or an AnnData) -> path of a real h5ad file."""

    def write(values_ng: Any, *, name: str = "cells.h5ad", **options: Any) -> str:
        adata = values_ng if isinstance(values_ng, ad.AnnData) else _adata(values_ng, **options)
        path = tmp_path / name
        adata.write_h5ad(path)
        return str(path)

    return write


@pytest.fixture
def make_tokenizer() -> Callable[..., GeneTokenizer]:
    """Return a function that builds the four-gene tokenizer with some settings changed.

    Ids: cell_type 4 (B cell), 5 (T cell); sex 6 (female), 7 (male); bin_0..bin_3 are 8..11. Types: cell_type 1, sex 2,
    genes 3..6.
    """

    def build(**changes: Any) -> GeneTokenizer:
        settings: dict[str, Any] = {
            "genes": FOUR_GENES,
            "phenotypes": {"sex": ["female", "male"], "cell_type": ["B cell", "T cell"]},
            "bin_edges": [0.5, 1.0, 2.0],
            "included_phenotypes": ("sex", "cell_type"),
            "max_length": 8,
            "normalization": "none",
        }
        return GeneTokenizer(**{**settings, **changes})

    return build


@pytest.fixture
def four_gene_tokenizer(make_tokenizer: Callable[..., GeneTokenizer]) -> GeneTokenizer:
    """Two phenotypes, four genes, edges 0.5, 1, 2 on the values as they are, at most 8 tokens."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def pbmc_cells() -> ad.AnnData:
    """All 700 PBMC cells that ship inside scanpy, `.raw` as X: 765 genes, log-normalised, CSR."""
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced()
    raw = cells.raw.to_adata()
    raw.obs = raw.obs.rename(columns={"bulk_labels": "cell_type"})
    return raw


@pytest.fixture
def pbmc(pbmc_cells: ad.AnnData) -> ad.AnnData:
    """A copy of the first 60 PBMC cells, free to change."""
    return pbmc_cells[:60].copy()


@pytest.fixture(scope="session")
def training_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of `small_training`."""
    from tests.small_training import make_corpus

    return make_corpus(tmp_path_factory.mktemp("training") / "corpus")


@pytest.fixture(scope="session")
def whole_weights(training_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights file of an undisturbed `small_training`."""
    from tests.small_training import command, main

    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(training_corpus, out)) == 0
    return (out / "model.safetensors").read_bytes()
