"""Phenotype vocabulary: which labels exist, which mean "not known", and the ids of special tokens, labels and bins.

Owns the id layout and the spelling of labels; knows nothing of genes, files or tensors. Letters: n cells, p phenotypes.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from perturbgene.errors import InputError, listed
from perturbgene.files import read_json

SPECIAL_TOKENS = ("[CLS]", "[EOS]", "[MASK]", "[PAD]")
CLS_ID, EOS_ID, MASK_ID, PAD_ID = range(4)

#: Labels that mean "not known" unless the vocabulary lists them: an empty one, how pandas spells NaN, and `unknown`.
#: `none`, `na`, `null` and the like are labels (untreated controls are often "none"); --missing_labels adds them.
MISSING_LABELS = frozenset({"", "nan", "<na>", "unknown"})

ABSENT = -1

#: A numeric obs column with more distinct values than this is a measurement, not a phenotype.
MOST_NUMERIC_LABELS = 50

logger = logging.getLogger(__name__)


def label_text(value: object) -> str:
    """Spell one `obs` value as a label: stripped, NFC, whole floats without the point, missing as ''."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def is_missing(label: str, missing_labels: Sequence[str] = ()) -> bool:
    """True for labels that mean "not known": those of `MISSING_LABELS` and `missing_labels`, in any case.

    Example:
        >>> is_missing("Unknown"), is_missing("none"), is_missing("none", ["None"])
        (True, False, True)
    """
    return label.lower() in MISSING_LABELS or label.lower() in {label_text(one).lower() for one in missing_labels}


class Labels(NamedTuple):
    """One obs column: the number of each cell's text, signed, of shape (n,). The text of a missing label is ''."""

    codes_n: np.ndarray
    texts: tuple[str, ...]

    @classmethod
    def of(cls, values_n: pd.Series) -> "Labels":
        """Spell the values of a column as labels."""
        factor = pd.Categorical(values_n)
        texts = (*map(label_text, factor.categories), "")
        return cls(np.where(factor.codes < 0, len(texts) - 1, factor.codes), texts)  # pandas' narrow type

    def counts(self, rows_n: np.ndarray | slice = slice(None)) -> Counter[str]:
        """Count the cells of each text, in all rows or in some."""
        counts = np.bincount(self.codes_n[rows_n], minlength=len(self.texts))
        counted: Counter[str] = Counter()
        for text, count in zip(self.texts, counts.tolist(), strict=True):
            counted[text] += count
        return +counted


def plain_spelling(text: str) -> str:
    """Spell a name without case, spaces and punctuation, to find names that differ in these only.

    Example:
        >>> plain_spelling("B-CELL") == plain_spelling("B cell"), plain_spelling("cell_type")
        (True, 'celltype')
    """
    return re.sub(r"[\W_]+", "", text.casefold())


def token_text(label: str) -> str:
    """Spell a label as a token; the token of a token is itself, however many brackets are around it.

    Example:
        >>> token_text(" B cell "), token_text("[B_cell]")
        ('[B_cell]', '[B_cell]')
    """
    text = "_".join(label_text(label).split())
    while len(text) > 1 and text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return f"[{text}]"


def check_are_labels(values_n: pd.Series, *, category: str, column: str, path: str) -> None:
    """Raise an InputError if a column of obs that is to be a phenotype holds measurements."""
    kinds = values_n.cat.categories if isinstance(values_n.dtype, pd.CategoricalDtype) else values_n
    is_number = pd.api.types.is_numeric_dtype(kinds) and not pd.api.types.is_bool_dtype(kinds)
    if is_number and values_n.nunique() > MOST_NUMERIC_LABELS:
        raise InputError(
            f"{path}: obs[{column!r}] holds {values_n.nunique():,} different numbers, too many to be labels of "
            f"{category!r}. Cut it into groups first, e.g. with pandas.cut."
        )


def with_new_labels(known: Mapping[str, Sequence[str]], found: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Return the known labels of every phenotype in their order, and behind them those that are new, sorted.

    A warning names new labels that differ from a known one in case and punctuation only.

    Example:
        >>> with_new_labels({"cell_type": ["T", "B cell"]}, {"cell_type": {"NK", "B_cell"}, "sex": {"male"}})
        {'cell_type': ['T', 'B cell', 'NK'], 'sex': ['male']}
    """
    labels = {category: list(of) for category, of in known.items()}
    for category, of in found.items():
        before = labels.get(category, [])
        tokens, spellings = set(map(token_text, before)), {plain_spelling(label): label for label in before}
        new = [label for label in sorted(of) if token_text(label) not in tokens]
        labels[category] = [*before, *new]
        for label in new:
            if (twin := spellings.get(plain_spelling(label))) is not None:
                text = "%s %r is new, though %r is known: rename it if they mean the same"
                logger.warning(text, category, label, twin)
    return labels


def _checked_labels(category: str, labels: Iterable[object]) -> tuple[str, ...]:
    cleaned = tuple(label_text(label) for label in labels)
    seen: dict[str, str] = {}
    for label in cleaned:
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in label):
            raise InputError(
                f"label {label!r} of phenotype {category!r} holds a control character, which no token may carry. "
                "Rename it in obs or in the vocabulary file."
            )
        if token_text(label) == "[]":
            raise InputError(f"phenotype {category!r} lists an empty label. Remove it from the vocabulary.")
        token = token_text(label)
        if token in seen:
            raise InputError(
                f"labels {seen[token]!r} and {label!r} of phenotype {category!r} are the same token {token}, "
                "so cells of both would be mixed. Merge or rename one of them."
            )
        seen[token] = label
    if not cleaned:
        raise InputError(f"phenotype {category!r} has no labels. List at least one, or leave the phenotype out.")
    return tuple(label[1:-1] if label == token_text(label) else label for label in cleaned)


@dataclass(frozen=True)
class Vocabulary:
    """Labels of every phenotype and their input ids.

    Args:
        phenotypes: Category -> labels, raw (`"B cell"`) or as tokens (`"[B_cell]"`). Categories are sorted by name.
    """

    phenotypes: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        ordered = {name: _checked_labels(name, self.phenotypes[name]) for name in sorted(self.phenotypes)}
        object.__setattr__(self, "phenotypes", ordered)

    @classmethod
    def from_file(cls, path: str | Path) -> "Vocabulary":
        """Read `{category: [labels]}` from JSON."""
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"vocabulary {path} cannot be read as JSON ({error}). Give a file like "
                '{"cell_type": ["B cell", "T cell"]}.'
            ) from error
        lists = content.values() if isinstance(content, dict) else [None]
        if any(not isinstance(one, list) or any(isinstance(label, list | dict) for label in one) for one in lists):
            raise InputError(
                f"vocabulary {path} must map each phenotype to a list of labels, like "
                '{"cell_type": ["B cell", "T cell"]}. Rewrite it in that form.'
            )
        return cls(content)

    @property
    def categories(self) -> tuple[str, ...]:
        """Phenotype names, sorted: the order of token types 1..P."""
        return tuple(self.phenotypes)

    @cached_property
    def _starts(self) -> dict[str, int]:
        sizes = [len(labels) for labels in self.phenotypes.values()]
        starts = np.cumsum([len(SPECIAL_TOKENS), *sizes]).tolist()
        return dict(zip(self.categories, starts, strict=False))

    @cached_property
    def _ids(self) -> dict[tuple[str, str], int]:
        return {
            (category, token_text(label)): self._starts[category] + index
            for category, labels in self.phenotypes.items()
            for index, label in enumerate(labels)
        }

    @property
    def first_bin_id(self) -> int:
        """Input id of `bin_0`: the ids of all special tokens and labels are below it."""
        return len(SPECIAL_TOKENS) + len(self._ids)

    def check_category(self, category: str) -> None:
        """Raise an InputError when the vocabulary has no such phenotype."""
        if category not in self.phenotypes:
            known = f"Choose one of: {listed(self.categories, most=12)}."
            if not self.categories:
                known = "It has none: train on a corpus that was prepared with --phenotypes."
            raise InputError(f"phenotype {category!r} is not in the vocabulary. {known}")

    def id_range(self, category: str) -> tuple[int, int]:
        """Return the half-open range of input ids of a phenotype's labels."""
        self.check_category(category)
        start = self._starts[category]
        return start, start + len(self.phenotypes[category])

    def token_type(self, category: str) -> int:
        """Return the token type of a phenotype, in 1..P."""
        self.check_category(category)
        return 1 + self.categories.index(category)

    def label_id(self, category: str, label: object) -> int:
        """Return the input id of a label, or -1 when the vocabulary lacks it."""
        return self._ids.get((category, token_text(label_text(label))), ABSENT)

    def label_of(self, input_id: int) -> tuple[str, str]:
        """Return (category, label) of a label's input id."""
        for category in self.categories:
            start, stop = self.id_range(category)
            if start <= input_id < stop:
                return category, self.phenotypes[category][input_id - start]
        raise InputError(f"input id {input_id} is not a phenotype label. Labels have ids 4..{self.first_bin_id - 1}.")

    def encode(
        self, category: str, values_n: Sequence[object] | pd.Series, *, missing_labels: Sequence[str] = ()
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Turn one `obs` column into input ids.

        Args:
            category: The phenotype.
            values_n: One value per cell, of any dtype.
            missing_labels: Labels that mean "not known", even if the vocabulary lists them.

        Returns:
            Input ids, int32 of shape (n,), -1 if the label is missing or not in the vocabulary; and how many cells have
            each label that is not in the vocabulary and not missing.
        """
        labels, named = Labels.of(pd.Series(values_n)), {label_text(label).lower() for label in missing_labels}
        id_of = {text: self.label_id(category, text) for text in labels.texts}
        ids = np.array([ABSENT if text.lower() in named else id_of[text] for text in labels.texts], dtype=np.int32)
        counts = {text: count for text, count in labels.counts().items() if id_of[text] == ABSENT}
        return ids[labels.codes_n], {text: n for text, n in counts.items() if not is_missing(text, missing_labels)}
