"""Where the docstring examples of the verbs run: a folder with `cells.h5ad`, a `corpus` of them and `runs/mlm`."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

# The threads of OpenMP do not survive a fork, and several processes of tests would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `tests.small_run.make_folder`: 255 PBMC cells and a run trained on them, which nobody changes.

    Processes of one `pytest -n` share it; the first one that needs it makes it.
    """
    from tests.small_run import make_folder

    common = tmp_path_factory.getbasetemp()
    folder = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / "small"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make_folder(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture
def in_folder(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, from which the small corpus, its cells and its run are seen."""
    for name in ("corpus", "cells.h5ad", "runs"):
        (tmp_path / name).symlink_to(small_folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _in_folder_of_examples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a docstring example that names `cells.h5ad` where there is one; all others cost nothing."""
    example = getattr(request.node, "dtest", None)
    if example is not None and any('"cells.h5ad"' in line.source for line in example.examples):
        monkeypatch.chdir(request.getfixturevalue("small_folder"))
