"""Gene identity: which column of a file is which gene of the panel.

Owns what a file calls its genes (`names_of`), aligning them to a panel (`GenePanel.align`) and finding genes that a
user names (`GenePanel.find_all`); knows nothing of values, tokens or HDF5. Letters: g genes of the panel, c columns.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbgene.errors import InputError, did_you_mean, listed

NOT_IN_PANEL = -1

#: Columns of `var` that hold another name of the gene, in the order they are tried (CELLxGENE, 10x, GEO habits).
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "symbol")
ID_COLUMNS = ("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl")

#: Symbols of genes that are often called by the name of their protein or by an older symbol (HGNC), for suggestions.
SYNONYMS = {
    "CD8": "CD8A", "CD10": "MME", "CD11B": "ITGAM", "CD11C": "ITGAX", "CD16": "FCGR3A", "CD20": "MS4A1",
    "CD21": "CR2", "CD25": "IL2RA", "CD26": "DPP4", "CD29": "ITGB1", "CD30": "TNFRSF8", "CD31": "PECAM1",
    "CD32": "FCGR2A", "CD39": "ENTPD1", "CD41": "ITGA2B", "CD42B": "GP1BA", "CD45": "PTPRC", "CD49D": "ITGA4",
    "CD54": "ICAM1", "CD56": "NCAM1", "CD57": "B3GAT1", "CD61": "ITGB3", "CD62L": "SELL", "CD64": "FCGR1A",
    "CD66B": "CEACAM8", "CD71": "TFRC", "CD73": "NT5E", "CD90": "THY1", "CD94": "KLRD1", "CD95": "FAS",
    "CD103": "ITGAE", "CD105": "ENG", "CD107A": "LAMP1", "CD115": "CSF1R", "CD117": "KIT", "CD122": "IL2RB",
    "CD123": "IL3RA", "CD127": "IL7R", "CD134": "TNFRSF4", "CD137": "TNFRSF9", "CD138": "SDC1", "CD141": "THBD",
    "CD152": "CTLA4", "CD161": "KLRB1", "CD183": "CXCR3", "CD184": "CXCR4", "CD197": "CCR7", "CD235A": "GYPA",
    "CD279": "PDCD1", "CKIT": "KIT", "COX2": "PTGS2", "ECAD": "CDH1", "GRANULYSIN": "GNLY",
    "HER2": "ERBB2", "IGJ": "JCHAIN", "JCHAIN": "IGJ", "KI67": "MKI67",
    "NKG2A": "KLRC1", "NKG2D": "KLRK1", "NKP46": "NCR1", "OCT4": "POU5F1", "P16": "CDKN2A", "P21": "CDKN1A",
    "P53": "TP53", "PD1": "PDCD1", "PDL1": "CD274", "PERFORIN": "PRF1", "PU.1": "SPI1", "PU1": "SPI1",
    "TBET": "TBX21", "TIM3": "HAVCR2", "TNFA": "TNF", "VEGF": "VEGFA",
}  # fmt: skip

_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})(?:\.\d+)?(.*)$")

#: Genome assembly in front of a name, as Cell Ranger writes it for several species (GRCh38_, mm10___, hg19_).
_GENOME = re.compile(r"^(?:(?i:GRC[a-z])\d+|hg\d+|mm\d+|rn\d+|T2T-CHM13v\d)(?:[-.][\w.-]*?)?_+(?=[^_])")

#: An id and a symbol in one name, in either order.
_ID_AND_SYMBOL = re.compile(r"^(ENS[A-Z]*G\d{6,})(?:\.\d+)?[_|:;](?!PAR_)(.+)$")
_SYMBOL_AND_ID = re.compile(r"^(.+)[_|:;](ENS[A-Z]*G\d{6,})(?:\.\d+)?$")

#: What scanpy (-1) and R (.1) append to a name that another column has already.
_COPY = re.compile(r"^(.+?)[-.]\d{1,2}$")


def clean_gene(name: object) -> str:
    """Strip blanks, a genome in front and the version of an Ensembl id; a missing name is ''.

    Example:
        >>> clean_gene("ENSG00000156738.18"), clean_gene(" MS4A1 "), clean_gene("GRCh38_MS4A1")
        ('ENSG00000156738', 'MS4A1', 'MS4A1')
    """
    text = name.strip() if isinstance(name, str) else "" if pd.isna(name) else str(name).strip()
    text = _GENOME.sub("", text) if "_" in text else text
    match = _ENSEMBL.match(text)
    return match.group(1) + match.group(2) if match else text


def species_of(names: Iterable[str]) -> str:
    """Return what most Ensembl ids begin with, such as ENSG (human) or ENSMUSG (mouse); '' without such ids."""
    starts = Counter(match[0] for match in (re.match(r"ENS[A-Z]*G(?=\d{6})", name) for name in names) if match)
    return starts.most_common(1)[0][0] if starts else ""


def is_ensembl(name: str) -> bool:
    """True for ids such as ENSG00000156738 or ENSMUSG00000024673."""
    return _ENSEMBL.match(name) is not None


#: Columns of `var` that say what a column measures, and what genes are called there (10x, muon, Cell Ranger ARC).
FEATURE_COLUMNS = ("feature_types", "feature_type")
GENE_FEATURES = {"gene expression", "gene_expression", "gene", "genes", "gex", "rna", "mrna"}
_OTHER_FEATURES = re.compile(
    r"antibody|peak|crispr|guide|multiplexing|hashtag|custom|^(adt|hto|atac|protein|cmo)$", re.I
)


def features_of(source: Any) -> tuple[np.ndarray, str] | None:
    """Return which columns of a file are gene expression, bool (c,), and the others in words; None if all are."""
    columns = [column for column in FEATURE_COLUMNS if column in source.columns_of(source.var_frame)]
    if not columns:
        return None
    kind_c = source.var_column(columns[0]).astype(object).map(clean_gene).to_numpy(dtype=object)
    is_gene_of = {kind: not kind or kind.lower() in GENE_FEATURES for kind in dict.fromkeys(kind_c)}
    if not any(is_gene and kind for kind, is_gene in is_gene_of.items()):  # other words for genes, such as lncRNA
        is_gene_of = {kind: not _OTHER_FEATURES.search(kind) for kind in is_gene_of}
    is_gene_c = np.array([is_gene_of[kind] for kind in kind_c], dtype=bool)
    if is_gene_c.all():
        return None
    counts = Counter(kind_c[~is_gene_c].tolist())
    named = listed([f"{count:,} {kind}" for kind, count in counts.items()])
    text = f"{(~is_gene_c).sum():,} columns whose var[{columns[0]!r}] is not gene expression ({named})"
    if not is_gene_c.any():
        raise InputError(f"{source.path} has no genes: {text}. Give the file with the gene expression.")
    return is_gene_c, text


class GeneNames(NamedTuple):
    """What a file calls its genes: the name of each column, and further ids and symbols, arrays of shape (c,)."""

    own_c: np.ndarray
    ids: tuple[np.ndarray, ...]
    symbols: tuple[np.ndarray, ...]


def names_of(source: Any, gene_id_column: str | None = None) -> GeneNames:
    """Return what a `CellSource` calls its genes ('' if a column is none); `gene_id_column` replaces `var_names`."""
    known = source.columns_of(source.var_frame)
    ids, symbols = (
        tuple(np.array(source.var_column(column), dtype=object) for column in columns if column in known)
        for columns in (ID_COLUMNS, SYMBOL_COLUMNS)
    )
    own_c = np.array(source.var_names if gene_id_column is None else source.var_column(gene_id_column), dtype=object)
    if (features := features_of(source)) is not None and len(features[0]) == len(own_c):
        for names_c in (own_c, *ids, *symbols):
            names_c[~features[0]] = ""
    return GeneNames(own_c, ids, symbols)


@dataclass(frozen=True)
class GeneAlignment:
    """Which gene of the panel each column of a file is.

    Args:
        gene_of_column_c: Panel index of each column, int32 of shape (c,), -1 if the panel lacks it.
        num_genes: Size of the panel g.
        by_symbol: Names of columns that were found by a symbol instead of an id.
        duplicated: Panel genes that several columns are.
        unknown: Names of columns that the panel lacks.
        other_case: Those of them that the panel has in another case, if it has few of the file's genes.
        num_copies: Columns of a panel gene that are named like another column with a number behind it (`MATR3-1`).
        num_prefixed: Columns that are known without the genome in front of their name.
        renaming: What a table of the user renamed, in words.
    """

    gene_of_column_c: np.ndarray
    num_genes: int
    by_symbol: tuple[str, ...] = ()
    duplicated: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    other_case: tuple[str, ...] = ()
    num_copies: int = 0
    num_prefixed: int = 0
    renaming: str = ""

    @cached_property
    def is_measured_g(self) -> np.ndarray:
        """True for panel genes that the file has, shape (g,)."""
        is_measured = np.zeros(self.num_genes, dtype=bool)
        is_measured[self.gene_of_column_c[self.gene_of_column_c >= 0]] = True
        return is_measured

    @property
    def coverage(self) -> float:
        """Share of the panel's genes that the file has, in 0..1."""
        return float(self.is_measured_g.mean()) if self.num_genes else 0.0

    def describe(self) -> str:
        """Return the coverage line that every verb prints."""
        parts = [f"{self.is_measured_g.sum():,} of {self.num_genes:,} panel genes found ({self.coverage:.1%})"]
        kinds = [
            (len(self.by_symbol), "by symbol"),
            (self.num_prefixed, "without the genome in front of their name"),
            (self.num_copies, "without a number that made their name unique"),
            (len(self.duplicated), f"summed from several columns ({listed(self.duplicated, most=3)})"),
            (len(self.unknown), "columns not in the panel"),
        ]
        parts += [f"{count:,} {kind}" for count, kind in kinds if count]
        return ", ".join(parts) + (f"; {self.renaming}" if self.renaming else "")


@dataclass(frozen=True)
class GenePanel:
    """The ordered genes that a model knows: gene i has token type 1 + P + i.

    Args:
        genes: Ids, Ensembl versions dropped, most variable first.
        symbols: Symbol of each gene, or empty.
    """

    genes: tuple[str, ...]
    symbols: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        genes = tuple(clean_gene(gene) for gene in self.genes)
        repeated = [gene for gene, count in Counter(genes).items() if count > 1]
        if not genes:
            raise InputError("the gene panel is empty. Give at least one gene.")
        if "" in genes:
            raise InputError(f"gene {genes.index('')} of the panel has a blank name. Remove it or name it.")
        if repeated:
            raise InputError(f"the gene panel names {listed(repeated)} more than once. Keep each gene once.")
        if self.symbols and len(self.symbols) != len(genes):
            raise InputError(f"{len(self.symbols):,} gene symbols were given for {len(genes):,} genes. Give one each.")
        object.__setattr__(self, "genes", genes)
        object.__setattr__(self, "symbols", tuple(clean_gene(symbol) for symbol in self.symbols))

    def __len__(self) -> int:
        return len(self.genes)

    @cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {gene: index for index, gene in enumerate(self.genes)}

    @cached_property
    def _index_of_symbol(self) -> dict[str, int]:
        num_genes = Counter(self.symbols)
        return {symbol: i for i, symbol in enumerate(self.symbols) if symbol and num_genes[symbol] == 1}

    @cached_property
    def _uses_ensembl(self) -> bool:
        return sum(map(is_ensembl, self.genes)) > len(self.genes) / 2

    def display_name(self, index: int) -> str:
        """Return the symbol of gene `index` when there is one, else its id."""
        return (self.symbols[index] if self.symbols else "") or self.genes[index]

    def find(self, name: object) -> int:
        """Return the panel index of an id or symbol, or -1."""
        key = clean_gene(name)
        return self._index_of_id.get(key, self._index_of_symbol.get(key, NOT_IN_PANEL))

    def find_all(self, names: Sequence[str], *, flag: str) -> np.ndarray:
        """Return the panel index of each id or symbol, int64; an InputError suggests the nearest and names the flag."""
        found = np.array([self.find(name) for name in names], dtype=np.int64)
        for at in np.flatnonzero(found == NOT_IN_PANEL)[:1]:
            known = [name for name in dict.fromkeys([*self.symbols, *self.genes]) if name]
            synonym = SYNONYMS.get(re.sub(r"[\s_-]", "", str(names[at])).upper(), "")
            is_synonym = self.find(synonym) >= 0
            hint = f"Did you mean {synonym!r}?" if is_synonym else did_you_mean(str(names[at]), known)
            raise InputError(
                f"gene {names[at]!r} is not among the {len(self):,} genes of the run's panel. {hint} Change --{flag}."
            )
        return found

    def align(
        self,
        names_c: Sequence[object] | np.ndarray,
        *,
        other_names_c: Sequence[Sequence[object] | np.ndarray] = (),
        can_be_summed: bool = False,
    ) -> GeneAlignment:
        """Find every column of a file in the panel, by name only.

        A column is looked up by its own name, then by its other names, then by an id and a symbol within its name.
        Where the panel uses Ensembl ids and one of the column's names is one, the id decides alone: a symbol never
        overrules it.

        Args:
            names_c: The file's `var_names`, length c.
            other_names_c: Further names of the same columns, such as `var["feature_name"]`.
            can_be_summed: True also finds copies, columns that are named like another one with a number behind it, as
                scanpy and R make repeated names unique.
        """
        columns = [clean_gene(name) for name in names_c]
        gene_of_column_c = np.array([self._index_of_id.get(name, NOT_IN_PANEL) for name in columns], dtype=np.int32)
        by_symbol, known, num_copies = list[str](), set(columns), 0
        for column in np.flatnonzero(gene_of_column_c < 0).tolist():
            name = columns[column]
            candidates = [name, *(clean_gene(names[column]) for names in other_names_c)]
            both = _ID_AND_SYMBOL.match(name) or _SYMBOL_AND_ID.match(name)
            if self._uses_ensembl and is_ensembl(name):
                candidates = [name]
            candidates += both.groups() if both else ()
            ensembl = [text for text in candidates if is_ensembl(text)] if self._uses_ensembl else []
            candidates = ensembl or [text for text in candidates if text]
            found = next((index for index in map(self.find, candidates) if index >= 0), NOT_IN_PANEL)
            if found < 0 and can_be_summed and not ensembl and (copy := _COPY.match(name)) and copy[1] in known:
                found = self.find(copy[1])
                num_copies += found >= 0
            elif found >= 0:
                by_symbol.append(name)
            gene_of_column_c[column] = found
        claims = Counter(gene_of_column_c[gene_of_column_c >= 0].tolist())
        unknown = tuple(columns[column] for column in np.flatnonzero(gene_of_column_c < 0) if columns[column])
        caseless = {name.casefold() for name in (*self.genes, *self.symbols) if name}
        has_few = len(claims) < len(self) / 2
        is_prefixed_c = [isinstance(name, str) and _GENOME.match(name.strip()) is not None for name in names_c]
        return GeneAlignment(
            gene_of_column_c,
            len(self),
            by_symbol=tuple(by_symbol),
            duplicated=tuple(self.display_name(gene) for gene, count in claims.items() if count > 1),
            unknown=unknown,
            other_case=tuple(name for name in unknown if name.casefold() in caseless) if has_few else (),
            num_copies=num_copies,
            num_prefixed=int((gene_of_column_c[np.array(is_prefixed_c, dtype=bool)] >= 0).sum()),
        )


#: Number of names in each part of a gene report.
_EXAMPLES = 10


def gene_report(
    names_c: Sequence[object] | np.ndarray, alignment: GeneAlignment, *, panel_of_gene: np.ndarray, panel: GenePanel
) -> dict[str, dict[str, Any]]:
    """Count what became of each column of a file, and which genes of the panel it lacks.

    Args:
        names_c: What the file calls its columns, length c.
        alignment: Its columns among all known genes.
        panel_of_gene: Panel index of each known gene, -1 if it was not chosen.
        panel: The chosen genes.

    Returns:
        Count and first examples of each kind: columns `kept` by their own id; columns `mapped` by a symbol; columns
        `dropped` because their gene is not in the panel; `unknown` columns, whose names are no known gene; genes of
        the panel `summed` from several columns; genes of the panel that are `unmeasured` because no column has them.
    """
    names = np.array([clean_gene(name) for name in names_c], dtype=object)
    is_known_c = alignment.gene_of_column_c >= 0
    panel_c = np.where(is_known_c, np.append(panel_of_gene, NOT_IN_PANEL)[alignment.gene_of_column_c], NOT_IN_PANEL)
    is_mapped_c = np.isin(names.astype(str), np.array(alignment.by_symbol, dtype=str)) & is_known_c
    times_g = np.bincount(panel_c[panel_c >= 0], minlength=len(panel))
    found: dict[str, Sequence[str] | np.ndarray] = {
        "kept": names[(panel_c >= 0) & ~is_mapped_c],
        "mapped": names[(panel_c >= 0) & is_mapped_c],
        "summed": [panel.display_name(int(gene)) for gene in np.flatnonzero(times_g > 1)],
        "dropped": names[is_known_c & (panel_c < 0)],
        "unknown": names[~is_known_c],
        "unmeasured": [panel.display_name(int(gene)) for gene in np.flatnonzero(times_g == 0)],
    }
    return {
        kind: {"count": len(genes), "examples": [str(gene) for gene in genes[:_EXAMPLES]]}
        for kind, genes in found.items()
    }


def read_panel(path: str | Path) -> tuple[str, ...]:
    """Read gene ids from a text file, one per line; blank lines and lines after # are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"panel {path} cannot be read ({error}). Give a text file with one gene per line.") from error
    genes = tuple(line.split("#")[0].split("\t")[0].strip() for line in lines)
    return tuple(gene for gene in genes if gene)
