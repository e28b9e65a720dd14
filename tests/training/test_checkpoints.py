"""A checkpoint counts when it is as it was written; others are named, set aside or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from perturbgene.errors import InputError
from perturbgene.files import partial_path
from perturbgene.training.checkpoints import (
    check_settings,
    check_whole,
    checkpoints,
    clean_up,
    commit,
    damage_of,
    mark,
    move_files,
    rotate,
    seal,
    set_damaged_aside,
)

FILES = {"model.safetensors": "weights", "trainer_state.json": "{}", "scheduler.pt": "rate", "shards/0.distcp": "part"}


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name, text in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    seal(path, step=step, world_size=1)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert damage_of(make_checkpoint(tmp_path, 2)) is None


DAMAGES = {
    "file missing": (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "file empty": (lambda path: (path / "scheduler.pt").write_text(""), "scheduler.pt is damaged"),
    "one letter changed": (lambda path: (path / "shards/0.distcp").write_text("pert"), "shards/0.distcp is damaged"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest torn": (lambda path: (path / "manifest.json").write_text('{"ver'), "manifest.json is missing or unread"),
    "manifest foreign": (lambda path: (path / "manifest.json").write_text("[1]"), "not written by perturbgene"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(harm, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make_checkpoint(tmp_path, 2)
    harm(path)
    with pytest.raises(InputError, match=f"checkpoint-2 cannot be used: .*{message}.*Give an older one"):
        check_whole(path)


def test_a_checkpoint_without_its_schedule_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 2)
    (path / "scheduler.pt").unlink()
    seal(path)
    with pytest.raises(InputError, match="without scheduler.pt .as --save_only_model"):
        check_whole(path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_whole(tmp_path / "checkpoint-9")


def test_the_newest_whole_checkpoint_is_taken_and_torn_ones_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 10):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("weightz")
    set_damaged_aside(tmp_path)
    assert names(tmp_path) == ["checkpoint-10.incomplete", "checkpoint-2", "checkpoint-4"]
    assert "model.safetensors is damaged" in caplog.text


def test_a_second_torn_checkpoint_of_a_step_gets_another_name(tmp_path: Path) -> None:
    for _ in range(2):
        (make_checkpoint(tmp_path, 4) / "scheduler.pt").unlink()
        set_damaged_aside(tmp_path)
    assert names(tmp_path) == ["checkpoint-4.incomplete", "checkpoint-4.incomplete-2"]


def partial(folder: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written."""
    path = partial_path(folder / f"checkpoint-{step}")
    mark(path)
    return path


def test_committing_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    final = make_checkpoint(tmp_path, 4)
    written = make_checkpoint(partial(tmp_path, 4), 4)
    (written / "new").touch()
    commit(written, final)
    assert names(tmp_path) == ["checkpoint-4"]
    assert (final / "new").exists()


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [2, 4, 8, 16]), (2, None, [8, 16]), (2, 2, [2, 16]),
        (1, 4, [4, 16]), (1, 16, [16]), (9, 2, [2, 4, 8, 16]),
    ],
    ids=["no limit", "the newest", "the best is one of them", "the best apart", "the best is the newest", "few"],
)  # fmt: skip
def test_rotation_keeps_the_newest_and_the_best(
    keep: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (2, 4, 8, 16):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, keep=keep, best=None if best is None else tmp_path / f"checkpoint-{best}")
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_rotation_deletes_nothing_that_only_begins_like_a_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-1-backup").mkdir()
    rotate(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-1-backup", "checkpoint-4"]


def test_what_a_killed_run_left_half_done_is_finished_or_deleted(tmp_path: Path) -> None:
    (make_checkpoint(partial(tmp_path, 8), 8) / "manifest.json").unlink()  # killed before it was sealed
    make_checkpoint(partial(tmp_path, 6), 6)  # and before it was renamed
    make_checkpoint(tmp_path, 4)
    clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_folders_that_we_did_not_write_are_never_deleted(tmp_path: Path) -> None:
    theirs = ["tmp-checkpoint-8", "tmp-notes", "checkpoint-2.del", ".checkpoint-8.partial", ".notes.partial"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it")
    clean_up(tmp_path)
    assert names(tmp_path) == sorted(theirs)


def test_files_are_moved_over_older_ones(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "a").write_text(text)
    move_files(source, target, last=["a", "absent"])
    assert (target / "a").read_text() == "new"
    assert not source.exists()


def check(then: dict[str, Any], now: dict[str, Any], folder: Path, *, num_ranks: int = 1) -> None:
    """Check settings of now against those of a run with a checkpoint."""
    checkpoint = make_checkpoint(folder, 2)
    (folder / "run.yaml").write_text(json.dumps(then))
    check_settings(checkpoint, now, num_ranks=num_ranks, may_change=False)


def test_the_same_cells_per_step_cut_otherwise_are_no_difference(tmp_path: Path) -> None:
    then = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    now = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    check(then, now, tmp_path, num_ranks=2)
    with pytest.raises(InputError, match="per_device_train_batch_size was 8, is 2; gradient_accumulation_steps was 1"):
        check(then, now, tmp_path, num_ranks=1)


def test_other_settings_are_distinguished_by_what_depends_on_them(tmp_path: Path) -> None:
    then = {"seed": 1, "learning_rate": 0.1, "max_steps": 3, "output_dir": "a", "dataloader_num_workers": 0}
    now = {"seed": 2, "learning_rate": 0.2, "max_steps": 4, "output_dir": "b", "dataloader_num_workers": 2}
    with pytest.raises(InputError, match=r"other settings: seed was 1, is 2; learning_rate was 0.1, is 0.2\. The"):
        check(then, now, tmp_path)
    with pytest.raises(InputError, match="do not fit these settings: hidden_size was 32, is 64. Give"):
        check({"hidden_size": 32}, {"hidden_size": 64}, tmp_path)


def test_the_manifest_names_every_file_with_its_size(tmp_path: Path) -> None:
    manifest = json.loads((make_checkpoint(tmp_path, 2) / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(text) for name, text in FILES.items()
    }
