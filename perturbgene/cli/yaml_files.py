"""Settings from YAML files: what `BaseConfig.save` wrote, or what a user has.

Owns reading and refusing files; leaves the type of each value to `values` and checks to the dataclass it makes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.checks import check_no_repeats
from perturbgene.cli.flags import own_flags
from perturbgene.cli.lookup import CONFIG_FLAG, find_flag
from perturbgene.cli.values import convert
from perturbgene.cli.verbs import CONFIGS
from perturbgene.errors import InputError

ConfigT = TypeVar("ConfigT", bound="BaseConfig")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        check_no_repeats([str(key) for key in keys], flag="config")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of settings.

    Raises:
        InputError: The file is missing, is no YAML, or is no mapping.
    """
    try:
        settings = _UniqueKeyLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise InputError(
            f"config is {str(path)!r}, which cannot be read ({error.strerror}). Correct --config."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config is {str(path)!r}, which is no plain YAML: {error}. Correct the file.") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InputError(f"config is {str(path)!r}, which holds no `name: value` lines. Correct the file.")
    return settings


def yaml_values(path: str | Path, config_class: type[BaseConfig]) -> dict[str, Any]:
    """Settings of a YAML file, of the right types.

    Raises:
        InputError: A key is unknown, a value does not fit, or the file is of another verb.
    """
    settings = read_yaml(path)
    verb = settings.pop("verb", config_class.verb)
    if verb != config_class.verb:
        raise InputError(
            f"config {str(path)!r} is of the verb {verb!r}, not of {config_class.verb!r}. "
            "Call that verb, or remove the line `verb:` and what does not fit."
        )
    values = {}
    for key, value in settings.items():
        where = f"{key} in {path}"
        flag = find_flag(str(key), config_class, where=where)
        if flag is CONFIG_FLAG:
            raise InputError(f"{where} would have one file name another. Put all settings into one file.")
        values[flag.name] = convert(value, flag, where=where)
    return values


def build_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make the dataclass; what is no field of its own goes to ``training_overrides``."""
    own = own_flags(config_class)
    fields = {name: value for name, value in values.items() if name in own}
    overrides = {name: value for name, value in values.items() if name not in own}
    return config_class(**fields, **({"training_overrides": overrides} if overrides else {}))


def load_config(path: str | Path) -> BaseConfig:
    """Read what `BaseConfig.save` wrote.

    Raises:
        InputError: The file does not say its verb, or does not fit it.
    """
    verb = read_yaml(path).get("verb")
    if verb not in CONFIGS:
        raise InputError(f"{str(path)!r} does not say its verb. Add a line such as `verb: mlm`.")
    return build_config(CONFIGS[verb], yaml_values(path, CONFIGS[verb]))
