"""The verbs `mlm` and `cls`: from a configuration to a run folder.

Owns putting the parts together and what a run folder holds (a Hugging Face model folder with `tokenizer.json`,
`run.yaml`, `metrics.json` and a model card); leaves the loop to `ShardedTrainer`. Letters: k classes.
"""

import logging
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors import safe_open
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from perturbgene import __version__
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import expand_paths, identity
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, StoppedError, listed
from perturbgene.eval_utils import ClassEvaluator, Evaluator, MlmEvaluator, Question, standard_questions, without_nan
from perturbgene.files import write_json
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM, load_preset
from perturbgene.plots import loss_figure, save_figure
from perturbgene.sharded_trainer import ShardedTrainer
from perturbgene.training.checkpoints import (
    MODEL_SETTINGS,
    changed_settings,
    check_whole,
    clean_up,
    differing,
    manifest_of,
    newest_sealed,
    newest_whole,
)
from perturbgene.training.claim import claimed
from perturbgene.urls import shown_path

if TYPE_CHECKING:
    from perturbgene.configs import ClsConfig, MlmConfig, TrainingConfig

logger = logging.getLogger(__name__)

#: Spread of fresh embeddings. Small against that of linear layers (1 / sqrt(h), which keeps the size of signals), so
#: that what is learnt of a gene soon outweighs its random start. 560 PBMC cells, 64 wide, held-out accuracy of two
#: splits: 0.80 and 0.83 after 20 epochs, against 0.81 and 0.74 after 24 with 0.07 for both.
EMBEDDING_RANGE = 0.02

RUN_FILE, METRICS_FILE, CARD_FILE = "run.yaml", "metrics.json", "README.md"


# -- data ---------------------------------------------------------------------------------------------------------


def _paths(config: "TrainingConfig", split: str, corpus: Corpus | None) -> list[str]:
    given = config.train_data_paths if split == "train" else config.eval_data_paths
    if given:
        return expand_paths(given)
    return corpus.paths(split) if corpus else []


def _check_overlap(train: Sequence[str], evaluation: Sequence[str], *, is_allowed: bool) -> None:
    trained = {identity(path) for path in train}
    shared = [shown_path(path) for path in evaluation if identity(path) in trained]
    if shared and not is_allowed:
        raise InputError(
            f"{listed(shared)} are in both --train_data_paths and --eval_data_paths, so scores would be of cells seen "
            "in training. Separate them, or pass --allow_overlap."
        )


def _dataset(
    config: "TrainingConfig", tokenizer: GeneTokenizer, arguments: TrainingArguments, split: str,
    corpus: Corpus | None, **options: Any,
) -> IterableAnnDataset | None:  # fmt: skip
    paths = _paths(config, split, corpus)
    if not paths:
        return None
    is_train = split == "train"
    if corpus and not (config.train_data_paths if is_train else config.eval_data_paths):
        options["known_sizes"] = corpus.sizes(split)
    if is_train:
        is_grouped = config.train_sampling_strategy == "group_by_length"
        options |= {"tokens_per_batch": config.tokens_per_batch, "group_by_length": is_grouped}
    return IterableAnnDataset(
        paths,
        tokenizer,
        shuffle=is_train,
        seed=arguments.seed,
        batch_size=arguments.per_device_train_batch_size if is_train else arguments.per_device_eval_batch_size,
        layer=config.layer,
        gene_id_column=config.gene_id_column,
        missing_labels=config.missing_labels,
        min_gene_coverage=config.min_gene_coverage,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        **options,
    )


def _datasets(
    config: "TrainingConfig", tokenizer: GeneTokenizer, arguments: TrainingArguments, **options: Any
) -> tuple[IterableAnnDataset, IterableAnnDataset | None]:
    corpus = Corpus.open(config.corpus) if config.corpus else None
    paths = [_paths(config, split, corpus) for split in ("train", "eval")]
    _check_overlap(*paths, is_allowed=config.allow_overlap)
    train = _dataset(config, tokenizer, arguments, "train", corpus, **options)
    assert train is not None  # the configuration was checked
    sizes = set(train.sizes)
    if config.shard_size and sizes != {config.shard_size}:
        logger.warning(
            "--shard_size says %d, the files hold %s cells; the files are right", config.shard_size, sorted(sizes)[:5]
        )
    if config.tokens_per_batch and not train.num_batches():
        raise InputError(
            f"{train.num_units()} batches of {config.tokens_per_batch} tokens are fewer than the {train.world_size} "
            "processes. Lower --tokens_per_batch."
        )
    if not config.tokens_per_batch and len(train) < arguments.per_device_train_batch_size:
        raise InputError(
            f"{len(train)} training cells per process are fewer than one batch of "
            f"{arguments.per_device_train_batch_size}. Lower --per_device_train_batch_size."
        )
    return train, _dataset(config, tokenizer, arguments, "eval", corpus, **options)


# -- model --------------------------------------------------------------------------------------------------------


#: A masked model's direct path in its weights file.
VOTES = "direct_labels.votes_tk"
_SHAPE = ("norm_position", "bin_gain_range")


def _own_sizes(config: "TrainingConfig") -> dict[str, Any]:
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "dropout")
    return {name: getattr(config, name) for name in (*names, *_SHAPE) if getattr(config, name) is not None}


def model_config(config: "TrainingConfig", tokenizer: GeneTokenizer, **extra: Any) -> GeneBertConfig:
    """Return the model's configuration: preset, then own sizes, then what the tokenizer fixes."""
    sizes = {**load_preset(config.model_arch), **_own_sizes(config)}
    if config.hidden_size and not config.intermediate_size:
        sizes["intermediate_size"] = 4 * config.hidden_size
    asked = extra.get("phenotype_category")  # of a classifier
    num_labels = sum(len(labels) for name, labels in tokenizer.phenotypes.items() if asked in (None, name))
    is_small = num_labels <= sizes["hidden_size"]  # then the votes are no more numbers than the genes' vectors
    if config.direct_path == "auto" and not is_small:
        logger.info("%d labels outnumber hidden_size %d: no --direct_path", num_labels, sizes["hidden_size"])
    sizes["direct_path"] = {"auto": is_small, "always": True, "never": False}[config.direct_path]
    sizes |= {"initializer_range": round(1 / math.sqrt(sizes["hidden_size"]), 4), "embedding_range": EMBEDDING_RANGE}
    return GeneBertConfig(**{**sizes, **_kernel(config), **tokenizer_facts(tokenizer), **extra})


def _with_learning_rate(config: "TrainingConfig") -> Any:
    """Fill in the learning rate, so that `run.yaml` tells it; the width is the pretrained model's, if there is one."""
    if config.pretrained_model_path:
        hidden_size = _pretrained_config(config).hidden_size
    else:
        hidden_size = config.hidden_size or load_preset(config.model_arch)["hidden_size"]
    return config.with_learning_rate(hidden_size)


def _kernel(config: "TrainingConfig") -> dict[str, str]:
    return {"attention_kernel": config.attn_implementation}


def tokenizer_facts(tokenizer: GeneTokenizer) -> dict[str, Any]:
    """Return the settings of a model that its tokenizer decides."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "type_vocab_size": tokenizer.type_vocab_size,
        "first_bin_id": tokenizer.first_bin_id,
        "phenotype_id_ranges": tokenizer.phenotype_id_ranges,
        "bin_levels": tokenizer.bin_edges.levels(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def check_fingerprint(model_config: GeneBertConfig, tokenizer: GeneTokenizer, *, source: str) -> None:
    """Refuse weights that were trained with other genes, labels or bins than the tokenizer's."""
    if model_config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise InputError(
            f"{source} was trained with another tokenizer (genes, labels, bins or scale differ), so its weights would "
            "mean other things. Use the corpus that it was trained on, or start without --pretrained_model_path."
        )


def _pretrained_config(config: "TrainingConfig") -> GeneBertConfig:
    path = str(config.pretrained_model_path)
    with _named_if_no_weights(path):
        loaded: GeneBertConfig = GeneBertConfig.from_pretrained(path, trust_remote_code=False)
        return loaded


@contextmanager
def _named_if_no_weights(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no GeneBERT weights ({error}). Give a run folder of mlm or cls.") from error


def _pretrained(kind: type[PreTrainedModel], config: "TrainingConfig", tokenizer: GeneTokenizer, **extra: Any) -> Any:
    path, loaded = str(config.pretrained_model_path), _pretrained_config(config)
    check_fingerprint(loaded, tokenizer, source=path)
    for name, value in {**_kernel(config), **extra}.items():
        setattr(loaded, name, value)
    with _named_if_no_weights(path):
        return _load_weights(kind, path, loaded)


def _inherit_votes(model: GeneBertForClassification, path: str, tokenizer: GeneTokenizer, category: str) -> None:
    """Start a classifier's direct path where the masked model's stands, if there is one."""
    file = cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None or model.direct_classes is None:
        return
    with safe_open(file, framework="pt") as weights:
        if VOTES in weights.keys():  # noqa: SIM118 - no mapping
            start, stop = (bound - model.config.first_label_id for bound in tokenizer.vocabulary.id_range(category))
            with torch.no_grad():
                model.direct_classes.votes_tk.copy_(weights.get_tensor(VOTES)[:, start:stop])
            logger.info("genes vote for %s as in %s from the start", category, path)


def _load_weights(kind: type[PreTrainedModel], path: str, config: GeneBertConfig) -> Any:
    """Load weights, and say in one line which parts start afresh, where transformers prints a table of every weight."""
    table = logging.getLogger("transformers.modeling_utils")
    level = table.level
    table.setLevel(logging.ERROR)
    try:
        loaded: Any = kind.from_pretrained(path, config=config, output_loading_info=True)
    finally:
        table.setLevel(level)
    model, report = loaded
    fresh, unused = (
        sorted({key.partition(".")[0] for key in report[f"{why}_keys"]}) for why in ("missing", "unexpected")
    )
    if fresh or unused:
        logger.info(
            "weights from %s; starting afresh: %s; not used: %s",
            path,
            listed(fresh) or "none",
            listed(unused) or "none",
        )
    return model


# -- run folder ---------------------------------------------------------------------------------------------------


def _check_output(config: "TrainingConfig", arguments: TrainingArguments) -> None:
    """Refuse a folder in use; by the first rank only, as others come when it may have written there already."""
    folder = Path(config.output_dir)
    if arguments.process_index:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not config.resume_from_checkpoint:
        raise InputError(
            f"{folder} exists and is not empty: an older run's checkpoints would be mixed with this one's. Choose "
            "another --output_dir, or continue with --resume_from_checkpoint."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Choose another --output_dir.") from error


def _checkpoint(config: "TrainingConfig", arguments: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from; the first rank looks it through and clears up before others look."""
    wanted, is_first = config.resume_from_checkpoint, arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if is_first:
            clean_up(config.output_dir)
        if wanted is None:
            return None
        if wanted != "latest":
            if is_first:
                check_whole(wanted)
            found: str | None = wanted
        else:
            newest = newest_whole(config.output_dir) if is_first else newest_sealed(config.output_dir)
            found = None if newest is None else str(newest)
        if found and is_first:
            _check_settings(config, arguments, Path(found))
    if found is None and is_first:
        logger.warning("%s holds no checkpoint yet: starting from the beginning", config.output_dir)
    return found


def _check_settings(config: "TrainingConfig", arguments: TrainingArguments, checkpoint: Path) -> None:
    """Compare the settings with those of the checkpoint's run; refuse those that would make it another run."""
    path = checkpoint.parent / RUN_FILE
    if not path.is_file():
        return
    then, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(config.to_yaml())
    if shape := [name for name in differing(then, now) if name in MODEL_SETTINGS]:
        changes = "; ".join(f"{name} was {then[name]}, is {now[name]}" for name in shape)
        raise InputError(
            f"{checkpoint} holds a model of another shape: {changes}. Give the settings of then, or start a new run in "
            "another --output_dir."
        )
    ranks = (int(manifest_of(checkpoint).get("world_size", 1)), arguments.world_size)
    grave, noted = changed_settings(then, now, ranks=ranks)
    if noted or grave:
        logger.warning("settings differ from those of %s: %s", path, "; ".join([*grave, *noted]))
    if grave and not config.allow_changed:
        raise InputError(
            f"{checkpoint} was trained with other settings: {'; '.join(grave)}. The result would be that of neither. "
            "Give the settings of then, or --allow_changed."
        )


def _model_card(config: "TrainingConfig", tokenizer: GeneTokenizer, results: dict[str, Any], num_cells: int) -> str:
    lines = [
        "---", "library_name: transformers", "tags: [single-cell, gene-expression, perturbgene]", "---",
        f"# {Path(config.output_dir).name}: GeneBERT {config.verb} model", "",
        f"Trained by perturbgene {__version__} on {num_cells:,} cells, {len(tokenizer.panel):,} genes.", "",
        "| phenotype | question | cells | accuracy | macro F1 |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for category, questions in results.items():
        for name, scores in questions.items():
            lines.append(
                f"| {category} | {name} | {scores['n']:,} | {scores['accuracy']:.3f} | {scores['macro_f1']:.3f} |"
            )
    command = f"perturbgene predict {config.output_dir} cells.h5ad --output predicted.h5ad"
    return "\n".join([*lines, "", "Use it:", "", "```bash", command, "```", ""])


def _finish(trainer: ShardedTrainer, config: "TrainingConfig", tokenizer: GeneTokenizer, evaluator: Evaluator) -> Path:
    """Score the final (best) weights and write the run folder."""
    results: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        results = evaluator.results()

    def write_more(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        write_json(folder / METRICS_FILE, without_nan(results), indent=1)
        assert isinstance(trainer.train_dataset, IterableAnnDataset)
        card = _model_card(config, tokenizer, results, sum(trainer.train_dataset.sizes))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        history = pd.DataFrame(trainer.state.log_history).drop(columns="train_loss", errors="ignore")
        if "loss" in history:
            figure = loss_figure(history, title=f"{config.verb}: {Path(config.output_dir).name}")
            save_figure(figure, folder / "loss.png")

    trainer.deliver(write_more)
    return Path(config.output_dir)


def _train(
    config: "TrainingConfig",
    arguments: TrainingArguments,
    tokenizer: GeneTokenizer,
    evaluators: tuple[Evaluator, Evaluator],
    **parts: Any,
) -> Path:
    """Train with the first evaluator, score the best weights with the second; nobody else may write there."""
    folder, is_first = Path(config.output_dir), arguments.process_index == 0
    with claimed(folder) if is_first else nullcontext():
        checkpoint = _checkpoint(config, arguments)
        trainer = ShardedTrainer(args=arguments, evaluator=evaluators[0], ema_decay=config.ema_decay, **parts)
        is_last = bool(checkpoint) and trainer.is_finished(str(checkpoint))
        if (is_last or config.resume_from_checkpoint == "latest") and trainer.is_delivered():
            logger.info("%s is finished: nothing to resume", folder)
            return folder
        if is_first:
            trainer.withdraw()
            config.save(folder / RUN_FILE)
            tokenizer.save_pretrained(folder)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop.stopped_by:
            raise _stopped(trainer)
        trainer.evaluator = evaluators[1]
        return _finish(trainer, config, tokenizer, evaluators[1])


def _stopped(trainer: ShardedTrainer) -> StoppedError:
    number, step = trainer.stop.stopped_by, trainer.state.global_step
    if not trainer.is_world_process_zero():  # one process tells
        return StoppedError("", exit_code=128 + number)
    return StoppedError(
        f"stopped by {signal.Signals(number).name} after step {step} of {trainer.state.max_steps}, all of it saved in "
        f"{trainer.folder}/checkpoint-{step}. The same command with --resume_from_checkpoint goes on from there.",
        exit_code=128 + number,
    )


# -- verbs --------------------------------------------------------------------------------------------------------


def run_mlm(config: "MlmConfig") -> Path:
    """Train by masking genes and phenotypes together; returns the run folder.

    Raises:
        InputError: Data, weights or settings do not fit together.
    """
    config = _with_learning_rate(config)
    arguments = config.training_arguments()
    _check_output(config, arguments)
    set_seed(arguments.seed)
    tokenizer = GeneTokenizer.from_config(config)
    train, evaluation = _datasets(config, tokenizer, arguments)
    weights = {"phenotype_loss_weight": config.phenotype_loss_weight, "gene_loss_weight": config.gene_loss_weight}
    if config.pretrained_model_path:
        model = _pretrained(GeneBertForPhenotypicMLM, config, tokenizer, **weights)
    else:
        model = GeneBertForPhenotypicMLM(model_config(config, tokenizer, **weights))
    collator = DataCollatorForPhenotypicMLM(
        tokenizer,
        gene_mask_prob=config.gene_mask_prob,
        phenotype_mask_prob=config.phenotype_mask_prob,
        absent_prob=config.absent_prob,
        unexpressed_ratio=config.unexpressed_ratio,
        seed=arguments.seed,
        pad_to_multiple_of=config.pad_to_multiple_of,
        packed=config.pad_to_multiple_of is None,
        gene_drop_prob=config.gene_drop_prob,
    )
    packed = replace(collator, packed=True, gene_drop_prob=0.0)  # scores are those of whole cells
    quick = [Question("alone", (category,)) for category in tokenizer.included_phenotypes]
    evaluator = MlmEvaluator(tokenizer, collator=packed, questions=quick)
    final = MlmEvaluator(tokenizer, collator=packed, questions=standard_questions(tokenizer.included_phenotypes))
    return _train(
        config, arguments, tokenizer, (evaluator, final),
        model=model, train_dataset=train, eval_dataset=evaluation, data_collator=collator,
    )  # fmt: skip


def class_names(tokenizer: GeneTokenizer, category: str, binary_label: str | None) -> list[str]:
    """Return the names of a classifier's classes, by class number."""
    return [f"not {binary_label}", binary_label] if binary_label else list(tokenizer.phenotypes[category])


def class_weights(counts_k: np.ndarray) -> list[float]:
    """Weigh classes inversely to their training cells, so that the mean weight over training cells is 1.

    Example:
        >>> class_weights(np.array([30, 10, 0]))
        [0.6667, 2.0, 0.0]
    """
    weights_k = np.where(counts_k > 0, counts_k.sum() / np.maximum(counts_k, 1) / max(1, (counts_k > 0).sum()), 0.0)
    return [round(float(weight), 4) for weight in weights_k]


def run_cls(config: "ClsConfig") -> Path:
    """Train a classifier of one phenotype, from scratch or from an mlm run; returns the run folder.

    Raises:
        InputError: Data, weights or settings do not fit together, or the training cells have one class only.
    """
    config = _with_learning_rate(config)
    arguments = config.training_arguments()
    _check_output(config, arguments)
    set_seed(arguments.seed)
    full = GeneTokenizer.from_config(config)
    full.vocabulary.check_category(config.phenotype_category)
    others = [name for name in config.included_phenotypes if name != config.phenotype_category]
    tokenizer = full.with_settings(included=others)
    train, evaluation = _datasets(
        config, tokenizer, arguments, phenotype_category=config.phenotype_category, binary_label=config.binary_label
    )
    names, counts_k = class_names(tokenizer, config.phenotype_category, config.binary_label), train.class_counts()
    if (counts_k > 0).sum() < 2:
        raise InputError(f"all training cells are {names[int(counts_k.argmax())]!r}: there is nothing to tell apart.")
    rare = [name for name, count in zip(names, counts_k, strict=True) if count < 2]
    if rare:
        logger.warning("classes with fewer than two training cells cannot be learnt: %s", listed(rare))
    head = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "phenotype_category": config.phenotype_category,
        "class_weights": None if config.balanced_dataset else class_weights(counts_k),
    }
    if config.pretrained_model_path:
        model = _pretrained(GeneBertForClassification, config, tokenizer, **head)
        if config.binary_label is None:  # else classes are no labels
            _inherit_votes(model, config.pretrained_model_path, full, config.phenotype_category)
    else:
        model = GeneBertForClassification(model_config(config, tokenizer, **head))
    evaluator = ClassEvaluator(names, tokenizer=tokenizer, category=config.phenotype_category)
    is_packed = config.pad_to_multiple_of is None
    collator = collate_fn_wrapper(
        tokenizer,
        config.pad_to_multiple_of,
        packed=is_packed,
        gene_drop_prob=config.gene_drop_prob,
        seed=arguments.seed,
    )
    return _train(
        config, arguments, tokenizer, (evaluator, evaluator),
        model=model, train_dataset=train, eval_dataset=evaluation, data_collator=collator,
    )  # fmt: skip
