"""The verb `embed`: embeddings of cells, of an asked phenotype and of named genes, as arrays in `obsm`.

Owns what is read from a cell; leaves pooling to `inference.pooling`, ranks and files to `streaming`, and means of genes
over cells to `genes`. Letters: n cells, m positions read, h hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.cli.options import check_question
from perturbgene.cli.verbs import EmbedConfig
from perturbgene.data_utils.data_collators import ask, pack
from perturbgene.data_utils.h5ad_writing import write_copy
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.embedding.genes import run_gene_means
from perturbgene.errors import InputError
from perturbgene.inference.parts import stored_rows, write_piece
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    GENES_COLUMN,
    GeneTokens,
    Given,
    Ranks,
    answered,
    claimed_output,
    given_labels,
    open_cells,
    read_cells,
    reading_options,
    with_results,
)
from perturbgene.training.cell_space import EMBEDDING_FILE, Pooling, asked_of

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "X_perturbgene"


def label_embeddings(run: Run, category: str) -> pd.DataFrame:
    """Return the static embedding of each label of a phenotype: what its token adds, before any cell is seen.

    Returns:
        One row per label, h columns.
    """
    start, stop = run.tokenizer.vocabulary.id_range(category)
    weights_vh = run.model.genebert.embeddings.word_embeddings.weight.detach()
    values_kh = weights_vh[start:stop].float().cpu().numpy()
    columns = [str(at) for at in range(values_kh.shape[1])]
    return pd.DataFrame(values_kh, index=list(run.tokenizer.phenotypes[category]), columns=columns)


@dataclass(frozen=True)
class CellEmbedder:
    """Which hidden states are read from every cell.

    Raises:
        InputError: A gene or phenotype is unknown, a phenotype is asked and given, or a classifier is asked for one.
    """

    run: Run
    pooling: Pooling  # see `embed`
    phenotypes: Sequence[str]  # asked one at a time; the final state of each one's `[MASK]`
    genes: Sequence[str]  # ids or symbols
    given: Mapping[str, str | None]  # phenotype -> label of all cells, or None to read `obs`; all others are absent

    def __post_init__(self) -> None:
        if self.phenotypes or self.pooling == "asked":
            self.run.require_mlm("phenotypes")
        if self.pooling == "joined" and self.run.space is None:
            raise InputError(
                f"{self.run.path} has no {EMBEDDING_FILE} that fits: it is not finished, or was trained by an older "
                "perturbgene. Train it again, or change --pooling."
            )
        if self.pooling == "asked" and not asked_of(self.run.tokenizer, self.given):
            raise InputError("nothing is left to ask: the run has no phenotype that is not given. Change --pooling.")
        if self.pooling == "auto":
            object.__setattr__(self, "pooling", self.run.default_pooling(self.given))
        for category in self.phenotypes:
            self.run.tokenizer.vocabulary.check_category(category)
        check_question(self.phenotypes, self.given, flag="phenotype")
        self.run.tokenizer.panel.find_all(self.genes, flag="genes")

    @property
    def keys(self) -> list[str]:
        """Names in `obsm`, in the order of `embed`."""
        names = [*self.phenotypes, *(f"gene_{name}" for name in self.genes)]
        return [KEY, *(f"{KEY}_{name.replace('/', '_')}" for name in names)]  # a slash would be a folder within HDF5

    def embed(self, block: TokenBlock) -> dict[str, np.ndarray]:
        """Embed a block of cells.

        Returns:
            `obsm` key -> float32 (n, h), rows in the order of the cells. A cell that expresses no gene of the panel is
            NaN throughout, as it gets no label from `predict`; a named gene is NaN in cells that do not express it.
        """
        run, given = self.run, list(self.given)
        found = [run.embed(block, pooling=self.pooling, given=given)]
        is_empty_n = np.isnan(found[0][:, 0])
        for category in self.phenotypes:
            batch = ask(block, run.tokenizer, asked=[category], given=given)
            states_nh = run.hidden_at(batch, batch.pop("label_positions").numpy())
            states_nh[is_empty_n] = np.nan
            found.append(states_nh)
        named, tokens = run.tokenizer.panel.find_all(self.genes, flag="genes"), GeneTokens.of(block, run.tokenizer)
        read_m = tokens.position_m[np.isin(tokens.gene_m, named)]
        hidden_mh = run.hidden_at(pack(block), read_m)
        for gene in named:
            is_gene_m = tokens.gene_m == gene
            states_nh = np.full_like(found[0], np.nan)
            states_nh[tokens.cell_m[is_gene_m]] = hidden_mh[np.searchsorted(read_m, tokens.position_m[is_gene_m])]
            found.append(states_nh)
        return dict(zip(self.keys, found, strict=True))

    def columns(self, found: dict[str, np.ndarray], dataset: IterableAnnDataset) -> dict[str, Any]:
        """Take the columns of `obs` out of what was found: the number of genes, and who expresses each named gene.

        In cells that `where` leaves out, the number is -1 and the others are missing.
        """
        columns: dict[str, Any] = {GENES_COLUMN: found.pop(GENES_COLUMN)}
        for name, key in zip(self.genes, self.keys[len(self.keys) - len(self.genes) :], strict=True):
            has_gene_n = np.isfinite(found[key][:, 0])
            columns[f"perturbgene_has_{name}"] = has_gene_n
            if dataset.chosen_rows:
                is_left_out_n = ~np.isin(np.arange(len(has_gene_n)), dataset.chosen_rows[0])
                columns[f"perturbgene_has_{name}"] = pd.arrays.BooleanArray(has_gene_n, is_left_out_n)
        return columns

    def facts(self, dataset: IterableAnnDataset) -> dict[str, Any]:
        """Return where the embeddings came from, with the static embedding of every label of asked phenotypes."""
        question: dict[str, Any] = {"pooling": self.pooling, "phenotypes": list(self.phenotypes)}
        question |= {"genes": list(self.genes), "verb": "embed", "given": dict(self.given)}
        if dataset.where:
            question["where"] = dataset.where
        facts = provenance(self.run, question, coverage=dataset.coverage)
        if self.phenotypes:
            facts["label_embeddings"] = {name: label_embeddings(self.run, name) for name in self.phenotypes}
        return facts


def embed(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    pooling: Pooling = EmbedConfig.pooling,
    phenotype: Sequence[str] = (),
    genes: Sequence[str] = (),
    given: Given | None = None,
    device: str = EmbedConfig.device,
    batch_tokens: int = EmbedConfig.batch_tokens,
    **reading: Any,
) -> "AnnData":
    """Return a copy of the cells with their embeddings in `obsm`.

    Args:
        adata: Cells, or the path of an h5ad file that fits into memory; no label column is needed.
        model: Run folder, or a loaded run.
        pooling: "asked" asks all phenotypes that are not given, at once, and takes the mean of the final states of
            their `[MASK]`; "cls" takes the final state of `[CLS]`, "genes" the mean of those of the cell's genes.
            "joined" puts principal components of the training cells, the genes' votes for labels and those of these
            states that the run's loss has trained side by side, see `JoinedSpace`. "auto" is "joined", or for a run
            that was trained before it existed "asked" (with phenotypes), "cls" (a classifier) or "genes".
        phenotype: Phenotypes, asked one at a time; `obsm["X_perturbgene_PHENOTYPE"]` holds the state of the question.
        genes: Ids or symbols; `obsm["X_perturbgene_gene_GENE"]` holds each one's contextual embedding, NaN in cells
            without it, and `obs["perturbgene_has_GENE"]` says which cells have it.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`; all others are absent, so
            no label leaks into the embedding.
        device: "auto", "cpu", "cuda", ...
        batch_tokens: Most tokens in a batch.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage`, ... of `IterableAnnDataset`.

    Returns:
        The copy; `obsm["X_perturbgene"]` is float32 of shape (n, h), or as wide as the joined space, and
        `obs["perturbgene_n_genes"]` counts the genes that the model saw. Cells that express no gene of the panel are
        NaN, and so are those that `where` leaves out.

    Raises:
        InputError: See `CellEmbedder` and `open_cells`.

    Example:
        >>> import perturbgene as pg
        >>> pg.embed("cells.h5ad", "runs/mlm").obsm["X_perturbgene"].shape
        (255, 32)
    """
    embedder = CellEmbedder(load_run(model, device=device), pooling, phenotype, genes, given_labels(given))
    cells = read_cells(adata)
    dataset = open_cells(cells, embedder.run, embedder.given, **reading)
    with answered(dataset, embedder.embed, text="embed", most_tokens=batch_tokens) as found:
        obs = embedder.columns(found, dataset)
        return with_results(cells, obs=obs, obsm=found, uns=embedder.facts(dataset))


def run_embed(config: EmbedConfig) -> str | None:
    """Run the verb `embed`: copy the file with embeddings of its cells, or write mean embeddings of genes."""
    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (source, target):
        run = load_run(config.run, device=ranks.device(config.device))
        if config.groupby or config.network:
            return run_gene_means(config, run, source=source, target=target, ranks=ranks)
        embedder = CellEmbedder(run, config.pooling, config.phenotype, config.genes, config.given_labels)
        dataset = open_cells(FileList([source]), run, embedder.given, ranks=ranks, **reading_options(config))
        if config.piece:
            return write_piece(config, dataset, embedder.embed, run=run, source=source, ranks=ranks)
        if ranks.is_main:
            check_readable(source)  # before the work, since a copy of it will be written
        stored = stored_rows(config, run=run, source=source)
        options: dict[str, Any] = {"text": "embed", "most_tokens": config.batch_tokens, "stored": stored}
        with answered(dataset, embedder.embed, target=target, ranks=ranks, **options) as found:
            if not ranks.is_main:
                return None
            facts, columns = embedder.facts(dataset), embedder.columns(found, dataset)
            write_copy(source, target, uns=facts, obs=columns, obsm=found, layer=config.layer)
            num_cells, num_empty = dataset.num_cells, dataset.num_cells - int(np.isfinite(found[KEY][:, 0]).sum())
    empty = f"; {num_empty:,} cells express no gene of the run and are NaN" if num_empty else ""
    keys = ", ".join(embedder.keys)
    return f"{num_cells:,} cells embedded by {config.run} (obsm: {keys}), written to {target}{empty}"
