"""Outputs are whole or not there, and have one writer at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from perturbgene.errors import InputError
from perturbgene.files import (
    check_new,
    claimed,
    damaged_file,
    renewed_sums,
    whole_file,
    whole_files,
    whole_folder,
    write_json,
    write_sums,
)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "out.txt") as temporary:
        temporary.write_text("all")
        assert not (tmp_path / "out.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(tmp_path / "out.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.txt": "old"}


def test_a_folder_appears_when_it_is_whole_and_what_a_killed_process_left_is_not_in_it(tmp_path: Path) -> None:
    (tmp_path / ".corpus.partial").mkdir()
    (tmp_path / ".corpus.partial/leftover").touch()
    with whole_folder(tmp_path / "corpus") as temporary:
        (temporary / "manifest.json").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["corpus", "corpus/manifest.json"]


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "scores.json", {"accuracy": float("nan")})
    assert not list(tmp_path.iterdir())


CLAIM = """
import sys, time
from perturbgene.files import claimed
with claimed(sys.argv[1], flag="output"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_killed(tmp_path: Path) -> None:
    output = tmp_path / "out.h5ad"
    first = subprocess.Popen([sys.executable, "-c", CLAIM, str(output)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with (
        pytest.raises(InputError, match=rf"being written by another process \({first.pid} on .*--output"),
        claimed(output, flag="output"),
    ):
        pass
    first.kill()
    first.wait()
    first.stdout.close()
    with claimed(output, flag="output"):
        assert (tmp_path / ".out.h5ad.lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be written .*--output_dir"),
        claimed(tmp_path / "file/run", flag="output_dir", is_inside=True),
    ):
        pass


def test_a_folder_in_the_place_of_a_file_is_never_replaced(tmp_path: Path) -> None:
    table, record = tmp_path / "ko.csv", tmp_path / "ko.json"
    table.write_text("old")
    record.mkdir()
    (record / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"ko\.json cannot be written \(it is a folder\)"):
        check_new(table, record, overwrite=True)
    with pytest.raises(InputError, match=r"ko\.json cannot be written"), whole_files(table, record) as folder:
        (folder / "ko.csv").write_text("new")
    assert (table.read_text(), (record / "thesis.txt").read_text()) == ("old", "mine")


def test_a_refused_command_leaves_none_of_the_folders_that_its_lock_needed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="wrong"), claimed(tmp_path / "runs/a/b", flag="output_dir", is_inside=True):
        raise InputError("wrong")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    with claimed(tmp_path / "runs/a/out.h5ad", flag="output"):
        (tmp_path / "runs/a/out.h5ad").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "out.h5ad", "runs"]


def test_a_process_may_open_as_many_files_as_the_system_allows() -> None:
    code = (
        "import resource; from perturbgene.files import open_file_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); "
        "print(open_file_limit(), open_file_limit(most=200), open_file_limit(most=150), open_file_limit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "100 200 200 200\n"


def test_sums_name_the_damaged_file_and_are_renewed_with_what_is_written_again(tmp_path: Path) -> None:
    kept, renewed = tmp_path / "kept", tmp_path / "renewed"
    kept.write_text("same")
    renewed.write_text("old")
    assert damaged_file(tmp_path) is None  # without sums, as folders of before
    write_sums(tmp_path, [kept, renewed])
    with renewed_sums(renewed):
        renewed.write_text("new")
        assert damaged_file(tmp_path) is None  # also if the process is killed here
    assert damaged_file(tmp_path) is None
    renewed.write_text("old")
    assert damaged_file(tmp_path) == "renewed is damaged: its content is not what was written"
