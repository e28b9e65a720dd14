"""A tokenizer of nine genes and two phenotypes, small enough to write its tokens by hand.

Ids: cell_type 4 (B cell), 5 (NK cell), 6 (T cell); tissue 7 (blood), 8 (spleen); bin_0..bin_2 are 9..11.
Types: cell_type 1, tissue 2, genes 3..11.
"""

from typing import Any

from perturbgene.data_utils.tokenization import GeneTokenizer

GENES = [f"G{i}" for i in range(9)]
LABELS = {"cell_type": ["B cell", "NK cell", "T cell"], "tissue": ["blood", "spleen"]}


def a_tokenizer(**options: Any) -> GeneTokenizer:
    """Make the tokenizer with some settings changed: edges 1 and 3 on the values as they are, at most 16 tokens."""
    defaults = {
        "genes": GENES,
        "phenotypes": LABELS,
        "bin_edges": [1.0, 3.0],
        "normalization": "none",
        "max_length": 16,
    }
    return GeneTokenizer(**{**defaults, "included_phenotypes": ["cell_type", "tissue"], **options})
