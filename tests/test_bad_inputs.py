"""Bad inputs, each with the outcome that docs/robustness.md promises: refused, said in a line, or read right.

The ids are those of the list that the page shows; `make robustness` writes the page.
"""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import perturbgene as pg
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.main import main
from perturbgene.model import GeneBertForPhenotypicMLM
from perturbgene.training.checkpoints import manifest_of, seal
from tests.plain_cells import IDS, SYMBOLS, make_run, plain_cells
from tests.web_server import serving

TRAINING = ["--model_arch", "tiny", "--num_hidden_layers", "1", "--no_bf16", "--report_to", "none", "--max_steps", "1",
            "--eval_strategy", "no"]  # fmt: skip


@dataclass
class Bench:
    """A folder to work in, an untrained run, and short ways to say what should come of an input."""

    folder: Path
    run: str
    corpus: str
    capsys: Any
    caplog: Any
    cells: ad.AnnData = field(default_factory=plain_cells)

    def write(self, adata: ad.AnnData | None = None, name: str = "in.h5ad") -> str:
        """Write cells, the plain ones by default."""
        path = self.folder / name
        (self.cells if adata is None else adata).write_h5ad(path)
        return str(path)

    def edit(self, change: Callable[[h5py.File], Any], adata: ad.AnnData | None = None) -> str:
        """Write cells, then change the file as no library would."""
        path = self.write(adata, f"in{len(list(self.folder.iterdir()))}.h5ad")
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    def file(self, name: str, content: bytes) -> str:
        """Write bytes."""
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def call(self, *words: str) -> tuple[int, str]:
        """Run a command line; return its exit code and all that it said."""
        self.capsys.readouterr()
        self.caplog.clear()
        code = main(list(words))
        return code, "\n".join([self.capsys.readouterr().err, self.caplog.text])

    def refused(self, *words: str, match: str) -> None:
        """Expect exit code 2, one line that matches, and nothing written."""
        before = sorted(path for path in self.folder.rglob("*"))
        code, said = self.call(*words)
        assert code == 2, said
        line = next(line for line in said.splitlines() if line.startswith("error: "))
        assert re.search(match, line), line
        assert "Traceback" not in said
        assert sorted(path for path in self.folder.rglob("*")) == before

    def not_predicted(self, path: str, *flags: str, match: str) -> None:
        """Expect that predict refuses a file."""
        out = str(self.folder / "refused.h5ad")
        self.refused("predict", self.run, path, "--output", out, "--ask", "cell_type", *flags, match=match)

    def not_prepared(self, *paths: str, flags: tuple[str, ...] = (), match: str) -> None:
        """Expect that prepare refuses files."""
        out = str(self.folder / "corpus")
        self.refused("prepare", *paths, "--output", out, "--phenotypes", "cell_type", *flags, match=match)

    def prepared(self, *paths: str, flags: tuple[str, ...] = ()) -> str:
        """Expect that prepare takes files; return what it said."""
        out = str(self.folder / "corpus")
        code, said = self.call("prepare", *paths, "--output", out, "--phenotypes", "cell_type", *flags)
        assert code == 0, said
        return said

    def predicted(self, path: str, *flags: str) -> tuple[ad.AnnData, str]:
        """Expect that predict takes a file; return what it wrote, and what it said."""
        out = str(self.folder / "out.h5ad")
        code, said = self.call("predict", self.run, path, "--output", out, "--ask", "cell_type", "--overwrite", *flags)
        assert code == 0, said
        return ad.read_h5ad(out), said

    def tokens(
        self, cells: Any, *, changes: dict[str, Any] | None = None, **options: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Return ids and types of every cell."""
        tokenizer = GeneTokenizer.from_pretrained(self.run).with_settings(**(changes or {}))
        stream = pg.IterableAnnDataset(cells, tokenizer, **options)
        return [(cell["input_ids"].tolist(), cell["token_type_ids"].tolist()) for cell in stream]

    def same_tokens(self, cells: Any, **options: Any) -> None:
        """Expect the tokens of the plain cells."""
        assert self.tokens(cells, **options) == self.tokens(self.cells)


@dataclass(frozen=True)
class Case:
    """One line of the page: an input, what comes of it, and the check; without a check, why there is none."""

    id: str
    what: str
    outcome: str
    check: Callable[[Bench], object] | None
    test: str = ""  # that of another file

    @property
    def exit(self) -> str:
        """Exit codes of the commands that are given it."""
        if not (self.check or self.test) or self.id.startswith("S8"):
            return ""
        return "2" if self.outcome.startswith("refused") else "0 or 2" if "refused" in self.outcome else "0"


CASES: list[Case] = []


def case(id: str, what: str, outcome: str) -> Callable[[Callable[[Bench], object]], Callable[[Bench], object]]:
    """Register the check of a case."""

    def register(check: Callable[[Bench], object]) -> Callable[[Bench], object]:
        CASES.append(Case(id, what, outcome, check))
        return check

    return register


def no_case(id: str, what: str, why: str) -> None:
    """List a case that makes no sense for how we are built, with the reason."""
    CASES.append(Case(id, what, f"does not apply: {why}", None))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run with random weights, and the corpus of its vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    make_run(plain_cells(60, seed=9), corpus=folder / "corpus", run=folder / "mlm", phenotypes=["cell_type"])
    return str(folder / "mlm"), str(folder / "corpus")


@pytest.fixture
def bench(tmp_path: Path, small_run: tuple[str, str], capsys: Any, caplog: Any) -> Bench:
    caplog.set_level("INFO", logger="perturbgene")
    return Bench(tmp_path, *small_run, capsys, caplog)


# -- files that cannot be read ------------------------------------------------------------------------------------


@case("B1-empty-file", "an empty file", "refused")
def _(b: Bench) -> None:
    b.not_predicted(b.file("in.h5ad", b""), match="is empty|truncated")


@case("B2-truncated-file", "a truncated file", "refused")
def _(b: Bench) -> None:
    path = Path(b.write())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    b.not_predicted(str(path), match="truncated")


@case("B3-not-HDF5", "text, a web page or a .gz with the name of an h5ad file", "refused, named by what it is")
def _(b: Bench) -> None:
    b.not_predicted(b.file("text.h5ad", b"gene,cell\n1,2\n" * 40), match=r"text")
    b.not_predicted(b.file("page.h5ad", b"<!DOCTYPE html><html>404</html>"), match=r"(?i)html|web page")
    b.not_predicted(b.file("zip.h5ad", gzip.compress(b"x" * 999)), match=r"gzip")


@case("B4-corrupt-metadata", "bytes of the file's structure overwritten", "refused")
def _(b: Bench) -> None:
    path = Path(b.write())
    content = bytearray(path.read_bytes())
    for start in [found.start() for found in re.finditer(rb"SNOD|TREE|HEAP|OHDR", content)][:40]:
        content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    b.not_predicted(str(path), match="damaged|cannot be read|truncated|not")


@case("B5-corrupt-chunk", "a damaged compressed chunk", "refused, naming file and rows")
def _(b: Bench) -> None:
    path = b.folder / "in.h5ad"
    b.cells.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        start = file["X/data"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    b.not_predicted(str(path), match=r"in\.h5ad.*rows? ")


@case("B6-flipped-byte", "one flipped byte in uncompressed values of a corpus", "refused by training: the manifest has "
      "sums, compared where size or time of a shard differ; other files carry none")  # fmt: skip
def _(b: Bench) -> None:
    own = Path(shutil.copytree(b.corpus, b.folder / "own"))
    shard = Path(Corpus.open(own).paths("train")[0])
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    words = ["mlm", "--corpus", str(own), "--output_dir", str(b.folder / "r"), *TRAINING]
    b.refused(*words, match="changed since `prepare` wrote it: its content is another")


@case("B7-missing-plugin", "values compressed by a filter that this machine lacks", "refused")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        old = file["X/data"][:]
        del file["X/data"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((len(old),))
        plist.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((len(old),))
        made = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, plist)
        made.write_direct_chunk((0,), old.tobytes(), 0)

    b.not_predicted(b.edit(change), match="hdf5plugin|filter|compress")


@case("B8-newer-encoding", "an encoding version that we do not know", "refused: written by a newer anndata")
def _(b: Bench) -> None:
    b.not_predicted(b.edit(lambda file: file["X"].attrs.update({"encoding-version": "9.0.0"})), match="newer")
    b.not_predicted(b.edit(lambda file: file["obs"].attrs.update({"encoding-version": "9.0.0"})), match="newer")


@case("B9-old-file", "tables of anndata 0.6", "read: the same tokens")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        for frame, index in (("obs", b.cells.obs_names), ("var", b.cells.var_names)):
            del file[frame]
            table = np.array([(name.encode(),) for name in index], dtype=[("index", "S20")])
            file.create_dataset(frame, data=table)

    no_labels: dict[str, Any] = {"included": []}
    assert b.tokens([b.edit(change)], changes=no_labels) == b.tokens(b.cells, changes=no_labels)


@case("B10-locked-file", "a file that another process is writing", "refused")
def _(b: Bench) -> None:
    path = b.write()
    (is_open, opened), (is_done, done) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with h5py.File(path, "r+"):
            os.write(opened, b"x")
            os.read(is_done, 1)
        os._exit(0)
    os.read(is_open, 1)
    try:
        b.not_predicted(path, match="locked by a program that writes it")
    finally:
        os.write(done, b"x")
        os.waitpid(child, 0)


@case("B11-no-such-path", "a missing path, a folder or glob or brace pattern without files", "refused, the first named")
def _(b: Bench) -> None:
    (b.folder / "empty").mkdir()
    for path in ("no.h5ad", "no_*.h5ad", "no_{0..2}.h5ad", "empty"):
        b.not_prepared(str(b.folder / path), match=re.escape(path.split("{")[0].split("*")[0]))


@case("B12-brace-bomb", "`{0..999999999}`", "refused")
def _(b: Bench) -> None:
    b.not_prepared(str(b.folder / "{0..999999999}.h5ad"), match="more than 100,000 files")


@case("B13-file-twice", "the same file by path, symlink or hard link", "refused")
def _(b: Bench) -> None:
    path = b.write()
    os.symlink(path, b.folder / "link.h5ad")
    os.link(path, b.folder / "hard.h5ad")
    for twin in (path, str(b.folder / "link.h5ad"), str(b.folder / "hard.h5ad")):
        b.not_prepared(path, twin, match="same file")


@case("B14-train-file-in-eval", "a training file also among the evaluation files", "refused")
def _(b: Bench) -> None:
    path = b.write()
    words = ["mlm", "--train_data_paths", path, "--eval_data_paths", path, "--output_dir", str(b.folder / "r")]
    b.refused(*words, "--pretrained_model_path", b.run, "--no_bf16", match="train.*eval|eval.*train")


# -- matrices -----------------------------------------------------------------------------------------------------


@case("B15-dense", "dense X", "read: the same tokens")
def _(b: Bench) -> None:
    dense = b.cells.copy()
    dense.X = dense.X.toarray()
    b.same_tokens([b.write(dense)])


@case("B16-csc", "CSC X", "read: the same tokens")
def _(b: Bench) -> None:
    csc = b.cells.copy()
    csc.X = csc.X.tocsc()
    b.same_tokens([b.write(csc)])


no_case("B17-coo", "COO X", "neither an h5ad file nor an AnnData can hold it: anndata refuses it")


@case("B18-no-X", "no X, counts only in a layer", "refused, naming the layers; read with `--layer`")
def _(b: Bench) -> None:
    bare = ad.AnnData(obs=b.cells.obs, var=b.cells.var, layers={"counts": b.cells.X})
    path = b.write(bare)
    b.not_predicted(path, match=r"'counts'.*--layer|--layer.*'counts'")
    b.same_tokens([path], layer="counts")


@case("B19-number-types", "bool, int8, int64, float16 and float64 values", "read: the same tokens as float32")
def _(b: Bench) -> None:
    for dtype in ("int8", "int64", "float16", "float64", "uint32"):
        other = b.cells.copy()
        other.X = other.X.toarray().astype(dtype)
        b.same_tokens([b.write(other)])
    yes_no = b.cells.copy()
    yes_no.X = sparse.csr_matrix(yes_no.X.toarray() > 0)
    numbers = b.cells.copy()
    numbers.X = yes_no.X.astype(np.float32)
    assert b.tokens([b.write(yes_no)]) == b.tokens(numbers)


def _with_value(cells: ad.AnnData, value: float, *, row: int = 20) -> ad.AnnData:
    cells = cells.copy()
    cells.X = cells.X.toarray()
    cells.X[row, 3] = value
    cells.X = sparse.csr_matrix(cells.X)
    return cells


for _id, _what, _value, _match in (
    ("B20-nan", "NaN in X", np.nan, "NaN"),
    ("B21-infinite", "infinity in X", np.inf, "infinite"),
    ("B22-negative", "negative values", -1.5, "negative"),
):

    @case(_id, _what, "refused")
    def _(b: Bench, value: float = _value, match: str = _match) -> None:
        path = b.write(_with_value(b.cells, value))
        b.not_predicted(path, match=match)
        b.not_prepared(path, match=match)


def _log1p(cells: ad.AnnData, target: float = 1e4) -> ad.AnnData:
    cells = cells.copy()
    values = cells.X.toarray().astype(np.float64)
    cells.X = sparse.csr_matrix(np.log1p(values / values.sum(1, keepdims=True) * target))
    return cells


@case("B23-counts-and-logs", "log1p counts per 10,000 for a run of counts", "read: the same tokens")
def _(b: Bench) -> None:
    b.same_tokens([b.write(_log1p(b.cells))])


@case("B24-logged-twice", "log1p of log1p counts per 10,000", "read: the same tokens, said in a line")
def _(b: Bench) -> None:
    twice = _log1p(b.cells)
    twice.X.data = np.log1p(twice.X.data)
    path = b.write(twice)
    b.same_tokens([path])
    assert "X holds log1p of log1p of counts per 10,000" in b.predicted(path)[1]


@case("B25-stored-zeros", "stored zeros in a sparse matrix", "read: the same tokens")
def _(b: Bench) -> None:
    full = b.cells.copy()
    dense = full.X.toarray()
    columns = np.indices(dense.shape)[1]
    full.X = sparse.csr_matrix(
        (dense.ravel(), columns.ravel(), np.arange(0, dense.size + 1, dense.shape[1])), dense.shape
    )
    b.same_tokens([b.write(full)])


@case("B26-unsorted-columns", "columns of a row that are not sorted", "read: the same tokens")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        ends = file["X/indptr"][:]
        for start, stop in pairwise(ends):
            for name in ("X/indices", "X/data"):
                file[name][start:stop] = file[name][start:stop][::-1]

    b.same_tokens([b.edit(change)])


@case("B27-column-twice", "a column twice in one row", "refused, naming cell and column")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        file["X/indices"][1] = file["X/indices"][0]

    b.not_predicted(b.edit(change), match="second value in column")
    b.not_prepared(b.edit(change), match="second value in column|twice")


for _id, _what, _value in (("B28-index-out-of-range", "a column index beyond the last gene", 999),
                           ("B29-negative-index", "a negative column index", -1)):  # fmt: skip

    @case(_id, _what, "refused")
    def _(b: Bench, value: int = _value) -> None:
        def change(file: h5py.File) -> None:
            file["X/indices"][5] = value

        path = b.edit(change)
        b.not_predicted(path, match="column")
        b.not_prepared(path, match="column")


@case("B30-offsets", "row offsets that fall or end beyond the data", "refused")
def _(b: Bench) -> None:
    for place, value in ((3, 0), (-1, 10**6)):

        def change(file: h5py.File, place: int = place, value: int = value) -> None:
            offsets = file["X/indptr"][:]
            offsets[place] = value
            file["X/indptr"][:] = offsets

        b.not_predicted(b.edit(change), match="indptr")


@case("B31-overflown-offsets", "row offsets that overflowed 32 bits", "refused")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        file["X/indptr"][-1] = -(2**31)

    b.not_predicted(b.edit(change), match="indptr")


@case("B32-shape-mismatch", "X of another shape than obs and var", "refused")
def _(b: Bench) -> None:
    b.not_predicted(b.edit(lambda file: file["X"].attrs.update({"shape": [24, 39]})), match="shape|columns|genes")
    b.not_predicted(b.edit(lambda file: file["X"].attrs.update({"shape": [23, 40]})), match="shape|rows|cells|indptr")


@case("B33-no-tables", "a file without /obs or /var", "refused")
def _(b: Bench) -> None:
    for name in ("obs", "var"):
        b.not_predicted(b.edit(lambda file, name=name: file.pop(name)), match=f"/{name}")


# -- genes --------------------------------------------------------------------------------------------------------


@case("B34-duplicate-genes", "two columns of one gene", "summed, said in a line; refused if the scale is unknown")
def _(b: Bench) -> None:
    two = ad.concat([b.cells, b.cells[:, :1]], axis=1)
    two.obs = b.cells.obs
    assert "summed" in b.predicted(b.write(two))[1]
    logs = b.write(_log1p(two))
    assert "summed" in b.predicted(logs)[1]
    b.not_predicted(logs, "--normalization", "none", match="several columns are the same gene .* cannot be summed")


@case("B35-gene-order", "genes in another order", "read: the same tokens")
def _(b: Bench) -> None:
    b.same_tokens([b.write(b.cells[:, np.random.default_rng(0).permutation(40)].copy())])


@case("B36-missing-genes", "a file that lacks panel genes", "said in a line; refused under `--min_gene_coverage`")
def _(b: Bench) -> None:
    assert "30 of 40 panel genes found" in b.predicted(b.write(b.cells[:, :30].copy()))[1]
    b.not_predicted(b.write(b.cells[:, :10].copy()), match="--min_gene_coverage")


@case("B37-extra-genes", "genes that the panel does not have", "ignored, said in a line; part of the library size")
def _(b: Bench) -> None:
    others = ad.AnnData(np.zeros((24, 2), "f4"), obs=b.cells.obs, var=pd.DataFrame(index=["X1", "X2"]))
    more = ad.concat([b.cells, others], axis=1)
    more.obs = b.cells.obs
    path = b.write(more)
    b.same_tokens([path])
    assert "2 columns not in the panel" in b.predicted(path)[1]


@case("B38-other-names", "genes by a name that the run does not know", "refused, naming examples and the flag")
def _(b: Bench) -> None:
    other = b.cells.copy()
    other.var = pd.DataFrame(index=[f"probe_{number}" for number in range(40)])
    b.not_predicted(b.write(other), match=r"probe_0.*--gene_id_column")


@case("B39-versions", "versions of Ensembl ids", "dropped: the same tokens")
def _(b: Bench) -> None:
    versions = b.cells.copy()
    versions.var = pd.DataFrame(index=[f"{id_}.{number}" for number, id_ in enumerate(IDS)])
    b.same_tokens([b.write(versions)])


@case("B40-two-species", "genes of two species in one file", "the panel's are used; the share that was found is said")
def _(b: Bench) -> None:
    mouse = [f"ENSMUSG{number:011d}" for number in range(40)]
    both = ad.AnnData(
        sparse.hstack([b.cells.X, b.cells.X]).tocsr(), obs=b.cells.obs, var=pd.DataFrame(index=IDS + mouse)
    )
    assert "40 columns not in the panel" in b.predicted(b.write(both))[1]


@case("B41-spelling", "gene names that differ by case or blanks", "blanks are dropped; another case is refused")
def _(b: Bench) -> None:
    blanks = b.cells.copy()
    blanks.var = pd.DataFrame(index=[f" {name} " for name in SYMBOLS])
    b.same_tokens([b.write(blanks)])
    mouse = b.cells.copy()
    mouse.var = pd.DataFrame(index=[name.lower() for name in SYMBOLS])
    b.not_predicted(b.write(mouse), match="(?i)case")


@case("B42-damaged-names", "gene names that are numbers", "refused: numbers name no gene")
def _(b: Bench) -> None:
    numbers = b.cells.copy()
    numbers.var = pd.DataFrame(index=[str(number) for number in range(40)])
    b.not_prepared(b.write(numbers), match="number")


no_case("B43-rank-column", "`highly_variable_rank` that is missing or tied", "`prepare` ranks genes itself")
no_case("B44-selection-per-file", "another selection of genes in each file", "the panel belongs to the corpus")


# -- labels -------------------------------------------------------------------------------------------------------


@case("B45-no-such-column", "an obs column that does not exist", "refused, with the nearest name")
def _(b: Bench) -> None:
    b.not_prepared(b.write(), flags=("--split_by", "donor"), match="'donor_id'")


@case("B46-listed-column", "a column that obs lists but does not hold", "refused")
def _(b: Bench) -> None:
    b.not_prepared(b.edit(lambda file: file["obs"].pop("cell_type")), match="cell_type")


@case("B47-category-codes", "codes beyond the categories of a column", "refused")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        file["obs/cell_type/codes"][3] = 9

    path = b.edit(change)
    b.not_prepared(path, match="cell_type")
    b.not_predicted(path, match="cell_type")


@case("B48-missing-labels", "NaN, empty and `unknown` labels", "missing: no class, counted in the audit")
def _(b: Bench) -> None:
    cells = plain_cells(60)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[:6, 0] = [np.nan, None, "", "unknown", "Unknown", " "]
    said = b.prepared(b.write(cells))
    assert "6 of 60 cells have a missing label" in said
    assert GeneTokenizer.from_pretrained(b.folder / "corpus").phenotypes["cell_type"] == ("B cell", "T cell")


@case("B49-unknown-label", "labels that the run does not know", "absent, counted in a line")
def _(b: Bench) -> None:
    other = b.cells.copy()
    other.obs["cell_type"] = ["plasma cell"] * 24
    said = b.predicted(b.write(other), "--audit")[1]
    assert "24 cells have a cell_type that the vocabulary lacks ('plasma cell')" in said


@case("B50-colliding-labels", "labels that are the same but for blanks", "refused with the pair")
def _(b: Bench) -> None:
    twins = plain_cells(60)
    twins.obs["cell_type"] = np.resize(["T cell", "T_cell"], 60)
    b.not_prepared(b.write(twins), match=r"T cell.*T_cell|T_cell.*T cell")


@case("B51-strange-labels", "labels with brackets, quotes, emoji, 10 kB, `=`", "kept; control characters: refused")
def _(b: Bench) -> None:
    labels = ["[x], 'y' \"z\"", "=SUM(A1)", "🧬", "é" * 5000, "</script>"]
    strange = plain_cells(100)
    strange.obs["cell_type"] = np.resize(labels, 100)
    b.prepared(b.write(strange))
    assert sorted(GeneTokenizer.from_pretrained(b.folder / "corpus").phenotypes["cell_type"]) == sorted(labels)
    shutil.rmtree(b.folder / "corpus")
    strange.obs["cell_type"] = np.resize(["a\x07b", "c"], 100)
    b.not_prepared(b.write(strange), match="control")


@case(
    "B52-reserved-labels",
    "labels called [MASK], [PAD] or bin_1",
    "kept, without brackets: labels have ids of their own",
)
def _(b: Bench) -> None:
    reserved = plain_cells(60)
    reserved.obs["cell_type"] = np.repeat(["[MASK]", "[PAD]", "bin_1"], 20)
    b.prepared(b.write(reserved))
    tokenizer = GeneTokenizer.from_pretrained(b.folder / "corpus")
    assert tokenizer.phenotypes["cell_type"] == ("MASK", "PAD", "bin_1")
    assert tokenizer.phenotype_id_ranges == [[4, 7]]  # after the special tokens, before the bins


@case(
    "B53-numeric-column", "a column of numbers", "measurements are refused; booleans and few whole numbers are labels"
)
def _(b: Bench) -> None:
    cells = plain_cells(120)
    cells.obs["cell_type"] = np.linspace(0, 1, 120)
    b.not_prepared(b.write(cells), match="different numbers")
    cells.obs["cell_type"] = np.arange(120) % 2 == 0
    b.prepared(b.write(cells))
    assert GeneTokenizer.from_pretrained(b.folder / "corpus").phenotypes["cell_type"] == ("False", "True")


@case("B54-rare-classes", "a class of one cell; one class only", "audit finding")
def _(b: Bench) -> None:
    cells = plain_cells(60)
    cells.obs["cell_type"] = ["rare", *np.resize(["B cell", "T cell"], 59)]
    assert "'rare' come from one donor_id only" in b.prepared(b.write(cells))
    shutil.rmtree(b.folder / "corpus")
    cells.obs["cell_type"] = "T cell"
    assert "every labeled training cell is 'T cell'" in b.prepared(b.write(cells))


no_case("B55-class-frequencies", "a file of class frequencies that disagrees", "frequencies are counted, never read")


# -- cells --------------------------------------------------------------------------------------------------------


@case("B56-empty-cell", "a cell without any expressed gene", "left out of training; answered as missing in its place")
def _(b: Bench) -> None:
    empty = b.cells.copy()
    empty.X = sparse.csr_matrix(empty.X.toarray() * (np.arange(24) != 5)[:, None])
    out, said = b.predicted(b.write(empty))
    assert list(out.obs_names) == list(empty.obs_names)
    assert out.obs["predicted_cell_type"].isna().to_numpy().nonzero()[0].tolist() == [5]
    assert "1 cells" in said or "1 cell" in said


@case("B57-one-gene", "a cell with one gene", "trained on and answered; the loss is finite")
def _(b: Bench) -> None:
    one = b.cells.copy()
    one.X = sparse.csr_matrix(one.X.toarray() * (np.arange(40) == 2))
    out, _ = b.predicted(b.write(one))
    assert out.obs["predicted_cell_type_probability"].dropna().between(0, 1).all()


@case("B58-nothing-masked", "a batch without a masked token", "loss 0 with a gradient, not NaN")
def _(b: Bench) -> None:
    from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM

    tokenizer = GeneTokenizer.from_pretrained(b.run)
    collate = DataCollatorForPhenotypicMLM(
        tokenizer, gene_mask_prob=0.0, phenotype_mask_prob=0.0, unexpressed_ratio=0.0
    )
    model = GeneBertForPhenotypicMLM.from_pretrained(b.run)
    loss = model(**collate(list(pg.IterableAnnDataset(b.cells, tokenizer))[:4])).loss
    loss.backward()
    assert loss.item() == 0


@case("B59-few-cells", "0 cells, 1 cell", "0: refused; 1: answered")
def _(b: Bench) -> None:
    assert b.predicted(b.write(b.cells[:1].copy()))[0].n_obs == 1
    empty = b.write(b.cells[:0].copy())
    b.not_predicted(empty, match="no cells")
    b.not_prepared(empty, match="no training cell")


@case("B60-few-genes", "a file of three genes, or none", "refused by coverage")
def _(b: Bench) -> None:
    b.not_predicted(b.write(b.cells[:, :3].copy()), match="3 of 40")
    b.not_predicted(b.write(b.cells[:, :0].copy()), match="0 of 40|no gene|0 columns")


@case("B61-uneven-files", "files of very different size", "every cell once")
def _(b: Bench) -> None:
    paths = [b.write(plain_cells(number, seed=number), f"{number}.h5ad") for number in (2, 50, 9)]
    assert len(b.tokens(paths)) == 61


@case("B62-more-workers-than-files", "more workers than files", "every cell once")
def _(b: Bench) -> None:
    loader = torch.utils.data.DataLoader(
        pg.IterableAnnDataset([b.write()], GeneTokenizer.from_pretrained(b.run)), batch_size=None, num_workers=3
    )
    assert len(list(loader)) == 24


no_case("B63-larger-than-memory", "a file larger than memory", "read in blocks; `benchmarks/` shows the memory")


@case("B64-max-length", "a `max_length` too small for one gene", "refused")
def _(b: Bench) -> None:
    out = str(b.folder / "r")
    b.refused("mlm", "--corpus", b.corpus, "--output_dir", out, "--max_length", "3", *TRAINING, match="max_length")


@case("B65-long-cell", "a cell longer than `max_length`", "cut to the first genes of the panel; [EOS] stays")
def _(b: Bench) -> None:
    short = GeneTokenizer.from_pretrained(b.run, max_length=10)
    ids = [cell["input_ids"].tolist() for cell in pg.IterableAnnDataset(b.cells, short)]
    assert all(len(one) <= 10 and one[-1] == 1 for one in ids)
    assert max(map(len, ids)) == 10


@case("B66-bin-edges", "edges that fall, repeat, are negative, NaN, infinite, missing or words", "refused")
def _(b: Bench) -> None:
    path = b.write()
    for edges in ("2 1", "1 1", "-1 1", "nan", "inf", "x", "0 1"):
        b.not_prepared(path, flags=("--bin_edges", *edges.split()), match="bin_edges")


@case("B67-edges-file", "a file of edges with genes missing, the wrong form or no JSON", "refused")
def _(b: Bench) -> None:
    path = b.write()
    for content in (b"{", b'{"CD1": [1, 2]}', b'"x"', b"[]", b'{"CD1": "x"}', b"[2, 1]"):
        edges = b.file("edges.json", content)
        b.not_prepared(path, flags=("--bin_edges_path", edges), match="edges")


@case("B68-other-vocabulary", "weights and a tokenizer that do not belong together", "refused by fingerprint")
def _(b: Bench) -> None:
    mixed = b.folder / "mixed"
    shutil.copytree(b.run, mixed)
    text = json.loads((mixed / "tokenizer.json").read_text())
    text["genes"] = text["genes"][::-1]
    (mixed / "tokenizer.json").write_text(json.dumps(text))
    out = str(b.folder / "out.h5ad")
    b.refused("predict", str(mixed), b.write(), "--output", out, match="tokenizer|fingerprint")


@case("B69-other-weights", "a run with part of its weights, or of another architecture", "refused")
def _(b: Bench) -> None:
    from safetensors.torch import load_file, save_file

    part = b.folder / "part"
    shutil.copytree(b.run, part)
    weights = load_file(part / "model.safetensors")
    save_file(dict(list(weights.items())[:3]), part / "model.safetensors", metadata={"format": "pt"})
    out = str(b.folder / "out.h5ad")
    b.refused("predict", str(part), b.write(), "--output", out, match="weight|model")
    (part / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    b.refused("predict", str(part), b.write(), "--output", out, match="bert|genebert|run")


@case("B70-output", "an output that exists, is read-only, a folder or below a file", "refused before any work")
def _(b: Bench) -> None:
    path, taken = b.write(), b.file("taken.h5ad", b"mine")
    (b.folder / "folder.h5ad").mkdir()
    for out in (taken, str(b.folder / "folder.h5ad"), taken + "/below.h5ad"):
        b.refused("predict", b.run, path, "--output", out, match="taken|folder|exist")
    assert Path(taken).read_bytes() == b"mine"


# -- security -----------------------------------------------------------------------------------------------------


@case("S1-pickle", "pickled content", "never read: no module of ours calls pickle, eval, a shell or remote code")
def _(b: Bench) -> None:
    forbidden = re.compile(r"import pickle|weights_only=False|allow_pickle=True|trust_remote_code=True|yaml\.load\(|"
                           r"shell=True|\beval\(|\bexec\(")  # fmt: skip
    package = Path(pg.__file__).parent
    found = [path.name for path in package.rglob("*.py") if forbidden.search(path.read_text().replace(".eval(", ""))]
    assert found == []
    b.not_predicted(b.file("in.pkl", b"\x80\x04K\x01."), match="(?i)pickle|pkl|not")


class _RunsCode:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@case("S2-optimizer-code", "code in optimizer.pt of a whole checkpoint", "refused, and not run")
def _(b: Bench) -> None:
    out = b.folder / "r"
    words = ["mlm", "--corpus", b.corpus, "--output_dir", str(out), *TRAINING, "--save_steps", "1"]
    assert b.call(*words)[0] == 0
    checkpoint = out / "checkpoint-1"
    torch.save(_RunsCode(b.folder / "code_ran"), checkpoint / "optimizer.pt")
    facts = {key: fact for key, fact in manifest_of(checkpoint).items() if key not in ("version", "files")}
    seal(checkpoint, **facts)
    code, said = b.call(*words, "--max_steps", "2", "--resume_from_checkpoint", "--allow_changed")
    assert code == 2 and "holds more than numbers" in said and "Traceback" not in said
    assert not (b.folder / "code_ran").exists()


@case("S3-yaml", "YAML that calls Python", "refused")
def _(b: Bench) -> None:
    config = b.file("c.yaml", b"output_dir: !!python/object/apply:os.system ['true']\n")
    b.refused("mlm", "--config", config, match="yaml|YAML|c.yaml")


@case("S4-auto-map", "a run that asks for code of its own (auto_map)", "read by our code; its code is not run")
def _(b: Bench) -> None:
    own = b.folder / "own"
    shutil.copytree(b.run, own)
    config = json.loads((own / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")
    (own / "config.json").write_text(json.dumps({**config, "auto_map": dict.fromkeys(names, "evil.Evil")}))
    (own / "evil.py").write_text(f"import os; os.mkdir({str(b.folder / 'code_ran')!r})")
    words = ["predict", str(own), b.write(), "--output", str(b.folder / "out.h5ad"), "--ask", "cell_type"]
    assert b.call(*words)[0] == 0
    assert not (b.folder / "code_ran").exists()


@case("S3-yaml-bomb", "YAML of few bytes that stands for a billion words, or lists in lists without end", "refused")
def _(b: Bench) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    b.refused("mlm", "--config", b.file("bomb.yaml", "\n".join(lines).encode()), match=r"refers to \*a0")
    b.refused("mlm", "--config", b.file("deep.yaml", b"seed: " + b"[" * 600), match="not plain YAML")


def _linked(b: Bench) -> list[Callable[[h5py.Group], Any]]:
    """Return ways to reach the matrix `data` of another HDF5 file from a group."""
    other = b.folder / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["data"] = b.cells.X.toarray()
        start = file["data"].id.get_offset()

    def link(group: h5py.Group) -> None:
        group["data"] = h5py.ExternalLink(str(other), "data")

    def storage(group: h5py.Group) -> None:
        group.create_dataset("data", (24, 40), "f4", external=[(str(other), start, 24 * 40 * 4)])

    def virtual(group: h5py.Group) -> None:
        layout = h5py.VirtualLayout((24, 40), "f4")
        layout[:] = h5py.VirtualSource(str(other), "data", (24, 40))
        group.create_virtual_dataset("data", layout)

    return [link, storage, virtual]


@case("S5-links", "an external link, virtual data set or external storage anywhere in an h5ad file", "refused by every "
      "verb")  # fmt: skip
def _(b: Bench) -> None:
    for number, add in enumerate(_linked(b)):
        path = b.write(name=f"linked{number}.h5ad")
        with h5py.File(path, "r+") as file:
            add(file.create_group("uns/elsewhere"))
        b.not_predicted(path, match="links|in another file")
    b.not_prepared(path, match="in another file")
    out, run = str(b.folder / "out.h5ad"), str(b.folder / "r")
    b.refused("check", path, match="in another file")
    b.refused("embed", b.run, path, "--output", out, match="in another file")
    b.refused("perturb", b.run, path, "--output", f"{out}.csv", "--genes", "CD1", match="in another file")
    b.refused("attribute", b.run, path, "--output", f"{out}.csv", "--ask", "cell_type", match="in another file")
    b.refused("evaluate", b.run, "--eval_data_paths", path, match="in another file")
    b.refused("mlm", "--train_data_paths", path, "--pretrained_model_path", b.run, "--no_bf16", "--output_dir", run,
              match="in another file")  # fmt: skip


@case("S5-links-10x", "the same in a 10x file", "refused")
def _(b: Bench) -> None:
    for number, add in enumerate(_linked(b)):
        path = b.folder / f"linked{number}.h5"
        with h5py.File(path, "w") as file:
            for name in ("barcodes", "indices", "indptr"):
                file[f"matrix/{name}"] = [0]
            add(file["matrix"])
        b.refused("check", str(path), match="links 'matrix/data' to another place|keeps matrix/data in another file")


@case("S5-loop", "a group that holds itself", "refused")
def _(b: Bench) -> None:
    b.not_predicted(b.edit(lambda file: file["uns"].__setitem__("loop", file["/"])), match="in two places")


@case("S5-zarr", "a zarr store with a symbolic link out of it, one address behind another, a list of references",
      "refused; links within a store are followed")  # fmt: skip
def _(b: Bench) -> None:
    store = b.folder / "in.zarr"
    b.cells.write_zarr(store)
    inside = next(path for path in sorted((store / "var").rglob("*")) if path.is_file())
    inside.rename(store / "moved")
    inside.symlink_to(store / "moved")
    os.symlink(store, b.folder / "same.zarr")
    assert b.predicted(str(b.folder / "same.zarr"))[0].n_obs == 24
    (store / "moved").rename(b.folder / "secret")
    inside.unlink()
    inside.symlink_to(b.folder / "secret")
    b.not_predicted(str(store), match=f"keeps {inside.relative_to(store)} in another place")
    b.not_predicted("reference://a.zarr", match="reference:// is none of")
    b.not_predicted(f"https://host/a::file://{store}", match=r"leads from one address to another \(::\)")


@case("S5-corpus", "a corpus whose manifest names shards outside of its folder", "refused")
def _(b: Bench) -> None:
    own = Path(shutil.copytree(b.corpus, b.folder / "own"))
    manifest = json.loads((own / "manifest.json").read_text())
    for file in ("/etc/cells.h5ad", "train/../../cells.h5ad"):
        manifest["shards"]["train"][0]["file"] = file
        (own / "manifest.json").write_text(json.dumps(manifest))
        words = ["mlm", "--corpus", str(own), "--output_dir", str(b.folder / "r"), *TRAINING]
        b.refused(*words, match=f"outside of its folder: '{file}'")


@case("S6-giant", "a small file that claims a dense matrix of terabytes", "refused before memory is taken")
def _(b: Bench) -> None:
    def change(file: h5py.File) -> None:
        del file["X"]
        made = file.create_dataset("X", shape=(24, 40), maxshape=(None, None), chunks=(1024, 1024), dtype="f4")
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        made.resize((10**7, 6 * 10**6))

    b.not_predicted(b.edit(change), match="X claims 240,000 GB, but the file holds next to nothing")


@pytest.fixture
def _no_giant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail in place of reading gigabytes."""
    read = h5py.Dataset.__getitem__

    def small(array: Any, *args: Any, **options: Any) -> Any:
        assert array.size < 10**8, f"{array.name} is read"
        return read(array, *args, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", small)


@case("S6-giant-arrays", "a small file that claims sparse arrays, labels or names of gigabytes", "refused before "
      "memory is taken")  # fmt: skip
def _(b: Bench) -> None:
    def claim(file: h5py.File, name: str) -> None:
        attributes, dtype = dict(file[name].attrs), file[name].dtype
        del file[name]
        file.create_dataset(name, (2 * 10**9,), dtype, chunks=(2**16,)).attrs.update(attributes)

    for name in ("X/data", "X/indices", "X/indptr", "obs/cell_type/codes", "obs/_index", "var/gene_ids"):
        path = b.edit(lambda file, name=name: claim(file, name))  # type: ignore[misc]
        b.not_predicted(path, match=f"{name.split('/')[0]}.* claims [0-9]+ GB, but the file holds next to nothing")


@case("S6-giant-10x", "a 10x file, or a `matrix.mtx`, that claims gigabytes", "refused before memory is taken")
def _(b: Bench) -> None:
    with h5py.File(b.folder / "in.h5", "w") as file:
        for name in ("barcodes", "indices", "indptr"):
            file[f"matrix/{name}"] = [0]
        file.create_dataset("matrix/data", (10**10,), "i4", chunks=(2**16,))
    b.refused("check", str(b.folder / "in.h5"), match="matrix/data claims 40 GB")
    folder = b.folder / "mtx"
    folder.mkdir()
    (folder / "barcodes.tsv").write_text("a\nb\n")
    (folder / "features.tsv").write_text("ENSG00000000011\tA\tGene Expression\n")
    for head, words in {"1 900000000000 1": "has 1 x 900,000,000,000 values of 1 genes and 2 cells",
                        "1 2 900000000000": "claims 900,000,000,000 values, but is too short"}.items():  # fmt: skip
        (folder / "matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate integer general\n%\n{head}\n1 1 1\n")
        b.refused("check", str(folder), match=words)


@case("S6-giant-model", "a run whose config.json describes a model of a billion layers, or of terabytes", "refused "
      "before memory is taken")  # fmt: skip
def _(b: Bench) -> None:
    own = Path(shutil.copytree(b.run, b.folder / "own"))
    config = json.loads((own / "config.json").read_text())
    for name, number in {"num_hidden_layers": 10**9, "hidden_size": 10**7, "type_vocab_size": 10**12}.items():
        (own / "config.json").write_text(json.dumps({**config, name: number}))
        b.refused("predict", str(own), b.write(), "--output", str(b.folder / "out.h5ad"), match="describes a model of")
    words = ["mlm", "--corpus", b.corpus, "--pretrained_model_path", str(own), "--output_dir", str(b.folder / "r")]
    b.refused(*words, "--no_bf16", "--report_to", "none", match="describes a model of at least .* but its weights have")


@case("S6-deep-json", "a tokenizer, manifest or vocabulary of a million brackets", "refused")
def _(b: Bench) -> None:
    own = Path(shutil.copytree(b.corpus, b.folder / "own"))
    words = ["mlm", "--corpus", str(own), "--output_dir", str(b.folder / "r"), *TRAINING]
    for name in ("tokenizer.json", "manifest.json"):
        (own / name).write_text("[" * 10**6)
        b.refused(*words, match="nested too deeply")
    words[2] = b.corpus
    b.refused(*words, "--vocab_path", str(own / name), match="nested too deeply")


no_case("S7-archives", "members of archives with `../`", "no archive is ever unpacked")
CASES.append(Case("S8-report", "labels with HTML in a report", "escaped; the page's policy runs no other script", None,
                  test="tests/reports/test_page.py::test_labels_stay_text"))  # fmt: skip


@case("S9-safetensors", "weights with a header of a gigabyte, or with tensors beyond the file", "refused")
def _(b: Bench) -> None:
    run = b.folder / "run"
    shutil.copytree(b.run, run)
    beyond = b'{"x":{"dtype":"F32","shape":[999999999,9],"data_offsets":[0,35999999964]}}'
    for content in ((2**30).to_bytes(8, "little") + b"{}", len(beyond).to_bytes(8, "little") + beyond + b"1234"):
        (run / "model.safetensors").write_bytes(content + bytes(10**5))
        b.refused("predict", str(run), b.write(), "--output", str(b.folder / "out.h5ad"), match="deserializing")


@case("S10-urls", "http redirects to files, passwords in URLs", "refused; passwords are hidden in every message")
def _(b: Bench) -> None:
    with serving() as web:
        url = f"{web.url}/moved_to_disk/a.h5ad".replace("://", "://me:hunter2@")
        b.not_predicted(url, match="redirects to file://")
    assert "hunter2" not in b.caplog.text


@case("S10-records", "a password and a token in the URL of cells", "in no settings, records, reports or logs")
def _(b: Bench) -> None:
    content = Path(b.write()).read_bytes()
    with serving(content=content) as web, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(b.folder / "cache"))
        url = f"{web.url}/good/cells.h5ad?token=hunter2".replace("://", "://me:hunter3@")
        said = b.prepared(url, flags=("--num_processes", "1"))
        run = ["mlm", "--train_data_paths", url, "--pretrained_model_path", b.run, "--output_dir", str(b.folder / "r")]
        few = "--max_steps 1 --no_bf16 --report_to none --eval_strategy no --per_device_train_batch_size 8"
        code, more = b.call(*run, *few.split())
        assert code == 0, more
        _, last = b.predicted(url)
    files = [path for path in b.folder.rglob("*") if path.is_file()]
    assert {"manifest.json", "run.yaml", "README.md", "out.h5ad"} <= {path.name for path in files}
    assert "cells.h5ad" in more and "hunter" not in said + more + last
    assert not [path for path in files if b"hunter" in path.read_bytes()]


@case("S11-tokens", "access tokens in the environment", "in no settings, records or logs of a run")
def _(b: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "hunter2")
        code, said = b.call("mlm", "--corpus", b.corpus, "--output_dir", str(b.folder / "r"), *TRAINING)
    assert code == 0 and "hunter2" not in said
    files = [path for path in b.folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"hunter2" in path.read_bytes()]


@case("S12-permissions", "weights that only their owner can read", "the umask decides, so that a group can share them")
def _(b: Bench) -> None:
    before = os.umask(0o027)
    try:
        assert b.call("mlm", "--corpus", b.corpus, "--output_dir", str(b.folder / "r"), *TRAINING)[0] == 0
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (b.folder / "r").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"] == "0o640"


@pytest.mark.parametrize("case", [case for case in CASES if case.check], ids=lambda case: case.id)
@pytest.mark.usefixtures("_no_giant")
def test_bad_inputs(case: Case, bench: Bench) -> None:
    assert case.check
    case.check(bench)
