"""Settings that all verbs have in common, and the options of h5ad files that most of them share.

Owns checking at construction and writing to YAML; reading is in `parsing`, the verbs' own options are in `verbs`.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from perturbgene.cli.options import DATA, GENES, check_flag, conditions, entries_of, option, own_flags
from perturbgene.errors import InputError
from perturbgene.files import write_text
from perturbgene.hub import is_hub_name
from perturbgene.urls import shown_path

Normalization = Literal["auto", "none", "log1p_cp10k"]

#: Of the files that `BaseConfig.save` writes, which `parsing` reads.
SETTINGS_FORMAT = 1

# Never written to files, like passwords and tokens in URLs, since run folders are shared.
SECRETS = ("hub_token",)


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings of a verb, which are checked when they are made and can be written to YAML.

    The docstring of a verb's class is the beginning of its manual page: a summary and a paragraph.
    """

    verb: ClassVar[str] = ""
    example: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, flag in own_flags(type(self)).items():
            value = getattr(self, name)
            if flag.is_list and value is not None and not isinstance(value, list):  # one name, a tuple, an array
                value = entries_of(value) if isinstance(value, Mapping) else value
                is_one = isinstance(value, str | Path) or not isinstance(value, Iterable)
                object.__setattr__(self, name, [value] if is_one else list(value))
        self.check()

    def check(self) -> None:
        """Refuse impossible settings with an `InputError`; subclasses add checks across fields."""
        for name, flag in own_flags(type(self)).items():
            value = getattr(self, name)
            check_flag(value, flag)
            for other in flag.excludes:
                if value and getattr(self, other):
                    raise InputError(
                        f"{name} and {other} are both given, but they answer the same question. "
                        f"Remove --{name} or --{other}."
                    )

    def check_machine(self) -> None:
        """Refuse files and packages that this machine does not have, before anything slow is imported."""
        for flag in own_flags(type(self)).values():
            value = getattr(self, flag.name)
            for path in (value if isinstance(value, list) else [value]) if flag.is_path else []:
                is_checked_later = not path or "://" in path or re.search(r"[*?\[{]", path)  # a URL or pattern
                if is_checked_later or Path(path).exists() or (flag.may_be_on_hub and is_hub_name(path)):
                    continue
                raise InputError(
                    f"{flag.name} is {path!r}, but there is no such file or folder. Correct the path given to "
                    f"--{flag.name}."
                )
            if flag.suffixes and str(value).endswith(".parquet") and not importlib.util.find_spec("pyarrow"):
                raise InputError("a .parquet file needs pyarrow. Write .csv, or pip install 'perturbgene[parquet]'.")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, with overrides of TrainingArguments; URLs without their secrets."""
        settings = {name: getattr(self, name) for name in own_flags(type(self))}
        settings.update(getattr(self, "training_overrides", {}))
        return {name: _without_secrets(value) for name, value in settings.items() if name not in SECRETS}

    def to_yaml(self) -> str:
        """The settings as YAML; ``--config`` with it gives equal settings, except for masked URLs."""
        settings = {"verb": self.verb, "format_version": SETTINGS_FORMAT, **self.to_dict()}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, whole or not at all."""
        write_text(path, self.to_yaml())


def _without_secrets(value: Any) -> Any:
    """Mask user, password and query of every URL in a value."""
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_secrets(item) for name, item in value.items()}
    return shown_path(value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(BaseConfig):
    """How cells are read from a file: which matrix, genes, scale and labels (every verb that reads cells)."""

    group = GENES

    layer: str | None = option(None, "Layer to read instead of X; `raw` means .raw.")
    gene_id_column: str | None = option(None, "Column of var with the gene ids. Default: the index of var.")
    gene_map: str | None = option(
        None, "Table (.csv or .tsv) of two columns, a gene's name in the file and its name in the panel: orthologs of "
        "another species, old symbols, probes.", is_path=True,
    )  # fmt: skip
    normalization: Normalization = option(
        "auto", "How values are scaled. auto recognizes the scale and brings it to log1p of counts per 10,000, "
        "log1p_cp10k takes values for counts, and none takes them as they are.",
    )  # fmt: skip
    missing_labels: list[str] = option(
        [], "Labels that also mean `not known`; NaN, an empty label and `unknown` (in any case) always do.", group=DATA
    )
    phenotypes: list[str] = option(
        [], "NAME=COLUMN reads the labels of a phenotype from another column of obs (cell_type=CellType).", group=DATA,
        is_named=True,
    )  # fmt: skip
    min_gene_coverage: float = option(0.5, "Stop if a file has less than this share of the panel.", within="[0, 1]")
    where: list[str] = option(
        [], "Only cells with these values in obs: COLUMN=VALUE ...; repeat a column to allow several of its values.",
        group=DATA, keeps_commas=True,
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        conditions(self.where)


@dataclass(frozen=True, kw_only=True)
class BinOptions(ReadingConfig):
    """Which genes are used and how their values become bins (prepare, mlm, cls)."""

    group = GENES

    panel: str | None = option(
        None, "Genes to use: text file with one id per line, or those of a run.", is_path=True, may_be_on_hub=True
    )
    num_top_genes: int | None = option(None, "Number of most variable genes to keep. Default: all.", within="[1, inf)")
    bin_edges: list[float] = option(
        [], "Increasing edges of the bins; a value on an edge belongs to the upper bin.", excludes=("bin_edges_path",),
        is_increasing=True,
    )  # fmt: skip
    bin_edges_path: str | None = option(None, "JSON file with a list of edges, or with gene -> edges.", is_path=True)
