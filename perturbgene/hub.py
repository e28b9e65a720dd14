"""Runs on the Hugging Face Hub: a name OWNER/NAME becomes a local folder.

Owns recognizing such a name, and fetching what a run folder holds; loading is in `inference.run`.
"""

import re
from pathlib import Path

from perturbgene.errors import InputError

#: What is fetched of a run: weights, settings, tokenizer, scores and calibration, but no checkpoints or logs.
RUN_FILES = ("*.json", "*.yaml", "*.safetensors", "README.md")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a text may name a model on the Hugging Face Hub: OWNER/NAME, and no such file or folder here.

    Example:
        >>> [is_hub_name(text) for text in ("lab/pbmc-mlm", "./runs/mlm", "run", "genes/panel.txt")]
        [True, False, False, False]
    """
    text, here = str(path), Path(path)
    is_file = here.suffix in (".txt", ".json", ".h5ad")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not (is_file or here.exists() or here.parent.is_dir())


def local_run(run: str | Path) -> Path:
    """Return the folder of a run; one on the Hugging Face Hub is fetched into its cache first.

    Raises:
        InputError: It is not here, and cannot be fetched.
    """
    if not is_hub_name(run):
        return Path(run)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(run), allow_patterns=list(RUN_FILES), ignore_patterns=["checkpoint-*/*"]))
    except Exception as error:  # of the hub, the network or the cache: all mean that there is no such run
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"run {str(run)!r} does not exist here, and cannot be fetched from the Hugging Face Hub ({reason}). "
            "Correct the path, or the name OWNER/NAME."
        ) from error
