"""Cells to tokens: the one place that knows the token contract.

Owns `GeneTokenizer`; leaves the compiled loops to `kernels`, reading to `shards` and masking to `data_collators`.
Letters: n cells, l tokens, g genes, p phenotypes, e edges, t tables of measured genes.

Input ids: [CLS] 0, [EOS] 1, [MASK] 2, [PAD] 3, then labels by category, then bin_0..bin_E.
Token types: 0 special, 1..P phenotype categories sorted by name, 1 + P + i gene i of the panel.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from perturbgene.data_utils.binning import BinEdges
from perturbgene.data_utils.genes import GeneAlignment, GenePanel
from perturbgene.data_utils.kernels import (
    BAD_COLUMN,
    INFINITE,
    NEGATIVE,
    NO_FAULT,
    NOT_A_NUMBER,
    REPEATED,
    gather_rows,
    tokenize_rows,
)
from perturbgene.data_utils.labels import (
    ABSENT,
    CLS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    Vocabulary,
    token_text,
)
from perturbgene.data_utils.recognition import check_values
from perturbgene.data_utils.scale import (
    NORMALIZATIONS,
    ExpressionBlock,
    Normalization,
    count_thresholds,
    library_sizes,
    native,
    panel_matrix,
)
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.sources import CellSource, MemoryFile
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import check_format, read_json, write_text
from perturbgene.forms import misfit
from perturbgene.hub import local_run

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1
#: What `tokenizer.json` holds.
_FORM = {
    "normalization": str, "max_length": int, "included_phenotypes": [str], "phenotypes": {str: [str]},
    "bin_edges": ([float], {str: [float]}), "genes": [str],
}  # fmt: skip

_FAULTS = {
    NOT_A_NUMBER: "NaN",
    INFINITE: "an infinite value",
    NEGATIVE: "a negative value",
    BAD_COLUMN: "a column index outside the matrix",
    REPEATED: "a second value",
}


@dataclass(frozen=True)
class TokenBlock:
    """Ragged tokens of n cells: cell i owns tokens `offsets_n1[i]:offsets_n1[i + 1]`.

    Args:
        input_ids_l, token_type_ids_l: Tokens, integers of shape (l,).
        offsets_n1: int64 of shape (n + 1,).
        cells_n: Number of each cell in the data set, int64 of shape (n,).
        measured_tg: True for the genes that each table of the data set measured, shape (t, g); None: all genes.
        table_n: Table of each cell, int64 of shape (n,); None if there are no tables.
        epochs_n: Epoch in which each cell was drawn, int64 of shape (n,); None means epoch 0.
        labels_n: Class of each cell when classifying, int64 of shape (n,).
    """

    input_ids_l: np.ndarray
    token_type_ids_l: np.ndarray
    offsets_n1: np.ndarray
    cells_n: np.ndarray
    measured_tg: np.ndarray | None = None
    table_n: np.ndarray | None = None
    epochs_n: np.ndarray | None = None
    labels_n: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets_n1) - 1

    def cell(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return input ids and token types of one cell."""
        span = slice(int(self.offsets_n1[index]), int(self.offsets_n1[index + 1]))
        return self.input_ids_l[span], self.token_type_ids_l[span]

    def tables(self, num_genes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which genes each table measured, bool (t, g), and the table of each cell, (n,)."""
        if self.measured_tg is None or self.table_n is None:
            return np.ones((1, num_genes), dtype=bool), np.zeros(len(self), dtype=np.int64)
        return self.measured_tg, self.table_n

    def take(self, rows_m: np.ndarray) -> "TokenBlock":
        """Return some cells, in the given order, as a block of its own."""
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets_n1)[rows_m])]).astype(np.int64)
        ids, types = np.empty((2, offsets[-1]), dtype=self.input_ids_l.dtype)
        gather_rows(self.input_ids_l, self.token_type_ids_l, self.offsets_n1, rows_m, ids, types, offsets)
        per_cell = {name: values[rows_m] for name, values in self._per_cell().items()}
        return replace(self, input_ids_l=ids, token_type_ids_l=types, offsets_n1=offsets, **per_cell)

    def cut(self, max_length: int) -> "TokenBlock":
        """Return the cells with at most so many tokens each: the first ones, and the last."""
        lengths_n = np.diff(self.offsets_n1)
        if not len(lengths_n) or lengths_n.max() <= max_length:
            return self
        offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths_n, max_length))]).astype(np.int64)
        at_l = np.arange(offsets[-1]) + np.repeat(self.offsets_n1[:-1] - offsets[:-1], np.diff(offsets))
        at_l[offsets[1:] - 1] = self.offsets_n1[1:] - 1
        ids_l, types_l = self.input_ids_l[at_l], self.token_type_ids_l[at_l]
        return replace(self, input_ids_l=ids_l, token_type_ids_l=types_l, offsets_n1=offsets)

    def _per_cell(self) -> dict[str, np.ndarray]:
        names = ("cells_n", "table_n", "epochs_n", "labels_n")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def join(cls, blocks: "Sequence[TokenBlock]", *, buffer: "TokenBuffer | None" = None) -> "TokenBlock":
        """Concatenate blocks of one data set, in memory of their own or in `buffer`."""
        if len(blocks) == 1:
            return blocks[0]
        length = sum(len(block.input_ids_l) for block in blocks)
        ids_l, types_l = (buffer or TokenBuffer()).rows(length, blocks[0].input_ids_l.dtype)
        starts = np.cumsum([0, *(len(block.input_ids_l) for block in blocks[:-1])])
        offsets = [block.offsets_n1[:-1] + start for block, start in zip(blocks, starts, strict=True)]
        tables = [block.measured_tg for block in blocks if block.measured_tg is not None]
        return replace(
            blocks[0],
            input_ids_l=np.concatenate([block.input_ids_l for block in blocks], out=ids_l),
            token_type_ids_l=np.concatenate([block.token_type_ids_l for block in blocks], out=types_l),
            offsets_n1=np.append(np.concatenate(offsets), starts[-1] + blocks[-1].offsets_n1[-1]),
            measured_tg=max(tables, key=len, default=None),  # the tables of a data set only grow, see `MeasuredGenes`
            **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in blocks[0]._per_cell()},
        )


class TokenBuffer:
    """Memory for tokens that is used again: fresh memory for each round would cost more than filling it."""

    def __init__(self) -> None:
        self._memory = np.empty((2, 0), dtype=np.uint16)

    def rows(self, length: int, dtype: np.dtype) -> np.ndarray:
        """Return two rows of so many tokens, shape (2, l); overwrites what the last call returned."""
        if self._memory.shape[1] < length or self._memory.dtype != dtype:
            self._memory = np.empty((2, length + length // 8), dtype=dtype)
        return self._memory[:, :length]


def _sum_duplicates(block: ExpressionBlock) -> ExpressionBlock:
    """Sum columns that are the same gene, unless a value has no bin or no column, which summing would hide."""
    check_values(block.values_l, source=block.source)
    is_outside_l = (block.columns_l < 0) | (block.columns_l >= len(block.alignment.gene_of_column_c))
    for at in np.flatnonzero(is_outside_l)[:1]:
        row = int(np.searchsorted(block.offsets_n1, at, side="right")) - 1
        raise _fault_of(block, row, int(at - block.offsets_n1[row]), BAD_COLUMN)
    summed, num_genes = panel_matrix(block), block.alignment.num_genes
    identity = GeneAlignment(np.arange(num_genes, dtype=np.int32), num_genes)
    offsets = summed.indptr.astype(np.int64)
    return replace(block, values_l=summed.data, columns_l=summed.indices, offsets_n1=offsets, alignment=identity)


def _fault_of(block: ExpressionBlock, row: int, at: int, fault: int) -> InputError:
    return InputError(
        f"{block.source}: cell {block.cells_n[row]} has {_FAULTS[fault]} in column "
        f"{block.columns_l[block.offsets_n1[row] + at]}. Bins need finite values >= 0 (counts or log-normalized): "
        "clean the matrix or choose another with --layer."
    )


class GeneTokenizer:
    """Turns cells into tokens by the contract of this module.

    Args:
        genes: Gene ids in panel order, most variable first; Ensembl versions are dropped.
        phenotypes: Category -> labels, raw or as tokens.
        bin_edges: Edges shared by all genes, or gene -> edges, on log1p counts per 10,000 (on the raw values with
            `normalization="none"`).
        included_phenotypes: Categories that appear in a cell's sequence, in this order.
        max_length: Most tokens per cell, `[CLS]` and `[EOS]` included; longer cells keep the first genes of the panel.
        normalization: "auto" normalizes raw counts and leaves log values as they are, "log1p_cp10k" always normalizes,
            "none" never.
        gene_symbols: Symbol of each gene, for files and messages that use symbols.

    Raises:
        InputError: Genes repeat, edges do not increase, a phenotype is unknown, or `max_length` leaves no gene.

    Example:
        >>> tokenizer = GeneTokenizer(genes=["A", "B"], phenotypes={"sex": ["f", "m"]}, bin_edges=[0.5, 2.0],
        ...                           included_phenotypes=["sex"], max_length=8, normalization="none")
        >>> tokenizer.convert_ids_to_tokens([0, 5, 7, 8, 1])
        ['[CLS]', '[m]', 'bin_1', 'bin_2', '[EOS]']
    """

    cls_token_id, eos_token_id, mask_token_id, pad_token_id = CLS_ID, EOS_ID, MASK_ID, PAD_ID
    cls_token, eos_token, mask_token, pad_token = SPECIAL_TOKENS

    def __init__(
        self,
        *,
        genes: Sequence[str],
        phenotypes: Mapping[str, Sequence[str]],
        bin_edges: Sequence[float] | Mapping[str, Sequence[float]],
        included_phenotypes: Sequence[str] = (),
        max_length: int = 2048,
        normalization: Normalization = "auto",
        gene_symbols: Sequence[str] | None = None,
    ) -> None:
        self.panel = GenePanel(tuple(genes), tuple(gene_symbols or ()))
        self.vocabulary = Vocabulary(dict(phenotypes))
        if isinstance(bin_edges, Mapping):
            self.bin_edges = BinEdges.per_gene(bin_edges, genes=self.panel.genes)
        else:
            self.bin_edges = BinEdges.shared(bin_edges)
        self.included_phenotypes = tuple(included_phenotypes)
        self.max_length, self.normalization = int(max_length), normalization
        for category in self.included_phenotypes:
            self.vocabulary.check_category(category)
        if len(set(self.included_phenotypes)) < len(self.included_phenotypes):
            raise InputError(f"included_phenotypes repeat a name: {list(self.included_phenotypes)}. Name each once.")
        shortest = 3 + len(self.included_phenotypes)
        if self.max_length < shortest:
            raise InputError(
                f"max_length {self.max_length} leaves no room for a gene next to [CLS], [EOS] and "
                f"{len(self.included_phenotypes)} phenotypes. Give --max_length of at least {shortest}."
            )
        if self.normalization not in NORMALIZATIONS:
            known = did_you_mean(str(self.normalization), NORMALIZATIONS)
            raise InputError(f"normalization {self.normalization!r} is unknown. {known}")

    # -- sizes and names ------------------------------------------------------------------------------------------

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene ids in panel order."""
        return self.panel.genes

    @property
    def gene_symbols(self) -> tuple[str, ...]:
        """Symbols in panel order, or empty."""
        return self.panel.symbols

    @property
    def phenotypes(self) -> dict[str, tuple[str, ...]]:
        """Category -> labels, categories sorted by name."""
        return {name: tuple(labels) for name, labels in self.vocabulary.phenotypes.items()}

    @property
    def first_bin_id(self) -> int:
        """Input id of `bin_0`."""
        return self.vocabulary.first_bin_id

    def num_genes(self, block: TokenBlock) -> np.ndarray:
        """Return how many genes of the panel each cell's sequence has, int32 of shape (n,); 0 means no answer."""
        return np.add.reduceat(block.token_type_ids_l >= self.first_gene_type, block.offsets_n1[:-1], dtype=np.int32)

    @property
    def first_gene_type(self) -> int:
        """Token type of the first gene of the panel."""
        return 1 + len(self.vocabulary.categories)

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return self.first_bin_id + self.bin_edges.num_edges + 1

    @property
    def type_vocab_size(self) -> int:
        """Number of token types."""
        return self.first_gene_type + len(self.panel)

    def __repr__(self) -> str:
        labels = ", ".join(f"{name} ({len(known)} labels)" for name, known in self.phenotypes.items())
        bins = f"{self.bin_edges.num_edges} bins of expression"
        return f"GeneTokenizer({len(self.panel):,} genes, {labels or 'no phenotypes'}, {bins})"

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def phenotype_id_ranges(self) -> list[list[int]]:
        """Half-open range of label ids of token types 1..P, in order."""
        return [list(self.vocabulary.id_range(category)) for category in self.vocabulary.categories]

    @property
    def most_genes(self) -> int:
        """How many genes of a cell the transformer reads: what fits next to [CLS], [EOS] and all included phenotypes.

        So a long cell keeps its genes whatever is asked and given.
        """
        return self.max_length - 2 - len(self.included_phenotypes)

    def reading(self, included: Sequence[str], *, is_whole: bool = False) -> "GeneTokenizer":
        """Return a copy that reads only some phenotypes, and of long cells `most_genes` genes or all of them.

        All of them are for questions about labels: genes vote, and the model itself cuts what its transformer reads.
        """
        most_genes = len(self.panel) if is_whole else self.most_genes
        return self.with_settings(included=included, max_length=2 + len(included) + max(1, most_genes))

    def convert_tokens_to_ids(self, tokens: str | tuple[str, str] | Sequence[Any]) -> int | list[int]:
        """Return ids of token texts, or an InputError; a label of several categories needs (category, label)."""
        if isinstance(tokens, list):
            return [cast(int, self.convert_tokens_to_ids(token)) for token in tokens]
        if isinstance(tokens, tuple):
            category, label = tokens
            self.vocabulary.check_category(category)
            found = {self.vocabulary.label_id(category, label)}
        else:
            found = {self.vocabulary.label_id(category, tokens) for category in self.vocabulary.categories}
            found |= {id_ for id_, text in enumerate(self._tokens) if text == tokens}
        found -= {ABSENT}
        if len(found) == 1:
            return found.pop()
        why = "has several meanings" if found else "is not in the vocabulary"
        raise InputError(f"token {tokens!r} {why}. Give (category, label), e.g. ('cell_type', 'B cell').")

    @cached_property
    def _tokens(self) -> list[str]:
        labels = [token_text(label) for labels in self.phenotypes.values() for label in labels]
        return [*SPECIAL_TOKENS, *labels, *(f"bin_{b}" for b in range(self.bin_edges.num_edges + 1))]

    def convert_ids_to_tokens(self, ids: "int | Sequence[int] | torch.Tensor") -> str | list[str]:
        """Return token texts of ids; an InputError if one is outside the vocabulary, such as -100."""
        if not isinstance(ids, int | np.integer):
            return [str(self.convert_ids_to_tokens(int(id_))) for id_ in ids]
        if not 0 <= ids < self.vocab_size:
            raise InputError(f"input id {ids} is outside the vocabulary of {self.vocab_size}. Give ids from 0.")
        return self._tokens[ids]

    def type_name(self, token_type: int) -> str:
        """Return the phenotype or gene (symbol if known) behind a token type; '' for special tokens."""
        if token_type == 0:
            return ""
        if token_type < self.first_gene_type:
            return self.vocabulary.categories[token_type - 1]
        return self.panel.display_name(token_type - self.first_gene_type)

    # -- cells to tokens ------------------------------------------------------------------------------------------

    def open(self, source: CellSource, **options: Any) -> Shard:
        """Align one file or AnnData to this tokenizer."""
        return Shard(source, **{**self.shard_options(), **options})

    def shard_options(self) -> dict[str, Any]:
        """Arguments that every `Shard` read for this tokenizer needs."""
        return {
            "panel": self.panel,
            "vocabulary": self.vocabulary,
            "included_phenotypes": self.included_phenotypes,
            "normalization": self.normalization,
        }

    @cached_property
    def _dtype(self) -> type:
        return np.uint16 if max(self.vocab_size, self.type_vocab_size) <= 1 << 16 else np.int32

    def tokenize_block(self, block: ExpressionBlock, *, epoch: int = 0) -> TokenBlock:
        """Tokenize many cells of one file at once; `epoch` travels with them, for masks."""
        library_size = block.library_size_n
        if block.is_linear and library_size is None:
            library_size = library_sizes(block.values_l, block.offsets_n1)
        if block.alignment.duplicated:
            block = _sum_duplicates(block)
        thresholds_ge, scale_n = self.bin_edges.edges_ge, np.ones(len(block))
        if block.is_linear and library_size is not None:
            thresholds_ge, scale_n = count_thresholds(thresholds_ge), library_size
        elif block.values_l.dtype.kind == "f":
            # Logarithms in float32 are compared in float32: 0.7 in a file reaches the edge 0.7 in either precision.
            thresholds_ge = thresholds_ge.astype(block.values_l.dtype).astype(np.float64)
        room = len(block.values_l) + len(block) * (2 + len(self.included_phenotypes))
        ids: np.ndarray = np.empty(room, dtype=self._dtype)
        types: np.ndarray = np.empty(room, dtype=self._dtype)
        offsets = np.zeros(len(block) + 1, dtype=np.int64)
        label_types = np.array([self.vocabulary.token_type(c) for c in self.included_phenotypes], dtype=np.int64)
        row, at, fault = tokenize_rows(
            native(block.values_l), block.columns_l, block.offsets_n1, block.alignment.gene_of_column_c,
            len(self.panel), thresholds_ge, scale_n, block.label_ids_np, label_types, self.first_gene_type,
            self.first_bin_id, self.max_length, ids, types, offsets,
        )  # fmt: skip
        if fault != NO_FAULT:
            raise _fault_of(block, row, at, fault)
        ids_l, types_l, epochs_n = ids[: offsets[-1]], types[: offsets[-1]], np.full(len(block), epoch)
        return TokenBlock(ids_l, types_l, offsets, block.cells_n, block.measured_tg, block.table_n, epochs_n)

    def __call__(
        self, adata: Any, *, layer: str | None = None
    ) -> "dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]":
        """Tokenize an AnnData: a dict for one cell, a list of dicts for many.

        Args:
            adata: Cells; X may be CSR, CSC, dense or backed, of integers or floats.
            layer: Name of a layer, or "raw" for `.raw`.

        Returns:
            `input_ids`, `token_type_ids` and `attention_mask` of each cell, `torch.long` of shape (l,).
        """
        shard = self.open(MemoryFile(adata, layer=layer))
        shard.check_genes(0.0)
        if shard.alignment.coverage < 1:
            logger.warning("AnnData: %s", shard.alignment.describe())
        if len(shard) == 0:
            return []
        for note in shard.values.notes:
            logger.warning("AnnData: %s", note)
        block = self.tokenize_block(shard.read(np.arange(len(shard))))
        cells = [self.as_tensors(*block.cell(index)) for index in range(len(block))]
        return cells[0] if len(cells) == 1 else cells

    @staticmethod
    def as_tensors(input_ids_l: np.ndarray, token_type_ids_l: np.ndarray) -> "dict[str, torch.Tensor]":
        """Turn one cell's tokens into the dict that datasets yield, `torch.long` of shape (l,)."""
        import torch  # here, because `check` and `prepare` need none and start sooner without it

        return {
            "input_ids": torch.from_numpy(input_ids_l.astype(np.int64)),
            "token_type_ids": torch.from_numpy(token_type_ids_l.astype(np.int64)),
            "attention_mask": torch.ones(len(input_ids_l), dtype=torch.long),
        }

    # -- files ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return all that defines this tokenizer, as written to `tokenizer.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer_class": type(self).__name__,
            "normalization": self.normalization,
            "max_length": self.max_length,
            "included_phenotypes": list(self.included_phenotypes),
            "phenotypes": {name: list(labels) for name, labels in self.phenotypes.items()},
            "bin_edges": self.bin_edges.to_json(self.panel.genes),
            "genes": list(self.panel.genes),
            "gene_symbols": list(self.panel.symbols) or None,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what ids and token types mean: genes, labels, bins and scale (not of max_length)."""
        meaning = {key: self.to_dict()[key] for key in ("genes", "phenotypes", "bin_edges", "normalization")}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneTokenizer) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> tuple[str]:
        """Write `tokenizer.json` into a folder, whole or not at all."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TOKENIZER_FILE, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")
        return (str(folder / TOKENIZER_FILE),)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, source: str) -> "GeneTokenizer":
        """Rebuild a tokenizer, refusing unknown keys and versions."""
        required = ("normalization", "max_length", "included_phenotypes", "phenotypes", "bin_edges", "genes")
        content = {key: value for key, value in content.items() if (key, value) != ("truncation", "variable")}
        check_format(source, content.get("format_version"), reads=FORMAT_VERSION)
        if unknown := sorted(set(content) - {*required, "format_version", "tokenizer_class", "gene_symbols"}):
            raise InputError(
                f"{source} is not a tokenizer of ours (unknown keys: {listed(unknown)}). Use the tokenizer.json that "
                "came with the model."
            )
        if missing := [key for key in required if key not in content]:
            raise InputError(f"{source} lacks {listed(missing)}. Use the tokenizer.json that came with the model.")
        if wrong := misfit(content, _FORM, at="tokenizer"):
            raise InputError(f"{source} is damaged: {wrong}. Use the tokenizer.json that came with the model.")
        return cls(**{key: content[key] for key in (*required, "gene_symbols") if key in content})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, max_length: int | None = None, included_phenotypes: Sequence[str] | None = None,
        **_: Any,
    ) -> "GeneTokenizer":  # fmt: skip
        """Read `tokenizer.json` from a run, corpus or tokenizer folder, or from a run on the Hugging Face Hub.

        Args:
            path: The folder, or the file itself.
            max_length, included_phenotypes: How sequences are laid out, if not as the file says.
            _: What `AutoTokenizer` passes on and no tokenizer of ours needs.
        """
        path = local_run(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"no tokenizer can be read from {file} ({error}). Point to a run or corpus folder."
            ) from error
        if not isinstance(content, dict):
            raise InputError(f"{file} is not a tokenizer. Point to a run or corpus folder.")
        tokenizer = cls.from_dict(content, source=str(file))
        if max_length is None and included_phenotypes is None:
            return tokenizer
        return tokenizer.with_settings(max_length=max_length, included=included_phenotypes)

    def with_settings(self, *, max_length: int | None = None, included: Sequence[str] | None = None) -> "GeneTokenizer":
        """Return a copy that means the same ids but lays sequences out differently."""
        content = self.to_dict()
        changes = {"max_length": max_length, "included_phenotypes": included}
        content.update({key: value for key, value in changes.items() if value is not None})
        return self.from_dict(content, source="tokenizer")
