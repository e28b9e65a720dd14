"""One process per run folder; a lock whose owner is gone does not hold anybody up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest

from perturbgene.errors import InputError
from perturbgene.training.claim import LOCK_FILE, claimed


def write_lock(folder: Path, **owner: object) -> Path:
    lock = folder / LOCK_FILE
    lock.write_text(json.dumps(owner))
    return lock


def test_a_claim_ends_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    message = f"being written by process {os.getpid()} on .*another --output_dir"
    with claimed(tmp_path):
        with pytest.raises(InputError, match=message), claimed(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os; from perturbgene.training.claim import claimed; "
        f"c = claimed({str(tmp_path)!r}); c.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] != os.getpid()
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_new_process_with_an_old_number_does_not_count_as_the_owner(tmp_path: Path) -> None:
    import socket

    me = psutil.Process()
    write_lock(tmp_path, host=socket.gethostname(), pid=me.pid, started=me.create_time() - 100)
    with claimed(tmp_path):
        pass


def test_an_owner_on_another_machine_that_gives_no_sign_of_life_is_gone(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", pid=1, started=0)
    with claimed(tmp_path, beat_seconds=0.05):
        pass


def test_an_owner_on_another_machine_that_gives_signs_of_life_is_respected(tmp_path: Path) -> None:
    lock = write_lock(tmp_path, host="elsewhere", pid=1, started=0)

    def live() -> None:
        for _ in range(20):
            time.sleep(0.05)
            os.utime(lock)

    other = Thread(target=live)
    other.start()
    with pytest.raises(InputError, match="process 1 on elsewhere"), claimed(tmp_path, beat_seconds=0.2):
        pass
    other.join()


def test_a_torn_lock_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"ho')
    with claimed(tmp_path, beat_seconds=0.05):
        pass
