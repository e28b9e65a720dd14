"""The command line and the Python function of a verb have the same defaults."""

import inspect
from typing import Any

import pytest

import perturbgene as pg
from perturbgene.configs import (
    AttributeConfig,
    BaseConfig,
    CounterfactualConfig,
    EmbedConfig,
    EvaluateConfig,
    PerturbConfig,
    PredictConfig,
    PrepareConfig,
    own_flags,
)

#: Function of the package -> the settings of the command that does the same.
FUNCTIONS: dict[str, type[BaseConfig]] = {
    "prepare": PrepareConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "embed": EmbedConfig,
    "gene_embeddings": EmbedConfig,
    "gene_network": EmbedConfig,
    "counterfactual": CounterfactualConfig,
    "perturb": PerturbConfig,
    "attribute": AttributeConfig,
}


def plain(value: Any) -> Any:
    """Make "nothing given" the same in all its forms: an empty list or text, and None."""
    return None if value is None or value in ((), [], {}, "") else value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_and_its_command_have_the_same_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(pg, name)).parameters.values()
    given = {it.name: plain(it.default) for it in parameters if it.default is not inspect.Parameter.empty}
    flags = [flag for flag in own_flags(FUNCTIONS[name]).values() if flag.name in given and not flag.is_required]
    assert {flag.name: given[flag.name] for flag in flags} == {flag.name: plain(flag.default) for flag in flags}
