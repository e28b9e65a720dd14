"""Every way of reading a span gives the numbers that h5py gives."""

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from perturbgene.data_utils import decode
from perturbgene.data_utils.decode import SpanReader

LAYOUTS = {
    "contiguous": {},
    "gzip": {"chunks": (100,), "compression": "gzip"},
    "gzip, bytes shuffled": {"chunks": (100,), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (100,), "compression": "lzf"},
    "chunks with checksums": {"chunks": (100,), "fletcher32": True},
}
VALUES = np.random.default_rng(0).integers(0, 50, size=1234)


def write(path: Path, **layout: object) -> h5py.File:
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=VALUES.astype(np.float32), **layout)
    return h5py.File(path, "r")


@pytest.mark.parametrize("span", [(0, 1234), (0, 1), (99, 101), (100, 200), (1200, 1234), (7, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_span_equals_what_h5py_reads(layout: dict[str, object], span: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with write(path, **layout) as file:
        read = SpanReader(file["data"]).read(*span)
        assert read.tolist() == VALUES[slice(*span)].astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("name", "is_contiguous", "is_gzip"), [("contiguous", True, False), ("gzip", False, True), ("lzf", False, False)]
)
def test_the_storage_is_recognized(name: str, is_contiguous: bool, is_gzip: bool, tmp_path: Path) -> None:
    with write(tmp_path / "x.h5", **LAYOUTS[name]) as file:
        reader = SpanReader(file["data"])
        assert (reader.is_contiguous, reader.is_gzip) == (is_contiguous, is_gzip)


def test_zlib_gives_the_same_numbers_where_isa_l_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "inflater", zlib)
    path = tmp_path / "x.h5"
    with write(path, **LAYOUTS["gzip"]) as file:
        assert SpanReader(file["data"]).read(150, 350).tolist() == VALUES[150:350].tolist()


def test_a_damaged_chunk_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with write(path, **LAYOUTS["gzip"]) as file:
        place = file["data"].id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 20] = b"\x00" * 20
    path.write_bytes(content)
    with h5py.File(path, "r") as file, pytest.raises(OSError, match="chunk at value 200"):
        SpanReader(file["data"]).read(200, 210)
