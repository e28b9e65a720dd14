"""A trained run, loaded: the model with the tokenizer it was trained with, on its device.

Owns what a run folder must hold, which device is meant and what an answer says of its origin; leaves asking it
anything to the verbs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perturbgene import __version__
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, listed
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: That the weights were trained with.
        path: The run folder.
    """

    model: GeneBertForPhenotypicMLM | GeneBertForClassification
    tokenizer: GeneTokenizer
    path: str

    @property
    def is_classifier(self) -> bool:
        """True for a run of `cls`, False for one of `mlm`."""
        return isinstance(self.model, GeneBertForClassification)

    @property
    def class_labels(self) -> list[str]:
        """Names of a classifier's classes."""
        names: dict[Any, str] = dict(self.model.config.id2label or {})
        return [names[index] for index in range(len(names))]

    @property
    def category(self) -> str:
        """The phenotype that a classifier names; "" for a masked model."""
        return self.model.config.phenotype_category or ""

    @property
    def binary_label(self) -> str | None:
        """The label that a classifier tells from all others; None when its classes are all labels."""
        is_binary = self.is_classifier and self.class_labels != list(self.tokenizer.phenotypes[self.category])
        return self.class_labels[1] if is_binary else None


def choose_device(device: str) -> torch.device:
    """Turn "auto" into the accelerator where there is one, else the CPU."""
    if device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")  # type: ignore[return-value]
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}). Give --device cpu."
        ) from error
    return torch.device(device)


def load_run(path: str | Path, *, device: str = "auto") -> Run:
    """Load a run folder of `mlm` or `cls`.

    Raises:
        InputError: The folder is no run, its files are damaged, or weights and tokenizer do not belong together.

    Example:
        >>> import perturbgene as pg
        >>> run = pg.load_run("runs/mlm")  # trained on "cells.h5ad"
        >>> run.tokenizer.phenotypes["cell_type"]
        ('B cell', 'NK cell', 'monocyte')
    """
    if not Path(path).is_dir():
        reason = "is a file, not a folder" if Path(path).exists() else "does not exist"
        raise InputError(f"run {path} {reason}. Give the --output_dir of an `mlm` or `cls` run.")
    tokenizer = GeneTokenizer.from_pretrained(path)
    try:
        config = GeneBertConfig.from_pretrained(path, trust_remote_code=False)
        is_classifier = "GeneBertForClassification" in (config.architectures or [])
        kind = GeneBertForClassification if is_classifier else GeneBertForPhenotypicMLM
        model, report = kind.from_pretrained(path, output_loading_info=True)  # type: ignore[misc]
    except Exception as error:  # transformers and safetensors raise many kinds; all mean an unusable folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} holds no finished run ({reason}). Train it again or name another folder.") from error
    strange = [*report["missing_keys"], *report["unexpected_keys"]]
    if strange or config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise InputError(
            f"{path}: weights and settings do not belong together ({listed(strange) or 'another tokenizer.json'}). "
            "Restore the folder as training wrote it."
        )
    return Run(model.to(choose_device(device)).eval(), tokenizer, str(path))


def provenance(run: Run, question: Mapping[str, Any], *, coverage: float) -> dict[str, Any]:
    """Say where an answer came from, for `uns["perturbgene"]`.

    Args:
        run: That answered.
        question: What was asked: text, numbers and lists of text as they are; anything else becomes JSON, as h5ad
            files hold no nested None.
        coverage: Share of the run's genes that the cells' file has, in 0..1.
    """
    facts = {"version": __version__, "run": run.path, "tokenizer_fingerprint": run.tokenizer.fingerprint}
    plain = {
        name: list(value) if isinstance(value, list | tuple) else value
        if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in question.items()
    }  # fmt: skip
    return {**facts, "gene_coverage": coverage, **plain}
