"""The transformer: tensors in, tensors out; nothing here knows AnnData or files of cells.

Read `config`, `packing` (cells without padding), `attention`, `layers`, `heads` (labels, genes and their losses).
"""

from perturbgene.model.layers import (
    BATCH_STEP,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertLayer,
    GeneBertModel,
    PackedCells,
    Packing,
    PositionlessEmbeddings,
    load_preset,
)

__all__ = [
    "BATCH_STEP",
    "GeneBertConfig",
    "GeneBertForClassification",
    "GeneBertForPhenotypicMLM",
    "GeneBertLayer",
    "GeneBertModel",
    "PackedCells",
    "Packing",
    "PositionlessEmbeddings",
    "load_preset",
]
