"""A contrast of two labels: the values that the model expects of hidden genes under each of them, summed over cells.

Owns one phenotype's change, its null and the running sums; leaves masking to the collator, and the choice of cells to
`counterfactual`. Letters: n cells, l tokens, m hidden genes, g genes, k groups, r null draws, s strata, e
edges, b bins.

A gene is predicted where it is hidden, once with the cell's own label and once with the label that is set, all else
equal. The null moves the label's embedding just as far in random directions.

How far a move carries the predictions depends on where it starts: a layer norm follows, so the same step matters more
from a short embedding than from a long one. A null from the own label alone would therefore differ between the two
directions of an edit. So each random move r is made from both labels: forward from the own label A, and backward from
the label B that is set. With f the predictions and v = B - A,

    null(r) = ((f(A + r) - f(A)) + (f(B) - f(B - r))) / 2

The real move gives null(v) = f(B) - f(A), the change itself, so change and null are one quantity for different moves.
Swapping A and B turns v into -v and null(r) into -null(r): on the same cells, the other direction of an edit has the
opposite change, the opposite null and the same p-values.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from perturbgene.data_utils.data_collators import Batch, DataCollatorForPhenotypicMLM, pack
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.eval_utils import content_hash, inference_mode, to_device
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import GeneTokens

#: Units of a change: expected log value (by the midpoints of bins), and expected number of the bin.
UNITS = ("value", "bin")
EXPRESSED, UNEXPRESSED = 0, 1


@dataclass(frozen=True)
class Contrast:
    """One phenotype, the label that it is set to, and how its effect is measured."""

    category: str
    label_id: int  # input id of the label that is set
    num_passes: int = 4  # masks per cell
    num_null: int = 20  # meaningless changes of the same size that make the null
    seed: int = 0  # of masks and of the null


class GenePredictor:
    """Expected values of hidden genes under a given label; `tokenizer` has the layout of the sequences."""

    def __init__(self, run: Run, contrast: Contrast, *, tokenizer: GeneTokenizer) -> None:
        assert not run.is_classifier
        self.run, self.contrast = run, contrast
        self.slot_type = tokenizer.vocabulary.token_type(contrast.category)
        self.first_gene_type, self.first_bin_id = tokenizer.first_gene_type, tokenizer.first_bin_id
        self.values_gb = torch.from_numpy(tokenizer.bin_edges.values()).float().to(run.model.device)
        rng, hidden_size = np.random.default_rng((contrast.seed, 1)), run.model.config.hidden_size
        # For each null: a permutation of the coordinates and their signs, (r, h).
        orders = [rng.permutation(hidden_size) for _ in range(contrast.num_null)]
        self.orders_rh = np.array(orders, dtype=np.int64).reshape(-1, hidden_size)
        self.signs_rh = rng.choice([-1.0, 1.0], size=(contrast.num_null, hidden_size))

    def expected(self, batch: Batch) -> np.ndarray:
        """Return the expected value and bin of every hidden gene, float64 of shape (m, 2)."""
        batch = to_device(batch, self.run.model.device)
        with inference_mode(self.run.model):
            logits_mv = self.run.model(**batch).logits.float()
            share_mb = torch.softmax(logits_mv[:, self.first_bin_id :], dim=-1)
            gene_m = batch["token_type_ids"][batch["label_positions"]] - self.first_gene_type
            value_mb = self.values_gb[gene_m] if len(self.values_gb) > 1 else self.values_gb
            bins_b = torch.arange(share_mb.shape[1], device=share_mb.device, dtype=share_mb.dtype)
            both_m2 = torch.stack([(share_mb * value_mb).sum(-1), share_mb @ bins_b], dim=-1)
        return both_m2.double().cpu().numpy()

    def with_label(self, batch: Batch) -> Batch:
        """Set the label of every cell."""
        ids_l = batch["input_ids"].clone()
        ids_l[batch["token_type_ids"] == self.slot_type] = self.contrast.label_id
        return {**batch, "input_ids": ids_l}

    def with_null(self, batch: Batch, draw: int) -> tuple[Batch, Batch]:
        """Move every cell's label by a meaningless vector: the change's coordinates, permuted and with random signs.

        Returns:
            The own label moved by that vector, and the label that is set moved by its opposite.
        """
        embeddings, device = self.run.model.genebert.embeddings, self.run.model.device
        order_h = torch.from_numpy(self.orders_rh[draw]).to(device)
        sign_h = torch.from_numpy(self.signs_rh[draw]).float().to(device)
        types_l = batch["token_type_ids"].to(device)
        is_slot_l = types_l == self.slot_type
        with inference_mode(self.run.model):
            own_lh = embeddings.summed(batch["input_ids"].to(device), types_l)
            set_lh = embeddings.summed(self.with_label(batch)["input_ids"].to(device), types_l)
            move_ch = (set_lh - own_lh)[is_slot_l][:, order_h] * sign_h  # one slot per cell
            own_lh[is_slot_l] += move_ch
            set_lh[is_slot_l] -= move_ch
        return {**batch, "inputs_embeds": own_lh}, {**batch, "inputs_embeds": set_lh}


# -- sums -------------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Running sums over cells, which add up over batches and ranks."""

    changes_2skg: np.ndarray  # sums of changes by unit, stratum, group and gene
    squares_skg: np.ndarray  # sums of their squares, in the first unit
    counts_skg: np.ndarray  # how many changes
    null_r2skg: np.ndarray  # sums of the changes of each null draw
    null_counts_skg: np.ndarray  # how many changes of each draw
    cells_k: np.ndarray  # cells that were changed
    # Of the changed cells (0), and of those that have the label anyway (1):
    measured_2kg: np.ndarray  # cells measured for a gene
    expressed_2kg: np.ndarray  # cells that express it
    values_2kg: np.ndarray  # sum of its values

    @classmethod
    def zeros(cls, *, num_groups: int, num_genes: int, num_null: int) -> "Sums":
        """Start from nothing."""
        kg = (num_groups, num_genes)
        return cls(
            np.zeros((2, 2, *kg)), np.zeros((2, *kg)), np.zeros((2, *kg)), np.zeros((num_null, 2, 2, *kg)),
            np.zeros((2, *kg)), np.zeros(num_groups), np.zeros((2, *kg)), np.zeros((2, *kg)), np.zeros((2, *kg)),
        )  # fmt: skip

    def add_changes(self, change_m2: np.ndarray, place_m: np.ndarray, *, draw: int | None = None) -> None:
        """Add changes of hidden genes at their flat place in (s, k, g): real ones, or those of a null draw."""
        sums = self.changes_2skg if draw is None else self.null_r2skg[draw]
        shape, size = self.counts_skg.shape, self.counts_skg.size
        for unit in range(len(UNITS)):
            sums[unit] += np.bincount(place_m, change_m2[:, unit], minlength=size).reshape(shape)
        if draw is None:
            self.counts_skg += np.bincount(place_m, minlength=size).reshape(shape)
            self.squares_skg += np.bincount(place_m, change_m2[:, 0] ** 2, minlength=size).reshape(shape)
        elif draw == 0:
            self.null_counts_skg += np.bincount(place_m, minlength=size).reshape(shape)

    def add_cells(
        self, block: TokenBlock, *, group_n: np.ndarray, has_label_n: np.ndarray, values_gb: np.ndarray,
        tokenizer: GeneTokenizer,
    ) -> None:  # fmt: skip
        """Count the cells of a block and sum what they express; `has_label_n` is True where nothing is changed."""
        side_n = has_label_n.astype(np.int64)
        self.cells_k += np.bincount(group_n[~has_label_n], minlength=len(self.cells_k))
        tokens = GeneTokens.of(block, tokenizer)
        bin_m = block.input_ids_l[tokens.position_m].astype(np.int64) - tokenizer.first_bin_id
        value_m = values_gb[tokens.gene_m if len(values_gb) > 1 else 0, bin_m]
        shape, size = self.expressed_2kg.shape, self.expressed_2kg.size
        place_m = np.ravel_multi_index((side_n[tokens.cell_m], group_n[tokens.cell_m], tokens.gene_m), shape)
        self.expressed_2kg += np.bincount(place_m, minlength=size).reshape(shape)
        self.values_2kg += np.bincount(place_m, value_m, minlength=size).reshape(shape)
        measured_tg, table_n = block.tables(shape[-1])
        for table in np.unique(table_n):
            counts_2k, is_here_n = np.zeros(shape[:2]), table_n == table
            np.add.at(counts_2k, (side_n[is_here_n], group_n[is_here_n]), 1)
            self.measured_2kg += counts_2k[..., None] * measured_tg[table]


def add_block(
    sums: Sums, predictor: GenePredictor, collator: DataCollatorForPhenotypicMLM, block: TokenBlock, *,
    group_n: np.ndarray, is_null_n: np.ndarray,
) -> None:  # fmt: skip
    """Add changes of hidden genes of the cells of a block, and on those of `is_null_n` also changes under the null."""
    rows = np.flatnonzero(is_null_n)
    for number in range(predictor.contrast.num_passes):
        batch, place_m = _hidden(sums, predictor, collator, block, number, group_n)
        if len(place_m):
            sums.add_changes(predictor.expected(predictor.with_label(batch)) - predictor.expected(batch), place_m)
        if not predictor.contrast.num_null or not len(rows):
            continue
        batch, place_m = _hidden(sums, predictor, collator, block.take(rows), number, group_n[rows])
        if not len(place_m):
            continue
        change_m2 = predictor.expected(predictor.with_label(batch)) - predictor.expected(batch)
        for draw in range(predictor.contrast.num_null):
            from_own_m2, to_set_m2 = map(predictor.expected, predictor.with_null(batch, draw))
            sums.add_changes((change_m2 + from_own_m2 - to_set_m2) / 2, place_m, draw=draw)


def _hidden(
    sums: Sums, predictor: GenePredictor, collator: DataCollatorForPhenotypicMLM, block: TokenBlock, number: int,
    group_n: np.ndarray,
) -> tuple[Batch, np.ndarray]:  # fmt: skip
    """Hide genes of cells: the packed batch, and where in (s, k, g) each hidden gene belongs, int64 of shape (m,).

    Masks depend on the number of the pass, in place of the epoch, and on a cell's genes and bins, not on its row: they
    are the same in any batch, group and file.
    """
    keys_n, numbers_n = content_hash(block, collator.tokenizer), np.full(len(block), number, dtype=np.int64)
    masked, labels_l = collator.mask(replace(block, cells_n=keys_n, epochs_n=numbers_n))
    batch = pack(masked, labels_l=labels_l)
    labels_m, position_m = batch.pop("labels").numpy(), batch["label_positions"].numpy()
    cell_m = np.searchsorted(masked.offsets_n1, position_m, side="right") - 1
    gene_m = masked.token_type_ids_l[position_m].astype(np.int64) - predictor.first_gene_type
    stratum_m = np.where(labels_m == predictor.first_bin_id, UNEXPRESSED, EXPRESSED)
    return batch, np.ravel_multi_index((stratum_m, group_n[cell_m], gene_m), sums.counts_skg.shape)
