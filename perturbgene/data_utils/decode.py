"""Spans of stored arrays, read as fast as their storage allows.

Owns the ways to the same numbers: direct reads of contiguous data, its own decompression of gzip chunks (ISA-L: twice
the speed of zlib, and outside the interpreter lock), h5py for other HDF5, and whole chunks of zarr. Letters: l values,
m spans.
"""

import importlib
import os
import weakref
import zlib
from typing import Any

import numpy as np

try:
    inflater: Any = importlib.import_module("isal.isal_zlib")
except ImportError:  # no wheel for this machine: zlib gives the same bytes more slowly
    inflater = zlib

_GZIP_FILTER, _SHUFFLE_FILTER = 1, 2
_MOST_KEPT_BYTES = 1 << 26


class _Descriptor:
    """A descriptor of its own for an open file, since another thread may close that; closed when nobody has it."""

    def __init__(self, file: Any) -> None:
        self.number = os.dup(file.id.get_vfd_handle())
        weakref.finalize(self, os.close, self.number)


class SpanReader:
    """Reads spans of one data set: an open one-dimensional `h5py.Dataset`.

    Contiguous data are read and not mapped: a file that is cut off meanwhile is an error, where a map ends the process.

    Args:
        dataset: What is read.
        beside: A reader of the same file, with which a descriptor is shared.
    """

    def __init__(self, dataset: Any, beside: "SpanReader | None" = None) -> None:
        self.dataset, self.dtype = dataset, dataset.dtype
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=dataset.dtype))
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
        is_plain = dataset.ndim == 1 and dataset.dtype.isnative and dataset.dtype.kind in "iuf"
        is_plain = is_plain and not dataset.is_virtual and not dataset.external
        is_chunked, self.is_shuffled = dataset.chunks is not None, _SHUFFLE_FILTER in filters
        #: True for chunks that are decompressed here.
        self.is_gzip = is_plain and is_chunked and filters in ([_GZIP_FILTER], [_SHUFFLE_FILTER, _GZIP_FILTER])
        offset = dataset.id.get_offset() if is_plain and not is_chunked and hasattr(os, "preadv") else None
        #: True when any span costs the same, whatever is between.
        self.is_contiguous = offset is not None
        if self.is_contiguous:
            self._offset = offset
            self._descriptor: _Descriptor
            if beside is not None and beside.is_contiguous:
                self._descriptor = beside._descriptor
            else:
                self._descriptor = _Descriptor(dataset.file)

    def gather(self, starts_m: np.ndarray, stops_m: np.ndarray) -> np.ndarray:
        """Return the values of several spans one after the other, shape (l,), of contiguous data.

        Raises:
            OSError: The file has become shorter.
        """
        values = np.empty(int((stops_m - starts_m).sum()), dtype=self.dtype)
        out, size, at = values.view(np.uint8).data, values.itemsize, 0
        is_first_m = np.append(True, starts_m[1:] != stops_m[:-1])[: len(starts_m)]  # neighbors are one read
        firsts_r = starts_m[is_first_m] * size + self._offset
        lasts_r = stops_m[np.append(is_first_m[1:], True)[: len(stops_m)]] * size + self._offset
        for first, num_bytes in zip(firsts_r.tolist(), (lasts_r - firsts_r).tolist(), strict=True):
            end = at + num_bytes
            while at < end:
                num_read = os.preadv(self._descriptor.number, [out[at:end]], first)
                if not num_read:
                    raise OSError(f"it ends before byte {first + end - at:,}, and was longer when it was opened")
                at, first = at + num_read, first + num_read
        return values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return values start..stop-1, shape (l,); an OSError means a damaged or shortened file."""
        if stop <= start:
            return np.empty(0, dtype=self.dtype)
        if self.is_contiguous:
            return self.gather(np.array([start]), np.array([stop]))
        if not self.is_gzip:
            return np.asarray(self.dataset[start:stop])
        (length,) = self.dataset.chunks
        values = np.empty(stop - start, dtype=self.dtype)
        for first in range(start - start % length, stop, length):
            known, chunk = self._last  # read at once: several threads may share a reader
            if known != first:  # the last chunk is kept, because neighboring spans share it
                chunk = self._inflate(first)
                self._last = (first, chunk)
            low, high = max(start, first), min(stop, first + length)
            values[low - start : high - start] = chunk[low - first : high - first]
        return values

    def _inflate(self, first: int) -> np.ndarray:
        (length,), size = self.dataset.chunks, self.dtype.itemsize
        try:
            mask, raw = self.dataset.id.read_direct_chunk((first,))
        except (ValueError, RuntimeError):  # a chunk that was never written holds the fill value
            return np.asarray(self.dataset[first : first + length])
        if mask:  # a filter was left out for this chunk
            return np.asarray(self.dataset[first : first + length])
        try:
            plain = inflater.decompress(raw, bufsize=length * size)
        except (zlib.error, inflater.error) as error:
            raise OSError(f"chunk at value {first} of {self.dataset.name}: {error}") from error
        if len(plain) != length * size:
            raise OSError(f"chunk at value {first} of {self.dataset.name} holds {len(plain)} bytes")
        if self.is_shuffled:  # bytes were regrouped by significance before gzip
            plain = np.frombuffer(plain, dtype=np.uint8).reshape(size, length).T.tobytes()
        return np.frombuffer(plain, dtype=self.dtype)


class ChunkReader:
    """Reads spans of the first axis of an array of zarr or HDF5 by whole chunks; keeps the last ones for the next."""

    is_contiguous = False

    def __init__(self, array: Any) -> None:
        self.array = array
        length, row_bytes = (array.chunks or (1,))[0], array.dtype.itemsize * int(np.prod(array.shape[1:]))
        self.length = length if length * row_bytes <= _MOST_KEPT_BYTES else 1
        self._last: tuple[int, np.ndarray] = (0, np.empty((0, *array.shape[1:]), dtype=array.dtype))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return values (or rows) start..stop-1."""
        first, values = self._last  # read at once: several threads may share a reader
        if stop > start and not first <= start < stop <= first + len(values):
            first, last = start - start % self.length, -(-stop // self.length) * self.length
            values = np.asarray(self.array[first : min(last, self.array.shape[0])])
            self._last = (first, values)
        return values[start - first : stop - first]
