"""A direct path from genes to labels beside the transformer: each expressed gene votes for every label.

Owns the table of votes and its sum over a cell; leaves how much a bin counts to the embeddings. A linear model on a few
thousand cells beats a transformer that must learn a vector for every gene first (docs/experiments.md), so both answer
together, as in "wide and deep" models (Cheng et al. 2016, arXiv:1606.07792). Letters: n cells, l tokens, k labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DirectPath(nn.Module):
    """Sums, over the tokens of a cell, what each token's type says for each label.

    Args:
        num_types: Number of token types.
        num_labels: Number k of labels.
    """

    def __init__(self, num_types: int, num_labels: int) -> None:
        super().__init__()
        self.votes_tk = nn.Parameter(torch.zeros(num_types, num_labels))

    def forward(self, token_type_ids_l: Tensor, weight_l: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what is added to the logits of each cell, float32 of shape (n, k).

        Args:
            token_type_ids_l: Shape (l,).
            weight_l: How much each token counts, shape (l,); 0 for what is no expressed gene.
            cu_seqlens: Start of each cell and the end of the last, shape (n + 1,).
        """
        starts_n = cu_seqlens[:-1].to(token_type_ids_l.dtype)
        weight_l = weight_l.to(self.votes_tk.dtype)
        return F.embedding_bag(token_type_ids_l, self.votes_tk, starts_n, mode="sum", per_sample_weights=weight_l)
