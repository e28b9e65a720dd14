"""What every verb that is asked about cells must hold, whatever it is asked: each check on each of them.

Untrained runs over nine genes, in process: the whole file takes seconds. docs/robustness.md lists the checks.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import perturbgene as pg
from perturbgene.errors import InputError
from perturbgene.files import sha256_of
from perturbgene.inference.run import Run
from perturbgene.main import main
from tests.nine_genes import GENES
from tests.untrained import a_run, save, save_score

Cells = ad.AnnData | str
#: Differences of results whose cells were put into other batches.
CLOSE = {"rtol": 0, "atol": 1e-5}


# -- the tasks ----------------------------------------------------------------------------------------------------


def _predict(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    out = pg.predict(cells, run, ask="cell_type", **options)
    probabilities = pd.DataFrame(out.obsm["predicted_cell_type_probabilities"]).set_axis(out.obs_names)
    return pd.concat([probabilities, out.obs.filter(like="predicted_")], axis=1)


def _embed(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    out = pg.embed(cells, run, **options)
    return pd.DataFrame(out.obsm["X_perturbgene"], index=out.obs_names)


def _genes(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    out = pg.gene_embeddings(cells, run, **options)
    means = pd.DataFrame(out.X, index=out.obs_names).add_prefix("mean_")
    return pd.concat([out.obs[["group", "gene", "n_cells"]].astype({"group": str, "gene": str}), means], axis=1)


def _counterfactual(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    settings = {"set": {"tissue": "spleen"}, "force": True, "num_passes": 1, "num_null": 5, "gene_mask_prob": 0.5}
    return pg.counterfactual(cells, run, **{**settings, **options}).sort_values(["group", "gene"])


def _perturb(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    settings = {"towards": "cell_type=B cell", "exact": True, "min_cells": 1}
    return pg.perturb(cells, run, **{**settings, **options}).sort_values(["group", "perturbation"])


def _attribute(cells: Cells, run: Run, **options: Any) -> pd.DataFrame:
    return pg.attribute(cells, run, ask="cell_type", num_check_cells=2, **options).sort_values(["label", "gene"])


@dataclass(frozen=True)
class Task:
    """A verb asked of a run, its answer as a table, and its command line."""

    name: str
    ask: Callable[..., pd.DataFrame]
    words: str  # of the command line, after run and input
    kind: str = "mlm"
    has_rows: bool = False  # the answer has a row per cell


TASKS = [
    Task("predict", _predict, "--output {out}.h5ad --ask cell_type", has_rows=True),
    Task("predict-cls", _predict, "--output {out}.h5ad", kind="cls", has_rows=True),
    Task("embed", _embed, "--output {out}.h5ad", has_rows=True),
    Task("embed-genes", _genes, "--output {out}.h5ad --groupby donor"),
    Task("counterfactual", _counterfactual, "--output {out}.h5ad --set tissue=spleen --force --num_null 0"),
    Task("perturb", _perturb, "--output {out}.csv --genes all --towards tissue=spleen --exact"),
    Task("attribute", _attribute, "--output {out}.csv --ask cell_type --num_check_cells 2"),
]
ASKING = [task.name for task in TASKS]
SMALL = {"model_arch": "tiny", "max_steps": 1, "bf16": False, "report_to": "none", "eval_strategy": "no"}
TASKS += [
    Task("mlm", partial(pg.mlm, **SMALL), ""),
    Task("cls", partial(pg.cls, phenotype_category="cell_type", **SMALL), ""),
]
BY_NAME = {task.name: task for task in TASKS}


def some_cells(num_cells: int = 14) -> ad.AnnData:
    """Draw cells that express about half of the nine genes at 0, 2 or 4, with labels and donors."""
    rng = np.random.default_rng(0)
    values_ng = rng.choice([0.0, 0.0, 2.0, 4.0], size=(num_cells, len(GENES)))
    values_ng[:, 0] = np.maximum(values_ng[:, 0], 2.0 * (values_ng.sum(axis=1) == 0))
    labels = {"cell_type": ["B cell", "NK cell", "T cell"], "tissue": ["blood", "spleen"], "donor": ["d1", "d2"]}
    obs = {name: pd.Categorical(rng.choice(values, num_cells)) for name, values in labels.items()}
    names = [f"cell_{row}" for row in range(num_cells)]
    matrix = sparse.csr_matrix(values_ng.astype(np.float32))
    cells = ad.AnnData(matrix, obs=pd.DataFrame(obs, index=names), var=pd.DataFrame(index=GENES))
    cells.obs["tissue"] = pd.Categorical(["blood", "spleen", *cells.obs["tissue"][2:]])
    return cells


@dataclass
class Desk:
    """A task, the run that it asks, cells, and a folder to work in."""

    task: Task
    run: Run
    folder: Path
    answers: dict[str, pd.DataFrame]  # of all tasks about the plain cells, as far as they are known
    cells: ad.AnnData = field(default_factory=some_cells)

    @property
    def plain(self) -> pd.DataFrame:
        """The answer about the plain cells, asked once."""
        if self.task.name not in self.answers:
            self.answers[self.task.name] = self.ask()
        return self.answers[self.task.name]

    def ask(self, cells: Cells | None = None, *, run: Run | None = None, **options: Any) -> pd.DataFrame:
        """Return the answer about some cells, by default the plain ones."""
        return self.task.ask(self.cells if cells is None else cells, run or self.run, **options)

    def write(self, cells: ad.AnnData | None = None) -> str:
        path = self.folder / f"in{len(list(self.folder.iterdir()))}.h5ad"
        (self.cells if cells is None else cells).write_h5ad(path)
        return str(path)

    def command(self, path: str) -> Path:
        """Run the command line of the verb; return the output."""
        words = self.task.words.format(out=self.folder / "out").split()
        assert main([self.task.name.split("-")[0], self.run.path, path, *words, "--device", "cpu"]) == 0
        return next(path for path in self.folder.iterdir() if path.name in ("out.h5ad", "out.csv"))

    def refused(self, match: str, cells: Cells, **options: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            self.ask(cells, **options)
        assert "\n" not in str(caught.value)


def same(left: pd.DataFrame, right: pd.DataFrame, **tolerance: float) -> None:
    """Expect equal tables, to the bit by default."""
    how: dict[str, Any] = {"check_exact": False, **tolerance} if tolerance else {"check_exact": True}
    pd.testing.assert_frame_equal(left, right, **how)


@contextmanager
def read_only(*paths: Path) -> Iterator[None]:
    """Take the right to write from files and whole folders."""
    modes = {one: one.stat().st_mode for path in paths for one in [path, *path.rglob("*")]}
    for one in modes:
        one.chmod(0o555 if one.is_dir() else 0o444)
    yield
    for one, mode in modes.items():
        one.chmod(mode)


@contextmanager
def offline() -> Iterator[None]:
    """Let every connection and every look-up of a name fail."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"a connection was tried: {args}")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(owner, name, refuse)
        yield


# -- the checks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of the page: what is done, what comes of it, and of which tasks."""

    id: str
    what: str
    outcome: str
    check: Callable[[Desk], object]
    tasks: tuple[str, ...]


CHECKS: list[Check] = []


def check(id: str, what: str, outcome: str, *, tasks: list[str] | None = None) -> Callable[[Any], Any]:
    """Register a check of all tasks, or of some."""

    def register(function: Callable[[Desk], object]) -> Callable[[Desk], object]:
        CHECKS.append(Check(id, what, outcome, function, tuple(tasks or ASKING)))
        return function

    return register


@check("T1-one-cell", "a single cell", "the answer that it gets among others; tables are of that cell alone")
def _(d: Desk) -> None:
    d.cells.obs["name"] = d.cells.obs_names
    alone, chosen = d.ask(d.cells[:1].copy()), d.ask(where="name=cell_0")
    if d.task.has_rows:
        same(alone, d.plain.iloc[:1], **CLOSE)
        chosen = chosen.iloc[:1]
    assert len(alone) and not alone.select_dtypes("number").isna().all(axis=None)
    same(alone, chosen, **CLOSE)


@check("T2-one-gene", "a single gene of the panel", "refused by coverage; answered with `--min_gene_coverage 0`")
def _(d: Desk) -> None:
    one = d.cells[:, ["G3"]].copy()
    d.refused("1 of 9.*min_gene_coverage", one)
    answer = d.ask(one, min_gene_coverage=0)
    assert len(answer) and not answer.select_dtypes("number").isna().all(axis=None)
    if d.task.has_rows:  # cells that do not express it have no answer
        assert (answer.select_dtypes("number").isna().all(axis=1) == (one.X.toarray()[:, 0] == 0)).all()


@check("T3-no-cell", "no cell", "refused in one line")
def _(d: Desk) -> None:
    d.refused("no cells", d.cells[:0].copy())
    d.refused("no cells", d.write(d.cells[:0].copy()))


@check("T4-nan", "NaN in the last cell", "refused, naming the value")
def _(d: Desk) -> None:
    broken = d.cells.copy()
    broken.X.data[-1] = np.nan
    d.refused("NaN", broken)


def _content(cells: ad.AnnData) -> list[Any]:
    parts = [cells.X.data, cells.X.indices, cells.X.indptr, cells.obs_names, cells.var_names]
    return [*(part.copy() for part in parts), cells.obs.copy(), cells.var.copy(), sorted(cells.obsm), sorted(cells.uns)]


@check("T5-input-in-memory", "an AnnData, in CSR with unsorted columns", "left as it is")
def _(d: Desk) -> None:
    rows = [np.arange(start, stop)[::-1] for start, stop in zip(d.cells.X.indptr, d.cells.X.indptr[1:], strict=False)]
    order = np.concatenate(rows)
    d.cells.X = sparse.csr_matrix(
        (d.cells.X.data[order], d.cells.X.indices[order], d.cells.X.indptr), shape=d.cells.shape
    )
    before = _content(d.cells)
    d.ask()
    for left, right in zip(before, _content(d.cells), strict=True):
        assert type(left) is type(right)
        assert left.equals(right) if isinstance(left, pd.DataFrame | pd.Index) else np.array_equal(left, right)


def _sums(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (sha256_of(path), path.stat().st_mtime_ns) for path in files}


@check("T6-read-only", "a file and a run folder that nobody may write", "answered; nothing in them is touched or added")
def _(d: Desk) -> None:
    """Root may write everywhere, so contents and times are compared too."""
    path, run = Path(d.write()), Path(d.run.path)
    before = _sums(run), sha256_of(path)
    with read_only(run, path):
        assert d.command(str(path)).stat().st_size
    assert (_sums(run), sha256_of(path)) == before


@check("T7-run", "a run in memory", "its weights, settings and mode are left as they are")
def _(d: Desk) -> None:
    def state() -> tuple[Any, ...]:
        weights = {name: weight.clone() for name, weight in d.run.model.state_dict().items()}
        return weights, d.run.model.config.to_dict(), d.run.tokenizer.fingerprint, d.run.model.training

    before = state()
    d.ask()
    after = state()
    assert all(torch.equal(weight, after[0][name]) for name, weight in before[0].items())
    assert before[1:] == after[1:]
    assert all(weight.grad is None and weight.requires_grad for weight in d.run.model.parameters())


@check("T8-subset", "some of the cells, alone or chosen by `--where`", "the answer of those cells, within 1e-5")
def _(d: Desk) -> None:
    for donor in ("d1", "d2"):
        is_own = (d.cells.obs["donor"] == donor).to_numpy()
        alone, chosen = d.ask(d.cells[is_own].copy()), d.ask(where=f"donor={donor}")
        if d.task.has_rows:
            same(alone, d.plain[is_own], **CLOSE)
            assert chosen[~is_own].select_dtypes("number").isna().all(axis=None)
            chosen = chosen[is_own]
        same(alone.reset_index(drop=True), chosen.reset_index(drop=True), **CLOSE)


@check("T9-groups", "cells by `--groupby`", "each group gets what its cells get alone, within 1e-5",
       tasks=["embed-genes", "counterfactual", "perturb"])  # fmt: skip
def _(d: Desk) -> None:
    grouped = d.ask(groupby="donor")
    for donor in ("d1", "d2"):
        alone = d.ask(d.cells[d.cells.obs["donor"] == donor].copy())
        own = grouped[grouped["group"] == donor]
        same(*(one.drop(columns="group").reset_index(drop=True) for one in (own, alone)), **CLOSE)


@check("T10-rows", "cells in another order", "the same answers in that order; the same table, within 1e-5 "
       "(of groups beyond 256 cells, the null of `counterfactual` is computed on others)")  # fmt: skip
def _(d: Desk) -> None:
    order = np.random.default_rng(1).permutation(d.cells.n_obs)
    answer, other = d.plain, d.ask(d.cells[order].copy())
    if d.task.has_rows:
        answer = answer.iloc[order]
    same(other.reset_index(drop=True), answer.reset_index(drop=True), **CLOSE)


@check("T11-columns", "genes in another order, other genes among them", "the same answer, bit by bit")
def _(d: Desk) -> None:
    wide = np.column_stack([d.cells.X.toarray(), np.ones(d.cells.n_obs, dtype=np.float32)])
    order = np.random.default_rng(1).permutation(10)
    var = pd.DataFrame(index=np.array([*GENES, "OTHER"])[order])
    same(d.ask(ad.AnnData(sparse.csr_matrix(wide[:, order]), obs=d.cells.obs, var=var)), d.plain)


@check("T12-file", "cells in a file in place of memory", "the same answer, bit by bit")
def _(d: Desk) -> None:
    same(d.ask(d.write()), d.plain)


@check("T13-saved", "a run saved and loaded again", "the same answer, bit by bit")
def _(d: Desk) -> None:
    loaded = pg.load_run(save(d.run, d.folder / "again"), device="cpu")
    save_score(d.folder / "again", "cell_type", accuracy=0.9)
    same(d.ask(run=loaded), d.plain)


@check("T14-twice", "the same question again", "the same answer, bit by bit")
def _(d: Desk) -> None:
    same(d.ask(), d.plain)


@check("T15-matrix", "values of another type; dense, CSC or CSR", "the same answer, bit by bit")
def _(d: Desk) -> None:
    form_of: dict[str, Callable[..., Any]] = {
        "float64": sparse.csr_matrix, "int64": sparse.csr_array, "uint32": sparse.csc_matrix, "int8": np.asarray,
        "float16": np.asarray,
    }  # fmt: skip
    for dtype, form in form_of.items():
        same(d.ask(ad.AnnData(form(d.cells.X.toarray().astype(dtype)), obs=d.cells.obs, var=d.cells.var)), d.plain)


@check("T16-names", "names of cells that are empty, numbers, `nan`, of any script, twice", "kept in their order; they "
       "change no answer")  # fmt: skip
def _(d: Desk) -> None:
    names = ["", "1", "nan", "細胞 1", 'a,"b"', "=1+1", "twice", "twice", "None", "é" * 300]
    named = d.cells.copy()
    named.obs_names = [*names, *named.obs_names[len(names) :]]
    answer = d.ask(named)
    same(answer.reset_index(drop=True), d.plain.reset_index(drop=True))
    if d.task.has_rows:
        assert list(answer.index) == list(named.obs_names)
        assert list(ad.read_h5ad(d.command(d.write(named))).obs_names) == list(named.obs_names)


def _given(task: Task) -> dict[str, Any]:
    """Return what makes a task read the tissue of each cell."""
    return {} if task.kind == "cls" or task.name == "counterfactual" else {"given": {"tissue": None}}


@check("T17-unknown-labels", "labels that the run does not know", "the answer of cells without a label, bit by bit")
def _(d: Desk) -> None:
    strange, bare = d.cells.copy(), d.cells.copy()
    tissue = d.cells.obs["tissue"].astype(object)
    strange.obs["tissue"], bare.obs["tissue"] = tissue.copy(), tissue.copy()
    strange.obs.iloc[2::3, 1], bare.obs.iloc[2::3, 1] = "the moon", np.nan
    absent = d.ask(bare, **_given(d.task))
    same(d.ask(strange, **_given(d.task)), absent)
    assert not absent.equals(d.ask(**_given(d.task)))


@check("T18-without-labels", "cells without any column", "answered alike; refused where the column is asked for")
def _(d: Desk) -> None:
    bare = d.cells.copy()
    bare.obs = bare.obs[[]]
    if d.task.name == "counterfactual":
        d.refused("'tissue'", bare)
    elif d.task.kind == "cls":  # it reads the tissue where there is one
        nothing = d.cells.copy()
        nothing.obs["tissue"] = np.nan
        same(d.ask(bare), d.ask(nothing))
    else:
        same(d.ask(bare), d.plain)
        d.refused("'tissue'", bare, **_given(d.task))


@check("T19-no-GPU", "a machine without a GPU", "answered on the CPU; CUDA is never started")
def _(d: Desk) -> None:
    def started(*args: object) -> None:
        raise AssertionError("CUDA was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "_lazy_init", started)
        loaded = pg.load_run(d.run.path)
        assert loaded.model.device.type == "cpu"
        d.ask(run=loaded)


@check("T20-offline", "a machine without a network", "answered; no connection is tried, no name is looked up")
def _(d: Desk) -> None:
    with offline():
        assert d.command(d.write()).stat().st_size


@check("T21-training", "a corpus that nobody may write, on a machine without a network", "trained; nothing in it is "
       "touched", tasks=["mlm", "cls"])  # fmt: skip
def _(d: Desk) -> None:
    cells = some_cells(120)
    settings: dict[str, Any] = {"phenotypes": ["cell_type", "tissue"], "bin_edges": [1, 3], "normalization": "none"}
    corpus = pg.prepare(cells, d.folder / "corpus", **settings)
    before = _sums(corpus)
    with read_only(corpus), offline():
        d.task.ask(corpus=corpus, output_dir=d.folder / "run")
    assert _sums(corpus) == before
    assert pg.load_run(d.folder / "run", device="cpu").is_classifier == (d.task.name == "cls")


@check("T22-training-nan", "training files with NaN in the last cell, or without a cell", "refused in one line",
       tasks=["mlm", "cls"])  # fmt: skip
def _(d: Desk) -> None:
    broken = some_cells(120)
    broken.X.data[-1] = np.nan
    for cells, match in ((broken, "NaN"), (broken[:0].copy(), "no cell|0 training cells")):
        settings = {"train_data_paths": d.write(cells), "pretrained_model_path": d.run.path}
        with pytest.raises(InputError, match=match) as caught:
            d.task.ask(**settings, output_dir=d.folder / "run")
        assert "\n" not in str(caught.value)
        assert not (d.folder / "run/model.safetensors").exists()


# -- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Untrained runs in folders that say that they are good."""
    loaded = {}
    for kind in ("mlm", "cls"):
        folder = tmp_path_factory.mktemp("runs") / kind
        save_score(folder, "cell_type", accuracy=0.9)
        loaded[kind] = pg.load_run(save(a_run(kind), folder), device="cpu")
    return loaded


@pytest.fixture(scope="module")
def answers() -> dict[str, pd.DataFrame]:
    return {}


@pytest.fixture(autouse=True, scope="module")
def _deletion_curves_are_short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perturbgene.perturbation.attribute.SHARES", (0.0, 1.0))
        yield


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize(
    ("check", "name"),
    [pytest.param(one, name, id=f"{one.id}-{name}") for one in CHECKS for name in one.tasks],
)
def test_tasks(check: Check, name: str, runs: dict[str, Run], answers: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    check.check(Desk(BY_NAME[name], runs[BY_NAME[name].kind], tmp_path, answers))
