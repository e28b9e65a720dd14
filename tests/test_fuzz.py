"""Damaged files are refused in one line, or read whole: few mutants of each form here, hundreds with `make fuzz`.

Mutant 17 of "h5ad csr" alone: `python -m tests.fuzz "h5ad csr" 17`. Below are the kinds of damage that mutants found.
"""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils import h5ad_writing, readable
from perturbgene.data_utils.guard import check_heap, guarded
from perturbgene.data_utils.h5ad_writing import write_copy
from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.files import read_json
from perturbgene.main import main
from perturbgene.model import GeneBertConfig
from tests.forked import needs_fork, start
from tests.fuzz import FORMS, TEXTS, Outcome, Shop, cells, run_mutant
from tests.nine_genes import a_tokenizer

#: Mutants of each form of cells, and of each text file.
NUM_MUTANTS = {**dict.fromkeys(FORMS, 84), **dict.fromkeys(TEXTS, 29)}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    yield Shop.open(tmp_path_factory.mktemp("fuzz"), for_many=False)


@pytest.fixture(scope="module")
def large_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    yield Shop.open(tmp_path_factory.mktemp("fuzz"))


@needs_fork
@pytest.mark.parametrize("form", NUM_MUTANTS)
def test_a_mutant_is_refused_in_one_line_or_read_whole(shop: Shop, form: str, tmp_path: Path) -> None:
    command = "report" if form == "manifest.json" else "predict"
    outcome = run_mutant(shop, form, 3, tmp_path / "mutant", only=[command])
    assert not outcome.complaints, (outcome.what, outcome.complaints, outcome.said)
    assert outcome.codes


@needs_fork
@pytest.mark.fuzz
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("form", NUM_MUTANTS)
def test_mutants_are_refused_in_one_line_or_read_whole(large_shop: Shop, form: str, tmp_path: Path) -> None:
    outcomes = [run_mutant(large_shop, form, number, tmp_path / "mutant") for number in range(NUM_MUTANTS[form])]
    assert not {f"{one.form} {one.number}": (one.what, one.complaints) for one in outcomes if one.complaints}


def test_a_mutant_on_which_a_command_hangs_is_not_counted_as_read() -> None:
    outcome = Outcome("h5ad csr", 15, "zeros", codes={}, complaints=["check: hangs"], seconds=60.0)
    assert not outcome.is_read


# -- where HDF5 would not come back -------------------------------------------------------------------------------


def heaps_of(content: bytes) -> list[int]:
    """Return where the global heaps of a file begin."""
    places, place = [], content.find(b"GCOL\x01\0\0\0")
    while place >= 0:
        places.append(place)
        place = content.find(b"GCOL\x01\0\0\0", place + 1)
    return places


def told_in_child(run: Callable[[], object], said: Path) -> tuple[int | None, str]:
    """Run a function in a process of its own with ten seconds of a core; return its exit code and what it printed."""

    def limited() -> None:
        used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + 10, used + 15))
        sys.exit(run())  # type: ignore[arg-type]

    process = start(limited, output=said)
    process.join(timeout=200)
    process.kill()
    process.join()
    return process.exitcode, said.read_text()


def some_names(path: Path) -> None:
    """Write cells whose names fill heaps of their own."""
    names = pd.DataFrame(index=[f"a cell with a rather long name {number}" for number in range(300)])
    ad.AnnData(np.ones((300, 2), dtype=np.float32), obs=names).write_h5ad(path)


def first_attributes(content: bytearray) -> None:
    content[heaps_of(content)[0] + 16 : heaps_of(content)[0] + 32] = bytes(16)


def last_names(content: bytearray) -> None:
    content[heaps_of(content)[-1] + 16 : heaps_of(content)[-1] + 32] = bytes(16)


def an_endless_text(content: bytearray) -> None:
    place = heaps_of(content)[0] + 16
    content[place + 8 : place + 16] = (2**64 - 16).to_bytes(8, "little")


def types_of_texts(content: bytearray) -> None:
    place = -1
    while (place := content.find(b"\x19\x01\x01\0\x10\0\0\0", place + 1)) >= 0:
        content[place + 1] = 3


@needs_fork
@pytest.mark.parametrize("damage", [first_attributes, last_names, an_endless_text, types_of_texts])
def test_texts_that_hdf5_would_read_for_ever_or_crash_on_are_refused(
    tmp_path: Path, damage: Callable[[bytearray], None]
) -> None:
    path = tmp_path / "in.h5ad"
    some_names(path)
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)

    def run() -> int:
        try:
            open_source(path).to_adata()
        except InputError as error:
            print(error)
            return main(["check", str(path)])
        return 1

    code, said = told_in_child(run, tmp_path / "said")
    assert (code, said.count("error: ")) == (2, 1), said
    assert said.count(f"{path}") >= 2
    assert "Traceback" not in said


@needs_fork
@pytest.mark.parametrize("name", ["in.h5ad", "in.h5"])
def test_a_text_that_claims_more_than_the_file_has_fills_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with h5py.File(path, "w") as file:
        for array in ("barcodes", "data", "indices", "indptr", "shape", "features/id"):
            file[f"matrix/{array}"] = np.array(["a", "b"], dtype=object)
        place = file["matrix/features/id"].id.get_offset()
    if name == "in.h5ad":
        some_names(path)
        with h5py.File(path) as file:
            place = file["obs/_index"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place + 16 : place + 20] = b"\xff" * 4  # the second text
    path.write_bytes(content)

    def run() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = main(["check", str(path)])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
        return code

    code, said = told_in_child(run, tmp_path / "said")
    assert code == 2, said
    assert "claims 4,294,967,295 bytes, but the file has" in said


@needs_fork
def test_a_10x_file_that_hdf5_would_read_for_ever_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        for name in ("barcodes", "data", "indices", "indptr", "shape", "features/id"):
            file[f"matrix/{name}"] = np.array(["a", "b"], dtype=object)
    content = bytearray(path.read_bytes())
    last_names(content)
    path.write_bytes(content)
    code, said = told_in_child(lambda: main(["check", str(path)]), tmp_path / "said")
    assert (code, said.count("error: ")) == (2, 1), said
    assert "texts were overwritten" in said


def test_texts_of_any_kind_are_read_as_without_a_guard(tmp_path: Path) -> None:
    path = tmp_path / "texts.h5"
    texts = ["", "GCOL\x01", "x" * 100_000, *(str(number) * (number % 40) for number in range(5000))]
    lists = [np.zeros(number % 50, dtype=np.uint64) for number in range(1000)]  # full of what looks like free space
    with h5py.File(path, "w") as file:
        file["texts"] = np.array(texts, dtype=object)
        file.create_dataset("lists", (len(lists),), dtype=h5py.vlen_dtype(np.uint64))[:] = lists
        for number in range(100):
            file.attrs[f"a{number}"] = "y" * number
        for number in range(0, 100, 3):  # leaves holes
            del file.attrs[f"a{number}"]
    assert len(heaps_of(path.read_bytes())) > 10
    with h5py.File(path) as plain, guarded(plain) as file:
        assert dict(file.attrs) == dict(plain.attrs)
        assert file["texts"].asstr()[:].tolist() == texts
        assert [len(one) for one in file["lists"]] == [len(one) for one in lists]


def test_a_heap_ends_where_its_objects_lead() -> None:
    def an_object(index: int, size: int) -> bytes:
        return index.to_bytes(2, "little") + bytes(6) + size.to_bytes(8, "little")

    head = b"GCOL\x01\0\0\0" + (72).to_bytes(8, "little")
    check_heap(head + an_object(1, 5) + b"12345\0\0\0" + an_object(0, 32) + bytes(16))
    check_heap(head + an_object(1, 32) + an_object(0, 0) + bytes(16) + bytes(8))  # a text that looks like free space
    for index, size in [(0, 0), (2, 2**64 - 16), (2, 2**64 - 23)]:
        with pytest.raises(ValueError, match="texts were overwritten"):
            check_heap(head + an_object(1, 5) + b"12345\0\0\0" + an_object(index, size) + bytes(16))


# -- what check says ----------------------------------------------------------------------------------------------


def test_half_a_character_from_a_damaged_store_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.zarr"
    FORMS["zarr 2"][1](cells(), path)
    array = json.loads((path / "X/data/.zarray").read_text())
    (path / "X/data/.zarray").write_text(json.dumps({**array, "shape": "\ud800"}))
    (path / ".zmetadata").unlink(missing_ok=True)
    assert main(["check", str(path)]) == 2
    assert r"\ud800" in capsys.readouterr().out


def test_check_refuses_a_column_twice_in_a_row_as_prepare_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.h5ad"
    FORMS["h5ad csr"][1](cells(), path)
    with h5py.File(path, "r+") as file:
        row = int(np.argmax(np.diff(file["X/indptr"][:])))
        first = int(file["X/indptr"][row])
        file["X/indices"][first + 1] = file["X/indices"][first]
    for words in (["check", str(path)], ["prepare", str(path), "--output", str(tmp_path / "corpus")]):
        assert main([*words, "--phenotypes", "cell_type", "--split_by", "donor"]) == 2
        assert f"row {row} has a second value in column" in capsys.readouterr().err


# -- what a copy would hold ---------------------------------------------------------------------------------------


def _cut(file: h5py.File, name: str) -> None:
    values = file[name][:-1]
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        pytest.param(lambda file: _cut(file, "obs/_index"), "obs", id="too few names"),
        pytest.param(lambda file: _cut(file, "obs/score"), "obs", id="a column that is too short"),
        pytest.param(lambda file: file["obsp/graph"].attrs.update(shape=[3, 3]), "obsp|the file", id="another graph"),
        pytest.param(lambda file: file.move("obsp", "obsq"), "the file", id="a part that anndata does not know"),
        pytest.param(lambda file: file["obs/_index"].attrs.pop("encoding-type"), "obs", id="a lost attribute"),
    ],
)  # fmt: skip
def test_what_anndata_could_not_read_in_a_copy_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h5ad_writing, "is_url", lambda source: True)  # what was fetched is looked at in the copy
    path = tmp_path / "in.h5ad"
    cells().write_h5ad(path)
    check_readable(path)
    with h5py.File(path, "r+") as file:
        change(file)
    for read in (check_readable, lambda path: write_copy(str(path), tmp_path / "out.h5ad", uns={})):
        with pytest.raises(InputError, match=f"in.h5ad: ({where}).* cannot be read"):
            read(path)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_large_arrays_are_read_in_pieces(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end, write = FORMS[form]
    path = tmp_path / f"in{end}"
    write(cells(), path)
    monkeypatch.setattr(readable, "_PIECE_BYTES", 1)
    check_readable(path)


def test_a_damaged_piece_of_a_large_array_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.h5ad"
    FORMS["h5ad gzip"][1](cells(), path)
    monkeypatch.setattr(readable, "_PIECE_BYTES", 1)
    for name in ("obsm/X_pca", "layers/counts/data", "obs/score"):
        with h5py.File(path) as file:
            chunk = file[name].id.get_chunk_info(0)
        content = bytearray(path.read_bytes())
        content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
        damaged = tmp_path / "damaged.h5ad"
        damaged.write_bytes(content)
        with pytest.raises(InputError, match=f"damaged.h5ad: {name.removesuffix('/data')} cannot be read"):
            check_readable(damaged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zarr 2", "zarr 3"])
def test_damage_that_only_a_copy_would_meet_is_found_behind_consolidated_metadata(tmp_path: Path, form: str) -> None:
    path = tmp_path / "in.zarr"
    FORMS[form][1](cells(), path)
    (path / "obsm/X_pca" / {"zarr 2": ".zarray", "zarr 3": "zarr.json"}[form]).write_text("{")
    with pytest.raises(InputError, match=r"in\.zarr"):
        check_readable(path)


# -- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '["\\ud800"]', "{", '"\xff"'], ids=str.__len__)
def test_damaged_json_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("genes", [1]), ("genes", None), ("max_length", 10**400), ("max_length", True), ("included_phenotypes", 0.5),
     ("phenotypes", {"tissue": 1}), ("bin_edges", [None]), ("normalization", [])],
)  # fmt: skip
def test_a_tokenizer_with_a_value_of_another_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"tokenizer.json is damaged: tokenizer.'{key}'"):
        GeneTokenizer.from_dict({**a_tokenizer().to_dict(), key: value}, source="tokenizer.json")


@pytest.mark.parametrize("key", ["shards", "split", "audit", "inputs", "phenotypes"])
def test_a_manifest_with_a_value_of_another_type_is_refused(shop: Shop, key: str, tmp_path: Path) -> None:
    manifest = json.loads((shop.folder / "corpus/manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, key: 1}))
    with pytest.raises(InputError, match=rf"manifest.json is damaged: manifest\['{key}'\] is not"):
        Corpus.open(tmp_path)


def test_levels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"bin_levels\[1\] is not a number"):
        GeneBertConfig(vocab_size=6, bin_levels=[1.0, "a"])


def test_a_number_too_large_for_any_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"verb: mlm\nabsent_prob: {10**400}\n")
    assert main(["mlm", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "which is too large" in capsys.readouterr().err
