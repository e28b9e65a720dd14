"""One process per run folder: a lock file that says who writes there, and ends with that process.

Owns the lock and telling a stale one from a live one; knows nothing of what is written.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from perturbgene.errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
#: Seconds between signs of life, by which another machine sees that the lock's owner lives.
BEAT_SECONDS = 15.0


def _own_identity() -> dict[str, Any]:
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}


def _is_alive_here(owner: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(int(owner["pid"])).create_time() - float(owner["started"])) < 1
    except (psutil.Error, KeyError, ValueError, TypeError):
        return False


def _beats(lock: Path, *, seconds: float) -> bool:
    """Wait for a sign of life of an owner on another machine; its clock does not matter."""
    try:
        first, end = lock.stat().st_mtime_ns, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 4))
            if lock.stat().st_mtime_ns != first:
                return True
    except FileNotFoundError:  # it was given up meanwhile
        pass
    return False


def _owner(lock: Path) -> dict[str, Any]:
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _check_free(lock: Path, *, beat_seconds: float) -> None:
    owner = _owner(lock)
    if owner.get("host") == socket.gethostname():
        is_alive = _is_alive_here(owner)
    else:
        logger.info("%s is claimed by %s: waiting for a sign of life", lock.parent, owner.get("host", "somebody"))
        is_alive = _beats(lock, seconds=3 * beat_seconds)
    if is_alive:
        raise InputError(
            f"{lock.parent} is being written by process {owner.get('pid')} on {owner.get('host')}: two runs would mix "
            "their checkpoints. Wait for it, end it, or choose another --output_dir."
        )
    logger.warning("%s was left by process %s on %s, which is gone", lock, owner.get("pid"), owner.get("host"))


def _take(lock: Path, *, beat_seconds: float) -> dict[str, Any]:
    identity = _own_identity()
    try:
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        _check_free(lock, beat_seconds=beat_seconds)
        lock.unlink(missing_ok=True)
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(identity, stream)
    return identity


def _beat(lock: Path, identity: dict[str, Any], is_over: threading.Event, *, seconds: float) -> None:
    while not is_over.wait(seconds):
        try:
            os.utime(lock)
        except OSError as error:  # the file system may come back; nobody else can take a folder that is not there
            logger.debug("no sign of life could be left at %s: %s", lock, error)


@contextmanager
def claimed(folder: str | Path, *, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Hold a run folder for this process; a lock whose owner is gone is taken over.

    An owner on this machine is looked up by its process number; of one on another machine, a sign of life is awaited.

    Raises:
        InputError: Another process writes there.
    """
    lock = Path(folder) / LOCK_FILE
    try:
        identity = _take(lock, beat_seconds=beat_seconds)
    except FileExistsError as error:
        raise InputError(f"{folder} was claimed by another process just now. Choose another --output_dir.") from error
    is_over = threading.Event()
    beats = threading.Thread(
        target=_beat, args=(lock, identity, is_over), kwargs={"seconds": beat_seconds}, daemon=True
    )
    beats.start()
    try:
        yield
    finally:
        is_over.set()
        beats.join()
        if _owner(lock) == identity:
            lock.unlink(missing_ok=True)
