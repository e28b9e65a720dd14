"""Checkpoints that are whole or not there: written under another name, sealed by a manifest, then renamed.

Owns the manifest, which checkpoint counts, setting others aside, deleting old ones, and what may differ on resuming;
knows nothing of what the files hold.

    run/tmp-checkpoint-40/checkpoint-40/   being written
    run/checkpoint-40/manifest.json        written last: size and SHA-256 of every other file
    run/checkpoint-20.del/                 being deleted
    run/checkpoint-40.incomplete/          torn or foreign, set aside
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perturbgene.corpus.workers import sha256_of
from perturbgene.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
_UNFINISHED, _DELETED, _SET_ASIDE = "tmp-", ".del", ".incomplete"
#: What a run needs to go on; others (weights, optimizer) have names that depend on how the model is cut.
_NEEDED = ("trainer_state.json", "scheduler.pt")


# -- names --------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name; None for any other name.

    Example:
        >>> step_of(Path("run/checkpoint-40")), step_of(Path("run/checkpoint-40.del"))
        (40, None)
    """
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else None


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders of a run that are named as checkpoints, by step."""
    steps = {path: step_of(path) for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def unfinished_folder(folder: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step is written, before it is renamed."""
    return Path(folder) / f"{_UNFINISHED}checkpoint-{step}"


# -- whole or not -------------------------------------------------------------------------------------------------


def _files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def _sync(path: Path) -> None:
    """Let a file or folder reach the disk, where the system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file by way of a temporary name."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def seal(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest, which makes a checkpoint count.

    Args:
        checkpoint: Folder with all its files.
        **facts: What else is worth knowing: numbers and strings.
    """
    files = {}
    for path in _files_of(checkpoint):
        _sync(path)
        name = path.relative_to(checkpoint).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"version": MANIFEST_VERSION, **facts, "files": files}
    replace_text(checkpoint / MANIFEST_FILE, json.dumps(manifest, indent=1))


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest; an empty one where it is missing or is none."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_known = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if is_known and manifest.get("version") == MANIFEST_VERSION else {}


def damage_of(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, naming the file; None when it is as it was written."""
    manifest = manifest_of(checkpoint)
    if not manifest:
        return f"{MANIFEST_FILE} is missing or unreadable, so it was not finished, or not written by perturbgene"
    for name in _NEEDED:
        if name not in manifest["files"]:
            return f"it was saved without {name} (as --save_only_model does)"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} is damaged: its content is not what was written"
    return None


def check_whole(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that is torn or foreign.

    Raises:
        InputError: It does not exist, or a file is missing or damaged; names the file.
    """
    if not Path(checkpoint).is_dir():
        raise InputError(f"checkpoint {checkpoint} does not exist. Give a folder, or --resume_from_checkpoint alone.")
    damage = damage_of(Path(checkpoint))
    if damage:
        raise InputError(
            f"checkpoint {checkpoint} cannot be used: {damage}. Give an older one, or --resume_from_checkpoint alone "
            "for the newest whole one."
        )


def newest_whole(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None; newer ones that are torn or foreign are set aside.

    A set-aside checkpoint is renamed to end in `.incomplete`, with one warning that says why.
    """
    for path in reversed(checkpoints(folder)):
        damage = damage_of(path)
        if damage is None:
            return path
        aside = _free_name(path.with_name(path.name + _SET_ASIDE))
        path.rename(aside)
        logger.warning("%s cannot be used: %s. It is now called %s", path, damage, aside.name)
    return None


def newest_sealed(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that has a manifest, or None; what other ranks take once rank 0 has looked."""
    return next((path for path in reversed(checkpoints(folder)) if manifest_of(path)), None)


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(name for name in names if not name.exists())


# -- writing and deleting -----------------------------------------------------------------------------------------


def commit(written: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one of the same name that was there before is deleted afterwards."""
    old = final.with_name(final.name + _DELETED)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    written.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(written.parent, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; stopped half-way, what is left no longer looks like one."""
    doomed = checkpoint.with_name(checkpoint.name + _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(folder: str | Path, *, keep: int | None, best: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`; the newest and the best one always stay."""
    every = checkpoints(folder)
    if not keep or len(every) <= keep:
        return
    spared = {every[-1].resolve()} | ({Path(best).resolve()} if best else set())
    spare = len(every) - max(keep, len(spared))
    for path in [path for path in every if path.resolve() not in spared][: max(0, spare)]:
        delete(path)


def clean_up(folder: str | Path) -> None:
    """Clear away what a killed run left half-written or half-deleted."""
    for path in Path(folder).glob(f"{_UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob(f"checkpoint-*{_DELETED}"):
        name = path.with_name(path.name.removesuffix(_DELETED))
        if not name.exists() and damage_of(path) is None:  # killed between the two renames of `commit`
            path.rename(name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def move_files(source: Path, target: Path, *, last: Iterable[str]) -> None:
    """Move every file of a folder into another over what is there, those named `last` at the end, in this order."""
    names = sorted(path.name for path in source.iterdir())
    ends = [name for name in last if name in names]
    for name in [*(name for name in names if name not in ends), *ends]:
        _sync(source / name)
        os.replace(source / name, target / name)
    source.rmdir()


# -- settings of then and now -------------------------------------------------------------------------------------

#: Settings on which the order of cells, the meaning of tokens, or what a step does with them depend.
_FIXED = (
    "verb", "corpus", "train_data_paths", "layer", "gene_id_column", "vocab_path", "included_phenotypes", "panel",
    "num_top_genes", "normalization", "bin_edges", "bin_edges_path", "max_length", "truncation", "seed",
    "gene_mask_prob", "phenotype_mask_prob", "absent_prob", "unexpressed_ratio", "gene_drop_prob",
    "phenotype_category", "binary_label", "balanced_dataset", "phenotype_loss_weight", "gene_loss_weight",
    "tokens_per_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "lr_scheduler_type", "optim", "max_grad_norm", "dropout", "ema_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
#: Settings that shape the model: the weights and the optimizer's moments of a checkpoint fit no other.
MODEL_SETTINGS = (
    "model_arch", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "norm_position",
    "bin_gain_range", "direct_path",
)  # fmt: skip
#: Settings that may change without a word: where and how often is written, and what reads.
_FREE = re.compile(
    r"output_dir|resume_from_checkpoint|allow_changed|dataloader_.*|save_.*|logging_.*|eval_.*|report_to|run_name"
    r"|per_device_eval_batch_size|disable_tqdm|allow_overlap|pretrained_model_path|project|hub_.*|push_to_hub|ddp_.*"
)
_CELLS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _cells_per_step(settings: Mapping[str, Any], world_size: int) -> int:
    return int(settings.get(_CELLS[0], 1)) * int(settings.get(_CELLS[1], 1)) * world_size


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that both have, with other values."""
    return [name for name in then if name in now and then[name] != now[name]]


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], *, ranks: tuple[int, int]
) -> tuple[list[str], list[str]]:
    """List what differs between the settings of a checkpoint and those it is to be continued with.

    Args:
        then, now: Settings by name.
        ranks: Number of processes then and now. Another cut of the same number of cells per step is no difference.

    Returns:
        Differences after which the run would be another one, and those that are only worth knowing, as lines.

    Example:
        >>> changed_settings({"seed": 1, "max_steps": 5}, {"seed": 2, "max_steps": 9}, ranks=(1, 1))
        (['seed was 1, is 2'], ['max_steps was 5, is 9'])
    """
    names = differing(then, now)
    is_same_step = _cells_per_step(then, ranks[0]) == _cells_per_step(now, ranks[1])
    names = [name for name in names if not _FREE.fullmatch(name) and not (is_same_step and name in _CELLS)]
    lines = {name: f"{name} was {then[name]}, is {now[name]}" for name in names}
    noted = [line for name, line in lines.items() if name not in _FIXED]
    if ranks[0] != ranks[1]:
        noted.append(f"processes were {ranks[0]}, are {ranks[1]}")
    return [line for name, line in lines.items() if name in _FIXED], noted
