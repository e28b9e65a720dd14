"""The two models that are trained: masked genes and phenotypes, and classification; their heads and losses.

Owns how hidden states and expressed genes become logits, and logits a loss; leaves hidden states to `layers`. Letters:
n cells, l tokens, a tokens whose logits are needed, h hidden size, v input ids, t token types, k labels or classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from perturbgene.errors import InputError
from perturbgene.model.config import GeneBertConfig
from perturbgene.model.layers import Dropout, GeneBertModel, GeneBertPreTrainedModel
from perturbgene.model.packing import PackedCells, pack_cells

IGNORED_LABEL = -100  # Hugging Face's and PyTorch's "no label here"


class DirectPath(nn.Module):
    """A linear term in the expression of every expressed gene: the votes of genes for labels.

    It is solved as a multinomial regression (``perturbgene.training.votes``), not trained by gradient steps: Adam moves
    all votes by the same step whatever they are worth, and loses to a regression (docs/experiments.md). The row of
    token type 0 holds the intercepts, which ``[CLS]`` adds. The transformer's logits are multiplied by a share before
    the term is added: for each phenotype (of a classifier: one) with no phenotype given, and with some given.
    """

    votes_tk: Tensor
    share_p2: Tensor

    def __init__(self, num_types: int, num_labels: int, *, num_phenotypes: int = 1) -> None:
        super().__init__()
        self.register_buffer("votes_tk", torch.zeros(num_types, num_labels))
        self.register_buffer("share_p2", torch.ones(num_phenotypes, 2))
        self.is_on = True  # False while the transformer is scored alone

    def init_own_weights(self) -> None:
        """Set the linear term to 0 and the shares to 1, unless they were loaded."""
        init.zeros_(self.votes_tk)
        init.ones_(self.share_p2)

    def forward(self, cells: PackedCells, expression_l: Tensor) -> Tensor:
        """Return the linear term of each cell, float32 of shape (n, k): rows of token types, weighted by expression."""
        types_l = cells.token_type_ids
        if types_l is None:
            raise InputError("The direct path needs token_type_ids next to inputs_embeds. Give them too.")
        weight_l, starts_n = expression_l.to(self.votes_tk.dtype), cells.packing.cu_seqlens[:-1].to(types_l.dtype)
        return F.embedding_bag(types_l, self.votes_tk, starts_n, mode="sum", per_sample_weights=weight_l)


@dataclass
class PhenotypicMLMOutput(ModelOutput):
    """Output of ``GeneBertForPhenotypicMLM``; the two parts of the loss are unweighted and detached."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (n, l, v), (l, v) or (a, v), see `forward`
    loss_phenotypes: Tensor | None = None
    loss_genes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings and each layer's output, on request


class GeneBertForPhenotypicMLM(GeneBertPreTrainedModel):
    """Predicts masked phenotypes and expression bins: dense, gelu, LayerNorm, projection to input ids."""

    # Head parameters share no name with a top-level part of the base model: loading would swap them silently.
    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        self.genebert = GeneBertModel(config)
        self.mlm_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlm_projection = nn.Linear(config.hidden_size, config.vocab_size)
        num_labels = config.first_bin_id - config.first_label_id
        has_path = config.direct_path and num_labels > 0
        sizes = {"num_phenotypes": len(config.phenotype_id_ranges)}
        self.direct_labels = DirectPath(config.type_vocab_size, num_labels, **sizes) if has_path else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> PhenotypicMLMOutput:
        """Compute logits of all input ids, and the loss if labels are given.

        Args:
            input_ids: As for ``pack_cells``; so are ``token_type_ids``, ``attention_mask`` and ``inputs``.
            labels: True input ids, -100 where there is none: padded (n, l), or with ``label_positions`` (a,).
            label_positions: Ascending flat positions, among the tokens without padding, whose logits are needed, (a,).
            num_items_in_batch: Denominator of the loss, see ``masked_loss``.
            output_hidden_states: Return all hidden states too; with ``label_positions`` the last is (a, h).

        Returns:
            With ``label_positions``: logits (a, v). Without: logits of all tokens, (n, l, v) with zeros at padding or
            (l, v); except in training with ``labels``, when only those of labelled tokens are computed, (a, v) in row
            order. Ids that are impossible at a token have the lowest finite logit, see ``restrict_logits``.
        """
        pad_token_id = self.config.pad_token_id
        batch = pack_cells(input_ids, token_type_ids, attention_mask, pad_token_id=pad_token_id, **inputs)
        positions_a = label_positions
        if labels is not None and label_positions is None:
            labels = batch.pack(labels)  # (n, l) -> (l,)
            if self.training:
                positions_a = (labels != IGNORED_LABEL).nonzero().squeeze(1)
                labels = labels.index_select(0, positions_a)  # (l,) -> (a,)
        if batch.token_type_ids is None:
            raise InputError("The masked head needs token_type_ids next to inputs_embeds. Give them too.")
        types_a = batch.token_type_ids if positions_a is None else batch.token_type_ids.index_select(0, positions_a)
        share_a, term_av, states = None, torch.zeros(()), None
        if self.direct_labels is not None and self.direct_labels.is_on and not self.training:
            share_a, term_av = self._votes(batch, types_a, positions_a)
        if share_a is not None and not output_hidden_states and _is_nothing(share_a):
            logits_av = term_av
        else:
            hidden_ah, states = self.genebert.encode(batch, positions_a, output_hidden_states=output_hidden_states)
            logits_av = self.mlm_projection(self.mlm_norm(F.gelu(self.mlm_dense(hidden_ah))))
            if share_a is not None:
                logits_av = logits_av.float() * share_a[:, None] + term_av
        logits_av = self.restrict_logits(logits_av, types_a)
        loss = phenotypes = genes = None
        if labels is not None:
            loss, phenotypes, genes = masked_loss(
                logits_av, labels, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return PhenotypicMLMOutput(
            loss=loss,
            logits=batch.repad(logits_av) if positions_a is None else logits_av,
            loss_phenotypes=phenotypes,
            loss_genes=genes,
            hidden_states=states,
        )

    def _votes(self, batch: PackedCells, types_a: Tensor, positions_a: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the share of the transformer's logits, (a,), and the direct path's term at phenotype slots, (a, v)."""
        assert self.direct_labels is not None
        term_nk = self.direct_labels(batch, self.genebert.embeddings.expression(batch))
        if positions_a is None:
            positions_a = torch.arange(len(types_a), device=types_a.device)
        ends_n, num_categories = batch.packing.cu_seqlens.long(), len(self.config.phenotype_id_ranges)
        cell_a = torch.searchsorted(ends_n[1:], positions_a, right=True)
        is_slot_a = (types_a > 0) & (types_a <= num_categories)
        around = (self.config.first_label_id, self.config.vocab_size - self.config.first_bin_id)
        term_av = F.pad(term_nk, around)[cell_a] * is_slot_a[:, None]  # (n, k) -> (a, v)
        assert batch.token_type_ids is not None and batch.input_ids is not None
        is_label_l = (batch.token_type_ids > 0) & (batch.token_type_ids <= num_categories)
        is_label_l &= (batch.input_ids >= self.config.first_label_id) & (batch.input_ids < self.config.first_bin_id)
        labels_before_l1 = F.pad(is_label_l.long().cumsum(0), (1, 0))
        has_given_n = labels_before_l1[ends_n[1:]] > labels_before_l1[ends_n[:-1]]
        share_p2 = F.pad(self.direct_labels.share_p2, (0, 0, 1, 0), value=1.0)  # tokens of other types are its own
        return share_p2[types_a * is_slot_a, has_given_n[cell_a].long()], term_av

    def restrict_logits(self, logits_av: Tensor, token_types_a: Tensor) -> Tensor:
        """Give ids that are impossible at a token the lowest finite logit.

        A phenotype, token type 1..P, keeps the ids of its category, a gene (a higher type) the bins, type 0 everything.
        """
        v = self.config.vocab_size
        ranges = ((0, v), *map(tuple, self.config.phenotype_id_ranges), (self.config.first_bin_id, v))
        bounds_a2 = _on_device(ranges, logits_av.device)[token_types_a.clamp(max=len(ranges) - 1)]
        ids_v = torch.arange(v, device=logits_av.device)
        is_impossible_av = (ids_v < bounds_a2[:, :1]) | (ids_v >= bounds_a2[:, 1:])
        return logits_av.masked_fill(is_impossible_av, torch.finfo(logits_av.dtype).min)


@lru_cache(maxsize=16)
def _on_device(rows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Copy a small table to a device once: each copy would make the host wait for the GPU."""
    with torch.inference_mode(mode=False):
        return torch.tensor(rows, device=device)


def masked_loss(
    logits_av: Tensor, labels_a: Tensor, *, config: GeneBertConfig, num_items_in_batch: Tensor | int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masked loss, and its phenotype and gene parts unweighted and detached.

    ``loss = phenotype_loss_weight * phenotypes + gene_loss_weight * genes``. A part is the sum of its tokens' cross
    entropies, computed in float32, divided by a count; without labelled tokens it is 0, with gradients of 0.

    Args:
        logits_av: Shape (a, v).
        labels_a: True input id, shape (a,); -100 is ignored. Ids below ``first_bin_id`` belong to the phenotype part.
        config: Source of the weights and of ``first_bin_id``.
        num_items_in_batch: None divides each part by its labelled tokens in this batch. Both counts of the whole global
            batch, shape (2,): the parts of any split into accumulation steps and ranks add up to those of the whole
            batch. One number is exact under accumulation too, but the many genes weigh more than the few phenotypes.
    """
    entropy_a = F.cross_entropy(logits_av.float(), labels_a, ignore_index=IGNORED_LABEL, reduction="none")
    is_phenotype_a = (labels_a >= 0) & (labels_a < config.first_bin_id)
    is_part_2a = torch.stack([is_phenotype_a, labels_a >= config.first_bin_id]).to(entropy_a.dtype)
    counts_2 = is_part_2a.sum(1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(entropy_a)
    parts_2 = (is_part_2a * entropy_a).sum(1) / counts_2.clamp(min=1)
    loss = config.phenotype_loss_weight * parts_2[0] + config.gene_loss_weight * parts_2[1]
    return loss, parts_2[0].detach(), parts_2[1].detach()


def _is_nothing(share_a: Tensor) -> bool:
    """Return whether the transformer adds nothing to the votes and nobody asks for gradients: then it need not run."""
    return torch.is_inference_mode_enabled() and not bool(share_a.any())


class GeneBertForClassification(GeneBertPreTrainedModel):
    """Predicts the class of a cell from its first token: dense, gelu, dropout, classifier."""

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        if config.class_weights is not None and len(config.class_weights) != config.num_labels:
            raise InputError(
                f"class_weights holds {len(config.class_weights)} weights for {config.num_labels} classes. "
                "Give one for each."
            )
        self.num_labels = cast(int, config.num_labels)
        self.genebert = GeneBertModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier_dropout = Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.direct_classes = DirectPath(config.type_vocab_size, self.num_labels) if config.direct_path else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | float | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Compute the logits of the classes of each cell, and the loss if labels are given.

        Args:
            input_ids: As for ``pack_cells``; so are ``token_type_ids``, ``attention_mask`` and ``inputs``.
            labels: Class of each cell, (n,); -100 is ignored.
            num_items_in_batch: Denominator of the loss, see ``weighted_loss``.
            output_hidden_states: Return all hidden states too; the last is that of the first tokens, (n, h).

        Returns:
            ``logits`` of shape (n, k), and ``loss`` if labels are given.
        """
        pad_token_id = self.config.pad_token_id
        batch = pack_cells(input_ids, token_type_ids, attention_mask, pad_token_id=pad_token_id, **inputs)
        share, term_nk, states = None, torch.zeros(()), None
        if self.direct_classes is not None and self.direct_classes.is_on and not self.training:
            share = self.direct_classes.share_p2[0, 0]
            term_nk = self.direct_classes(batch, self.genebert.embeddings.expression(batch))
        if share is not None and not output_hidden_states and _is_nothing(share):
            logits_nk = term_nk
        else:
            starts_n = batch.packing.cu_seqlens[:-1].long()  # first token of each cell
            hidden_nh, states = self.genebert.encode(batch, starts_n, output_hidden_states=output_hidden_states)
            logits_nk = self.classifier(self.classifier_dropout(F.gelu(self.pre_classifier(hidden_nh))))
            if share is not None:
                logits_nk = logits_nk.float() * share + term_nk
        loss = None
        if labels is not None:
            weights = self.config.class_weights
            loss = weighted_loss(logits_nk, labels, class_weights=weights, num_items_in_batch=num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits_nk, hidden_states=states)


def weighted_loss(
    logits_nk: Tensor,
    labels_n: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    """Return the class-weighted cross entropy in float32; 0 with gradients of 0 if no cell has a label.

    Args:
        logits_nk: Shape (n, k).
        labels_n: Shape (n,); -100 is ignored.
        class_weights: One weight per class, length k; None means 1.
        num_items_in_batch: Denominator, the number of cells in the whole global batch: any split into accumulation
            steps and ranks adds up to the same step. None divides by the sum of weights in this batch.
    """
    logits_nk = logits_nk.float()
    entropy_n = F.cross_entropy(logits_nk, labels_n, ignore_index=IGNORED_LABEL, reduction="none")
    has_label_n = labels_n != IGNORED_LABEL
    weight_n = has_label_n.to(entropy_n.dtype)
    if class_weights is not None:
        weight_n = weight_n * logits_nk.new_tensor(class_weights)[labels_n.clamp(min=0)]
    total = (weight_n * entropy_n).sum()
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch).to(total)
    total_weight = weight_n.sum()
    return total / torch.where(total_weight > 0, total_weight, torch.ones_like(total_weight))


AutoConfig.register("genebert", GeneBertConfig, exist_ok=True)
AutoModel.register(GeneBertConfig, GeneBertModel, exist_ok=True)
AutoModelForMaskedLM.register(GeneBertConfig, GeneBertForPhenotypicMLM, exist_ok=True)
AutoModelForSequenceClassification.register(GeneBertConfig, GeneBertForClassification, exist_ok=True)
