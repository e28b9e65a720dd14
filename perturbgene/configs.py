"""The settings of every verb, and the function that reads a command line into them.

Owns nothing: this is the door to the room `cli`, where options are declared (`base`, `training`, `verbs`) and read
(`parsing`).
"""

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.options import check_question, own_flags
from perturbgene.cli.parsing import HelpRequested, load_config, overview, parse_args
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.verbs import (
    CONFIGS,
    AttributeConfig,
    ClsConfig,
    CounterfactualConfig,
    DownloadConfig,
    EmbedConfig,
    EvaluateConfig,
    MlmConfig,
    PerturbConfig,
    PredictConfig,
    PrepareConfig,
)
