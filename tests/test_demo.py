"""The demo replaces only a folder that it made itself."""

import sys
from pathlib import Path

import pytest

from perturbgene import demo


def test_a_folder_of_the_user_is_refused_even_if_it_holds_a_file_named_like_the_demos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pbmc.h5ad", "thesis.txt"):
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="was not made by the demo"):
        demo.cli()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"pbmc.h5ad": "mine", "thesis.txt": "mine"}


def test_a_folder_that_the_demo_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path / "demo")])
    monkeypatch.setattr(demo, "commands", lambda folder: sys.exit("ran"))
    for _ in range(2):
        with pytest.raises(SystemExit, match="ran"):
            demo.cli()
        assert not (tmp_path / "demo/old").exists()
        (tmp_path / "demo/old").touch()
