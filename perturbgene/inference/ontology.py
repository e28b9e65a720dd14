"""Labels as terms of an ontology: which label is an ancestor of which, and the finest term that is probable enough.

Owns finding the terms of labels, relations between them, and sums of probabilities; leaves asking to `predict` and
counting answers to `eval_utils`. Letters: n cells, k labels, t terms.

The terms and their is-a relations are those of `cellxgene-ontology-guide`, which ships them; nothing is downloaded. It
is imported where labels are looked up, since few need it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import label_text
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import Confusion, Scores

logger = logging.getLogger(__name__)

PACKAGE = "cellxgene_ontology_guide"
#: Follows the name of a column of labels, as CELLxGENE writes it, where its term ids are.
SUFFIX = "_ontology_term_id"
#: Nearly every cell is one of these, so they are no answer: cell, native, eukaryotic, animal, nucleate, single nucleate
#: and motile cell.
SAY_NOTHING = (
    "CL:0000000", "CL:0000003", "CL:0000255", "CL:0000548", "CL:0002242", "CL:0000226", "CL:0000219",
)  # fmt: skip


def is_installed() -> bool:
    """Return whether ontologies can be read."""
    return find_spec(PACKAGE) is not None


def ontology_parser() -> Any:
    """Return what reads ontologies.

    Raises:
        InputError: The package is not installed.
    """
    if not is_installed():
        raise InputError(
            "terms of ontologies need the package cellxgene-ontology-guide, which is not installed. "
            "Run: pip install 'perturbgene[ontology]'"
        )
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    return OntologyParser()


@dataclass(frozen=True)
class LabelTerms:
    """The terms of the labels of one phenotype.

    Args:
        labels: Its labels, k in all.
        term_of: Label -> term id, for those that are terms.
        ancestors_of: Term id -> its ancestors and itself.
        name_of: Term id -> name, for all of these.
    """

    labels: tuple[str, ...]
    term_of: Mapping[str, str]
    ancestors_of: Mapping[str, frozenset[str]]
    name_of: Mapping[str, str]

    @classmethod
    def of(cls, labels: Sequence[str], ids: Mapping[str, str] | None = None) -> "LabelTerms":
        """Look labels up: as term ids, in `ids` (label -> term id), or as names in the Cell Ontology, in any case.

        Raises:
            InputError: The package is not installed.

        Example:
            >>> terms = LabelTerms.of(["T cell", "CD4-positive, alpha-beta T cell", "doublet"])
            >>> terms.term_of
            {'T cell': 'CL:0000084', 'CD4-positive, alpha-beta T cell': 'CL:0000624'}
            >>> terms.relation_kk.tolist()  # a CD4 T cell (row) that was called T cell (column): 1, an ancestor
            [[0, -1, 0], [1, 0, 0], [0, 0, 0]]
        """
        parser, term_of = ontology_parser(), dict[str, str]()
        by_name = {name.casefold(): term for name, term in parser.get_term_label_to_id_map("CL").items()}
        for label in labels:
            found = [label, (ids or {}).get(label, ""), by_name.get(label.casefold(), "")]
            if term := next((term for term in found if ":" in term and parser.is_valid_term_id(term)), ""):
                term_of[label] = term
        ancestors_of = {
            term: frozenset(parser.get_term_ancestors(term, include_self=True)) for term in term_of.values()
        }
        everyone = frozenset[str]().union(*ancestors_of.values())
        ancestors_of |= {
            term: frozenset(parser.get_term_ancestors(term, include_self=True)) for term in everyone - set(ancestors_of)
        }
        return cls(tuple(labels), term_of, ancestors_of, {term: parser.get_term_label(term) for term in everyone})

    @property
    def without_term(self) -> list[str]:
        """The labels that are no terms."""
        return [label for label in self.labels if label not in self.term_of]

    @cached_property
    def relation_kk(self) -> np.ndarray:
        """What the label of a column is to that of a row: 1 an ancestor, -1 a descendant, 0 neither, int8 (k, k)."""
        terms = [self.term_of.get(label, "") for label in self.labels]
        is_ancestor_kk = np.array(
            [[said != true and said in self.ancestors_of.get(true, ()) for said in terms] for true in terms], dtype=bool
        ).reshape(len(terms), len(terms))
        return is_ancestor_kk.astype(np.int8) - is_ancestor_kk.T

    def scores(self, confusion: Confusion) -> Scores:
        """Count answers that are an ancestor or a descendant of the true label apart.

        Returns:
            Shares of the cells: `coarser`, answered with an ancestor; `finer`, answered with a descendant;
            `right_or_finer`, what scTab counts as right: the label or a descendant of it (Fischer et al. 2024, "scTab:
            scaling cross-tissue single-cell annotation models", Methods; its code replaces such an answer by the true
            label before it counts). `macro_f1_or_finer` is the macro F1 after that. `n_without_term` is the number of
            cells whose true label is no term: for these only the label itself is right.
        """
        counts_kk, num_cells = confusion.counts_kk, max(int(confusion.counts_kk.sum()), 1)
        finer_kk = np.where(self.relation_kk == -1, counts_kk, 0)
        replaced = Confusion(confusion.labels)
        replaced.counts_kk = counts_kk - finer_kk + np.diag(finer_kk.sum(axis=1))
        found = replaced.scores()
        is_term_k = np.array([label in self.term_of for label in self.labels])
        return {
            "coarser": float(counts_kk[self.relation_kk == 1].sum() / num_cells),
            "finer": float(finer_kk.sum() / num_cells),
            "right_or_finer": found["accuracy"],
            "macro_f1_or_finer": found["macro_f1"],
            "n_without_term": int(counts_kk[~is_term_k].sum()),
        }

    # -- coarse answers -------------------------------------------------------------------------------------------

    @cached_property
    def answers(self) -> tuple[list[str], np.ndarray]:
        """What a coarse answer may be, the finest first, and which labels each one covers, bool of shape (t, k).

        These are the labels themselves and all of their ancestors; of terms that cover the same labels only the one
        with most ancestors. A label that is no term covers itself alone.
        """
        terms = [self.term_of.get(label, "") for label in self.labels]
        covers: dict[bytes, tuple[int, str, np.ndarray]] = {}
        for number, label in enumerate(self.labels):
            if label not in self.term_of:
                is_own_k = np.arange(len(self.labels)) == number
                covers[is_own_k.tobytes()] = (0, label, is_own_k)
        label_of = {term: label for label, term in reversed(list(self.term_of.items()))}
        for term in sorted(self.name_of):
            if term in SAY_NOTHING:
                continue
            covered_k = np.array([term in self.ancestors_of.get(own, ()) for own in terms])
            found = (len(self.ancestors_of[term]), label_of.get(term, self.name_of[term]), covered_k)
            if found[0] > covers.get(covered_k.tobytes(), (-1,))[0]:
                covers[covered_k.tobytes()] = found
        order = sorted(covers.values(), key=lambda found: (int(found[2].sum()), -found[0], found[1]))
        return [name for _, name, _ in order], np.array([covered_k for *_, covered_k in order]).reshape(-1, len(terms))

    @property
    def answer_ids(self) -> list[str]:
        """The term id of each of the `answers`, "" for a label that is no term."""
        id_of = {name: term for term, name in self.name_of.items()} | dict(self.term_of)
        return [id_of.get(name, "") if name not in self.without_term else "" for name in self.answers[0]]

    def coarse(self, probability_nk: np.ndarray, *, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the finest answer whose labels together are probable enough.

        Finer is what covers fewer labels; of equals, the more probable answer is taken.

        Args:
            probability_nk: Probabilities of the labels.
            least: At least 0.5, so that there are no two answers without a label in common.

        Returns:
            Number of each cell's answer, -1 if there is none, int32 of shape (n,), and its probability, float32; NaN if
            there is none.
        """
        _, covered_tk = self.answers
        mass_nt = probability_nk.astype(np.float64) @ covered_tk.T
        passes_nt = mass_nt >= least - 1e-6  # sums of float32
        size_t = covered_tk.sum(axis=1)
        rank_nt = np.where(passes_nt, size_t - np.minimum(mass_nt, 1) / 2, np.inf)  # fewest labels, then most probable
        best_n, rows = rank_nt.argmin(axis=1), np.arange(len(mass_nt))
        has_answer_n = passes_nt[rows, best_n]
        probability_n = np.where(has_answer_n, np.minimum(mass_nt[rows, best_n], 1), np.nan)
        return np.where(has_answer_n, best_n, -1).astype(np.int32), probability_n.astype(np.float32)

    def describe(self, phenotype: str) -> str:
        """Say how many labels are terms, and which are not."""
        lacking = self.without_term
        text = f"{phenotype}: {len(self.labels) - len(lacking)} of {len(self.labels)} labels are terms of an ontology"
        return f"{text}, not {listed(lacking)}" if lacking else text


def term_ids(dataset: IterableAnnDataset, phenotype: str) -> dict[str, str]:
    """Return the term id of each label that has one: `X_ontology_term_id` of `obs` for the labels in column `X`.

    Labels with several ids are left out.
    """
    found: dict[str, set[str]] = {}
    for index in range(len(dataset.shards)):
        shard = dataset.shards[index]
        column = shard.obs_columns.get(phenotype, phenotype)
        if not {column, f"{column}{SUFFIX}"} <= set(shard.source.columns_of("obs")):
            continue
        pairs = pd.DataFrame(
            {"label": shard.source.obs_column(column), "term": shard.source.obs_column(f"{column}{SUFFIX}")}
        )
        for label, term in pairs.astype(object).dropna().drop_duplicates().itertuples(index=False):
            found.setdefault(label_text(label), set()).add(str(term))
    return {label: next(iter(terms)) for label, terms in found.items() if len(terms) == 1}
