"""A trained run, loaded: the model with the tokenizer it was trained with, on its device.

Owns what a run folder must hold, the choice of device, and where a result came from; leaves questions to the verbs.
Letters: m positions, h hidden size.
"""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perturbgene import __version__
from perturbgene.cli.verbs import MASK_RATES, MlmConfig
from perturbgene.configs import BaseConfig, load_config
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.data_collators import Batch
from perturbgene.data_utils.opening import FileList, expand_paths
from perturbgene.data_utils.sources import CellSource, StoredCells
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, NewerFormatError, listed
from perturbgene.eval_utils import hidden_at
from perturbgene.files import check_format, damaged_file
from perturbgene.hub import local_run
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM
from perturbgene.model.config import RUN_FORMAT
from perturbgene.training.cell_space import JoinedSpace, Pooling, pooled_states, trained_pooling
from perturbgene.training.votes import direct_path

logger = logging.getLogger(__name__)

#: What a run folder has, with weights, once training has ended.
CONFIG_NAME = "config.json"

#: Of what `provenance` writes into results.
RESULT_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer."""

    model: GeneBertForPhenotypicMLM | GeneBertForClassification  # in evaluation mode, on its device
    tokenizer: GeneTokenizer  # the one that the weights were trained with
    path: str  # the run folder

    def __repr__(self) -> str:
        config, kind = self.model.config, "cls" if self.is_classifier else "mlm"
        what = f" of {self.category} ({len(self.class_labels)} classes)" if self.is_classifier else ""
        shape = f"{config.num_hidden_layers} x {config.hidden_size}, on {self.model.device}"
        return f"Run({self.path!r}: {kind}{what}, {shape}; {self.tokenizer!r})"

    @property
    def is_classifier(self) -> bool:
        """True for a run of `cls`, False for one of `mlm`."""
        return isinstance(self.model, GeneBertForClassification)

    @property
    def class_labels(self) -> list[str]:
        """Names of a classifier's classes."""
        return [name for _, name in sorted((self.model.config.id2label or {}).items())]

    @property
    def category(self) -> str:
        """The phenotype that a classifier predicts; "" for a masked model."""
        return self.model.config.phenotype_category or ""

    @property
    def binary_label(self) -> str | None:
        """The one label that a one-against-rest classifier recognizes; None when its classes are all labels."""
        is_binary = self.is_classifier and self.class_labels != list(self.tokenizer.phenotypes[self.category])
        return self.class_labels[1] if is_binary else None

    @cached_property
    def settings(self) -> BaseConfig | None:
        """The settings that the run was trained with; None where only weights and tokenizer are left."""
        folder = Path(self.path)
        for path in (folder / "run.yaml", folder.parent / "run.yaml"):
            if path.exists() and (path.parent == folder or folder.name.startswith("checkpoint-")):
                return load_config(path)
        return None

    @property
    def mask_rates(self) -> dict[str, float]:
        """How much of a cell was masked in training, by the names of `DataCollatorForPhenotypicMLM`."""
        settings = self.settings
        rates = settings.mask_rates if isinstance(settings, MlmConfig) else {}
        return {name: rates.get(name, getattr(MlmConfig, name)) for name in MASK_RATES}

    def shares(self, phenotype: str) -> tuple[float, float]:
        """Return how much the transformer's logits count beside the genes' votes: nothing given, something given."""
        path = direct_path(self.model)
        if path is None or not path.is_on:
            return 1.0, 1.0
        if self.is_classifier:
            return (float(path.share_p2[0, 0]),) * 2
        alone, given = path.share_p2[self.tokenizer.vocabulary.token_type(phenotype) - 1].tolist()
        return alone, given

    def warn_if_ignored(self, given: Collection[str], asked: Iterable[str]) -> None:
        """Say so if the run does not look at the phenotypes that it is given."""
        if voted := [name for name in asked if given and self.shares(name)[1] == 0]:
            logger.warning(
                "%s answers %s by votes of the genes alone (held-out cells gave its transformer no say), so what is "
                "given (%s) changes no answer", self.path, listed(voted), listed(given),
            )  # fmt: skip

    @cached_property
    def space(self) -> JoinedSpace | None:
        """The joined space that cells are embedded in; None for a run that has none."""
        space = JoinedSpace.load(self.path)
        return space if space is not None and len(space.axes_gc) == len(self.tokenizer.panel) else None

    def default_pooling(self, given: Collection[str] = ()) -> Pooling:
        """Return what "auto" means when some phenotypes are given."""
        return "joined" if self.space is not None else trained_pooling(self.model, self.tokenizer, given)

    def embed(self, block: TokenBlock, *, pooling: Pooling, given: Collection[str] = ()) -> np.ndarray:
        """Return the embeddings of cells, float32, see `embed`; NaN for cells that express no gene of the panel."""
        if pooling == "joined":
            assert self.space is not None, "choose another pooling"
            return self.space.place(self.model, self.tokenizer, block, given)
        return pooled_states(self.model, self.tokenizer, block, pooling=pooling, given=given)

    def own_files(self, split: str) -> FileList:
        """Return the files of the run's own "train" or "eval" cells.

        Raises:
            InputError: The run does not say where they are, or they are not there.
        """
        flag = f"--{split}_data_paths"
        corpus, patterns = (getattr(self.settings, name, None) for name in ("corpus", f"{split}_data_paths"))
        if not corpus and not patterns:
            raise InputError(f"{self.path} does not say which {split} cells it has. Give --corpus or {flag}.")
        try:
            return expand_paths(patterns) if patterns else Corpus.open(str(corpus)).paths(split)
        except InputError as error:
            if patterns:
                raise InputError(f"{error} (run.yaml names these {split} cells; give them with {flag}.)") from error
            raise InputError(
                f"{self.path} has its {split} cells in its corpus {corpus!r}, as run.yaml says, but they are not "
                f"there. Give --corpus, or {flag}."
            ) from error

    def require_mlm(self, what: str) -> None:
        """Raise an InputError when this is a classifier, which cannot be asked for `what`."""
        if self.is_classifier:
            raise InputError(f"{self.path} is a classifier, which cannot be asked for {what}. Give an mlm run.")

    def hidden_at(self, batch: Batch, positions_m: np.ndarray) -> np.ndarray:
        """Run the encoder on a packed batch; return its final states at ascending flat positions, float32 (m, h)."""
        return hidden_at(self.model, batch, positions_m)


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


def load_run(run: str | Path | Run, *, device: str = "auto") -> Run:
    """Load a run of `mlm` or `cls`: a folder, or a name on the Hugging Face Hub; a loaded run is returned as it is.

    Of a run that is not finished, the newest whole checkpoint is read.

    Raises:
        InputError: The folder is not a run, its files are damaged, or weights and tokenizer do not belong together.

    Example:
        >>> import perturbgene as pg
        >>> run = pg.load_run("runs/mlm")  # trained on "cells.h5ad"
        >>> run.tokenizer.phenotypes["cell_type"]
        ('B cell', 'NK cell', 'monocyte')
    """
    if isinstance(run, Run):
        return run
    if not isinstance(run, str | Path):
        raise InputError(
            f"{type(run).__name__} is no run. Give the folder of an mlm or cls run, its name on the Hugging Face Hub, "
            "or what `load_run` returns."
        )
    run = local_run(run)
    if not run.is_dir():
        reason = "is a file, not a folder" if run.exists() else "does not exist"
        raise InputError(f"run {run} {reason}. Give the --output_dir of an `mlm` or `cls` run.")
    if not ((run / CONFIG_NAME).exists() and any(run.glob("*.safetensors"))):  # it is not finished
        from perturbgene.training.checkpoints import newest_whole  # imports the Trainer, which takes seconds

        run = newest_whole(run) or run
    elif damage := damaged_file(run):
        raise InputError(
            f"run {run} cannot be used: {damage}. Restore the folder as it was written, or train it again."
        )
    tokenizer = GeneTokenizer.from_pretrained(run)
    try:
        written = GeneBertConfig.get_config_dict(run)[0].get("run_format", 1)
        config = GeneBertConfig.from_pretrained(run, trust_remote_code=False, name_or_path=str(run))
        config.check_size(run)
        is_classifier = "GeneBertForClassification" in (config.architectures or [])
        kind = GeneBertForClassification if is_classifier else GeneBertForPhenotypicMLM
        model, report = kind.from_pretrained(run, output_loading_info=True)
    except NewerFormatError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; all mean an unusable folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{run} holds no finished run ({reason}). Train it again or name another folder.") from error
    if written != RUN_FORMAT and config.direct_path:
        raise InputError(
            f"{run} was trained before genes' votes were solved as a regression, so its answers would not be those of "
            "then. Train it again."
        )
    strange = [*report["missing_keys"], *report["unexpected_keys"]]
    if strange or config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise InputError(
            f"{run}: weights and settings do not belong together ({listed(strange) or 'another tokenizer.json'}). "
            "Restore the folder as training wrote it."
        )
    return Run(model.to(choose_device(device)).eval(), tokenizer, str(run))


def provenance(run: Run, question: Mapping[str, Any], *, coverage: float) -> dict[str, Any]:
    """Return where a result came from, for `uns["perturbgene"]`.

    Args:
        run: The run that was asked.
        question: What was asked. Text, numbers and lists of text stay; anything else becomes JSON, since h5ad files
            cannot hold a nested None.
        coverage: Share of the run's genes that the cells' file has, in 0..1.
    """
    facts = {
        "format_version": RESULT_FORMAT,
        "version": __version__,
        "run": run.path,
        "tokenizer_fingerprint": run.tokenizer.fingerprint,
    }
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in question.items()}
    stored = {name: v if isinstance(v, str | int | float | list) else json.dumps(v) for name, v in plain.items()}
    return {**facts, **stored, "gene_coverage": coverage}


def facts_of(source: CellSource) -> dict[str, Any]:
    """Return what `provenance` has written into a result; nothing if the file is no result.

    Raises:
        InputError: A newer perturbgene has written it.
    """
    facts = source.element("uns/perturbgene") if isinstance(source, StoredCells) else None
    if not isinstance(facts, dict):
        return {}
    check_format(f"{source.path}: uns/perturbgene", facts.get("format_version"), reads=RESULT_FORMAT)
    return facts
