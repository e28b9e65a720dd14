"""The settings of every verb, and the functions that read them; all are defined in `cli`."""

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.options import check_question, own_flags
from perturbgene.cli.parsing import HelpRequested, config_of, load_config, overview, parse_args
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.verbs import (
    CONFIGS,
    AttributeConfig,
    ClsConfig,
    CounterfactualConfig,
    DividedOptions,
    DownloadConfig,
    EmbedConfig,
    EvaluateConfig,
    MergeConfig,
    MlmConfig,
    PerturbConfig,
    PredictConfig,
    PrepareConfig,
)
