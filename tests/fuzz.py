"""Damaged files, thousands of them: bytes of a file of cells, and JSON and YAML of a run or corpus, changed at random.

Owns making a mutant from its name and number, running commands on it in a process of its own, and judging what came of
them: refused in one line with nothing written, or done with an output that anndata reads whole. `python -m tests.fuzz
"h5ad csr" 17` runs one mutant again and shows all that was printed.
"""

import contextlib
import gc
import importlib
import io
import itertools
import json
import logging
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import yaml
from scipy import sparse

from tests.forked import start
from tests.untrained import a_run, save, save_score, some_cells

NUM_CELLS = 40
#: A mutant whose commands take longer hangs. They take about two seconds of a core; the clock allows for a busy one.
MOST_CORE_SECONDS, MOST_SECONDS = 30, 240

READ = "--device cpu"
ASK = "--ask cell_type --abstain 0.5 --no_report"
#: Command lines on a mutant of a file of cells.
ON_CELLS = {
    "check --run": "check {mutant} --run {run}",
    "check": "check {mutant} --phenotypes cell_type tissue --split_by donor",
    "prepare": "prepare {mutant} --output {out}/corpus --phenotypes cell_type tissue --split_by donor "
    "--num_processes 1 --no_report",
    "predict": f"predict {{run}} {{mutant}} --output {{out}}/out{{end}} {ASK} {READ}",
    "embed": f"embed {{run}} {{mutant}} --output {{out}}/out{{end}} {READ}",
}
#: Command lines on a run one of whose files is a mutant.
ON_RUN = {
    "predict": f"predict {{mutant}} {{cells}} --output {{out}}/out.h5ad {ASK} {READ}",
    "evaluate": "evaluate {mutant} --eval_data_paths {cells} --output {out}/scores --no_calibrate --no_baselines "
    f"--ask cell_type --no_report {READ}",
}
#: Command lines on a corpus one of whose files is a mutant.
ON_CORPUS = {
    "evaluate": f"evaluate {{run}} --corpus {{mutant}} --output {{out}}/scores --no_calibrate --no_baselines "
    f"--ask cell_type --no_report {READ}",
    "report": "report {mutant} --output {out}/page.html",
    "mlm": "mlm --corpus {mutant} --output_dir {out}/run --model_arch tiny --hidden_size 8 --num_hidden_layers 1 "
    "--num_attention_heads 2 --max_steps 1 --per_device_train_batch_size 4 --no_bf16 --report_to none",
}


# -- what is damaged ----------------------------------------------------------------------------------------------


def cells() -> ad.AnnData:
    """Make cells with every kind of element that a file often has."""
    adata, rng = some_cells(NUM_CELLS), np.random.default_rng(0)
    adata.X = adata.X.ceil()  # counts
    adata.obs = adata.obs.assign(
        cell_type=adata.obs["cell_type"].astype("category"),
        n=np.arange(NUM_CELLS),
        score=rng.random(NUM_CELLS),
        age=pd.array([None, 3] * (NUM_CELLS // 2), dtype="Int64"),
        smoker=pd.array([None, True] * (NUM_CELLS // 2), dtype="boolean"),
    )
    adata.obsm["X_pca"] = rng.random((NUM_CELLS, 2)).astype(np.float32)
    adata.obsp["graph"] = sparse.random(NUM_CELLS, NUM_CELLS, 0.05, format="csr", random_state=0)
    adata.layers["counts"] = adata.X.copy()
    adata.uns = {"neighbors": {"params": {"n": 3, "metric": "cosine"}}, "colors": np.array(["#000", "#fff"])}
    return adata


def write_h5ad(adata: ad.AnnData, path: Path, *, matrix: Callable[[Any], Any], compression: Any = None) -> None:
    adata.X = matrix(adata.X)
    adata.write_h5ad(path, compression=compression)


def write_zarr(adata: ad.AnnData, path: Path, *, version: int) -> None:
    with ad.settings.override(zarr_write_format=version), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(path)


#: Files of cells: the name of a form -> its ending, and what writes one.
FORMS: dict[str, tuple[str, Callable[[ad.AnnData, Path], None]]] = {
    "h5ad csr": (".h5ad", partial(write_h5ad, matrix=sparse.csr_matrix)),
    "h5ad gzip": (".h5ad", partial(write_h5ad, matrix=sparse.csr_matrix, compression="gzip")),
    "h5ad csc": (".h5ad", partial(write_h5ad, matrix=sparse.csc_matrix)),
    "h5ad dense": (".h5ad", partial(write_h5ad, matrix=lambda matrix: matrix.toarray())),
    "zarr 2": (".zarr", partial(write_zarr, version=2)),
    "zarr 3": (".zarr", partial(write_zarr, version=3)),
}
#: Files of a run or a corpus, by the folder of `Shop` that has them.
TEXTS = {
    "tokenizer.json": "run", "config.json": "run", "run.yaml": "run", "calibration.json": "run", "metrics.json": "run",
    "sums.json": "summed", "manifest.json": "corpus",
}  # fmt: skip


# -- mutations ----------------------------------------------------------------------------------------------------


def mutated_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage bytes in one of five ways; return them, and what was done in words."""
    data, size = bytearray(content), len(content)
    kind = rng.choice(["flip", "flips", "overwrite", "truncate", "zero", "duplicate"])
    at, length = rng.randrange(max(1, size)), min(size, 2 ** rng.randrange(10))
    stop = min(size, at + length)
    if kind in ("flip", "flips"):
        places = [rng.randrange(size) for _ in range(1 if kind == "flip" else 16)] if size else []
        for place in places:
            data[place] ^= 1 << rng.randrange(8)
        return bytes(data), f"{kind} bits of bytes {places}"
    if kind == "overwrite":
        data[at:stop] = rng.randbytes(stop - at)
    elif kind == "truncate":
        del data[at:]
    elif kind == "zero":
        data[at:stop] = bytes(stop - at)
    else:
        data[at:at] = data[at:stop]
    return bytes(data), f"{kind} bytes {at}..{stop} of {size}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container within a JSON value with every key or index in it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


#: What takes the place of a value.
STRANGERS: dict[str, Any] = {
    "null": None, "true": True, "-1": -1, "0": 0, "2^63": 2**63, "10^400": 10**400, "1e308": 1e308, "0.5": 0.5,
    "NaN": float("nan"), "infinity": float("inf"), "empty text": "", "text": "x", "zero byte": "a\0b", "lone surrogate":
    "\ud800", "long text": "y" * 100_000, "path": "../../etc/passwd", "empty list": [], "empty object": {},
    "nested lists": [[[[1]]]], "list": [1, "a", None], "object": {"a": 1},
}  # fmt: skip


def mutated_json(content: bytes, rng: random.Random, *, is_yaml: bool = False) -> tuple[bytes, str]:
    """Change the structure of a JSON or YAML text; return it, and what was done in words."""
    value = yaml.safe_load(content) if is_yaml else json.loads(content)
    kind = rng.choice(["missing", "stranger", "stranger", "stranger", "extra", "twice", "whole", "deep", "shorter"])
    if kind == "whole":
        name = rng.choice([*STRANGERS])
        return _dumped(STRANGERS[name], is_yaml), f"the whole is {name}"
    # Few of the places are at the top, where most settings are.
    places = list(_places(value)) if rng.random() < 0.5 else [(value, key) for key in value]
    parent, key = rng.choice(places or [({"x": 1}, "x")])
    was = str(key)[:40]
    if kind == "missing":
        del parent[key]
    elif kind == "stranger":
        name = rng.choice([*STRANGERS])
        parent[key], was = STRANGERS[name], f"{was}, now {name}"
    elif kind == "extra":
        parent[key] = {"unknown": parent[key]} if isinstance(parent, list) else parent[key]
        if isinstance(parent, dict):
            parent["unknown"] = 1
    elif kind == "shorter" and isinstance(parent[key], list | str):
        parent[key] = parent[key][: len(parent[key]) // 2]
    elif kind == "deep":
        parent[key] = "DEEP"
        return _dumped(value, is_yaml).replace(b'"DEEP"', b"[" * 100_000 + b"]" * 100_000).replace(
            b"DEEP", b"[" * 5_000 + b"]" * 5_000), f"deep lists at {was}"  # fmt: skip
    elif kind == "twice":
        text = json.dumps({key: rng.choice([*STRANGERS.values()])})[1:-1].encode("utf-8", "surrogatepass")
        end = b"}" if not is_yaml else b"\n"
        whole = _dumped(value, is_yaml).rstrip()
        return (whole.removesuffix(b"}") + (b"," if not is_yaml else b"\n") + text + end), f"{was} twice"
    return _dumped(value, is_yaml), f"{kind} {was}"


def _dumped(value: Any, is_yaml: bool) -> bytes:
    with contextlib.suppress(ValueError, yaml.YAMLError):
        return (yaml.safe_dump(value) if is_yaml else json.dumps(value)).encode("utf-8", "surrogatepass")
    return b"1" + b"0" * 400 if value == 10**400 else repr(value).encode("utf-8", "surrogatepass")


# -- one mutant ---------------------------------------------------------------------------------------------------


@dataclass
class Shop:
    """Whole files that mutants are made of, in one folder, and what the commands make of them."""

    folder: Path
    expected: dict[str, Any] = field(default_factory=dict)  # form -> answers about the whole file

    @classmethod
    def open(cls, folder: Path, *, for_many: bool = True) -> "Shop":
        """Write the files; for many mutants, also import all that the commands import."""
        from perturbgene.configs import MlmConfig
        from perturbgene.files import write_sums
        from perturbgene.inference.calibration import Calibration, Temperature, weights_hash

        shop = cls(folder)
        for form, (_, write) in FORMS.items():
            write(cells(), shop.whole(form))
        save(a_run(), folder / "run")
        out, asked = folder / "made", shop.whole("h5ad csr")
        out.mkdir()
        assert _done(ON_CELLS["prepare"].format(mutant=asked, out=out))
        (out / "corpus").rename(folder / "corpus")
        MlmConfig(output_dir=str(folder / "run"), corpus=str(folder / "corpus")).save(folder / "run/run.yaml")
        save_score(folder / "run", "cell_type", accuracy=0.9)
        entry = Temperature("cell_type", ("cell_type",), (), 1.5, 30, novelty_quantiles=(-2.0, 0.0, 2.0))
        Calibration((entry,), (-3.0, -2.0, -1.0), "donors", weights_hash(folder / "run")).save(folder / "run")
        shutil.copytree(folder / "run", folder / "summed")
        write_sums(folder / "summed", [path for path in (folder / "summed").iterdir() if path.is_file()])
        if for_many:
            _import_what_commands_import(shop)
        gc.collect()
        gc.freeze()
        return shop

    def whole(self, form: str) -> Path:
        """Return a file of a form, or the folder that has a text file."""
        return self.folder / (TEXTS[form] if form in TEXTS else form.replace(" ", "_") + FORMS[form][0])

    def mutant(self, form: str, number: int, into: Path) -> tuple[Path, str]:
        """Write mutant `number` of a form; return its path and what was done to it."""
        rng, whole = random.Random(f"{form} {number}"), self.whole(form)
        target = into / whole.name
        if whole.is_file():
            content, what = mutated_bytes(whole.read_bytes(), rng)
            target.write_bytes(content)
            return target, what
        shutil.copytree(whole, target)
        if form in TEXTS:
            file, is_yaml = target / form, form.endswith("yaml")
            change = mutated_bytes if rng.random() < 0.3 else partial(mutated_json, is_yaml=is_yaml)
        else:
            file, change = rng.choice(sorted(path for path in target.rglob("*") if path.is_file())), mutated_bytes
            if rng.random() < 0.05:
                file.unlink()
                return target, f"{file.relative_to(target)} is gone"
            if "json" in file.name or file.name.startswith(".z"):
                change = mutated_json if rng.random() < 0.5 else mutated_bytes
        content, what = change(file.read_bytes(), rng)
        file.write_bytes(content)
        return target, f"{file.relative_to(target)}: {what}"


def _import_what_commands_import(shop: Shop) -> None:
    """Import it once, before the forks, but do not run the commands: threads of torch do not survive a fork."""
    before, names = set(sys.modules), shop.folder / "names"

    wholes = [(shop.whole("h5ad csr"), ON_CELLS), (shop.folder / "summed", ON_RUN), (shop.folder / "corpus", ON_CORPUS)]

    def run() -> None:
        for mutant, (verb, line) in ((whole, item) for whole, lines in wholes for item in lines.items()):
            out = shop.folder / f"warm_{mutant.name}_{verb}"
            out.mkdir()
            known = {"run": shop.folder / "run", "cells": wholes[0][0], "end": ".h5ad"}
            assert _done(line.format(mutant=mutant, out=out, **known)), line
        names.write_text("\n".join(set(sys.modules) - before))

    process = start(run, output=shop.folder / "said")
    process.join()
    assert process.exitcode == 0, (shop.folder / "said").read_text()
    for name in names.read_text().splitlines():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _done(line: str) -> bool:
    """Run a command line without showing what it prints, unless it fails."""
    from perturbgene.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(line.split())
    print(said.getvalue() if code else "", end="", file=sys.stderr)
    return code == 0


@dataclass(frozen=True)
class Outcome:
    """What came of the commands on one mutant."""

    form: str
    number: int
    what: str  # what was done to the file
    codes: dict[str, int]  # command -> exit code; those that did not end are not there
    complaints: list[str]  # what may not be, empty if all is well
    seconds: float
    said: str = ""

    @property
    def is_read(self) -> bool:
        """True if every command ended, and could use the file."""
        return not self.complaints and not any(self.codes.values())


def run_mutant(shop: Shop, form: str, number: int, folder: Path, *, only: Sequence[str] = ()) -> Outcome:
    """Run the commands on one mutant in a copy of this process, and judge what came of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mutant, what = shop.mutant(form, number, folder)
    lines = ON_CELLS if form in FORMS else ON_CORPUS if TEXTS[form] == "corpus" else ON_RUN
    names = {"mutant": mutant, "run": shop.folder / "run", "cells": shop.whole("h5ad csr"),
             "end": FORMS[form][0] if form in FORMS else ""}  # fmt: skip
    chosen = {verb: line for verb, line in lines.items() if not only or verb in only}
    began = time.monotonic()
    process = start(partial(_in_child, shop, form, chosen, names, folder), output=folder / "said")
    process.join(timeout=MOST_SECONDS)
    hangs = process.is_alive()
    process.kill()
    process.join()
    hangs = hangs or process.exitcode == -signal.SIGXCPU
    results = [json.loads(line) for line in _lines(folder / "results")]
    codes = {one["verb"]: one["code"] for one in results if "code" in one}
    complaints = [f"{one['verb']}: {one['complaint']}" for one in results if "complaint" in one]
    if process.exitcode != 0:
        at = results[-1].get("begins", "?") if results else "?"
        complaints.append(f"{at}: {'hangs' if hangs else f'ends with code {process.exitcode}'}")
    if len({codes[verb] == 0 for verb in ("check", "prepare") if verb in codes}) > 1:
        complaints.append(f"check says {codes['check']}, and prepare {codes['prepare']}")
    if codes.get("check --run") == 0 and form in FORMS and codes.get("predict") not in (0, None):
        complaints.append(f"check --run accepts what predict refuses ({codes['predict']})")
    said = "\n".join(_lines(folder / "said"))
    return Outcome(form, number, what, codes, complaints, time.monotonic() - began, said)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _in_child(shop: Shop, form: str, lines: dict[str, str], names: dict[str, Any], folder: Path) -> None:
    """Run the commands one after the other, and write down which one begins, how it ends and what is wrong with it."""
    import faulthandler

    from perturbgene.main import main

    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, chain=True)  # shows where it hangs
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + MOST_CORE_SECONDS, used + MOST_CORE_SECONDS + 5))
    with (folder / "results").open("w", buffering=1) as results:
        for number, (verb, line) in enumerate(lines.items()):
            out, said = folder / f"out_{number}", folder / f"said_{number}"
            out.mkdir()
            results.write(json.dumps({"begins": verb}) + "\n")
            logging.getLogger().handlers.clear()  # the one of the command before writes to its own stream
            with said.open("w", buffering=1, errors="backslashreplace") as stream, contextlib.redirect_stderr(stream):
                try:
                    code = main(line.format(out=out, **names).split())
                except BaseException:
                    traceback.print_exc()
                    code = 1
            print(f"== {verb} ({code})\n{said.read_text()}")
            results.write(json.dumps({"verb": verb, "code": code}) + "\n")
            results.write(json.dumps({"begins": f"judging {verb}"}) + "\n")
            try:
                complaint = _complaint(shop, form, verb, code, said.read_text(), out, names)
            except Exception as error:  # of anndata, which cannot read the output
                traceback.print_exc()
                complaint = f"its output cannot be read ({type(error).__name__}: {error})"[:300]
            if complaint:
                results.write(json.dumps({"verb": verb, "complaint": complaint}) + "\n")


# -- judging ------------------------------------------------------------------------------------------------------


def _complaint(shop: Shop, form: str, verb: str, code: int, said: str, out: Path, names: dict[str, Any]) -> str | None:
    """Say what is wrong with how a command ended; None if nothing is."""
    if "Traceback" in said or code not in (0, 2, 3):
        return f"exit code {code}, and: {(said.strip().splitlines() or [''])[-1][:300]}"
    if code != 0:
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        if len(told) != 1 or not said.rstrip().splitlines()[-1].startswith("error: "):
            return f"refused with {len(told)} lines of error"
        if len(told[0]) > 2000:
            return f"refused in a line of {len(told[0]):,} characters"
        if left := sorted(str(path.relative_to(out)) for path in out.rglob("*")):
            return f"refused, and left {left[:3]}"
        return None
    if verb == "prepare":
        shards = [*(out / "corpus").rglob("*.h5ad")]
        total = sum(read_whole(shard).n_obs for shard in shards)
        known = total  # where anndata does not read the parts that `prepare` does not read either
        with contextlib.suppress(Exception):
            known = int((read_whole(names["mutant"]).X.sum(axis=1) > 0).sum())
        return None if total == known else f"a corpus of {total} cells, not {known}"
    if verb in ("predict", "embed"):
        written = next(path for path in out.iterdir() if path.suffix in (".h5ad", ".zarr"))
        if [path.name for path in out.iterdir()] != [written.name]:
            return f"left {sorted(path.name for path in out.iterdir())}"
        return _wrong_answers(shop, form, verb, read_whole(written), names)
    return None


def read_whole(path: Path) -> ad.AnnData:
    """Read every element of a file or store, as anndata does."""
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


def _wrong_answers(shop: Shop, form: str, verb: str, written: ad.AnnData, names: dict[str, Any]) -> str | None:
    """Compare the answers in an output with those about the cells as anndata reads them from the mutant."""
    import perturbgene as pg

    if written.n_obs != NUM_CELLS:
        return f"{written.n_obs} rows"
    if form in TEXTS:
        return None
    given = read_whole(names["mutant"])
    given.X = sparse.csr_matrix(given.X)
    run = pg.load_run(names["run"], device="cpu")
    if not (given.obs_names == written.obs_names).all() or not (given.var_names == written.var_names).all():
        return "names are not those of the file"
    if verb == "predict":
        known = pg.predict(given, model=run, ask=["cell_type"])
        same = (known.obs["predicted_cell_type"].astype(str) == written.obs["predicted_cell_type"].astype(str)).all()
        return None if same else "other answers than about the same cells in memory"
    known = pg.embed(given, model=run)
    same = np.allclose(known.obsm["X_perturbgene"], written.obsm["X_perturbgene"], atol=1e-5, equal_nan=True)
    return None if same else "another embedding than of the same cells in memory"


# -- many mutants -------------------------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """`FORM NUMBER` runs one mutant and shows what was printed; `FORM FIRST LAST` runs many and shows complaints."""
    import tempfile

    import perturbgene.main  # noqa: F401  (imports are done once, before the forks)
    from perturbgene.inference import predict  # noqa: F401

    form, numbers = words[0], range(int(words[1]), int(words[-1]) + 1)
    forms = {"all": [*FORMS, *TEXTS], "cells": [*FORMS], "texts": [*TEXTS]}.get(form, [form])
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop.open(Path(folder))
        for number, form in itertools.product(numbers, forms):
            outcome = run_mutant(shop, form, number, Path(folder) / "mutant")
            print(outcome.said if len(numbers) * len(forms) == 1 else "", end="")
            print(f"{form} {number} ({outcome.what}): {outcome.codes} {outcome.seconds:.1f} s", flush=True)
            for complaint in outcome.complaints:
                print(f"  BAD {complaint}", flush=True)
            outcomes.append(outcome)
    num_bad = sum(bool(one.complaints) for one in outcomes)
    num_done = sum(one.is_read for one in outcomes)
    print(f"{len(outcomes)} mutants: {num_done} read by every command, {num_bad} handled badly")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
