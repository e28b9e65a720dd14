"""The verbs as Python functions: the names of the command line, and values as a notebook writes them.

Owns how keywords are read and how mistakes in them are reported; leaves the work to the functions of the rooms.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from perturbgene import VERBS
from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.options import Flag, check_flag, entries_of, named_values, own_flags
from perturbgene.cli.parsing import CONFIG_FLAG, advice, convert, known_flags
from perturbgene.cli.verbs import CONFIGS, DividedOptions, MergeConfig
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import piece_path

#: Other names of parameters: those of the command line for what is positional here, and names of older versions.
OTHER_NAMES = {
    "input": "adata", "run": "model", "phenotypes": "phenotype", "away": "from_", "eval_data_paths": "eval_paths",
    "train_data_paths": "train_paths",
}  # fmt: skip


def as_function(function: Callable[..., Any], verb: str) -> Callable[..., Any]:
    """Let a function of a room read its keywords as the command of a verb does.

    One name may be given where a list is meant, any iterable in place of a list, and "NAME=LABEL" in place of a
    mapping. What `**reading` of the function takes are the options of `ReadingConfig`; other `**settings` are all
    options of the verb.

    Raises:
        TypeError: On a call with an unknown keyword; it names the nearest one.
        InputError: On a call with a value that the option does not allow.
    """
    flags, signature = own_flags(CONFIGS[verb]), inspect.signature(function)
    named = {name: it for name, it in signature.parameters.items() if it.kind is not inspect.Parameter.VAR_KEYWORD}
    rest = next(iter(signature.parameters.keys() - named.keys()), "")
    names = ("batch_size", *(it.name for it in fields(ReadingConfig))) if rest == "reading" else flags if rest else ()
    # Reports are written by the commands, and in Python by `pg.report`.
    options = [flags[name] for name in names if name in flags and name not in {*named, "report"}]
    is_divided = issubclass(CONFIGS[verb], DividedOptions) and function.__name__ == verb
    options += [flags[name] for name in ("part", "output") if is_divided]
    takes = {*named, *(flag.name for flag in options)}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values, has_settings = {}, rest == "settings"
        known = known_flags(CONFIGS[verb]) if has_settings else flags
        accepted = takes | (known.keys() - {CONFIG_FLAG.name} if has_settings else set())
        for given, value in kwargs.items():
            name = given if given in accepted else OTHER_NAMES.get(given, given)
            if name not in accepted:
                hint = did_you_mean(given, sorted(accepted))
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {given!r}. {hint}")
            is_plain = name not in known or (value is None and not has_settings)
            values[name] = value if is_plain else _as_given(value, known[name], is_option=name not in named)
        if is_divided and values.get("part") is not None:
            bound = inspect.signature(function).bind(*args, **values).arguments
            more = bound.pop(rest, {})
            return _run_part(verb, {**bound, **more})
        if is_divided and values.pop("output", None) is not None:
            raise InputError(f"output is for one part of {verb}. Give --part too, or leave it out and take the result.")
        values.pop("part", None)
        return function(*args, **values)

    more = [inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=flag.default) for flag in options]
    kept = [it for name, it in signature.parameters.items() if name != rest or rest == "settings"]
    at = len(named)
    call.__signature__ = signature.replace(parameters=[*kept[:at], *more, *kept[at:]])  # type: ignore[attr-defined]
    return call


def _run_part(verb: str, values: dict[str, Any]) -> Path:
    """Run the command of a verb for one part of the cells of a file; return the folder of the part."""
    cells, run = values.pop("adata"), values.pop("model")
    if not isinstance(cells, str | Path):
        raise InputError(f"part divides the cells of a file, but they are {type(cells).__name__}. Give a path.")
    settings = {name: entries_of(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    settings |= {"input": str(cells), "run": str(getattr(run, "path", run))}
    config = CONFIGS[verb](**{name: value for name, value in settings.items() if value is not None})
    assert isinstance(config, DividedOptions) and config.piece is not None
    config.check_machine()
    _run(config)
    return piece_path(Path(config.output).expanduser(), *config.piece)


def _run(config: DividedOptions) -> None:
    importlib.import_module(VERBS[config.verb][0]).__dict__[f"run_{config.verb}"](config)


def merge(
    output: str | Path, pieces: Sequence[str | Path] = (), *, overwrite: bool = MergeConfig.overwrite,
    device: str = MergeConfig.device,
) -> Path:  # fmt: skip
    """Make one output of the pieces that `part` of `predict`, `embed`, `perturb` or `attribute` wrote.

    Args:
        output: File to write, as the pieces have it.
        pieces: Folders of the pieces; none means all that are in `OUTPUT.parts`.
        overwrite: True replaces an output that already exists.
        device: Where `perturb` and `attribute` check their results.

    Returns:
        The output: what the command without `part` writes. The pieces are deleted.

    Raises:
        InputError: Some pieces are missing or come twice, or they differ in their settings, run or cells.

    Example:
        >>> import perturbgene as pg
        >>> for number in (1, 2):
        ...     part = pg.embed("cells.h5ad", "runs/mlm", part=f"{number}/2", output="embedded.h5ad")
        >>> part.as_posix(), pg.merge("embedded.h5ad").as_posix()
        ('embedded.h5ad.parts/part-2-of-2', 'embedded.h5ad')
    """
    config = MergeConfig(output=str(output), pieces=[str(it) for it in pieces], overwrite=overwrite, device=device)
    config.check_machine()
    whole = run_merge(config)
    _run(whole)
    return Path(whole.output)


def run_merge(config: MergeConfig) -> DividedOptions:
    """Check all pieces of an output; return the settings of the command that makes it of them."""
    from perturbgene.inference.parts import whole_config  # imports torch

    return whole_config(config)


def _as_given(value: Any, flag: Flag, *, is_option: bool) -> Any:
    """Bring a value to the type of its option; `is_option` is False where a function has a mapping instead of text."""
    if isinstance(value, Mapping) and is_option and dict not in flag.kinds:
        value = entries_of(value)
    if not is_option and (isinstance(value, Mapping) or flag.is_positional or flag.is_path):
        return str(value) if isinstance(value, Path) else value
    is_one = isinstance(value, str | Mapping) or not isinstance(value, Iterable)
    items = [item.item() if isinstance(item, np.generic) else item for item in ([value] if is_one else value)]
    items = [getattr(item, "path", item) if flag.is_path else item for item in items]  # a loaded run gives its own
    items = [str(item) if isinstance(item, Path) else item for item in items]
    if len(items) != 1 and not flag.is_list:
        raise InputError(f"{flag.name} was given {listed(items) or 'nothing'}, but it takes one value. {advice(flag)}")
    exact = replace(flag, keeps_commas=flag.keeps_commas or not isinstance(value, str))
    converted = convert(items if flag.is_list and value is not None else items[0], exact, where=flag.name)
    if flag.is_named and not is_option:
        labels = named_values(converted if flag.is_list else [converted], flag=flag.name)
        if None in labels.values() and not flag.is_list:
            raise InputError(f"{flag.name} was given {value!r}, which is no NAME=LABEL. {flag.help}")
        return labels
    check_flag(converted, flag)
    return converted
