"""Options that `mlm` and `cls` share, for data, model and training, and the `TrainingArguments` made from them.

Owns defaults and checks of both; what only one of them has is in `verbs`. Imports torch and transformers only to build
training arguments.
"""

import math
import re
import sys
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from perturbgene.cli.base import BaseConfig, BinOptions
from perturbgene.cli.options import DATA, IN_OUT, MODEL, TRAINING, option, own_flags
from perturbgene.devices import check_bfloat16, has_fast_bfloat16
from perturbgene.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Peak learning rate x hidden size. Under Adam the best rate falls as one over the width (Yang et al. 2022,
#: arXiv:2203.03466); 64 wide, 1.5e-3 to 4e-3 did equally well on 3,000 sorted PBMC (docs/experiments.md).
RATE_TIMES_WIDTH = 0.128
#: Factor of the rate when training starts from given weights: a new head still needs a high rate. Fine-tuned on 560
#: PBMC, 64 wide, 1e-3 did best; 3e-4 for six epochs left the head untrained.
RATE_OF_FINE_TUNING = 0.5
#: Cells that a run reads by default, of few cells again and again: 800 batches of 32.
DRAWN_CELLS = 25_600
#: So often a run is scored whose passes have fewer cells than `LONG_PASS`: scoring 40 times took half of its time.
EVALUATIONS, LONG_PASS = 10, 5_000

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
    "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau",
]  # fmt: skip
#: Fields of `TrainingArguments` that can have no other value here than their default -> why.
IMPOSSIBLE = {
    "label_smoothing_factor": "the losses of phenotypes and genes are computed by the model, which smooths no labels",
    "neftune_noise_alpha": "it adds noise to padded batches of words, and cells are packed without padding",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "every batch is packed to another length, which torch.compile cannot follow",
    ),
    "use_liger_kernel": "its kernels are for language models of words",
    "train_sampling_strategy": "cells are read in random order",
}
#: Fields that say what a model looks like; a pretrained one has its own.
SHAPE = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "dropout", "norm_position",
    "bin_gain_range",
)  # fmt: skip
#: Schedules that need arguments -> an example for --lr_scheduler_kwargs.
SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": 1000}',
}

Logger = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "trackio", "none", "all"]


@dataclass(frozen=True, kw_only=True)
class DataOptions(BinOptions):
    """Which cells are read and how they become tokens (mlm, cls)."""

    group = DATA

    corpus: str | None = option(
        None, "Folder made by `prepare`: shards, vocabulary, panel, bins.", is_path=True, excludes=("train_data_paths",)
    )
    train_data_paths: list[str] = option([], "Training files: paths, globs, a_{0..9}.h5ad or URLs.", is_path=True)
    eval_data_paths: list[str] = option([], "Evaluation files; they replace those of a corpus.", is_path=True)
    vocab_path: str | None = option(None, "JSON file {category: [labels]} with the phenotypes.", is_path=True)
    included_phenotypes: list[str] = option(
        [], "Phenotypes in a sequence, in this order. Default: all.", is_unique=True
    )
    max_length: int = option(
        2048, "Maximum number of a cell's tokens that the transformer reads, with [CLS] and [EOS]. Votes for labels "
        "(--direct_path) always come from all of its genes.", within="[3, inf)",
    )  # fmt: skip
    pad_to_multiple_of: int | None = option(None, "Pad to a multiple of this; tensor cores like 8.", within="[1, inf)")
    allow_overlap: bool = option(False, "Continue even if a file or cell is in both training and evaluation.")

    @property
    def has_eval_data(self) -> bool:
        """Whether there are cells to evaluate on."""
        return bool(self.corpus or self.eval_data_paths)

    def check(self) -> None:
        super().check()
        if not self.corpus and not self.train_data_paths:
            raise InputError(
                "Neither corpus nor train_data_paths is given, so there are no cells to train on. "
                "Give --corpus DIR (made by `perturbgene prepare`) or --train_data_paths."
            )
        least = 2 + 1 + len(self.included_phenotypes)
        if self.max_length < least:
            raise InputError(
                f"max_length is {self.max_length}, but [CLS], {least - 3} phenotypes, one gene and [EOS] need "
                f"{least} tokens. Raise --max_length."
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseConfig):
    """Size of the model and where its first weights come from (mlm, cls)."""

    group = MODEL

    model_arch: Literal["auto", "tiny", "small", "base", "large"] = option(
        "auto", "Preset sizes; flags below change them. auto: tiny for up to 50,000 training cells, small above."
    )
    pretrained_model_path: str | None = option(
        None, "Run folder or Hugging Face model with weights and sizes to start from.", is_path=True, may_be_on_hub=True
    )
    train_only: Literal["all", "head", "lora", "votes"] = option(
        "all", "What learns. head: only the output layers of a pretrained model. lora: these, a low-rank update of "
        "each matrix of its encoder (needs peft), and what is new to it. votes: only the regression of labels on "
        "genes, which takes no training steps.",
    )  # fmt: skip
    compare_scratch: bool = option(
        False, "Then train the same without --pretrained_model_path, into OUTPUT_DIR/scratch, so that evaluate shows "
        "whether the start has paid. This takes longer than the run itself.",
    )  # fmt: skip
    num_hidden_layers: int | None = option(None, "Number of layers.", within="[1, inf)")
    num_attention_heads: int | None = option(None, "Number of attention heads per layer.", within="[1, inf)")
    hidden_size: int | None = option(None, "Size of a token's vector.", within="[1, inf)")
    intermediate_size: int | None = option(None, "Size inside the feed-forward network.", within="[1, inf)")
    dropout: float | None = option(None, "Dropout after embeddings and sublayers, not in attention.", within="[0, 1)")
    norm_position: Literal["post", "branch"] | None = option(
        None, "LayerNorm after each sum (post, as in DistilBERT) or on what a sublayer adds (branch, the presets)."
    )
    bin_gain_range: float | None = option(
        None, "How much a gene's expression bin scales its vector before training: 1 + this * (mean expression of "
        "the bin - 1). 0 only adds the two vectors (BERT).", within="[0, 1]",
    )  # fmt: skip
    direct_path: Literal["auto", "always", "never"] = option(
        "auto", "Let the expressed genes vote for labels: a regression, solved before training, to which the "
        "transformer adds what it earns on held-out cells. auto and always do, never does not.",
    )  # fmt: skip
    attn_implementation: Literal["auto", "matmul", "sdpa", "varlen", "flash"] = option(
        "auto", "How attention is computed; auto chooses the fastest that the device supports."
    )

    def check(self) -> None:
        super().check()
        fixed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "norm_position",
                 "bin_gain_range", "direct_path")  # fmt: skip
        for name in fixed if self.pretrained_model_path else ():
            if getattr(self, name) not in (None, "auto"):
                raise InputError(
                    f"{name} is given, but the model of --pretrained_model_path has its own. Remove --{name}."
                )
        if self.compare_scratch and not self.pretrained_model_path:
            raise InputError(
                "compare_scratch is given, but without a pretrained model the run is from scratch itself. Give "
                "--pretrained_model_path, or remove --compare_scratch."
            )
        if self.train_only in ("head", "lora") and not self.pretrained_model_path:
            raise InputError(
                f"train_only is {self.train_only}, which keeps the encoder as it is, but without a pretrained model it "
                "is random. Give --pretrained_model_path, or remove --train_only."
            )
        if self.train_only == "lora" and find_spec("peft") is None:
            raise InputError("train_only is lora, which needs the package peft. Install it with `pip install peft`.")
        if self.train_only == "votes" and self.direct_path == "never":
            raise InputError(
                "train_only is votes, but direct_path never leaves the genes' votes out, so nothing would learn. "
                "Remove --train_only or --direct_path."
            )
        heads, hidden = self.num_attention_heads, self.hidden_size
        if heads and hidden and hidden % heads:
            raise InputError(
                f"hidden_size is {hidden}, which {heads} heads cannot share equally. Choose a --hidden_size that is "
                "a multiple of --num_attention_heads."
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(BaseConfig):
    """How long and how fast to train (mlm, cls); any other TrainingArguments field is an override."""

    group = TRAINING

    output_dir: str = option(
        "", "Run folder to write: weights, settings and metrics.", group=IN_OUT, is_required=True, is_folder=True
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to continue from. Without a value: the newest valid one.", group=IN_OUT, bare="latest"
    )
    allow_changed: bool = option(
        False, "Resume even if settings changed that affect the order of cells or the size of a step; train even if a "
        "data file is not what it was.", group=IN_OUT,
    )  # fmt: skip
    learning_rate: float | None = option(
        None, "Peak learning rate of AdamW. Default: 0.128 / hidden size (tiny 2e-3, small 5e-4, base 1.7e-4, "
        "large 1.25e-4), or half of it if training starts from a pretrained model.", within="(0, inf)",
    )  # fmt: skip
    per_device_train_batch_size: int = option(32, "Number of cells per batch and device.", within="[1, inf)")
    tokens_per_batch: int | None = option(
        None, "Maximum number of tokens in a device's batch, instead of a number of cells; at least --max_length. "
        "Tokens are counted before genes are masked or dropped.", within="[3, inf)",
    )  # fmt: skip
    per_device_eval_batch_size: int = option(64, "Number of cells per evaluation batch and device.", within="[1, inf)")
    gradient_accumulation_steps: int = option(1, "Number of batches per optimizer step.", within="[1, inf)")
    num_train_epochs: float | None = option(
        None, "Number of passes over the training cells. Default: as many as read about 25,600 cells, but 3 to 40; a "
        "quarter of them, but 3 to 10, if training starts from a pretrained model.", within="(0, inf)",
    )  # fmt: skip
    max_steps: int = option(-1, "Stop after this many steps, even within an epoch; -1: no limit.", within="[-1, inf)")
    lr_scheduler_type: Schedule = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.1, "Steps to the peak learning rate; below 1, a share of all.", within="[0, inf)")
    weight_decay: float | None = option(
        None, "Decoupled weight decay. Default: 0.3 for up to 10,000 training cells, 0.01 above.", within="[0, inf)"
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", within="[0, inf)")
    bf16: bool | None = option(None, "Compute in bfloat16. Default: only if the device is fast at it.")
    use_cpu: bool = option(False, "Use the CPU even if there is a GPU.")
    seed: int = option(42, "Seed of the weights, the order of cells and the masks.", within="[0, 4294967295]")
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = option(
        "auto",
        "When to evaluate. auto: every --eval_steps if they are given, otherwise after each pass, but about "
        "ten times in a run whose passes are short (fewer than 5,000 cells).",
    )
    eval_steps: float | None = option(None, "Steps between evaluations; below 1, a share of all.", within="(0, inf)")
    early_stopping_patience: int | None = option(
        None, "End training after this many evaluations without improvement, and keep the best weights. What improves "
        "is --metric_for_best_model: the loss (mlm) or macro F1 (cls) by default.", within="[1, inf)",
    )  # fmt: skip
    early_stopping_threshold: float = option(0.0, "Smallest change that is an improvement.", within="[0, inf)")
    save_strategy: Literal["auto", "no", "steps", "epoch", "best"] = option(
        "auto", "When to write a checkpoint. auto: every --save_steps if they are given, otherwise when evaluating."
    )
    save_steps: float | None = option(None, "Steps between checkpoints; below 1, a share of all.", within="(0, inf)")
    save_total_limit: int | None = option(2, "Checkpoints to keep, including the best one.", within="[1, inf)")
    logging_steps: float = option(10, "Steps between log lines; below 1, a share of all.", within="(0, inf)")
    report_to: list[Logger] = option(
        ["tensorboard"], "Where logs go, in addition to the terminal; tensorboard and wandb also get the figures."
    )
    dataloader_num_workers: int = option(
        0, "Number of processes that read cells. Two threads read already, so more processes rarely help. This does "
        "not affect the cells or masks.", within="[0, inf)",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        for name in ("eval", "save"):
            strategy, steps = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if steps is not None and strategy not in ("auto", "steps"):
                raise InputError(
                    f"{name}_steps is {steps:g}, but {name}_strategy is {strategy}, which ignores steps. "
                    f"Remove --{name}_steps or --{name}_strategy."
                )
            if strategy == "steps" and steps is None:
                raise InputError(f"{name}_strategy is steps, but their number is missing. Give --{name}_steps.")
        if self.max_steps == 0:
            raise InputError("max_steps is 0, which trains nothing. Give --max_steps 1 or more, or -1 for no limit.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(DataOptions, ModelOptions, TrainOptions):
    """Options of mlm and cls; ``training_overrides`` has the TrainingArguments fields that are not our own flags."""

    best_metric: ClassVar[str] = "eval_loss"

    training_overrides: dict[str, Any] = field(default_factory=dict)
    gene_drop_prob: float | None = option(
        None, "Drop a random share of each training cell's genes, between 0 and this, drawn again in every epoch, "
        "against learning few cells by heart. Default: 0.9 for up to 1,000 training cells, 0.5 for up to 10,000, 0 "
        "above.", group=TRAINING, within="[0, 1]",
    )  # fmt: skip

    sample_by: str | None = option(
        None, "Draw cells of rare labels more often: a phenotype, or a column of obs that the corpus keeps. A label's "
        "share of the draws grows with the square root of its number of cells, and an epoch has about as many draws as "
        "there are cells. Cells without a label are drawn once. The regression of labels on genes weights cells in the "
        "same way.", group=TRAINING,
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        budget, packed = self.tokens_per_batch, ("per_device_train_batch_size", "pad_to_multiple_of")
        if budget is not None and budget < self.max_length:
            raise InputError(
                f"tokens_per_batch is {budget}, but a single cell may have max_length {self.max_length} tokens. "
                "Raise --tokens_per_batch, or lower --max_length."
            )
        for name in packed if budget is not None else ():
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise InputError(
                    f"tokens_per_batch {budget} and {name} {value} are both given, but batches of --tokens_per_batch "
                    f"have as many cells as fit and are packed without padding. Remove --tokens_per_batch or --{name}."
                )
        if self.eval_strategy not in ("auto", "no") and not self.has_eval_data:
            raise InputError(
                f"eval_strategy is {self.eval_strategy}, but there is nothing to evaluate on. "
                "Give --eval_data_paths or --corpus, or remove --eval_strategy."
            )
        if self.early_stopping_patience and (self.eval_strategy == "no" or not self.has_eval_data):
            raise InputError(
                "early_stopping_patience needs evaluations, but there are none. Give --corpus or --eval_data_paths, "
                "and remove --eval_strategy no."
            )
        if self.train_only == "votes" and self.early_stopping_patience:
            raise InputError(
                "train_only is votes, which takes no training steps: --early_stopping_patience has nothing to stop. "
                "Remove one of them."
            )
        if self.train_only == "lora" and self.training_overrides.get("fsdp"):
            raise InputError("train_only is lora, which cannot be combined with --fsdp. Remove one of them.")
        for name, reason in IMPOSSIBLE.items():
            value = self.training_overrides.get(name)
            if value not in (None, "random") and (value or name == "neftune_noise_alpha"):  # 0 adds its hook, too
                raise InputError(f"{name} is {value}, but {reason}. Remove --{name}.")
        if self.compare_scratch and not self.corpus:
            raise InputError(
                "compare_scratch is given without a corpus, so the run from scratch has nothing to take genes, labels "
                "and bins from. Give --corpus, or remove --compare_scratch."
            )
        if not (self.corpus or self.pretrained_model_path or self.bin_edges or self.bin_edges_path):
            raise InputError(
                "Bin edges are missing, and there is no corpus or pretrained model to take them from. "
                "Give --bin_edges 0.5 1 2 4, or --bin_edges_path."
            )

    def suited_to(self, num_cells: int) -> Self:
        """Return the settings with what suits so many training cells, where nothing is given (docs/experiments.md)."""
        is_start = self.pretrained_model_path is None
        draws, most = (DRAWN_CELLS, 40.0) if is_start else (DRAWN_CELLS / 4, 10.0)
        suited: dict[str, Any] = {
            "num_train_epochs": float(round(min(max(draws / num_cells, 3.0), most))),
            "weight_decay": 0.3 if num_cells <= 10_000 else 0.01,
            "gene_drop_prob": 0.9 if num_cells <= 1_000 else 0.5 if num_cells <= 10_000 else 0.0,
        }
        suited = {name: value for name, value in suited.items() if getattr(self, name) is None}
        if self.model_arch == "auto":
            suited["model_arch"] = "tiny" if num_cells <= 50_000 else "small"
        return replace(self, **suited)

    def passes_per_evaluation(self, num_cells: int) -> int:
        """Return after how many passes over so many cells to evaluate and save, where that is left to us."""
        is_free = self.eval_strategy == self.save_strategy == "auto" and not (self.eval_steps or self.save_steps)
        if not is_free or self.max_steps > 0 or self.num_train_epochs is None or num_cells >= LONG_PASS:
            return 1
        return math.ceil(self.num_train_epochs / EVALUATIONS)

    def with_learning_rate(self, hidden_size: int) -> Self:
        """Return the settings with a learning rate: the one given, or one that suits the width of the model."""
        if self.learning_rate is not None:
            return self
        rate = RATE_TIMES_WIDTH / hidden_size * (RATE_OF_FINE_TUNING if self.pretrained_model_path else 1)
        return replace(self, learning_rate=float(f"{rate:.3g}"))

    def training_arguments(self) -> "TrainingArguments":
        """Build the `transformers.TrainingArguments`, overrides last (imports transformers).

        Raises:
            InputError: transformers refuses the combination.
        """
        import torch
        from transformers import TrainingArguments

        known = {declared.name for declared in fields(TrainingArguments)}
        own = {name: getattr(self, name) for name in own_flags(type(self)) if name in known}
        not_yet_known = ("learning_rate", "num_train_epochs", "weight_decay")
        own = {name: value for name, value in own.items() if value is not None or name not in not_yet_known}
        use_cpu = self.use_cpu or not torch.accelerator.is_available()
        device_type = "cpu" if use_cpu else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        has_fp16 = bool(self.training_overrides.get("fp16"))
        if self.bf16 and not has_fp16:
            check_bfloat16(device_type, flag="--bf16")
        bf16 = (not has_fp16 and has_fast_bfloat16(device_type)) if self.bf16 is None else self.bf16
        settings = {
            **own,
            **self._schedule_settings(),
            "use_cpu": use_cpu,
            "bf16": bf16,
            "logging_nan_inf_filter": False,  # True logs 0.0 while the weights are NaN
            "remove_unused_columns": False,
            "disable_tqdm": not sys.stderr.isatty(),
            "label_names": ["labels"],
            "hub_strategy": "end",  # half-trained weights stay here
            "include_num_input_tokens_seen": "no",
            **self.training_overrides,
        }
        if metric := settings["metric_for_best_model"]:
            settings.setdefault("greater_is_better", re.search(r"loss(_genes|_phenotypes)?$", metric) is None)
        if isinstance(mesh := settings.get("parallelism_config"), dict):
            from accelerate import ParallelismConfig

            settings["parallelism_config"] = ParallelismConfig(**mesh)
        try:
            arguments = TrainingArguments(**settings)
        except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
            raise InputError(f"The training flags were refused by transformers: {error}") from error
        _check_parts(arguments)
        return arguments

    def _schedule_settings(self) -> dict[str, Any]:
        """When to evaluate and save; the best checkpoint is loaded at the end if both happen together."""
        evaluates: str = self.eval_strategy
        if evaluates == "auto":
            evaluates = "no" if not self.has_eval_data else "steps" if self.eval_steps else "epoch"
        saves: str = self.save_strategy
        if saves == "auto":
            saves = "steps" if self.save_steps else "epoch" if evaluates == "no" else evaluates
        save_steps = self.save_steps or self.eval_steps or 500
        is_multiple = saves != "steps" or (save_steps / (self.eval_steps or save_steps)).is_integer()
        is_together = saves == "best" or (saves == evaluates and is_multiple)
        return {
            "eval_strategy": evaluates,
            "save_strategy": saves,
            "save_steps": save_steps,
            "load_best_model_at_end": evaluates != "no" and is_together,
            "metric_for_best_model": self.best_metric if evaluates != "no" else None,
        }


def _check_parts(arguments: "TrainingArguments") -> None:
    """Make a schedule, an optimizer and the loggers once, so that what fails does so before any cell is read.

    Raises:
        InputError: One of them lacks an argument or a package; names the flag.
    """
    import torch
    from huggingface_hub import HfApi
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    model = torch.nn.Linear(1, 1)
    schedule, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {}
    assert isinstance(settings, dict) and isinstance(arguments.report_to, list)  # TrainingArguments ensures it
    schedule_name, optimizer_name = getattr(schedule, "value", schedule), getattr(arguments.optim, "value", "")
    flag, advice = f"--lr_scheduler_type {schedule_name}", "Correct --lr_scheduler_kwargs"
    if example := SCHEDULE_ARGUMENTS.get(schedule_name):
        advice += f", e.g. --lr_scheduler_kwargs '{example}'"
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=arguments.learning_rate)
        get_scheduler(schedule, optimizer, arguments.get_warmup_steps(100), 100, scheduler_specific_kwargs=settings)
        flag, advice = "--log_level", "Give debug, info, warning, error, critical or passive"
        arguments.get_process_log_level()
        flag, advice = f"--optim {optimizer_name}", "Install what it needs, or choose another --optim"
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
        if "optimizer_dict" not in options:  # layer by layer
            kind(**{"params": list(model.parameters()), **options})
        if arguments.fsdp and arguments.world_size == 1:
            raise InputError("--fsdp needs several processes. Start it with torchrun, or remove --fsdp.")
        if arguments.push_to_hub and arguments.process_index == 0:
            flag, advice = "--push_to_hub", "Log in with `hf auth login`, or remove --push_to_hub"
            HfApi().whoami(token=arguments.hub_token)
        flag, advice = f"--report_to {' '.join(arguments.report_to)}", "Install it, or give --report_to none"
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except InputError:
        raise
    except Exception as error:  # of packages, of the hub, ...: all mean that the flag cannot be used
        raise InputError(f"{flag} cannot be used: {' '.join(str(error).split())} {advice}.") from error
