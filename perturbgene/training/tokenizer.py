"""The tokenizer of a new run: from a configuration of `mlm` or `cls` and its training files.

Owns the choice of panel, vocabulary and bins; leaves their meaning to `GeneTokenizer`.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.cli.options import conditions
from perturbgene.corpus.panel import RANK_COLUMN, given_panel
from perturbgene.data_utils.binning import read_edges
from perturbgene.data_utils.gene_map import read_gene_map
from perturbgene.data_utils.genes import GenePanel, clean_gene, names_of
from perturbgene.data_utils.iterable_ann_dataset import columns_of
from perturbgene.data_utils.labels import Labels, Vocabulary, check_are_labels, is_missing, with_new_labels
from perturbgene.data_utils.opening import FileList, open_source
from perturbgene.data_utils.shards import ShardCache
from perturbgene.data_utils.tokenization import FORMAT_VERSION, GeneTokenizer
from perturbgene.errors import InputError

if TYPE_CHECKING:
    from perturbgene.configs import TrainingConfig


def tokenizer_of(config: "TrainingConfig", train_files: FileList) -> GeneTokenizer:
    """Return the tokenizer that a configuration describes.

    It starts from the tokenizer of `config.corpus`, or from that of `config.pretrained_model_path`, behind whose labels
    come new ones of the training files. A vocabulary, bin edges or a panel that the configuration names replace those.
    Without either, the panel is a file of genes, another run's
    tokenizer, or the first training file's genes by `highly_variable_rank`.
    """
    base = config.corpus or config.pretrained_model_path
    content: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if base:
        content = GeneTokenizer.from_pretrained(base).to_dict()
    content["max_length"] = config.max_length
    if config.vocab_path or not base:
        vocabulary = Vocabulary.from_file(config.vocab_path) if config.vocab_path else Vocabulary({})
        content["phenotypes"] = {name: list(labels) for name, labels in vocabulary.phenotypes.items()}
        content["included_phenotypes"] = list(vocabulary.categories)
    elif not config.corpus:  # the files have no vocabulary of their own
        named = [*config.included_phenotypes, *filter(None, [getattr(config, "phenotype_category", "")])]
        found = _labels_in(train_files, config, known=content["phenotypes"], named=named)
        content["phenotypes"] = with_new_labels(content["phenotypes"], found)
        content["included_phenotypes"] = content["included_phenotypes"] or list(content["phenotypes"])
    if config.included_phenotypes:
        content["included_phenotypes"] = list(config.included_phenotypes)
    if config.bin_edges_path or config.bin_edges:
        content["bin_edges"] = read_edges(config.bin_edges_path) if config.bin_edges_path else list(config.bin_edges)
    if config.panel or not base:
        content["genes"], content["gene_symbols"] = _panel_of(config, train_files)
    if config.num_top_genes:
        count, known = config.num_top_genes, len(content["genes"])
        if count > known:
            raise InputError(
                f"num_top_genes {count:,} exceeds the {known:,} genes of the panel. Lower --num_top_genes."
            )
        content["genes"] = content["genes"][:count]
        content["gene_symbols"] = (content["gene_symbols"] or [])[:count] or None
    if not base or config.normalization != "auto":
        content["normalization"] = config.normalization
    return GeneTokenizer.from_dict(content, source=str(base or "the configuration"))


def _labels_in(
    files: FileList, config: "TrainingConfig", *, known: Iterable[str], named: Sequence[str]
) -> dict[str, set[str]]:
    """Return the labels that the chosen cells of files have, of phenotypes that a run knows or the user names.

    Raises:
        InputError: No file has a column or label of a named phenotype that the run lacks, or it holds measurements.
    """
    found: dict[str, set[str]] = {}
    options: dict[str, Any] = {"panel": GenePanel(("none",)), "obs_columns": columns_of(config.phenotypes)}
    with closing(ShardCache(files, where=conditions(config.where), vocabulary=Vocabulary({}), **options)) as shards:
        for shard in shards:
            for category in dict.fromkeys([*known, *named]):
                column = shard.obs_columns.get(category, category)
                if column not in shard.source.columns_of("obs"):
                    continue
                values_n = shard.label_column(category)
                check_are_labels(values_n, category=category, column=column, path=shard.path)
                texts = {text for text, count in Labels.of(values_n).counts().items() if count}
                texts = {text for text in texts if not is_missing(text, config.missing_labels)}
                found[category] = found.get(category, set()) | texts
        for category in [name for name in named if not found.get(name) and name not in known]:
            shards[0].label_column(category)  # raises where it is missing
            raise InputError(f"no training cell has a {category!r}: its column in obs is empty. Give labeled cells.")
    return found


def _panel_of(config: "TrainingConfig", train_files: FileList) -> tuple[list[str], list[str] | None]:
    """Return gene ids and symbols of the whole panel, if known."""
    if config.panel:
        genes, known_symbols = given_panel(config.panel)
        return genes, known_symbols or None
    file = open_source(train_files[0], layer=config.layer)
    names: Any = file.var_names if config.gene_id_column is None else file.var_column(config.gene_id_column).to_numpy()
    if gene_map := read_gene_map(config.gene_map):
        names = gene_map.rename(names_of(file, config.gene_id_column)).names.own_c
    known, order = file.columns_of(file.var_frame), np.arange(len(names))
    if RANK_COLUMN in known:
        rank = file.var_column(RANK_COLUMN).to_numpy(dtype=np.float64)
        if len(set(rank[np.isfinite(rank)])) < np.isfinite(rank).sum():
            raise InputError(
                f"{file.path}: var[{RANK_COLUMN!r}] has ties. Rank the genes 0, 1, 2, ... or use `prepare`."
            )
        order = np.argsort(rank, kind="stable")[: int(np.isfinite(rank).sum())]
    elif config.num_top_genes:
        raise InputError(
            f"{file.path} has no var column {RANK_COLUMN!r}, so --num_top_genes cannot choose. Rank the genes with "
            "`perturbgene prepare`, or give --panel."
        )
    symbols = None
    if gene_map:  # columns that share a gene are one
        order = order[~pd.Index(names[order]).duplicated()]
    elif "feature_name" in known:
        symbols = [clean_gene(name) for name in file.var_column("feature_name").to_numpy(dtype=object)[order]]
    file.close()
    return [str(name) for name in names[order]], symbols
