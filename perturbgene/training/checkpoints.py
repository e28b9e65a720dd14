"""Checkpoints that are whole or not there, and what may change when a run is resumed.

Owns the manifest, which checkpoint counts, setting others aside and deleting old ones, and how files reach the disk;
leaves when they are written to `ShardedTrainer`. Only folders with the names below are touched, and unfinished ones
only if they hold our mark.

    run/.checkpoint-40.partial/written_by_perturbgene      the mark
    run/.checkpoint-40.partial/checkpoint-40/              being written
    run/checkpoint-40/manifest.json                        written last: size and SHA-256 of every other file
    run/checkpoint-40.incomplete/                          cannot be used, set aside
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from perturbgene.cli.parsing import settings_in
from perturbgene.data_utils.tokenization import TOKENIZER_FILE
from perturbgene.errors import InputError, NewerFormatError
from perturbgene.files import check_format, read_json, sums_of, write_json, write_sums

logger = logging.getLogger(__name__)

MANIFEST_FILE, MARK_FILE = "manifest.json", "written_by_perturbgene"
#: Settings of a run, in its folder.
SETTINGS_FILE = "run.yaml"
MANIFEST_VERSION = 1
#: What a run needs to continue; other files (weights, optimizer) have names that depend on how the model is sharded.
_NEEDED = (TRAINER_STATE_NAME, "scheduler.pt")
#: Final files whose presence shows other programs that a run is finished, in the order in which they appear.
LAST_FILES = ("config.json", "model.safetensors", TRAINER_STATE_NAME)


# -- whole or not -------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders of a run that are named exactly like checkpoints, by step."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    return sorted(
        (path for path, step in steps.items() if step and path.is_dir()), key=lambda path: int(path.name[11:])
    )


def newest_whole(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run that has no final weights, with a warning; None without one."""
    whole = (path for path in reversed(checkpoints(run)) if damage_of(path, needed=("config.json",)) is None)
    if (newest := next(whole, None)) is not None:
        text = "%s is still in training or was stopped: reading its newest whole checkpoint, %s"
        logger.warning(text, run, newest.name)
    return newest


def _sync(path: Path) -> None:
    """Make a file or folder reach the disk, where the file system allows it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(descriptor)


def share(folder: Path) -> None:
    """Give every file the mode that the umask gave the trainer's state: safetensors lets only the owner read."""
    for path in folder.iterdir():
        if path.is_file():
            shutil.copymode(folder / TRAINER_STATE_NAME, path)


def seal(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest, which makes a checkpoint with all its files count, with facts (numbers and strings)."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    for path in paths:
        _sync(path)
    files = {path.relative_to(checkpoint).as_posix(): sums_of(path) for path in paths}
    write_json(checkpoint / MANIFEST_FILE, {"version": MANIFEST_VERSION, **facts, "files": files})
    _sync(checkpoint / MANIFEST_FILE)


def seal_run(waiting: Path) -> None:
    """Write the sums of what a run's final files have learned, which wait for their rename.

    Settings and scores have none: people change these by hand, and what is damaged in them is found as they are read.
    """
    write_sums(
        waiting, [path for path in waiting.iterdir() if path.suffix == ".safetensors" or path.name == TOKENIZER_FILE]
    )


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest; returns an empty one where it is missing or not ours.

    Raises:
        NewerFormatError: A newer perturbgene wrote it, so the checkpoint is neither used nor set aside nor deleted.
    """
    try:
        manifest = read_json(checkpoint / MANIFEST_FILE)
        check_format(checkpoint / MANIFEST_FILE, manifest.get("version"), reads=MANIFEST_VERSION)
    except NewerFormatError:
        raise
    except (OSError, ValueError, AttributeError):
        return {}
    return manifest if isinstance(manifest.get("files"), dict) else {}


def damage_of(checkpoint: Path, *, needed: Sequence[str] = _NEEDED) -> str | None:
    """Return what is wrong with a checkpoint, with the name of the file; None if it is as it was written.

    `needed` files it must have; by default those with which a run continues.
    """
    manifest = manifest_of(checkpoint)
    if not manifest:
        return f"{MANIFEST_FILE} is missing or unreadable, so it was not finished, or not written by perturbgene"
    for name in needed:
        if name not in manifest["files"]:
            return f"it was saved without {name} (as --save_only_model does)"
    for name, expected in manifest["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if sums_of(checkpoint / name) != expected:
            return f"{name} is damaged: its content is not what was written"
    return None


def check_whole(checkpoint: str | Path) -> None:
    """Raise an InputError that says why, if a checkpoint does not exist, is incomplete, damaged or not ours."""
    if not Path(checkpoint).is_dir():
        raise InputError(f"checkpoint {checkpoint} does not exist. Give a folder, or --resume_from_checkpoint alone.")
    if damage := damage_of(Path(checkpoint)):
        raise InputError(
            f"checkpoint {checkpoint} cannot be used: {damage}. Give an older one, or --resume_from_checkpoint alone "
            "for the newest complete one."
        )


@contextmanager
def only_data(checkpoint: str | None) -> Iterator[None]:
    """Refuse a checkpoint in which torch meets an object of a class; it reads tensors, numbers and text alone."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise InputError(
            f"checkpoint {checkpoint} holds more than numbers in its *.pt or *.pth files, which is not read, since it "
            "could run code. Start from its weights alone, with --pretrained_model_path."
        ) from error


def set_damaged_aside(folder: str | Path) -> None:
    """Rename checkpoints that cannot be used and are newer than the newest one that can, with a warning for each."""
    for path in reversed(checkpoints(folder)):
        damage = damage_of(path)
        if damage is None:
            return
        names = [path.with_name(f"{path.name}.incomplete{suffix}") for suffix in ("", *range(-2, -1000, -1))]
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        logger.warning("%s cannot be used: %s. Its new name is %s", path, damage, aside.name)


# -- writing and deleting -----------------------------------------------------------------------------------------


def mark(partial: Path) -> None:
    """Make a folder for unfinished files that `clean_up` may delete, since it holds our mark."""
    partial.mkdir(parents=True, exist_ok=True)
    (partial / MARK_FILE).touch()


def commit(written: Path, final: Path) -> None:
    """Give a sealed checkpoint its final name, in place of an older one; then delete the folder it was written in."""
    if final.exists():
        final.rename(written.parent / "replaced")
    written.rename(final)
    _sync(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def clean_up(folder: str | Path) -> None:
    """Finish or delete what a killed run left half-written; a folder without our mark is not touched."""
    for partial in Path(folder).glob(".*.partial"):
        if not (partial / MARK_FILE).is_file():
            continue
        for written in checkpoints(partial):
            if damage_of(written) is None and not (Path(folder) / written.name).exists():
                commit(written, Path(folder) / written.name)
        shutil.rmtree(partial, ignore_errors=True)


def rotate(folder: str | Path, *, keep: int | None, best: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`; the newest and the best one always stay.

    `transformers.trainer_utils.rotate_checkpoints` would also delete a `checkpoint-20-backup` of the user's.
    """
    every = checkpoints(folder)
    spared = {path.resolve() for path in [*every[-1:], *([Path(best)] if best else [])]}
    num_spare = len(every) - max(keep, len(spared)) if keep else 0
    for path in [path for path in every if path.resolve() not in spared][: max(0, num_spare)]:
        shutil.rmtree(path, ignore_errors=True)


def move_files(source: Path, target: Path, *, last: Iterable[str]) -> None:
    """Move every file of a folder into another over what is there, those named `last` at the end, in this order."""
    names = sorted(path.name for path in source.iterdir() if path.name != MARK_FILE)
    ends = [name for name in last if name in names]
    for name in [*(name for name in names if name not in ends), *ends]:
        _sync(source / name)
        os.replace(source / name, target / name)
    shutil.rmtree(source)


# -- changed settings ---------------------------------------------------------------------------------------------

#: Settings on which the order of cells, the meaning of tokens, or what a step does with them depend.
_FIXED = (
    "verb", "corpus", "train_data_paths", "where", "layer", "gene_id_column", "gene_map", "vocab_path",
    "included_phenotypes", "panel", "num_top_genes", "normalization", "missing_labels", "phenotypes", "bin_edges",
    "bin_edges_path",
    "max_length", "seed", "gene_mask_prob", "phenotype_mask_prob", "absent_prob", "unexpressed_ratio", "gene_drop_prob",
    "sample_by", "phenotype_category", "binary_label", "balanced_dataset", "phenotype_loss_weight", "gene_loss_weight",
    "tokens_per_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "lr_scheduler_type", "optim", "max_grad_norm", "dropout", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
#: Settings that shape the model, or say what learns: weights and the optimizer's moments of a checkpoint fit no other.
_MODEL_SETTINGS = (
    "model_arch", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "norm_position",
    "bin_gain_range", "direct_path", "train_only",
)  # fmt: skip


def check_settings(checkpoint: Path, now: Mapping[str, Any], *, num_ranks: int, may_change: bool) -> None:
    """Compare settings with those of a checkpoint's run; refuse those that would make it another run.

    If they may change, a warning names them, but the model must keep its shape, and what learns. The same number of
    cells per step, divided otherwise among processes and accumulated batches, is no difference.
    """
    path = checkpoint.parent / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        then = settings_in(path)
    except NewerFormatError:
        raise
    except InputError:
        then = {}
    if not then:
        raise InputError(
            f"{path} is empty or damaged, so nothing says what the run was trained with. Restore it; or delete it, "
            "and the run continues with the settings of now."
        )
    names = [name for name in then if name in now and then[name] != now[name]]
    changed = {name: f"{name} was {then[name]}, is {now[name]}" for name in names}
    if shape := [text for name, text in changed.items() if name in _MODEL_SETTINGS]:
        raise InputError(
            f"{checkpoint} holds weights that do not fit these settings: {'; '.join(shape)}. Give the earlier "
            "settings, or start a new run in another --output_dir."
        )
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    cells_then, cells_now = (math.prod(settings.get(name, 1) for name in factors) for settings in (then, now))
    if cells_then * int(manifest_of(checkpoint).get("world_size", 1)) == cells_now * num_ranks:
        changed = {name: text for name, text in changed.items() if name not in factors}
    changes = "; ".join(text for name, text in changed.items() if name in _FIXED)
    if changes and not may_change:
        raise InputError(
            f"{checkpoint} was trained with other settings: {changes}. The result would belong to neither run. Give "
            "the earlier settings, or --allow_changed."
        )
    if changes:
        logger.warning("settings differ from those of %s: %s", path, changes)


def take_settings(group: dict[str, Any], now: dict[str, Any]) -> None:
    """Give a loaded group of parameters the settings of now; its learning rate, which the schedule moves, is scaled."""
    group |= {name: now[name] for name in ("weight_decay", "betas", "eps") if name in group and name in now}
    then, wanted = group.get("initial_lr"), now.get("initial_lr")
    if then != wanted and then and wanted is not None:
        group |= {"lr": group["lr"] * wanted / then, "initial_lr": wanted}
