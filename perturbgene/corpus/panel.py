"""The genes of a corpus: those of all files under one name each, and the ranked panel chosen from them.

Owns joining and choosing genes, and which table of genes measures which of them; leaves how a name is cleaned and
matched to `data_utils.genes`. Letters: g genes of the panel, u genes of all files, t tables of genes.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from perturbgene.cli.verbs import PrepareConfig
from perturbgene.corpus.statistics import Statistics
from perturbgene.corpus.survey import Plan, Survey, gene_names_of, open_files, path_of
from perturbgene.data_utils.genes import (
    GenePanel,
    clean_gene,
    gene_report,
    is_ensembl,
    read_panel,
    species_of,
)
from perturbgene.data_utils.labels import label_text
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, listed
from perturbgene.hub import local_run

logger = logging.getLogger(__name__)

#: Column of `var` with the rank by variability.
RANK_COLUMN = "highly_variable_rank"

#: Two files that share no more than this part of the smaller set of genes name their genes differently.
LEAST_SHARED = 0.02

#: What a gene report counts: columns of a file (kept, mapped, dropped, unknown) and genes of the panel (the others).
MEANING = {
    "kept": "columns are in the panel under their own name",
    "mapped": "columns are in the panel under another name of their gene, such as the Ensembl id of a symbol",
    "summed": "genes of the panel are the sum of several columns",
    "dropped": "columns are genes outside the panel",
    "unknown": "columns name no gene",
    "unmeasured": "genes of the panel have no column: they are unknown in these cells, not zero",
}


def join_genes(survey: Survey, config: PrepareConfig) -> tuple[GenePanel, np.ndarray]:
    """Return the genes of all files, in order of first appearance; a gene known by id and by symbol is one gene.

    The second result is True where a table of genes has a gene, shape (t, u).

    Raises:
        InputError: There is no gene, or files share (nearly) none with the rest of the corpus.
    """
    symbol_of: dict[str, str] = {}
    kept_apart: set[str] = set()
    with closing(open_files(survey.sources, config)) as cache:
        for index in survey.first_of_table:
            genes = dict[str, str]()
            for name, id_, symbol in zip(*gene_names_of(cache[index]), strict=True):
                own, other, known_as = clean_gene(name), clean_gene(id_), clean_gene(label_text(symbol))
                # The Ensembl id if the file has it anywhere, else the name of the column. A number counts columns or
                # rows of a table elsewhere: two files with a gene "17" need not mean the same one.
                chosen = next((text for text in (own, known_as, other) if text and not text.isdecimal()), "")
                genes[other if is_ensembl(other) and not is_ensembl(own) else chosen] = known_as or own
            genes.pop("", None)
            kept_apart.update(symbol for gene, symbol in genes.items() if symbol != gene and symbol in genes)
            for gene, symbol in genes.items():
                if symbol_of.setdefault(gene, symbol) == gene:
                    symbol_of[gene] = symbol
    if not symbol_of:
        raise InputError(
            "the files hold no genes: no column has a name, or numbers for names. Name the column of var that holds "
            "them with --gene_id_column."
        )
    times = Counter(symbol for gene, symbol in symbol_of.items() if symbol != gene)
    aliases = {symbol for symbol, count in times.items() if count == 1 and not is_ensembl(symbol)} - kept_apart
    kept = {gene: symbol for gene, symbol in symbol_of.items() if gene not in aliases}
    union = GenePanel(tuple(kept), tuple(kept.values()))
    with closing(open_files(survey.sources, config, union)) as cache:
        measured_tu = np.stack([cache[index].alignment.is_measured_g for index in survey.first_of_table])
    _check_shared(survey, union, config, measured_tu=measured_tu)
    return union, measured_tu


@dataclass(frozen=True)
class CorpusGenes:
    """The panel of a corpus and how the files measure it."""

    panel: GenePanel
    panel_of_union: np.ndarray  # place in the panel of each gene of all files, int64 of shape (u,), or -1
    measured_tg: np.ndarray  # True where a table has a gene of the panel, shape (t, g)
    reports: list[dict[str, Any]]  # what became of the columns of each table, in the words of `MEANING`
    remedies: list[str]  # where a table's file has more genes of the panel, and the flag that reads them; or ''
    num_given_missing: int  # genes of a given panel that no file has


def choose_genes(plan: Plan, survey: Survey, statistics: Statistics, *, measured_tu: np.ndarray) -> CorpusGenes:
    """Choose the panel (given genes, then expressed ones by variability) and find its genes in every table."""
    config, moments, union = plan.config, statistics.moments, plan.union
    given, num_top = config.panel or config.like, config.num_top_genes
    genes, symbols, union_g = list[str](), list[str](), np.zeros(0, dtype=np.int64)
    if given:
        genes, symbols, union_g = _given_genes(union, given, config)
        num_top = max(num_top, len(genes)) if num_top and config.like else num_top
    if not config.panel:
        # A gene varies among the cells that measure it: in the others it is unknown, not zero.
        num_cells_u = statistics.cells_of_table @ measured_tu
        if statistics.counts:
            ranked = moments.rank(statistics.counts.normalized_variance(num_cells_u))
        else:
            ranked = moments.rank(moments.normalized_dispersion(num_cells_u))
        ranked = ranked[(moments.num_expressed_g[ranked] > 0) & ~np.isin(ranked, union_g)]
        # Genes that most cells measure come first: of others, most cells would know nothing.
        is_common_g = 2 * num_cells_u[ranked] > moments.num_cells
        ranked = np.concatenate([ranked[is_common_g], ranked[~is_common_g]])
        genes, symbols = [*genes, *(union.genes[g] for g in ranked)], [*symbols, *(union.symbols[g] for g in ranked)]
        union_g = np.concatenate([union_g, ranked])
    if not len(genes):
        raise InputError("no training cell expresses any gene: is X empty? Choose the matrix with --layer.")
    if num_top and num_top > len(genes):
        raise InputError(f"num_top_genes {num_top:,} exceeds the {len(genes):,} expressed genes. Lower it.")
    union_g = union_g[:num_top]
    panel = GenePanel(tuple(genes[:num_top]), tuple(symbols[:num_top]))
    is_known_g, panel_of_union = union_g >= 0, np.full(len(union), -1, dtype=np.int64)
    panel_of_union[union_g[is_known_g]] = np.flatnonzero(is_known_g)
    measured_tg = measured_tu[:, union_g] & is_known_g
    reports, remedies = [], [""] * len(measured_tg)
    with (
        closing(open_files(plan.sources, config, union)) as cache,
        closing(open_files(plan.sources, config, panel)) as panel_cache,
    ):
        for table, index in enumerate(survey.first_of_table):
            shard = cache[index]
            if not measured_tg[table].all():
                remedies[table] = panel_cache[index].gene_remedy()
            names_c = shard.renaming.names.own_c
            reports.append(gene_report(names_c, shard.alignment, panel_of_gene=panel_of_union, panel=panel))
            logger.info("genes of %s:", shard.path)
            if shard.renaming.text:
                logger.log(shard.renaming.level, "  %s", shard.renaming.text)
            for kind, found in reports[-1].items():
                if found["count"]:
                    examples = ", ".join(found["examples"][:3])
                    logger.info("  %s: %s %s (%s)", kind, f"{found['count']:,}", MEANING[kind], examples)
    return CorpusGenes(panel, panel_of_union, measured_tg, reports, remedies, int((~is_known_g).sum()))


def _check_shared(survey: Survey, union: GenePanel, config: PrepareConfig, *, measured_tu: np.ndarray) -> None:
    """Raise an InputError if files share (nearly) no gene with the rest of the corpus, with the likely reason."""
    shared_tt = measured_tu.astype(np.float32) @ measured_tu.T.astype(np.float32)
    num_genes_t = shared_tt.diagonal()
    are_linked_tt = shared_tt > LEAST_SHARED * np.minimum(num_genes_t[:, None], num_genes_t)
    # Files that share genes through other files belong together; those with most cells are right.
    num_groups, group_t = connected_components(sparse.csr_matrix(are_linked_tt), directed=False)
    if num_groups == 1:
        return
    sizes = [file.num_cells for file in survey.files]
    main = np.bincount(group_t[survey.table_of_source], weights=sizes, minlength=num_groups).argmax()
    other, table = int(np.flatnonzero(group_t == main)[0]), int(np.flatnonzero(group_t != main)[0])
    indices = [survey.first_of_table[one] for one in (table, other)]
    paths = [path_of(survey.sources[index]) for index in indices]
    genes = [[union.genes[g] for g in np.flatnonzero(measured_tu[one])] for one in (table, other)]
    with closing(open_files(survey.sources, config)) as cache:
        cells = [[clean_gene(name) for name in cache[index].source.obs_names] for index in indices]
    raise InputError(
        f"{paths[0]} shares no gene with the other files, or nearly none ({shared_tt[table, other]:,.0f} of "
        f"{num_genes_t[table]:,.0f} with {paths[1]}): its genes are {listed(genes[0], most=3)}, there "
        f"{listed(genes[1], most=3)}. {why_none_is_shared(genes, cells)}"
    )


def why_none_is_shared(genes: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> str:
    """Return the likely reason why two files, with these names of genes and cells, share no gene, and what to do.

    Example:
        >>> why_none_is_shared([["Cd3d", "Cd19"], ["CD3D", "CD19"]], [["c1"], ["c2"]])[:56]
        'Their names differ in upper and lower case only, as mous'
    """
    either = ((0, 1), (1, 0))
    for one, other in either:
        if len(set(cells[one]) & set(genes[other])) > min(len(cells[one]), len(genes[other])) / 5:
            where = ("the first", "the second")[one]
            return f"Cells and genes of {where} are swapped: transpose it (adata.T)."
    species = [species_of(names) for names in genes]
    if all(species) and species[0] != species[1]:
        return f"They are of different species ({species[0]} and {species[1]}): give orthologs with --gene_map."
    if any(species) and not all(species):
        return (
            "One has Ensembl ids, the other has symbols: name a column of var that holds the same kind of names in all "
            "files with --gene_id_column."
        )
    known = [{name.casefold() for name in names} for names in genes]
    least = min(map(len, known)) / 2
    if len(known[0] & known[1]) > least:
        return (
            "Their names differ in upper and lower case only, as mouse symbols differ from human ones: give a table of "
            "orthologs with --gene_map; if it is one species, write all as one (var_names.str.upper())."
        )
    for one, other in either:
        found = [re.match(r"[^_:|]+[_:|]+", name) for name in genes[one]]
        prefixes = Counter(match[0] for match in found if match).most_common(1)
        for prefix, _ in prefixes:
            if len({name.removeprefix(prefix) for name in genes[one]} & set(genes[other])) > least:
                return f"Names of one begin with {prefix!r}: remove it (var_names.str.removeprefix({prefix!r}))."
    return (
        "Name a column of var that holds the same kind of names in all files with --gene_id_column, or bring the files "
        "to one naming first (Ensembl ids or symbols, one species, cells as rows)."
    )


def given_panel(given: str) -> tuple[list[str], list[str]]:
    """Read the genes of a run, a tokenizer or a text file, and their symbols; none where these are not known."""
    path = local_run(given)
    if not path.is_dir() and path.suffix != ".json":
        return list(read_panel(path)), []
    tokenizer = GeneTokenizer.from_pretrained(path)
    return list(tokenizer.genes), list(tokenizer.gene_symbols)


def _given_genes(union: GenePanel, given: str, config: PrepareConfig) -> tuple[list[str], list[str], np.ndarray]:
    """Return a given panel's genes and symbols, whole and in its order, and the place of each among all genes or -1."""
    genes, symbols = given_panel(given)
    union_g = np.array([union.find(gene) for gene in genes], dtype=np.int64)
    for i in np.flatnonzero(union_g < 0) if symbols else ():
        union_g[i] = union.find(symbols[i])
    num_missing = int((union_g < 0).sum())
    if num_missing > (1 - config.min_gene_coverage) * len(genes) or num_missing == len(genes):
        flag = "like" if config.like else "panel"
        raise InputError(
            f"{flag} {given}: {num_missing:,} of {len(genes):,} genes are in no file, and --min_gene_coverage is "
            f"{config.min_gene_coverage:g}. Give another --{flag}, lower --min_gene_coverage, or leave --{flag} out: "
            "training that starts from a run (--pretrained_model_path) matches genes by name."
        )
    if not symbols:
        symbols = [union.symbols[g] if g >= 0 else gene for gene, g in zip(genes, union_g, strict=True)]
        if config.like:  # a run's genes keep the names that its weights have
            return genes, symbols, union_g
        genes = [union.genes[g] if g >= 0 else gene for gene, g in zip(genes, union_g, strict=True)]
    return genes, symbols, union_g
