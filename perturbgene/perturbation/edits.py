"""Perturbations as edits of token sequences: a gene's token is removed, gets another bin, or is inserted.

Owns what a perturbation is, which cells it changes and the edited sequences; knows nothing of models or effects.
Letters: n cells, l tokens, q perturbations, m edited sequences, j genes of all perturbations.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numba
import numpy as np

from perturbgene.cli.verbs import PerturbationKind, check_bin
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError, did_you_mean

ALL_GENES = "all"
REMOVED = -1  # in place of an input id


@dataclass(frozen=True)
class Perturbations:
    """What is done to cells, one entry for each of q perturbations."""

    names: tuple[str, ...]  # genes by symbol (or id), those of a combination joined by "+"
    types_j: np.ndarray  # token types of the genes, ascending within a perturbation, int64
    offsets_q1: np.ndarray  # perturbation q owns `types_j[offsets_q1[q]:offsets_q1[q + 1]]`
    new_id: int  # input id that the genes get; `REMOVED` takes their tokens away
    inserts: bool  # whether a token is inserted where the cell does not express the gene

    def __len__(self) -> int:
        return len(self.names)

    def types(self, row: int) -> np.ndarray:
        """Return the token types of one perturbation's genes."""
        return self.types_j[self.offsets_q1[row] : self.offsets_q1[row + 1]]

    def take(self, rows: np.ndarray) -> "Perturbations":
        """Return some of the perturbations, in the given order."""
        types = [self.types(row) for row in rows]
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            types_j=np.concatenate([np.empty(0, dtype=np.int64), *types]),
            offsets_q1=np.cumsum([0, *map(len, types)]).astype(np.int64),
        )


def perturbations_of(
    genes: Sequence[str], tokenizer: GeneTokenizer, *, kind: PerturbationKind = "knock_out", level: int | None = None
) -> Perturbations:
    """Return the perturbations that names refer to.

    Args:
        genes: Ids or symbols of the panel, those of a combination joined by "+"; or "all" alone for every gene that a
            cell expresses.
        tokenizer: The model's.
        kind: "knock_out" removes the token, "over_express" sets the highest bin, "set_bin" sets the bin `level`; the
            last two insert the gene into cells that do not express it, except with "all".
        level: Bin for "set_bin", from 1 to the number of edges.

    Raises:
        InputError: A gene is not in the panel, is named twice, or the bin does not exist.

    Example:
        >>> tokenizer = GeneTokenizer(genes=["A", "B"], phenotypes={}, bin_edges=[1.0], max_length=4)
        >>> perturbations_of(["B", "B+A"], tokenizer).types_j.tolist()
        [2, 1, 2]
    """
    kinds, top = get_args(PerturbationKind), tokenizer.bin_edges.num_edges
    if kind not in kinds:
        raise InputError(f"kind {kind!r} is unknown. {did_you_mean(kind, kinds)}")
    check_bin(kind, level)
    if level is not None and not 1 <= level <= top:
        raise InputError(
            f"--bin is {level}, but the run's bins go from 1 to {top} (bin 0 is a knock-out). Change --bin."
        )
    new_id = REMOVED if kind == "knock_out" else tokenizer.first_bin_id + (top if level is None else level)
    if not genes:
        raise InputError("no gene is named. Give genes to --genes, or `--genes all`.")
    if list(genes) == [ALL_GENES]:
        types = tokenizer.first_gene_type + np.arange(len(tokenizer.panel), dtype=np.int64)
        symbols = [tokenizer.type_name(int(type_)) for type_ in types]
        count = Counter(symbols)  # genes that share a symbol are named by id
        names = tuple(gene if count[name] > 1 else name for name, gene in zip(symbols, tokenizer.genes, strict=True))
        return Perturbations(names, types, np.arange(len(types) + 1), new_id, inserts=False)
    parts = [_types_of(entry, tokenizer) for entry in genes]
    names = tuple("+".join(tokenizer.type_name(type_) for type_ in part) for part in parts)
    if len(set(map(tuple, parts))) < len(parts):
        raise InputError(f"genes name a perturbation twice: {list(names)}. Name each once in --genes.")
    types = np.array([type_ for part in parts for type_ in part], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Perturbations(names, types, offsets, new_id, inserts=kind != "knock_out")


def _types_of(entry: str, tokenizer: GeneTokenizer) -> list[int]:
    """Return the ascending token types of one perturbation, e.g. of "A+B"; a gene's name may itself contain a "+"."""
    panel = tokenizer.panel
    parts = [entry] if panel.find(entry) >= 0 else [part.strip() for part in entry.split("+")]
    types = sorted(tokenizer.first_gene_type + int(gene) for gene in panel.find_all(parts, flag="genes"))
    if len(set(types)) < len(types):
        raise InputError(f"genes hold {entry!r}, which names a gene twice. Name each gene once in --genes.")
    return types


def changed_pairs(
    block: TokenBlock, perturbations: Perturbations, tokenizer: GeneTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cell, perturbation) of every edit that changes a sequence, cell by cell, each int64 of shape (m,).

    All others have an effect of exactly zero by definition and are never run: a knock-out of a gene that the cell does
    not express, or a bin that the gene already has.
    """
    if not len(perturbations):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    cells, rows = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for cell in range(len(block)):
        ids, types = block.cell(cell)
        id_of_type = np.full(tokenizer.type_vocab_size, -1, dtype=np.int64)
        id_of_type[types] = ids
        id_j = id_of_type[perturbations.types_j]
        is_changed_j = np.where(id_j >= 0, id_j != perturbations.new_id, perturbations.inserts)
        rows.append(np.flatnonzero(np.logical_or.reduceat(is_changed_j, perturbations.offsets_q1[:-1])))
        cells.append(np.full(len(rows[-1]), cell))
    return np.concatenate(cells), np.concatenate(rows)


def edit(
    block: TokenBlock, perturbations: Perturbations, tokenizer: GeneTokenizer, *,
    pairs: tuple[np.ndarray, np.ndarray], most_genes: int,
) -> tuple[TokenBlock, np.ndarray]:  # fmt: skip
    """Apply perturbations to cells.

    An inserted gene is placed in the panel's order; a cell that is full loses its last unperturbed genes to make room.
    After a removal, genes that truncation had cut stay out: otherwise the effect of one gene would be mixed with that
    of another that comes in.

    Args:
        block: Sequences as the model reads them.
        perturbations, pairs: What is done, and the cell and the perturbation of each edited sequence, each (m,).
        tokenizer: The model's.
        most_genes: Maximum number of genes in a sequence.

    Returns:
        The m edited sequences, and True for tokens of perturbed genes, shape (l,).
    """
    cell_m, perturbation_m = pairs
    longest = int(np.diff(perturbations.offsets_q1).max(initial=0)) if perturbations.inserts else 0
    room = int(np.diff(block.offsets_n1)[cell_m].sum()) + longest * len(cell_m)
    ids, types = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    is_own, offsets = np.zeros(room, dtype=bool), np.zeros(len(cell_m) + 1, dtype=np.int64)
    _edit_rows(
        block.input_ids_l, block.token_type_ids_l, block.offsets_n1, cell_m, perturbation_m, perturbations.types_j,
        perturbations.offsets_q1, perturbations.new_id, perturbations.inserts, tokenizer.first_gene_type, most_genes,
        ids, types, is_own, offsets,
    )  # fmt: skip
    stop = offsets[-1]
    return TokenBlock(ids[:stop], types[:stop], offsets, block.cells_n[cell_m]), is_own[:stop]


@numba.njit(nogil=True, cache=True)
def _first_spare(types, genes, first_gene_type, most_genes):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return the first token from which unperturbed genes are dropped, so that the absent ones of `genes` fit in."""
    present, num_genes = 0, 0
    for k in range(len(types)):
        num_genes += types[k] >= first_gene_type
        for gene in genes:
            present += types[k] == gene
    over, at = num_genes + len(genes) - present - most_genes, len(types)
    while over > 0 and at > 0:
        at -= 1
        is_perturbed = False
        for gene in genes:
            is_perturbed |= types[at] == gene
        over -= types[at] >= first_gene_type and not is_perturbed
    return at


@numba.njit(nogil=True, cache=True)
def _edit_rows(  # type: ignore[no-untyped-def]
    ids_l, types_l, offsets_n1, cell_m, perturbation_m, types_j, offsets_q1, new_id, inserts, first_gene_type,
    most_genes, out_ids, out_types, out_own, out_offsets,
):  # fmt: skip  # pragma: no cover - compiled
    """Write every edited sequence by merging the cell's tokens with the genes of its perturbation."""
    at = 0
    for m in range(len(cell_m)):
        start, stop = offsets_n1[cell_m[m]], offsets_n1[cell_m[m] + 1]
        ids, types = ids_l[start:stop], types_l[start:stop]
        genes = types_j[offsets_q1[perturbation_m[m]] : offsets_q1[perturbation_m[m] + 1]]
        spare = _first_spare(types, genes, first_gene_type, most_genes) if inserts else len(types)
        j = 0
        for k in range(len(types)):
            is_end = k == len(types) - 1
            while j < len(genes) and (is_end or (types[k] >= first_gene_type and genes[j] < types[k])):
                if inserts:
                    out_ids[at], out_types[at], out_own[at] = new_id, genes[j], True
                    at += 1
                j += 1
            if j < len(genes) and genes[j] == types[k]:
                j += 1
                if new_id >= 0:
                    out_ids[at], out_types[at], out_own[at] = new_id, types[k], True
                    at += 1
            elif k < spare or types[k] < first_gene_type:
                out_ids[at], out_types[at], out_own[at] = ids[k], types[k], False
                at += 1
        out_offsets[m + 1] = at
