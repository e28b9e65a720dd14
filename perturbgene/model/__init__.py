"""The transformer: tensors in, tensors out; nothing here knows AnnData or files of cells.

The path of a batch is the reading order, types at the arrows. `config`: the settings.

1. `packing`: padded ``(n, l)`` or packed ``(l,)`` tensors -> ``PackedCells`` without padding.
2. `layers`: ids and types ``(l,)`` -> embeddings ``(l, h)`` -> each layer ``(l, h)``, where `attention` runs; the last
   one only where an output is needed, ``(a, h)``.
3. `heads`: ``(a, h)`` -> logits ``(a, v)`` or ``(n, k)``, and the loss.
"""

from perturbgene.model.config import GeneBertConfig, load_preset
from perturbgene.model.heads import DirectPath, GeneBertForClassification, GeneBertForPhenotypicMLM
from perturbgene.model.layers import GeneBertModel, PositionlessEmbeddings
from perturbgene.model.packing import PackedCells, Packing
