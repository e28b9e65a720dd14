"""The verbs `mlm` and `cls`: from settings to a run folder.

Owns putting the parts together and what a run folder holds (a Hugging Face model folder with `tokenizer.json`,
`run.yaml`, `metrics.json` and a model card); leaves the loop to `ShardedTrainer`. Letters: k classes, t token types.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from perturbgene.cli.options import conditions
from perturbgene.cli.training import SHAPE
from perturbgene.configs import ClsConfig, MlmConfig, config_of
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.chosen_cells import check_where
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import FileList, expand_paths, identity
from perturbgene.data_utils.shards import ShardCache
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.devices import has_fast_bfloat16
from perturbgene.errors import InputError, StoppedError, listed
from perturbgene.eval_utils import (
    GENE_BINS,
    METRICS_FILE,
    ClassEvaluator,
    MlmEvaluator,
    Question,
    standard_questions,
    without_nan,
)
from perturbgene.files import SUMS_FILE, claimed, write_json
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM, load_preset
from perturbgene.model.heads import DirectPath
from perturbgene.plots import confusion_figure, loss_figure, save_figure
from perturbgene.sharded_trainer import ShardedTrainer
from perturbgene.training import checkpoints
from perturbgene.training.callbacks import FewerEvaluations, StopEarly, show_figures
from perturbgene.training.card import write_card
from perturbgene.training.cell_space import save_space
from perturbgene.training.data_files import DataFiles
from perturbgene.training.tokenizer import tokenizer_of
from perturbgene.training.trainable import choose_weights
from perturbgene.training.transfer import ConfigT, Start, from_scratch, quiet, run_config, start_from
from perturbgene.training.votes import READING, describe_shares, direct_path, fit_shares, solve_votes, vote_alone
from perturbgene.urls import shown_path

if TYPE_CHECKING:
    from perturbgene.configs import TrainingConfig

logger = logging.getLogger(__name__)

#: Spread of fresh embeddings. It is small next to that of linear layers (1 / sqrt(h), which keeps the size of signals),
#: so that what the model learns about a gene soon outweighs the gene's random start (docs/experiments.md).
EMBEDDING_RANGE = 0.02


# -- verbs --------------------------------------------------------------------------------------------------------


def mlm(**settings: Any) -> Path:
    """Train by masking genes and phenotypes together.

    Args:
        settings: Options of `perturbgene mlm`, and fields of `transformers.TrainingArguments`.

    Returns:
        The run folder, `output_dir`.

    Raises:
        InputError: Data, weights or settings do not fit together.

    Example:
        >>> import perturbgene as pg
        >>> corpus = pg.prepare("cells.h5ad", "for_mlm", phenotypes="cell_type", num_top_genes=50)
        >>> folder = pg.mlm(corpus=corpus, output_dir="runs/new", model_arch="tiny", max_steps=2, report_to="none")
        >>> (folder / "model.safetensors").exists()
        True
    """
    return run_mlm(config_of(MlmConfig, settings))


def cls(**settings: Any) -> Path:
    """Train a classifier of one phenotype, from scratch or from another run.

    Args:
        settings: Options of `perturbgene cls`, and fields of `transformers.TrainingArguments`.

    Returns:
        The run folder, `output_dir`.

    Raises:
        InputError: Data, weights or settings do not fit together, or all training cells have the same class.

    Example:
        >>> import perturbgene as pg
        >>> corpus = pg.prepare("cells.h5ad", "for_cls", phenotypes="cell_type", num_top_genes=50)
        >>> settings = {"model_arch": "tiny", "max_steps": 2, "report_to": "none"}
        >>> pg.cls(corpus=corpus, output_dir="runs/cls", phenotype_category="cell_type", **settings).name
        'cls'
    """
    return run_cls(config_of(ClsConfig, settings))


def run_mlm(config: "MlmConfig") -> Path:
    """Train by masking genes and phenotypes together; returns the run folder. Raises what `mlm` raises."""
    if config.compare_scratch:
        return _and_from_scratch(run_mlm, config)
    with _run_folder(config) as (config, arguments):
        cells = _data(config, arguments)
        config, tokenizer = _suited(config, arguments, cells), cells.tokenizer
        collator = DataCollatorForPhenotypicMLM(
            tokenizer,
            **config.mask_rates,
            seed=arguments.seed,
            pad_to_multiple_of=config.pad_to_multiple_of,
            packed=config.pad_to_multiple_of is None,
            gene_drop_prob=config.gene_drop_prob or 0.0,
        )
        packed = replace(collator, packed=True, gene_drop_prob=0.0)  # whole cells are scored
        alone = [Question("alone", (category,)) for category in tokenizer.included_phenotypes]
        every = standard_questions(tokenizer.included_phenotypes)
        quick, final = (MlmEvaluator(tokenizer, collator=packed, questions=questions) for questions in (alone, every))
        weights = {"phenotype_loss_weight": config.phenotype_loss_weight, "gene_loss_weight": config.gene_loss_weight}
        parts: dict[str, Any] = {"data_collator": collator, "evaluator": quick, "final_evaluator": final}
        return _train(GeneBertForPhenotypicMLM, weights, config, arguments, cells, **parts)


def run_cls(config: "ClsConfig") -> Path:
    """Train a classifier of one phenotype; returns the run folder. Raises what `cls` raises."""
    if config.compare_scratch:
        return _and_from_scratch(run_cls, config)
    category, one = config.phenotype_category, config.binary_label
    with _run_folder(config) as (config, arguments):
        cells = _data(config, arguments, phenotype_category=category, binary_label=one)
        config, tokenizer = _suited(config, arguments, cells), cells.tokenizer
        names = [f"not {one}", one] if one else list(tokenizer.phenotypes[category])
        counts_k = cells.train.class_counts()
        if (counts_k > 0).sum() < 2:
            raise InputError(f"all training cells are {names[int(counts_k.argmax())]!r}: there is nothing to classify.")
        if rare := [name for name, count in zip(names, counts_k, strict=True) if count < 2]:
            logger.warning("classes with fewer than two training cells cannot be learned: %s", listed(rare))
        drawn_k = cells.train.class_counts(per_draw=True)
        head = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "phenotype_category": category,
            "class_weights": class_weights(drawn_k) if config.balanced_dataset else None,
        }
        collator = collate_fn_wrapper(
            tokenizer,
            config.pad_to_multiple_of,
            packed=config.pad_to_multiple_of is None,
            gene_drop_prob=config.gene_drop_prob or 0.0,
            seed=arguments.seed,
        )
        evaluator = ClassEvaluator(names, tokenizer=tokenizer, category=category)
        parts: dict[str, Any] = {"data_collator": collator, "evaluator": evaluator}
        return _train(GeneBertForClassification, head, config, arguments, cells, **parts)


def _and_from_scratch(train: Callable[[ConfigT], Path], config: ConfigT) -> Path:
    """Train a run, then the same from scratch within its folder; returns the folder of the first."""
    scratch = from_scratch(config)  # raises before anything is trained
    folder = train(replace(config, compare_scratch=False))
    logger.info("training the same from scratch: %s", scratch.output_dir)
    train(scratch)
    return folder


def class_weights(counts_k: np.ndarray) -> list[float]:
    """Weight classes inversely to their training cells, so that the mean weight over training cells is 1.

    Example:
        >>> class_weights(np.array([30, 10, 0]))
        [0.6667, 2.0, 0.0]
    """
    weights_k = np.where(counts_k > 0, counts_k.sum() / np.maximum(counts_k, 1) / max(1, (counts_k > 0).sum()), 0.0)
    return [round(float(weight), 4) for weight in weights_k]


# -- before training ----------------------------------------------------------------------------------------------


@contextmanager
def _run_folder(config: "TrainingConfig") -> Iterator[tuple[Any, TrainingArguments]]:
    """Hold the run folder while the block runs; yield the settings and those of the trainer."""
    arguments, folder = config.training_arguments(), Path(config.output_dir)
    set_seed(arguments.seed)
    if config.pretrained_model_path:
        run_config(config.pretrained_model_path)  # raises before any cell is read
    if arguments.process_index:  # the first process holds it for all processes of `torchrun`
        yield config, arguments
        return
    with claimed(folder, flag="output_dir", is_inside=True):
        if any(path.name != ".lock" for path in folder.iterdir()) and not config.resume_from_checkpoint:
            raise InputError(
                f"{folder} exists and is not empty: an older run's checkpoints would be mixed with this one's. Choose "
                "another --output_dir, or continue with --resume_from_checkpoint."
            )
        yield config, arguments


def _suited(config: ConfigT, arguments: TrainingArguments, cells: "_Cells") -> ConfigT:
    """Return the settings with what suits the cells and the model filled in, so that `run.yaml` has it."""
    config = config.suited_to(cells.train.num_cells)
    if config.pretrained_model_path:
        hidden_size = run_config(str(config.pretrained_model_path)).hidden_size
    else:
        hidden_size = config.hidden_size or load_preset(config.model_arch)["hidden_size"]
    config = config.with_learning_rate(hidden_size)
    for name in ("num_train_epochs", "weight_decay", "learning_rate"):
        setattr(arguments, name, getattr(config, name))
    if config.bf16 is None and not has_fast_bfloat16(arguments.device.type, hidden_size=hidden_size):
        arguments.bf16, arguments.mixed_precision = False, "fp16" if arguments.fp16 else "no"
    if config.train_only != "votes":  # it takes no steps
        logger.info(
            "settings: %s model, %g passes over %s cells, learning rate %g, weight decay %g, up to %g of a cell's "
            "genes dropped", "the given" if config.pretrained_model_path else config.model_arch,
            config.num_train_epochs, f"{cells.train.num_cells:,}", config.learning_rate, config.weight_decay,
            config.gene_drop_prob,
        )  # fmt: skip
    return config


@dataclass(frozen=True)
class _Cells:
    """The cells of a run: those that this process trains and is scored on, and how to stream all of a split."""

    tokenizer: GeneTokenizer
    train: IterableAnnDataset
    evaluation: IterableAnnDataset | None
    whole: Callable[[str], IterableAnnDataset]  # of "train" or "eval", for one process
    corpus: Corpus | None
    donor_column: str
    files: DataFiles


def _data(config: "TrainingConfig", arguments: TrainingArguments, **classes: Any) -> _Cells:
    """Return the tokenizer, the training cells and the evaluation cells, with paths expanded and opened once."""
    corpus, paths = Corpus.open(config.corpus) if config.corpus else None, {}
    for split, given in (("train", config.train_data_paths), ("eval", config.eval_data_paths)):
        paths[split] = expand_paths(given) if given else FileList()
        if corpus and not given:
            paths[split] = corpus.paths(split)
    files = DataFiles(config.output_dir, [*paths["train"], *paths["eval"]], corpus)
    trained = {identity(path) for path in paths["train"]}
    shared = [shown_path(path) for path in paths["eval"] if identity(path) in trained]
    if shared and not config.allow_overlap:
        raise InputError(
            f"{listed(shared)} are in both --train_data_paths and --eval_data_paths, so scores would be of cells seen "
            "in training. Separate them, or pass --allow_overlap."
        )
    tokenizer = tokenizer_of(config, paths["train"])
    if category := classes.get("phenotype_category"):
        tokenizer.vocabulary.check_category(category)  # what a classifier learns leaves the sequence
        others = [name for name in config.included_phenotypes if name != category]
        tokenizer = tokenizer.with_settings(included=others)
    where = conditions(config.where)
    if where:  # checked on both splits together: one may lack a value that the other has
        with closing(ShardCache([*paths["train"], *paths["eval"]], where=where, **tokenizer.shard_options())) as cache:
            check_where((cache[index].source for index in range(len(cache))), where)
    options: dict[str, Any] = {
        "seed": arguments.seed, "layer": config.layer, "gene_id_column": config.gene_id_column,
        "gene_map": config.gene_map,
        "missing_labels": config.missing_labels, "phenotypes": config.phenotypes, "where": where,
        "min_gene_coverage": config.min_gene_coverage, "has_all_values": False,
        "rank": arguments.process_index, "world_size": arguments.world_size,
    }  # fmt: skip
    options |= classes
    size, budget = arguments.per_device_train_batch_size, config.tokens_per_batch
    train = IterableAnnDataset(
        paths["train"], tokenizer, shuffle=True, batch_size=size, tokens_per_batch=budget, sample_by=config.sample_by,
        **options,
    )  # fmt: skip
    if not train.num_batches() or (not budget and len(train) < train.batch_size):
        what, flag = f"{size} cells", "per_device_train_batch_size"
        if budget:
            what, flag = f"{budget} tokens", "tokens_per_batch"
        raise InputError(
            f"{train.num_cells:,} training cells are fewer than one batch of {what} for each of {train.world_size} "
            f"processes. Lower --{flag}."
        )
    size = arguments.per_device_eval_batch_size
    unlimited = tokenizer.reading(tokenizer.included_phenotypes, is_whole=True)
    evaluation = IterableAnnDataset(paths["eval"], unlimited, batch_size=size, **options) if paths["eval"] else None
    options |= {"rank": 0, "world_size": 1, "batch_size": size}
    donor_column = (corpus.split_by if corpus else None) or "donor_id"

    def whole(split: str) -> IterableAnnDataset:
        with quiet(READING):
            return IterableAnnDataset(paths[split], unlimited, **options)

    return _Cells(tokenizer, train, evaluation, whole, corpus, donor_column, files)


# -- model --------------------------------------------------------------------------------------------------------


def model_config(config: "TrainingConfig", tokenizer: GeneTokenizer, **extra: Any) -> GeneBertConfig:
    """Return the model's configuration: the preset, then given sizes, then what the tokenizer decides."""
    sizes = load_preset(config.model_arch)
    sizes |= {name: getattr(config, name) for name in SHAPE if getattr(config, name) is not None}
    if config.hidden_size and not config.intermediate_size:
        sizes["intermediate_size"] = 4 * config.hidden_size
    sizes["direct_path"] = config.direct_path != "never"
    sizes |= {"initializer_range": round(1 / math.sqrt(sizes["hidden_size"]), 4), "embedding_range": EMBEDDING_RANGE}
    sizes["attention_kernel"] = config.attn_implementation
    return GeneBertConfig(**{**sizes, **tokenizer_facts(tokenizer), **extra})


def tokenizer_facts(tokenizer: GeneTokenizer) -> dict[str, Any]:
    """Return the settings of a model that its tokenizer decides."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "type_vocab_size": tokenizer.type_vocab_size,
        "first_bin_id": tokenizer.first_bin_id,
        "phenotype_id_ranges": tokenizer.phenotype_id_ranges,
        "bin_levels": tokenizer.bin_edges.levels(),
        "most_genes": tokenizer.most_genes,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


# -- training -----------------------------------------------------------------------------------------------------


def _train(
    kind: type, settings: dict[str, Any], config: "TrainingConfig", arguments: TrainingArguments, cells: _Cells,
    **parts: Any,
) -> Path:  # fmt: skip
    """Make the model, fresh or from another run, train it, score the best weights and write the run folder.

    `settings` are those of the model that neither an option nor the tokenizer decides; `parts` go to the trainer.
    """
    tokenizer, evaluation = cells.tokenizer, cells.evaluation
    if config.pretrained_model_path is None:
        start = Start(kind(model_config(config, tokenizer, **settings)), (), {}, has_head=False)
    else:
        settings |= tokenizer_facts(tokenizer)
        start = start_from(kind, config, tokenizer, seed=arguments.seed, **settings)
    model = start.model
    has_states = start.has_head or config.train_only != "votes"
    if config.train_only == "votes":
        arguments.max_steps = 0
        vote_alone(model, has_head=start.has_head)
    else:
        parts["adapters"] = choose_weights(model, config.train_only, is_new=start.is_new)
    if config.early_stopping_patience:
        parts["early_stopping"] = StopEarly(config.early_stopping_patience, config.early_stopping_threshold)
    if has_states:
        parts["before_scoring"] = _fit_shares_on(cells, direct_path(model))
    parts["before_saving"] = cells.files.check
    trainer = ShardedTrainer(args=arguments, model=model, train_dataset=cells.train, eval_dataset=evaluation, **parts)
    trainer.add_callback(FewerEvaluations(config.passes_per_evaluation(cells.train.num_cells)))
    folder, is_first = Path(config.output_dir), trainer.is_world_process_zero()
    checkpoint = _checkpoint(config, arguments)
    is_last = checkpoint is not None and trainer.is_finished(checkpoint)
    if (is_last or config.resume_from_checkpoint == "latest") and trainer.is_delivered():
        logger.info("%s is finished: nothing to resume", folder)
        return folder
    if is_first:
        is_resumed = bool(config.resume_from_checkpoint)
        for change in cells.files.check_start(may_change=config.allow_changed, is_resumed=is_resumed):
            logger.warning("%s", change)
        (folder / SUMS_FILE).unlink(missing_ok=True)
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # the run is not finished, or not any more
        config.save(folder / checkpoints.SETTINGS_FILE)
        tokenizer.save_pretrained(folder)
    if model.config.direct_path and checkpoint is None:
        _solve_votes(model, cells, start=config.pretrained_model_path, class_weights=settings.get("class_weights"))
    if arguments.max_steps != 0:
        trainer.train(resume_from_checkpoint=checkpoint)
    if number := trainer.stop.stopped_by:
        step = trainer.state.global_step
        message = (
            f"stopped by {signal.Signals(number).name} after step {step} of {trainer.state.max_steps}; everything is "
            f"saved in {folder}/checkpoint-{step}. The same command with --resume_from_checkpoint continues from there."
        )
        raise StoppedError(message if is_first else "", exit_code=128 + number)  # one process prints
    trainer.merge_adapters()
    results = trainer.final_results()
    for line in describe_shares(model, tokenizer) if evaluation is not None else ():
        logger.info(line)

    def write_more(waiting: Path) -> None:
        _write_run(waiting, trainer, config, cells, results, kept=start.lines)
        save_space(waiting, model, cells.whole("train"), has_states=has_states)

    trainer.deliver(write_more)
    return folder


def _solve_votes(model: Any, cells: _Cells, *, start: str | None, class_weights: list[float] | None) -> None:
    """Solve the genes' votes on the training cells, from those of the run that training starts from, if they are new.

    Cross-validation would find any penalty good for votes that were solved on the same cells.
    """
    path = direct_path(model)
    if path is not None and start is not None and cells.files.were_read_by(start, cells.train.paths):
        logger.info("%s has read some of these cells: the genes' votes are solved anew", start)
        path.votes_tk.zero_()
    weights: dict[str, Any] = {"class_weights": class_weights, "rate_n": cells.train.rate_n}
    solve_votes(model, cells.whole("train"), donor_column=cells.donor_column, **weights)


def _fit_shares_on(cells: _Cells, path: DirectPath | None) -> Callable[[Any], None] | None:
    """Return what finds out how much the transformer adds to the votes, or None; until then it adds nothing."""
    if path is None:
        return None
    path.share_p2.zero_()
    if cells.evaluation is None:
        logger.warning(
            "no evaluation cells say how much the transformer may add to the genes' votes for labels: it adds nothing"
        )
        return None
    held_out = cells.whole("eval")
    return lambda model: fit_shares(model, held_out)


def _checkpoint(config: "TrainingConfig", arguments: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from; the first process checks it and cleans up before the others look."""
    found, is_first = config.resume_from_checkpoint, arguments.process_index == 0
    is_latest = found == "latest"
    with arguments.main_process_first(local=False):
        if is_first:
            checkpoints.clean_up(config.output_dir)
        if is_first and is_latest:
            checkpoints.set_damaged_aside(config.output_dir)
        if is_latest:
            found = next(map(str, reversed(checkpoints.checkpoints(config.output_dir))), None)
        elif found and is_first:
            checkpoints.check_whole(found)
        if found and is_first:
            settings = yaml.safe_load(config.to_yaml())
            num_ranks, may_change = arguments.world_size, config.allow_changed
            checkpoints.check_settings(Path(found), settings, num_ranks=num_ranks, may_change=may_change)
    if is_latest and found is None:
        logger.warning("%s holds no checkpoint yet: starting from the beginning", config.output_dir)
    return found


def _write_run(
    folder: Path,
    trainer: ShardedTrainer,
    config: "TrainingConfig",
    cells: _Cells,
    results: dict[str, Any],
    *,
    kept: Sequence[str],
) -> None:
    """Write what a run folder holds besides the weights: tokenizer, scores, model card and a figure of the losses."""
    cells.tokenizer.save_pretrained(folder)
    write_json(folder / METRICS_FILE, without_nan(results), indent=1)
    num_cells = sum(trainer.cells.sizes)
    write_card(folder, config, cells.tokenizer, results, corpus=cells.corpus, num_cells=num_cells, kept=kept)
    history = pd.DataFrame(trainer.state.log_history).drop(columns="train_loss", errors="ignore")
    title = f"{config.verb}: {Path(config.output_dir).name}"
    if "loss" in history:
        save_figure(loss_figure(history, title=title), folder / "loss.png")

    def draw() -> dict[str, Any]:
        tables = trainer.final_evaluator.confusions() if results and trainer.final_evaluator is not None else {}
        figures = {
            f"confusion/{name}": confusion_figure(one.table(), title=f"{name.replace('.', ', ')} (held-out cells)")
            for name, one in tables.items()
            if name != GENE_BINS
        }
        return figures | ({"loss_figure": loss_figure(history, title=title)} if "loss" in history else {})

    show_figures(draw, trainer.callback_handler.callbacks, step=trainer.state.global_step)
