"""What `training` compares: cells with lengths like real ones, the usual recipe, and ours with every option on and off.

Owns the batches, the usual recipe's model and one step of each contender; leaves rounds and tables to `training`.
Letters: n cells, l tokens, h hidden size, v input ids.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DistilBertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.distilbert.modeling_distilbert import Transformer

from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM, PositionlessEmbeddings, load_preset
from perturbgene.model.config import PRESETS
from perturbgene.model.heads import IGNORED_LABEL

MASK, PAD, GENES, PHENOTYPES, LABELS_EACH, BINS = 2, 3, 58_604, 5, 64, 11
FIRST_BIN = 4 + PHENOTYPES * LABELS_EACH
NUM_IDS, NUM_TYPES = FIRST_BIN + BINS, 1 + PHENOTYPES + GENES
GENE_MASK_PROB, PHENOTYPE_MASK_PROB = 0.15, 0.5  # the defaults of `mlm`
POOL = (
    48  # batches' worth of cells from which length-bucketed batches are drawn, about as many as Trainer sorts at once
)
SIZES = {"2x64": PRESETS["tiny"], "4x256": PRESETS["small"], "6x512": (6, 512, 8), "12x768": PRESETS["base"]}
#: Name -> longest cell, spread of a log-normal (None: cells all reach the longest) and its mean. "~700" is pancreas.
LENGTHS: dict[str, tuple[int, float | None, int]] = {
    "full 512": (512, None, 512), "full 1024": (1024, None, 1024), "~500": (1024, 0.6, 500), "~700": (1500, 0.33, 700),
}  # fmt: skip


def make_config(size: str, **settings: Any) -> GeneBertConfig:
    """Return our configuration of a size, else as the presets have it."""
    layers, h, heads = SIZES[size]
    sizes = {"num_hidden_layers": layers, "hidden_size": h, "num_attention_heads": heads, "intermediate_size": 4 * h}
    ids = {"vocab_size": NUM_IDS, "type_vocab_size": NUM_TYPES, "first_bin_id": FIRST_BIN}
    ranges = [[4 + p * LABELS_EACH, 4 + (p + 1) * LABELS_EACH] for p in range(PHENOTYPES)]
    return GeneBertConfig(
        **{**load_preset("small"), **sizes, **ids, "phenotype_id_ranges": ranges, "direct_path": True, **settings}
    )


# -- cells --------------------------------------------------------------------------------------------------------


def draw_lengths(name: str, n: int, *, seed: int) -> list[int]:
    """Draw the lengths of n cells, [CLS] and [EOS] included; long ones are cut."""
    longest, spread, mean = LENGTHS[name]
    if spread is None:
        return [longest] * n
    drawn_n = np.random.default_rng(seed).lognormal(np.log(mean) - spread**2 / 2, spread, n)
    return [int(length) for length in drawn_n.clip(64, longest)]


def draw_cell(length: int, draw: np.random.Generator) -> dict[str, Tensor]:
    """Draw a cell: [CLS], the phenotypes, genes from all over the panel, [EOS]; some are masked and labelled."""
    num_genes = length - PHENOTYPES - 2
    genes = np.sort(draw.choice(GENES, num_genes, replace=False)) + 1 + PHENOTYPES
    types = np.concatenate([np.arange(1 + PHENOTYPES), genes, [0]])
    labels = 4 + np.arange(PHENOTYPES) * LABELS_EACH + draw.integers(LABELS_EACH, size=PHENOTYPES)
    truth = np.concatenate([[0], labels, FIRST_BIN + draw.integers(1, BINS, size=num_genes), [1]])
    chance = np.where(np.arange(length) <= PHENOTYPES, PHENOTYPE_MASK_PROB, GENE_MASK_PROB)
    is_asked = (draw.random(length) < chance) & (truth > 1)
    return {
        "input_ids": torch.from_numpy(np.where(is_asked, MASK, truth)),
        "token_type_ids": torch.from_numpy(types),
        "labels": torch.from_numpy(np.where(is_asked, truth, IGNORED_LABEL)),
    }


@dataclass(frozen=True)
class Batch:
    """Cells in both layouts, made on first use.

    Args:
        cells: One dict for each cell.
        device: Where the tensors go.
    """

    cells: Sequence[dict[str, Tensor]]
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        """Tokens of each cell."""
        return [len(cell["labels"]) for cell in self.cells]

    @property
    def num_reads(self) -> int:
        """Labelled tokens."""
        return sum(int((cell["labels"] != IGNORED_LABEL).sum()) for cell in self.cells)

    @cached_property
    def padded(self) -> dict[str, Tensor]:
        """Padded to the longest, as the usual collator does."""
        fill = {"input_ids": PAD, "token_type_ids": 0, "labels": IGNORED_LABEL}
        columns = {name: [cell[name] for cell in self.cells] for name in fill}
        batch = {
            name: nn.utils.rnn.pad_sequence(columns[name], batch_first=True, padding_value=fill[name]).to(self.device)
            for name in fill
        }
        return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

    @cached_property
    def packed(self) -> dict[str, Any]:
        """Without padding, as our collator does."""
        labels = torch.cat([cell["labels"] for cell in self.cells])
        positions = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        row = {name: torch.cat([cell[name] for cell in self.cells]) for name in ("input_ids", "token_type_ids")}
        row |= {"label_positions": positions, "labels": labels[positions]}
        row["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0).int()
        on_device = {name: value.to(self.device) for name, value in row.items()}
        return {**on_device, "max_seqlen": max(self.lengths), "lengths": self.lengths}

    @cached_property
    def asked(self) -> dict[str, Any]:
        """The packed cells with one question each: the first phenotype, its slot masked."""
        batch = {name: value for name, value in self.packed.items() if name != "labels"}
        slots = batch["cu_seqlens"][:-1].long() + 1
        return {**batch, "input_ids": batch["input_ids"].index_fill(0, slots, MASK), "label_positions": slots}


def draw_batches(lengths: str, *, cells: int, batches: int, device: str) -> tuple[list[Batch], list[Batch]]:
    """Draw batches of cells in random order, and as many length-bucketed ones.

    The bucketed ones are drawn from a pool sorted by length, at equal distances, so that their lengths are spread as
    those of all cells; full-length batches are the same in both lists.
    """
    draw, place = np.random.default_rng(0), torch.device(device)
    count = batches if LENGTHS[lengths][1] is not None else 1

    def made(lengths_n: Sequence[int]) -> Batch:
        return Batch([draw_cell(length, draw) for length in lengths_n], place)

    drawn = draw_lengths(lengths, count * cells, seed=1)
    mixed = [made(drawn[start : start + cells]) for start in range(0, len(drawn), cells)]
    if LENGTHS[lengths][1] is None:
        return mixed, mixed
    pool = sorted(draw_lengths(lengths, POOL * cells, seed=2))
    starts = [int((k + 0.5) / count * POOL) * cells for k in range(count)]
    return mixed, [made(pool[start : start + cells]) for start in starts]


# -- the usual recipe ---------------------------------------------------------------------------------------------


class UsualModel(nn.Module):
    """Transformers' own DistilBERT layers on positionless embeddings, with the masked head on every token.

    Args:
        config: Sizes.
        attention: ``eager`` or ``sdpa``, of transformers.
        attention_dropout: On attention weights.
    """

    def __init__(self, config: GeneBertConfig, *, attention: str, attention_dropout: float) -> None:
        super().__init__()
        h = config.hidden_size
        self.settings = DistilBertConfig(
            dim=h,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            hidden_dim=config.intermediate_size,
            dropout=config.dropout,
            attention_dropout=attention_dropout,
        )
        self.settings._attn_implementation = attention
        self.embeddings = PositionlessEmbeddings(config)
        self.embeddings.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(self.settings)
        self.vocab_transform, self.vocab_layer_norm = nn.Linear(h, h), nn.LayerNorm(h, eps=1e-12)
        self.vocab_projector = nn.Linear(h, config.vocab_size)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross entropy of the labels, or without them the logits of all tokens, (n, l, v)."""
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = create_bidirectional_mask(config=self.settings, inputs_embeds=hidden, attention_mask=attention_mask)
        hidden = self.transformer(hidden, mask).last_hidden_state
        logits_nlv = self.vocab_projector(self.vocab_layer_norm(F.gelu(self.vocab_transform(hidden))))
        if labels is None:
            return logits_nlv  # type: ignore[no-any-return]
        return F.cross_entropy(logits_nlv.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)


# -- contenders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One way to train and ask the same model.

    Args:
        is_ours: Packed, our model; else padded, the usual one.
        bf16: Under bfloat16 autocast.
        fused: Fused AdamW; else ``torch.optim.AdamW(parameters)`` as it comes (a loop on CPU, foreach on CUDA).
        attention: Of the usual model, ``eager`` (with dropout on its weights) or ``sdpa`` (without).
        bucketed: Batches of similar lengths.
        medium: ``torch.set_float32_matmul_precision("medium")``.
        settings: Further settings of our configuration.
    """

    is_ours: bool = True
    bf16: bool = False
    fused: bool = True
    attention: str = "eager"
    bucketed: bool = False
    medium: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, config: GeneBertConfig) -> nn.Module:
        """Make the model with fresh weights."""
        torch.manual_seed(0)
        if self.is_ours:
            return GeneBertForPhenotypicMLM(config)
        dropout = config.dropout if self.attention == "eager" else 0.0
        return UsualModel(config, attention=self.attention, attention_dropout=dropout)


USUAL, TRAINER, OURS = "usual recipe", "the same, length-bucketed, bf16", "ours: packed, bf16"
RECIPES = {
    USUAL: Recipe(is_ours=False, fused=False, settings={"norm_position": "post", "bin_gain_range": 0}),
    "sdpa, no attention dropout, fused AdamW": Recipe(
        is_ours=False, attention="sdpa", settings={"norm_position": "post", "bin_gain_range": 0}
    ),
    TRAINER: Recipe(
        is_ours=False,
        attention="sdpa",
        bucketed=True,
        bf16=True,
        settings={"norm_position": "post", "bin_gain_range": 0},
    ),
    "ours: packed, fp32": Recipe(),
    "ours: packed, fp32, medium matmul precision": Recipe(medium=True),
    OURS: Recipe(bf16=True),
    "ours in bf16, but attention by SDPA": Recipe(bf16=True, settings={"attention_kernel": "sdpa"}),
    "ours in bf16, but AdamW as it comes": Recipe(bf16=True, fused=False),
}
#: What `--recipes main` measures.
MAIN = (USUAL, "sdpa, no attention dropout, fused AdamW", TRAINER, "ours: packed, fp32", OURS)


class Trainee:
    """A recipe at work on one size: its model, its optimizer and its batches.

    Args:
        name: Of the recipe.
        size: One of `SIZES`.
        batches: Mixed and bucketed ones, of `draw_batches`.
    """

    def __init__(self, name: str, *, size: str, batches: tuple[list[Batch], list[Batch]], is_training: bool) -> None:
        self.name, self.recipe = name, RECIPES[name]
        self.config = make_config(size, **self.recipe.settings)
        self.batches = batches[int(self.recipe.bucketed)]
        self.device = self.batches[0].device
        self.model = self.recipe.build(self.config).to(self.device).train(is_training)
        if is_training:
            options = {"fused": True} if self.recipe.fused else {}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **options)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Compute as the recipe says."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.recipe.medium else before)
        try:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        with self.precision():
            output = self.model(**(batch.packed if self.recipe.is_ours else batch.padded))
        return output.loss if self.recipe.is_ours else output  # type: ignore[no-any-return]

    def train(self, batch: Batch) -> None:
        """Take one step as Trainer does: forward, backward, clip, update, forget."""
        loss = self.loss(batch)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.recipe.medium else before)
        loss.backward()
        torch.set_float32_matmul_precision(before)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self, batch: Batch) -> None:
        """Answer one masked phenotype of every cell; the usual recipe scores every token on the way."""
        with torch.inference_mode(), self.precision():
            if self.recipe.is_ours:
                self.model(**batch.asked)
            else:
                self.model(**{name: value for name, value in batch.padded.items() if name != "labels"})

    def kept_bytes(self, batch: Batch) -> int:
        """Count what the forward pass keeps for the backward one, weights left out."""
        weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output that kept itself would never be freed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(batch)  # noqa: F841  # alive until counted, so that no storage is used twice
        return sum(kept.values())


Step = Callable[[Trainee, Batch], None]
