"""HDF5 files whose damage cannot make HDF5 read for ever.

Owns a look at every global heap, where HDF5 keeps the texts of attributes and columns, just before HDF5 decodes it;
leaves all other damage to HDF5, which finds it, and to `untrusted`.

HDF5 (up to 2.0 at least) goes through the objects of a heap by adding the size of each to its place. Where bytes were
overwritten by zeros, it stays at an object of size 0, in C and with all locks held: no thread and no signal handler of
Python runs again. So HDF5 reads through a file object of ours, which raises where that loop would stay. Each heap is
read anyway, and a file that HDF5 would read is never refused. A time limit could only end the whole process, also a
user's notebook, and would have to guess how slow a disk may be; a look from another process would read every name in
every file twice.
"""

import io
import struct
from typing import Any

import h5py
import numpy as np

#: What a global heap begins with: signature, version 1 and three bytes that are 0.
_HEAD = b"GCOL\x01\0\0\0"
_HEADER_BYTES = 16  # of a heap and of each object in it, whatever the lengths in a file are made of


class GuardedStream(io.FileIO):
    """A file for `h5py.File` that raises a ValueError where HDF5 would read a heap that has no end.

    Args:
        plain: The same file, opened by its path, which holds the lock on it.
    """

    def __init__(self, plain: h5py.File) -> None:
        super().__init__(plain.filename, "rb")
        self._num_length_bytes = plain.id.get_create_plist().get_sizes()[1]

    def __del__(self) -> None:
        self.close()  # h5py does not

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position on, with zeros beyond the end of the file."""
        view, start, num_read = memoryview(buffer).cast("B"), self.tell(), 0
        while num_read < len(view) and (more := super().readinto(view[num_read:])):  # at most 2 GB at a time
            num_read += more
        view[num_read:] = bytes(len(view) - num_read)
        if view[: len(_HEAD)] == _HEAD:
            size = int.from_bytes(view[8 : 8 + self._num_length_bytes], "little")
            self.seek(start)
            check_heap(self.read(size) if size > len(view) else bytes(view[:size]), self._num_length_bytes)
        return len(view)


def check_heap(heap: bytes, num_length_bytes: int = 8) -> None:
    """Raise a ValueError if a global heap has an object after which HDF5 would find the same object again.

    Example:
        >>> check_heap(b"GCOL" + bytes(44))
        Traceback (most recent call last):
        ...
        ValueError: texts were overwritten
    """
    words = np.frombuffer(heap, dtype="<u8", count=len(heap) // 8)
    most = (1 << 8 * num_length_bytes) - 1
    sizes = words[1:] & np.uint64(most)
    # Wherever it is; most heaps have nothing that looks like such an object.
    if not (((words[:-1] & np.uint64(0xFFFF) == 0) & (sizes == 0)) | (sizes >= np.uint64(2**64 - 23))).any():
        return
    known, place = words.tolist(), _HEADER_BYTES  # a list: a heap has thousands of objects
    while place + _HEADER_BYTES <= len(heap):
        if place % 8:
            first, second = struct.unpack_from("<QQ", heap, place)
        else:
            first, second = known[place // 8], known[place // 8 + 1]
        is_free, size = not first & 0xFFFF, second & most
        step = (size if is_free else _HEADER_BYTES + -(-size // 8) * 8) % 2**64  # as C adds them
        if step == 0:
            raise ValueError("texts were overwritten")
        place += step


def guarded(plain: h5py.File, **options: Any) -> h5py.File:
    """Open once more a file that is open, so that reading from it always ends."""
    return h5py.File(GuardedStream(plain), "r", **options)
