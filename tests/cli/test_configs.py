"""Settings: flags, YAML, defaults, checks at the door, training arguments and manual pages."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from perturbgene.cli.options import GROUPS
from perturbgene.cli.parsing import RENAMED, find_flag, training_flags
from perturbgene.cli.training import SCHEDULE_ARGUMENTS, Schedule
from perturbgene.cli.verbs import DividedOptions
from perturbgene.configs import (
    CONFIGS,
    ClsConfig,
    DownloadConfig,
    EvaluateConfig,
    HelpRequested,
    MlmConfig,
    PredictConfig,
    PrepareConfig,
    load_config,
    own_flags,
    parse_args,
)
from perturbgene.data_utils.opening import expand_paths
from perturbgene.errors import InputError

MLM = ["mlm", "--corpus", "corpus", "--output_dir", "run"]
CLS = ["cls", "--corpus", "corpus", "--output_dir", "run", "--phenotype_category", "cell_type"]
PREDICT = ["predict", "run", "in.h5ad", "--output", "out.h5ad"]
FILES = ["mlm", "--output_dir", "run", "--train_data_paths", "a.h5ad"]


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


# Flags


def test_every_verb_has_flags_with_help_and_a_known_group():
    for config_class in CONFIGS.values():
        for flag in own_flags(config_class).values():
            assert flag.help, flag.name
            assert flag.group in GROUPS, flag.name


@pytest.mark.parametrize("config_class", CONFIGS.values(), ids=list(CONFIGS))
def test_every_field_is_a_flag_but_the_overrides(config_class):
    fields = {declared.name for declared in dataclasses.fields(config_class)}
    internal = {"training_overrides", *({"pieces"} if issubclass(config_class, DividedOptions) else ())}
    assert fields - internal == set(own_flags(config_class))


@pytest.mark.parametrize("config_class", CONFIGS.values(), ids=list(CONFIGS))
def test_the_example_of_a_manual_page_can_be_parsed(config_class):
    program, *tokens = config_class.example.replace("--pretrained_model_path runs/mlm", "").split()
    assert program == "perturbgene"
    assert type(parse_args(tokens)) is config_class


def test_a_verb_gives_its_own_config_with_defaults():
    config = parse_args(MLM)
    assert config == MlmConfig(corpus="corpus", output_dir="run")
    assert (config.gene_mask_prob, config.phenotype_mask_prob, config.absent_prob) == (0.15, 0.5, 0.1)


def test_verbs_take_positionals_in_order():
    assert parse_args(PREDICT) == PredictConfig(run="run", input="in.h5ad", output="out.h5ad")
    assert parse_args(["evaluate", "--device", "cpu", "run"]) == EvaluateConfig(run="run", device="cpu")
    assert parse_args(["prepare", "a.h5ad", "b.h5ad", "--output", "c"]).inputs == ["a.h5ad", "b.h5ad"]
    assert parse_args(["download", "https://host/a.h5ad"]) == DownloadConfig(sources=["https://host/a.h5ad"])


def test_two_dashes_end_a_list_before_positionals():
    config = parse_args(["predict", "--output", "o.h5ad", "--ask", "sex", "age", "--", "run", "in.h5ad"])
    assert (config.ask, config.run, config.input) == (["sex", "age"], "run", "in.h5ad")


@pytest.mark.parametrize(
    "tokens",
    [
        ["--corpus", "c", "mlm", "--output_dir", "mlm"],
        ["--corpus", "c", "--output_dir", "mlm", "mlm"],
        ["--output_dir=mlm", "mlm", "--corpus", "c"],
        ["mlm", "--output-dir", "mlm", "--corpus=c"],
    ],
    ids=["verb in the middle", "a value that equals the verb", "value by equals sign", "dashes for underscores"],
)
def test_flags_may_come_before_the_verb(tokens):
    assert parse_args(tokens) == MlmConfig(corpus="c", output_dir="mlm")


def test_two_dashes_end_the_flags():
    config = parse_args(["predict", "run", "--output", "o.h5ad", "--", "-odd.h5ad"])
    assert (config.run, config.input) == ("run", "-odd.h5ad")


def test_a_label_may_be_called_none():
    assert parse_args([*CLS, "--binary_label", "none"]).binary_label == "none"
    assert parse_args(CLS).binary_label is None


def test_the_page_says_which_lists_are_not_split_at_commas():
    assert parse_args(["prepare", "a", "--output", "c", "--eval_donors", "D1,D2"]).eval_donors == ["D1,D2"]
    with pytest.raises(HelpRequested) as page:
        parse_args(["prepare", "-h"])
    entry = str(page.value).partition("--eval_donors")[2].partition("\n  --")[0]
    assert "separate values with spaces; commas are kept" in " ".join(entry.split())


def test_a_list_before_the_verb_ends_at_the_verb():
    config = parse_args(["--given", "sex", "predict", "run", "in.h5ad", "--output", "o.h5ad"])
    assert (config.given, config.run) == (["sex"], "run")


@pytest.mark.parametrize(
    "values",
    [["0.1", "1", "2"], ["0.1,1,2"], ["0.1,", "1,", "2"], ["1e-1", "1,2"]],
    ids=["spaces", "commas", "both", "mixed"],
)
def test_lists_are_cut_at_spaces_and_commas(values):
    assert parse_args([*MLM, "--bin_edges", *values]).bin_edges == [0.1, 1.0, 2.0]


def test_braces_and_labels_keep_their_commas():
    paths = parse_args(
        [*FILES[:3], "--train_data_paths", "s_{0,1}.h5ad,t.h5ad", "--bin_edges", "1", "--vocab_path", "."]
    )
    assert paths.train_data_paths == ["s_{0,1}.h5ad", "t.h5ad"]
    given = parse_args([*PREDICT, "--given", "cell_type=CD4-positive,alpha-beta T cell"]).given_labels
    assert given == {"cell_type": "CD4-positive,alpha-beta T cell"}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--use_cpu"], True),
        (["--use_cpu", "false"], False),
        (["--use_cpu=no"], False),
        (["--no_use_cpu"], False),
        (["--no-use-cpu"], False),
        ([], False),
    ],
)
def test_booleans_may_stand_alone_be_told_or_be_negated(tokens, expected):
    assert parse_args([*MLM, *tokens]).use_cpu is expected


def test_a_boolean_leaves_the_next_positional_alone():
    assert parse_args(["evaluate", "--no_baselines", "run"]).run == "run"
    assert parse_args(["prepare", "--overwrite", "a.h5ad", "--output", "c"]).inputs == ["a.h5ad"]


@pytest.mark.parametrize(
    ("tokens", "name", "expected"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--num_top_genes", "none"], "num_top_genes", None),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", "latest"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", "latest"),
        (["--resume_from_checkpoint", "run/checkpoint-5"], "resume_from_checkpoint", "run/checkpoint-5"),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_values_have_the_type_of_their_field(tokens, name, expected):
    value = getattr(parse_args([*MLM, *tokens]), name)
    assert value == expected
    assert type(value) is type(expected)


# YAML


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write_yaml(tmp_path, "corpus: c\noutput_dir: run\nlearning_rate: 1e-4\nseed: 7\n")
    config = parse_args(["mlm", "--seed", "8", "--config", path])
    assert (config.learning_rate, config.seed, config.max_length) == (1e-4, 8, 2048)


def test_yaml_values_are_typed_like_flags(tmp_path):
    text = "corpus: c\noutput_dir: run\n"
    text += "bin_edges: [1e-1, 1]\neval_strategy: no\nsave_total_limit: null\nadam_beta2: 95e-2\n"
    config = parse_args(["mlm", "--config", write_yaml(tmp_path, text)])
    assert config.bin_edges == [0.1, 1.0]
    assert (config.eval_strategy, config.save_total_limit) == ("no", None)
    assert config.training_overrides == {"adam_beta2": 0.95}


def test_numeric_donors_in_yaml_become_names(tmp_path):
    path = write_yaml(tmp_path, "inputs: a.h5ad\noutput: c\neval_donors: [1, D2]\n")
    assert parse_args(["prepare", "--config", path]).eval_donors == ["1", "D2"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lerning_rate: 1", "lerning_rate in .*Did you mean 'learning_rate'"),
        ("seed: [1, 2]", "seed in .*not a number"),
        ("output_dir: null", "output_dir in .*is empty"),
        ("layer: yes", "put it in quotes"),
        ("seed: 1\nseed: 2", "'seed' more than once"),
        ("- 1\n- 2", "has no `name: value`"),
        ("seed: [1", "not plain YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not plain YAML"),
        ("verb: cls", "for the verb 'cls'"),
        ("config: other.yaml", "name another"),
        ("evaluation_strategy: steps", "called --eval_strategy"),
    ],
)
def test_yaml_that_cannot_be_is_refused_by_name(tmp_path, text, match):
    with pytest.raises(InputError, match=match):
        parse_args([*MLM, "--config", write_yaml(tmp_path, text)])


@pytest.mark.parametrize(
    "tokens",
    [
        MLM,
        [*MLM, "--bin_edges", "1e-5", "2"],
        [*MLM, "--bf16", "--eval_steps", "0.1", "--adam_beta2", "0.95", "--optim", "adamw_torch", "--fsdp"],
        [*MLM, "--lr_scheduler_kwargs", '{"num_cycles": 1}', "--optim_target_modules", "a", "b"],
        [*CLS, "--binary_label", "1e-4", "--balanced_dataset", "--learning_rate", "1e-5"],
        ["prepare", "a.h5ad", "--output", "c", "--eval_donors", "007", "no", "--phenotypes", "a=b"],
        ["evaluate", "run", "--ask", "sex", "--no_baselines"],
        [*PREDICT, "--given", "tissue=lung, left", "sex"],
        ["download", "https://host/a.h5ad", "--retries", "0"],
    ],
    ids=lambda tokens: tokens[0],
)
def test_a_dumped_configuration_reads_back_equal(tmp_path, tokens):
    config = parse_args(tokens)
    config.save(tmp_path / "run.yaml")
    assert parse_args([tokens[0], "--config", str(tmp_path / "run.yaml")]) == config
    assert load_config(tmp_path / "run.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_dump_holds_neither_tokens_nor_passwords():
    urls = ["https://me:s3cret@host/a.h5ad", "https://host/b_{0..3}.h5ad?X-Signature=s3cret", "s3://bucket/*.h5ad"]
    text = parse_args([*MLM, "--hub_token", "s3cret", "--eval_data_paths", *urls]).to_yaml()
    assert "s3cret" not in text
    shown = ["https://***@host/a.h5ad", "https://host/b_{0..3}.h5ad?***", "s3://bucket/*.h5ad"]
    assert yaml.safe_load(text)["eval_data_paths"] == shown


def test_a_dumped_configuration_with_a_hidden_url_takes_the_whole_url_again(tmp_path):
    url = "https://host/a.h5ad?token=s3cret"
    config = parse_args([*MLM, "--eval_data_paths", url])
    config.save(tmp_path / "run.yaml")
    again = ["mlm", "--config", str(tmp_path / "run.yaml")]
    assert parse_args([*again, "--eval_data_paths", url]) == config
    with pytest.raises(InputError, match="https://host/a.h5ad[?][*]{3} is a URL as it is shown.* Give the whole URL"):
        expand_paths(parse_args(again).eval_data_paths)


def test_a_file_without_verb_cannot_be_loaded_alone(tmp_path):
    with pytest.raises(InputError, match="does not name its verb"):
        load_config(write_yaml(tmp_path, "seed: 1"))


# Refusals


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([], "The verb is missing"),
        (["mlmm"], "Did you mean 'mlm'"),
        (["--seed", "1"], "The verb is missing"),
        (["mlm", "--corpus", "c"], "output_dir is missing.*--output_dir"),
        (["mlm", "--output_dir", "r"], "Neither corpus nor train_data_paths"),
        ([*MLM, "--train_data_paths", "a"], "corpus and train_data_paths are both given"),
        ([*MLM, "--lerning_rate", "1"], "--lerning_rate is unknown to mlm. Did you mean 'learning_rate'"),
        ([*MLM, "--learn", "1"], "--learn is unknown"),
        ([*MLM, "-x"], "-x is unknown"),
        ([*MLM, "stray"], "'stray' belongs to no flag"),
        ([*MLM, "--seed", "1", "2"], "'2' belongs to no flag"),
        ([*MLM, "--seed"], "--seed needs a value"),
        ([*MLM, "--seed", "--bf16"], "--seed needs a value"),
        ([*MLM, "--seed="], "--seed was given '', which is not a number"),
        ([*MLM, "--seed", "1.5"], "not a whole number"),
        ([*MLM, "--seed", "-1"], "must be in"),
        ([*MLM, "--max_steps", "inf"], "not a whole number"),
        ([*MLM, "--max_steps", "0"], "trains nothing"),
        ([*MLM, "--learning_rate", "fast"], "--learning_rate was given 'fast', which is not a number"),
        ([*MLM, "--learning_rate", "nan"], "must be in"),
        ([*MLM, "--bf16", "--fp16=maybe"], "neither true nor false"),
        ([*MLM, "--no_bf16=1"], "takes no value"),
        ([*MLM, "--eval_strategy", "none"], "Give --eval_strategy one of auto.no.steps.epoch"),
        ([*MLM, "--model_arch", "smal"], "did you mean 'small'"),
        ([*MLM, "--lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        ([*MLM, "--lr_scheduler_kwargs", "{num: 1}"], "not a JSON object"),
        ([*MLM, "--phenotype_category", "x"], "is a setting of cls, not of mlm"),
        ([*MLM, "--gene_mask_prob", "1.5"], r"gene_mask_prob is 1.5, but it must be in \[0, 1\]. Change"),
        ([*MLM, "--phenotype_mask_prob", "0", "--gene_mask_prob", "0"], "nothing to learn"),
        ([*MLM, "--max_length", "2"], "must be in"),
        ([*MLM, "--max_length", "4", "--included_phenotypes", "a", "b"], "need 5 tokens. Raise --max_length"),
        ([*MLM, "--included_phenotypes", "a", "a"], "'a' more than once"),
        ([*MLM, "--pad_to_multiple_of", "0"], "must be in"),
        ([*MLM, "--hidden_size", "100", "--num_attention_heads", "3"], "cannot share equally"),
        (
            [*MLM, "--tokens_per_batch", "2047"],
            "a single cell may have max_length 2048 tokens. Raise --tokens_per_batch",
        ),
        (
            [*MLM, "--tokens_per_batch", "4096", "--per_device_train_batch_size", "16"],
            "tokens_per_batch 4096 and per_device_train_batch_size 16 are both given",
        ),
        ([*MLM, "--tokens_per_batch", "4096", "--pad_to_multiple_of", "8"], "packed without padding"),
        ([*CLS, "--train_sampling_strategy", "group_by_length"], "train_sampling_strategy is group_by_length, but"),
        ([*MLM, "--train_sampling_strategy", "sequential"], "Remove --train_sampling_strategy"),
        ([*MLM, "--bin_edges", "1", "0.1"], r"edge 1 \(0.1\) does not exceed edge 0 \(1\). Sort"),
        ([*MLM, "--bin_edges", "1", "1"], "does not exceed"),
        ([*MLM, "--bin_edges", "0", "1"], "above 0, but edge 0 is 0"),
        ([*MLM, "--bin_edges", "1", "inf"], "edge 1 is inf"),
        ([*MLM, "--bin_edges", "nan"], "edge 0 is nan"),
        ([*MLM, "--bin_edges", "1", "--bin_edges_path", "."], "both given"),
        ([*MLM, "--pretrained_model_path", ".", "--hidden_size", "64"], "has its own. Remove --hidden_size"),
        ([*MLM, "--config", "nowhere.yaml"], "cannot be read"),
        ([*MLM, "--config", "."], "cannot be read"),
        ([*MLM, "--eval_steps", "5", "--eval_strategy", "epoch"], "ignores steps"),
        ([*MLM, "--save_strategy", "steps"], "Give --save_steps"),
        (FILES, "Bin edges are missing"),
        ([*FILES, "--bin_edges", "1"], "vocabulary is missing"),
        ([*FILES, "--bin_edges", "1", "--vocab_path", ".", "--eval_strategy", "epoch"], "nothing to evaluate on"),
        (CLS[:-2], "phenotype_category is missing"),
        ([*CLS, "--included_phenotypes", "sex", "cell_type"], "would be given the answer"),
        (["prepare", "--output", "c"], "INPUTS after the verb, or --inputs"),
        (["prepare", "a", "--output", "c", "--eval_fraction", "1"], "must be in"),
        (["prepare", "a", "--output", "c", "--eval_donors", "D1", "--split_by", "cell"], "needs a split by donor"),
        (["prepare", "a", "--output", "c", "--phenotypes", "a="], "NAME=VALUE"),
        (["prepare", "a", "--output", "c", "--phenotypes", "a", "a=b"], "'a' more than once"),
        (["evaluate"], "RUN after the verb"),
        (["evaluate", "r", "extra"], "takes RUN"),
        (["evaluate", "r", "--ask", "a", "--given", "a"], "both asked and given"),
        (["evaluate", "r", "--device", "gpu"], "none of auto, cpu"),
        (["evaluate", "r", "--corpus", "c", "--eval_data_paths", "a"], "both given"),
        (["predict", "r", "--output", "o"], "INPUT after the verb"),
        (["predict", "r", "a.h5ad", "--output", "a.h5ad"], "the input itself"),
        (["prepare", "a.h5ad", "--output", "corpus.h5ad"], "a folder is written. Give another --output"),
        (["evaluate", "r", "--output", "scores.csv"], "a folder is written"),
        (["mlm", "--corpus", "c", "--output_dir", "model.json"], "a folder is written. Give another --output_dir"),
        (["predict", "r", "a.h5ad", "--output", "a.csv"], "must end in .h5ad or .zarr. Change --output"),
        ([*PREDICT, "--ask", "sex", "--given", "sex=male"], "both asked and given"),
        (["download", "a.h5ad"], "'a.h5ad' is not a URL"),
        (["download", "https://host/a.h5ad", "--retries", "-1"], "must be in"),
        (["download", "https://host/a.h5ad", "--adam_beta2", "0.9"], "unknown to download"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_refused_with_a_way_out(tokens, match):
    with pytest.raises(InputError, match=match):
        parse_args(tokens)


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_arguments_gone_from_transformers_5_get_a_hint(name):
    assert name not in training_flags()
    with pytest.raises(InputError, match=f"--{name} is gone from transformers 5. "):
        parse_args([*MLM, f"--{name}", "1"])


@pytest.mark.parametrize("name", ["bin_edges_path", "vocab_path", "panel", "corpus", "pretrained_model_path"])
def test_a_missing_file_is_refused_by_its_flag(name):
    config = MlmConfig(**{"corpus": ".", "output_dir": "run", name: "./nowhere"})
    with pytest.raises(InputError, match=f"{name} is './nowhere', but there is no such file or folder.*--{name}"):
        config.check_machine()


def test_a_hub_id_need_not_exist_here():
    assert parse_args([*MLM, "--pretrained_model_path", "owner/model"]).pretrained_model_path == "owner/model"


def test_a_pretrained_model_brings_vocabulary_and_bins():
    assert parse_args([*FILES, "--pretrained_model_path", "."]).bin_edges == []


def test_settings_made_in_python_are_checked_alike():
    with pytest.raises(InputError, match="Change --eval_fraction"):
        PrepareConfig(inputs=["a"], output="b", eval_fraction=0.0)
    with pytest.raises(InputError, match="phenotype_category is missing"):
        ClsConfig(corpus="c", output_dir="r")


# Training arguments


@pytest.mark.parametrize(
    ("tokens", "name", "override", "expected"),
    [
        (["--adam_beta2", "0.95"], "adam_beta2", 0.95, 0.95),
        (["--gradient_checkpointing"], "gradient_checkpointing", True, True),
        (["--no_average_tokens_across_devices"], "average_tokens_across_devices", False, False),
        (["--optim", "adamw_torch_fused"], "optim", "adamw_torch_fused", "adamw_torch_fused"),
        (["--adam_epsilon", "1e-1"], "adam_epsilon", 0.1, 0.1),
        (["--lr_scheduler_kwargs", '{"num_cycles": 1}'], "lr_scheduler_kwargs", {"num_cycles": 1}, {"num_cycles": 1}),
        (["--accelerator_config", "{}"], "accelerator_config", {}, None),
        (["--fsdp", "full_shard"], "fsdp", "full_shard", None),
        (["--ddp_backend", "gloo"], "ddp_backend", "gloo", None),
        (["--run_name", "1"], "run_name", "1", "1"),
        (["--include_for_metrics", "inputs", "loss"], "include_for_metrics", ["inputs", "loss"], ["inputs", "loss"]),
        (["--optim_target_modules", "all-linear"], "optim_target_modules", "all-linear", "all-linear"),
        (["--dataloader_prefetch_factor", "none"], "dataloader_prefetch_factor", None, None),
        (["--debug", "underflow_overflow"], "debug", "underflow_overflow", None),
        (["--metric_for_best_model", "eval_accuracy"], "metric_for_best_model", "eval_accuracy", "eval_accuracy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_arguments_are_reached_by_their_own_names(tokens, name, override, expected):
    config = parse_args([*MLM, *tokens])
    assert config.training_overrides == {name: override}
    if expected is not None:
        assert getattr(config.training_arguments(), name) == expected


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is 0.1, but .*Remove --label_smoothing_factor"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha is 5.0, but .* packed without padding"),
        (["--torch_compile"], "torch_compile is True, but .*Remove --torch_compile"),
        (["--use_liger_kernel"], "language models of words"),
        (["--eval_strategy", "no", "--early_stopping_patience", "2"], "early_stopping_patience needs evaluations"),
        (["--early_stopping_patience", "0"], "must be in"),
    ],
)
def test_training_flags_that_cannot_work_are_refused_when_they_are_read(tokens, message):
    with pytest.raises(InputError, match=message):
        parse_args([*MLM, *tokens])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--lr_scheduler_type", "cosine_with_min_lr"], "e.g. --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'"),
        (["--lr_scheduler_type", "cosine_warmup_with_min_lr"], "e.g. --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps.* e.g. --lr_scheduler_kwargs"),
        (["--lr_scheduler_kwargs", '{"min_rate": 1}'], "argument .min_rate. Correct --lr_scheduler_kwargs"),
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 2}'], "lr_end .*must be smaller"),
        (["--optim", "galore_adamw"], "--optim galore_adamw cannot be used: .*galore_torch.* another --optim"),
        (["--optim", "grokadamw"], "--optim grokadamw cannot be used: .*Install what it needs"),
        (["--fsdp", "full_shard"], "--fsdp needs several processes. Start it with torchrun"),
        (["--log_level", "loud"], "--log_level cannot be used: 'loud' Give debug, info"),
        (["--report_to", "clearml"], "--report_to clearml cannot be used: .*pip install clearml.* --report_to none"),
    ],
)
def test_training_flags_that_lack_something_are_refused_before_any_cell_is_read(tokens, message):
    with pytest.raises(InputError, match=message):
        parse_args([*MLM, *tokens]).training_arguments()


@pytest.mark.parametrize("schedule", [name for name in get_args(Schedule) if name not in SCHEDULE_ARGUMENTS])
def test_every_other_schedule_needs_no_arguments(schedule):
    assert parse_args([*MLM, "--lr_scheduler_type", schedule]).training_arguments().lr_scheduler_type == schedule


@pytest.mark.parametrize(("schedule", "settings"), SCHEDULE_ARGUMENTS.items())
def test_the_example_of_a_schedule_s_arguments_works(schedule, settings):
    tokens = ["--lr_scheduler_type", schedule, "--lr_scheduler_kwargs", settings]
    assert parse_args([*MLM, *tokens]).training_arguments().lr_scheduler_kwargs == json.loads(settings)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("eval_loss_genes", False), ("eval_sex_log_loss", False), ("eval_sex_accuracy", True), ("loss", False)],
)
def test_losses_are_better_when_they_are_smaller(metric, greater):
    assert parse_args([*MLM, "--metric_for_best_model", metric]).training_arguments().greater_is_better is greater


def test_every_field_of_training_arguments_is_a_flag_read_without_importing_transformers():
    from transformers import TrainingArguments

    fields = {declared.name: declared for declared in dataclasses.fields(TrainingArguments)}
    assert set(training_flags()) == set(fields)
    for name in fields:
        assert find_flag(name, MlmConfig, where="").name == name
    assert training_flags()["adam_beta2"].default == fields["adam_beta2"].default


def test_own_settings_reach_the_training_arguments():
    config = parse_args([*MLM, "--learning_rate=2e-3", "--max_steps=5", "--warmup_steps=0.2", "--no_bf16", "--seed=3"])
    arguments = config.training_arguments()
    assert (arguments.learning_rate, arguments.max_steps, arguments.warmup_steps) == (2e-3, 5, 0.2)
    assert (arguments.bf16, arguments.seed, arguments.output_dir) == (False, 3, "run")
    assert (arguments.report_to, arguments.label_names) == (["tensorboard"], ["labels"])
    assert not arguments.logging_nan_inf_filter
    assert not arguments.remove_unused_columns


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "expected"),
    [
        (MLM, 64, 2e-3),
        (MLM, 256, 5e-4),
        (MLM, 768, 1.67e-4),
        ([*MLM, "--pretrained_model_path", "."], 64, 1e-3),
        ([*MLM, "--learning_rate", "3e-4"], 64, 3e-4),
    ],
)
def test_the_learning_rate_falls_with_the_width_and_is_halved_on_given_weights(tokens, hidden_size, expected):
    assert parse_args(tokens).with_learning_rate(hidden_size).learning_rate == expected


SUITED = ("model_arch", "num_train_epochs", "weight_decay", "gene_drop_prob")


@pytest.mark.parametrize(
    ("tokens", "num_cells", "expected"),
    [
        (MLM, 500, ("tiny", 40.0, 0.3, 0.9)),
        (MLM, 5_000, ("tiny", 5.0, 0.3, 0.5)),
        (MLM, 2_000_000, ("small", 3.0, 0.01, 0.0)),
        ([*MLM, "--pretrained_model_path", "."], 500, ("tiny", 10.0, 0.3, 0.9)),
        ([*MLM, "--num_train_epochs", "7", "--gene_drop_prob", "0"], 500, ("tiny", 7.0, 0.3, 0.0)),
        ([*MLM, "--model_arch", "base", "--weight_decay", "0"], 500, ("base", 40.0, 0.0, 0.9)),
    ],
)
def test_what_is_not_given_suits_the_number_of_cells(tokens, num_cells, expected):
    suited = parse_args(tokens).suited_to(num_cells)
    assert tuple(getattr(suited, name) for name in SUITED) == expected


def test_the_best_model_is_told_by_loss_for_mlm_and_by_macro_f1_for_cls():
    mlm, cls = parse_args(MLM).training_arguments(), parse_args(CLS).training_arguments()
    assert (mlm.metric_for_best_model, mlm.greater_is_better) == ("eval_loss", False)
    assert (cls.metric_for_best_model, cls.greater_is_better) == ("eval_macro_f1", True)
    assert mlm.load_best_model_at_end
    assert (mlm.eval_strategy, mlm.save_strategy) == ("epoch", "epoch")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--eval_steps", "5"], ("steps", "steps", 5, True)),
        (["--eval_steps", "5", "--save_steps", "10"], ("steps", "steps", 10, True)),
        (["--eval_steps", "5", "--save_steps", "7"], ("steps", "steps", 7, False)),
        (["--eval_steps", "0.1", "--save_steps", "0.2"], ("steps", "steps", 0.2, True)),
        (["--save_steps", "7"], ("epoch", "steps", 7, False)),
        (["--eval_strategy", "no"], ("no", "epoch", 500, False)),
        (["--save_strategy", "no"], ("epoch", "no", 500, False)),
        (["--save_strategy", "best"], ("epoch", "best", 500, True)),
    ],
)
def test_the_best_model_is_loaded_where_evaluation_and_saving_meet(tokens, expected):
    arguments = parse_args([*MLM, *tokens]).training_arguments()
    schedule = (arguments.eval_strategy, arguments.save_strategy, arguments.save_steps)
    assert (*schedule, arguments.load_best_model_at_end) == expected


@pytest.mark.parametrize(
    ("tokens", "num_cells", "expected"),
    [
        ([], 600, 4),
        ([], 2_800, 1),
        (["--num_train_epochs", "25"], 2_800, 3),
        (["--num_train_epochs", "25"], 5_000, 1),
        (["--max_steps", "400"], 600, 1),
        (["--eval_steps", "5"], 600, 1),
        (["--save_steps", "5"], 600, 1),
        (["--eval_strategy", "epoch"], 600, 1),
    ],
)
def test_many_short_passes_are_scored_about_ten_times(tokens, num_cells, expected):
    config = parse_args([*MLM, *tokens]).suited_to(num_cells)
    assert config.passes_per_evaluation(num_cells) == expected


def test_without_evaluation_data_nothing_is_evaluated():
    config = parse_args([*FILES, "--bin_edges", "1", "--vocab_path", "."])
    arguments = config.training_arguments()
    assert (arguments.eval_strategy, arguments.eval_on_start, arguments.metric_for_best_model) == ("no", False, None)


@pytest.mark.parametrize("tokens", [["--fp16", "--bf16"], ["--optim", "adam"]], ids=" ".join)
def test_what_transformers_refuses_is_a_clean_error(tokens):
    with pytest.raises(InputError, match="refused by transformers"):
        parse_args([*MLM, *tokens]).training_arguments()


# Manual pages


@pytest.mark.parametrize("verb", list(CONFIGS))
def test_a_manual_page_names_every_own_flag_with_its_default(verb):
    with pytest.raises(HelpRequested) as page:
        parse_args([verb, "-h"])
    text = str(page.value)
    assert CONFIGS[verb].example in text
    for flag in own_flags(CONFIGS[verb]).values():
        assert f"\n  --{flag.spelling}" in text
    assert max(map(len, text.splitlines())) <= 125


def test_the_full_page_also_names_every_training_argument():
    with pytest.raises(HelpRequested) as page:
        parse_args(["cls", "--help-all"])
    assert all(f"\n  --{name}" in str(page.value) for name in training_flags())


def test_help_without_a_verb_lists_the_verbs():
    with pytest.raises(HelpRequested, match="prepare"):
        parse_args(["--help"])


def test_settings_are_plain_values():
    assert json.loads(json.dumps(parse_args(CLS).to_dict()))["phenotype_category"] == "cell_type"


@pytest.mark.parametrize("value", [(0.5, 1.5), np.array([0.5, 1.5]), [0.5, 1.5]], ids=["tuple", "array", "list"])
def test_a_list_may_be_a_tuple_or_an_array(value: Any) -> None:
    assert PrepareConfig(inputs="a.h5ad", output="c", bin_edges=value).bin_edges == [0.5, 1.5]


def test_one_name_is_a_list_of_one() -> None:
    assert PrepareConfig(inputs="a.h5ad", output="c", phenotypes="cell_type").phenotypes == ["cell_type"]
