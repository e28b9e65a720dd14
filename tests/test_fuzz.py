"""Damaged files are refused in one line, or read whole: few mutants of each form here, hundreds with `make fuzz`.

Mutant 17 of "h5ad csr" alone: `python -m tests.fuzz "h5ad csr" 17`. Below are the kinds of damage that mutants found.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils import h5ad_writing, readable
from perturbgene.data_utils.h5ad_writing import write_copy
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.files import read_json
from perturbgene.main import main
from perturbgene.model import GeneBertConfig
from tests.forked import needs_fork
from tests.fuzz import FORMS, TEXTS, Shop, cells, run_mutant
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
