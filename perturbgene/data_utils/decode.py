"""Spans of one-dimensional HDF5 data sets, read as fast as their storage allows.

Owns three ways to the same numbers: a memory map of contiguous data, own decompression of gzip chunks (ISA-L, about
twice the speed of zlib, outside the interpreter lock), and h5py for all else. Opens nothing itself. Letters: l values.
"""

import importlib
import zlib
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np


def _inflater() -> Any:
    """Return ISA-L's module where it is installed (extra `fast`), else zlib: the same bytes, more slowly."""
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


_INFLATER = _inflater()

_GZIP_FILTER, _SHUFFLE_FILTER = 1, 2


@dataclass(frozen=True)
class Storage:
    """How a data set lies in its file.

    Args:
        kind: "contiguous", "gzip" or "other".
        is_shuffled: True when bytes were regrouped by significance before gzip.
    """

    kind: str
    is_shuffled: bool = False

    @classmethod
    def of(cls, dataset: Any) -> "Storage":
        """Look at a data set's creation properties; what is not understood is "other"."""
        properties = dataset.id.get_create_plist()
        codes = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
        is_plain = dataset.ndim == 1 and dataset.dtype.isnative and dataset.dtype.kind in "iuf"
        if not is_plain or dataset.is_virtual or dataset.external:
            return cls("other")
        if dataset.chunks is None:
            return cls("contiguous" if dataset.id.get_offset() is not None else "other")
        if codes in ([_GZIP_FILTER], [_SHUFFLE_FILTER, _GZIP_FILTER]):
            return cls("gzip", is_shuffled=_SHUFFLE_FILTER in codes)
        return cls("other")


@numba.njit(nogil=True, cache=True)
def copy_spans(
    bytes_l: np.ndarray, starts_m: np.ndarray, stops_m: np.ndarray, out: np.ndarray
) -> None:  # pragma: no cover
    """Copy spans of bytes behind each other."""
    at = 0
    for m in range(len(starts_m)):
        length = stops_m[m] - starts_m[m]
        out[at : at + length] = bytes_l[starts_m[m] : stops_m[m]]
        at += length


class SpanReader:
    """Reads spans of one data set.

    Args:
        dataset: An open one-dimensional `h5py.Dataset`.
        path: Its file on this machine, for memory maps; None when it is read from elsewhere.
    """

    def __init__(self, dataset: Any, *, path: str | None) -> None:
        self.dataset, self.storage = dataset, Storage.of(dataset)
        self._is_remote = path is None
        self._map: np.ndarray | None = None
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=dataset.dtype))
        if self.storage.kind == "contiguous" and path is not None and len(dataset):
            offset = dataset.id.get_offset()
            self._map = np.asarray(np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape))

    @property
    def is_mapped(self) -> bool:
        """True when any span costs the same, whatever lies between."""
        return self._map is not None

    def gather(self, starts_m: np.ndarray, stops_m: np.ndarray) -> np.ndarray:
        """Return the values of several spans behind each other, shape (l,), of mapped data."""
        assert self._map is not None
        values = np.empty(int((stops_m - starts_m).sum()), dtype=self.dataset.dtype)
        size = values.itemsize
        copy_spans(self._map.view(np.uint8), starts_m * size, stops_m * size, values.view(np.uint8))
        return values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return values start..stop-1, shape (l,).

        Raises:
            OSError: A chunk is damaged.
        """
        if stop <= start:
            return np.empty(0, dtype=self.dataset.dtype)
        if self._map is not None:
            return np.asarray(self._map[start:stop])
        if self.storage.kind == "gzip" and not self._is_remote:
            return self._read_chunks(start, stop)
        return np.asarray(self.dataset[start:stop])

    def _read_chunks(self, start: int, stop: int) -> np.ndarray:
        (length,) = self.dataset.chunks
        values = np.empty(stop - start, dtype=self.dataset.dtype)
        for first in range(start - start % length, stop, length):
            chunk = self._chunk(first)
            low, high = max(start, first), min(stop, first + length)
            values[low - start : high - start] = chunk[low - first : high - first]
        return values

    def _chunk(self, first: int) -> np.ndarray:
        """Return one decompressed chunk; the last one is kept, because neighbouring spans share it."""
        known, chunk = self._last  # read at once: several threads may share a reader
        if known != first:
            chunk = self._inflate(first)
            self._last = (first, chunk)
        return chunk

    def _inflate(self, first: int) -> np.ndarray:
        (length,) = self.dataset.chunks
        try:
            mask, raw = self.dataset.id.read_direct_chunk((first,))
        except (ValueError, RuntimeError):  # a chunk that was never written holds the fill value
            return np.asarray(self.dataset[first : first + length])
        if mask:  # a filter was left out for this chunk
            return np.asarray(self.dataset[first : first + length])
        try:
            plain = _INFLATER.decompress(raw, bufsize=length * self.dataset.dtype.itemsize)
        except (zlib.error, _INFLATER.error) as error:
            raise OSError(f"chunk at value {first} of {self.dataset.name}: {error}") from error
        if len(plain) != length * self.dataset.dtype.itemsize:
            raise OSError(f"chunk at value {first} of {self.dataset.name} holds {len(plain)} bytes")
        if self.storage.is_shuffled:
            size = self.dataset.dtype.itemsize
            plain = np.frombuffer(plain, dtype=np.uint8).reshape(size, length).T.tobytes()
        return np.frombuffer(plain, dtype=self.dataset.dtype)
