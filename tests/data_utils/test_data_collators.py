"""Padding, packing, masking and asking, with expected tensors of a few tokens; masks are checked by restoring them."""

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbgene.data_utils.data_collators import (
    IGNORED,
    DataCollatorForPhenotypicMLM,
    ask,
    block_of,
    collate_fn_wrapper,
)
from perturbgene.data_utils.iterable_ann_dataset import Cell, IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from tests.nine_genes import GENES, LABELS, a_tokenizer

CLS, EOS, MASK, PAD, BIN_0 = 0, 1, 2, 3, 9  # labels have ids 4..8, phenotypes types 1 and 2, genes types 3..11


def a_cell(input_ids: Sequence[int], token_type_ids: Sequence[int], index: int = 0, **attributes: Any) -> Cell:
    """Make a cell of these tokens."""
    cell = Cell(input_ids=torch.tensor(input_ids), token_type_ids=torch.tensor(token_type_ids))
    for name, value in {"index": index, **attributes}.items():
        setattr(cell, name, value)
    return cell


LONG = ([CLS, 5, 8, 10, 11, 10, 11, EOS], [0, 1, 2, 3, 5, 6, 9, 0])
SHORT = ([CLS, 10, EOS], [0, 4, 0])

#: Ids, types and labels of LONG as cell 11 of epoch 2 at seed 7.
GOLDEN = [
    [0, 2, 8, 2, 11, 10, 11, 2, 1],
    [0, 1, 2, 3, 5, 6, 9, 8, 0],
    [-100, 5, -100, 10, -100, -100, -100, 9, -100],
]


def random_cells(num_cells: int, num_genes: int, *, seed: int = 0, density: float = 0.3) -> ad.AnnData:
    """Make labelled cells that express each gene, at 2 or 4, with this probability."""
    generator = np.random.default_rng(seed)
    values_ng = generator.choice([2.0, 4.0], (num_cells, num_genes)) * (
        generator.random((num_cells, num_genes)) < density
    )
    obs = pd.DataFrame({"cell_type": [*LABELS["cell_type"], None] * (num_cells // 4), "tissue": ["blood"] * num_cells})
    obs.index = obs.index.astype(str)
    return ad.AnnData(
        values_ng.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(num_genes)])
    )


def rows_of(batch: dict[str, Any]) -> list[list[tuple[int, int, int]]]:
    """Return the (id, type, label) triples of every cell of a padded batch, padding left out."""
    columns = (batch["input_ids"], batch["token_type_ids"], batch["labels"], batch["attention_mask"])
    return [
        [(i, t, y) for i, t, y, keep in zip(*map(torch.Tensor.tolist, row), strict=True) if keep]
        for row in zip(*columns, strict=True)
    ]


def restored(row: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Put the labels back and take the unexpressed genes out: (id, type) pairs."""
    tokens = [(id_ if label == IGNORED else label, type_) for id_, type_, label in row]
    return [token for token in tokens if token[0] != BIN_0]


def unexpressed(row: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return the panel indices of genes labelled bin_0."""
    return [type_ - 3 for _, type_, label in row if label == BIN_0]


# -- joining without masks ----------------------------------------------------------------------------------------


def test_shorter_cells_are_padded_with_pad_tokens() -> None:
    batch = collate_fn_wrapper(a_tokenizer())([a_cell(*LONG), a_cell(*SHORT)])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [LONG[0], [CLS, 10, EOS, PAD, PAD, PAD, PAD, PAD]],
        "token_type_ids": [LONG[1], [0, 4, 0, 0, 0, 0, 0, 0]],
        "attention_mask": [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]],
    }


@pytest.mark.parametrize(("multiple", "width"), [(None, 8), (1, 8), (5, 10), (8, 8), (64, 64)])
def test_the_padded_length_is_rounded_up_to_a_multiple(multiple: int | None, width: int) -> None:
    batch = collate_fn_wrapper(a_tokenizer(), pad_to_multiple_of=multiple)([a_cell(*LONG), a_cell(*SHORT)])
    assert {tuple(values.shape) for values in batch.values()} == {(2, width)}


def test_packed_cells_lie_end_to_end() -> None:
    batch = collate_fn_wrapper(a_tokenizer(), packed=True)([a_cell(*SHORT), a_cell(*LONG)])
    assert batch["input_ids"].tolist() == SHORT[0] + LONG[0]
    assert batch["token_type_ids"].tolist() == SHORT[1] + LONG[1]
    assert (batch["cu_seqlens"].tolist(), batch["cu_seqlens"].dtype) == ([0, 3, 11], torch.int32)
    assert (batch["max_seqlen"], batch["lengths"]) == (8, [3, 8])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_class_labels_become_one_per_cell(packed: bool) -> None:
    cells = [a_cell(*SHORT), a_cell(*LONG)]
    for label, cell in enumerate(cells, start=1):
        cell["labels"] = torch.tensor(label)
    assert collate_fn_wrapper(a_tokenizer(), packed=packed)(cells)["labels"].tolist() == [1, 2]


# -- masking ------------------------------------------------------------------------------------------------------


def test_nothing_is_masked_at_probability_zero() -> None:
    collator = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=0, phenotype_mask_prob=0, absent_prob=0)
    batch = collator([a_cell(*LONG)])
    assert (batch["input_ids"].tolist(), batch["token_type_ids"].tolist()) == ([LONG[0]], [LONG[1]])
    assert batch["labels"].tolist() == [[IGNORED] * 8]


def test_everything_but_special_tokens_is_masked_at_probability_one() -> None:
    collator = DataCollatorForPhenotypicMLM(
        a_tokenizer(), gene_mask_prob=1, phenotype_mask_prob=1, absent_prob=0, unexpressed_ratio=0
    )
    batch = collator([a_cell(*LONG)])
    assert batch["input_ids"].tolist() == [[CLS, MASK, MASK, MASK, MASK, MASK, MASK, EOS]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 8, 10, 11, 10, 11, IGNORED]]


def test_absent_phenotypes_leave_the_sequence() -> None:
    collator = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=0, absent_prob=1)
    assert collator([a_cell(*LONG)])["token_type_ids"].tolist() == [[0, 3, 5, 6, 9, 0]]


def test_masks_of_one_cell_never_change_between_versions() -> None:
    batch = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=0.5, unexpressed_ratio=1.0, seed=7)(
        [a_cell(*LONG, index=11, epoch=2)]
    )
    assert [batch[name].tolist()[0] for name in ("input_ids", "token_type_ids", "labels")] == GOLDEN


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_thinning_takes_a_share_of_genes_drawn_anew_for_each_cell_and_epoch(
    many_cells: list[Cell], prob: float
) -> None:
    first = wide_tokenizer().first_gene_type

    def genes_left(batch: dict[str, Any]) -> np.ndarray:
        is_gene_l = (batch["token_type_ids"] >= first).numpy()
        return np.add.reduceat(is_gene_l, batch["cu_seqlens"][:-1].numpy(), dtype=np.int64)

    whole = collate_fn_wrapper(wide_tokenizer(), packed=True)(many_cells)
    left = collate_fn_wrapper(wide_tokenizer(), packed=True, gene_drop_prob=prob, seed=1)(many_cells)
    share_n = 1 - genes_left(left) / genes_left(whole)
    assert share_n.mean() == pytest.approx(prob / 2, abs=0.02)
    assert (share_n < 0.2 * prob).mean() == pytest.approx(0.2, abs=0.06)  # uniform: some cells lose next to nothing
    assert np.quantile(share_n, 0.95) < prob + 0.15
    again = [collate_fn_wrapper(wide_tokenizer(), gene_drop_prob=prob, seed=1)([cell]) for cell in many_cells[:50]]
    assert [int(batch["attention_mask"].sum()) for batch in again] == left["lengths"][:50]
    for cell in many_cells:
        cell.epoch = 1
    other = collate_fn_wrapper(wide_tokenizer(), packed=True, gene_drop_prob=prob, seed=1)(many_cells)
    for cell in many_cells:
        cell.epoch = 0
    assert other["lengths"] != left["lengths"]


def test_thinning_never_takes_phenotypes_and_never_calls_a_gene_unexpressed(many_cells: list[Cell]) -> None:
    collator = DataCollatorForPhenotypicMLM(
        wide_tokenizer(), gene_mask_prob=0.3, phenotype_mask_prob=0, absent_prob=0, gene_drop_prob=0.9,
        unexpressed_ratio=1,
    )  # fmt: skip
    first = wide_tokenizer().first_gene_type
    for cell, row in zip(many_cells, rows_of(collator(many_cells)), strict=True):
        expressed = set(cell["token_type_ids"].tolist())
        assert {type_ for _, type_, _ in row if 0 < type_ < first} == {t for t in expressed if 0 < t < first}
        unexpressed = {type_ for _, type_, label in row if label == wide_tokenizer().first_bin_id}
        assert not unexpressed & expressed


def test_without_thinning_masks_are_what_they_were(many_rows: list, many_cells: list[Cell]) -> None:
    collator = DataCollatorForPhenotypicMLM(wide_tokenizer(), gene_drop_prob=0.0)
    assert rows_of(collator(many_cells)) == many_rows


def test_a_share_of_dropped_genes_beyond_one_is_refused() -> None:
    with pytest.raises(InputError, match="gene_drop_prob is 1.5"):
        collate_fn_wrapper(wide_tokenizer(), gene_drop_prob=1.5)


@pytest.fixture(scope="module")
def many_cells() -> list[Cell]:
    """1,200 cells of 60 genes, of which each expresses about 18."""
    return list(IterableAnnDataset(random_cells(1200, 60), wide_tokenizer()))


def wide_tokenizer(**options: Any) -> GeneTokenizer:
    """Make a tokenizer of sixty genes."""
    return a_tokenizer(**{"genes": [f"G{i}" for i in range(60)], "max_length": 80, **options})


@pytest.fixture(scope="module")
def many_rows(many_cells: list[Cell]) -> list[list[tuple[int, int, int]]]:
    """The same cells masked with default probabilities."""
    return rows_of(DataCollatorForPhenotypicMLM(wide_tokenizer())(many_cells))


def is_within_four_sigma(hits: int, trials: int, probability: float) -> bool:
    """True when a binomial count is no surprise."""
    return abs(hits - trials * probability) < 4 * np.sqrt(trials * probability * (1 - probability))


def test_genes_are_masked_at_their_rate(many_cells: list[Cell], many_rows: list[Any]) -> None:
    hits = sum(type_ >= 3 and label not in (IGNORED, BIN_0) for row in many_rows for _, type_, label in row)
    trials = sum(int((cell["token_type_ids"] >= 3).sum()) for cell in many_cells)
    assert is_within_four_sigma(hits, trials, 0.15 + 0.85**18 / 18)  # at least one gene of about 18 is masked


def test_every_cell_that_expresses_genes_has_a_masked_one(many_rows: list[Any]) -> None:
    assert all(any(label > BIN_0 for _, _, label in row) for row in many_rows)


def test_phenotypes_are_absent_asked_and_given_at_their_rates(many_rows: list[Any]) -> None:
    slots = [label for row in many_rows for _, type_, label in row if type_ == 2]
    assert is_within_four_sigma(1200 - len(slots), 1200, 0.1)
    assert is_within_four_sigma(sum(label != IGNORED for label in slots), len(slots), 0.5)


def test_phenotypes_of_one_cell_are_decided_independently(many_rows: list[Any]) -> None:
    asked = [{type_ for _, type_, label in row if label != IGNORED and type_ < 3} for row in many_rows]
    both = sum({1, 2} <= types for types in asked)
    assert is_within_four_sigma(both, 900, 0.45 * 0.45)  # a quarter of the cells has no cell type


def test_there_is_half_an_unexpressed_gene_per_masked_one(many_rows: list[Any]) -> None:
    masked = sum(label > BIN_0 for row in many_rows for _, type_, label in row if type_ >= 3)
    wanted, spread = 0.5 * masked, 0.5 * np.sqrt(len(many_rows))
    assert abs(sum(len(unexpressed(row)) for row in many_rows) - wanted) < 4 * spread


def test_masked_tokens_and_only_those_have_labels(many_rows: list[Any]) -> None:
    assert all((id_ == MASK) == (label != IGNORED) for row in many_rows for id_, _, label in row)


def test_special_tokens_stand_at_both_ends_unmasked(many_rows: list[Any]) -> None:
    assert all(row[0] == (CLS, 0, IGNORED) and row[-1] == (EOS, 0, IGNORED) for row in many_rows)


def test_restoring_the_labels_gives_the_cell_without_its_absent_phenotypes(
    many_cells: list[Cell], many_rows: list[Any]
) -> None:
    for cell, row in zip(many_cells, many_rows, strict=True):
        kept = {type_ for _, type_, _ in row}
        tokens = zip(cell["input_ids"].tolist(), cell["token_type_ids"].tolist(), strict=True)
        assert restored(row) == [(id_, type_) for id_, type_ in tokens if type_ in kept]
        assert all(type_ in (1, 2) for type_ in {*cell["token_type_ids"].tolist()} - kept)


def test_unexpressed_genes_are_drawn_from_all_genes_alike(many_rows: list[Any]) -> None:
    drawn_g = np.bincount([gene for row in many_rows for gene in unexpressed(row)], minlength=60)
    mean = drawn_g.mean()
    assert np.abs(drawn_g - mean).max() < 4 * np.sqrt(mean)


def test_each_epoch_draws_other_masks(many_cells: list[Cell]) -> None:
    collator, cell = DataCollatorForPhenotypicMLM(wide_tokenizer()), many_cells[0]
    later = a_cell(cell["input_ids"].tolist(), cell["token_type_ids"].tolist(), epoch=1)
    assert rows_of(collator([cell])) != rows_of(collator([later]))


def test_each_seed_draws_other_masks(many_cells: list[Cell]) -> None:
    first, second = (rows_of(DataCollatorForPhenotypicMLM(wide_tokenizer(), seed=s)(many_cells[:1])) for s in (0, 1))
    assert first != second


def test_masks_are_the_same_alone_and_in_any_batch(many_cells: list[Cell], many_rows: list[Any]) -> None:
    collator = DataCollatorForPhenotypicMLM(wide_tokenizer())
    assert [rows_of(collator([cell]))[0] for cell in many_cells[:40]] == many_rows[:40]
    assert rows_of(collator(many_cells[39::-1])) == many_rows[39::-1]


def test_packed_and_padded_masks_hold_the_same_tokens(many_cells: list[Cell]) -> None:
    cells = many_cells[:20]
    padded = DataCollatorForPhenotypicMLM(wide_tokenizer())(cells)
    packed = DataCollatorForPhenotypicMLM(wide_tokenizer(), packed=True)(cells)
    is_token_nl = padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert torch.equal(padded[name][is_token_nl], packed[name])
    labels_l = padded["labels"][is_token_nl]
    assert torch.equal(packed["label_positions"], torch.nonzero(labels_l != IGNORED).flatten())
    assert torch.equal(packed["labels"], labels_l[labels_l != IGNORED])
    assert packed["lengths"] == is_token_nl.sum(dim=1).tolist()


def test_a_cell_without_genes_is_masked_without_a_gene() -> None:
    batch = DataCollatorForPhenotypicMLM(a_tokenizer(), phenotype_mask_prob=1, absent_prob=0)(
        [a_cell([0, 4, 1], [0, 1, 0])]
    )
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[CLS, MASK, EOS]], [[IGNORED, 4, IGNORED]])


def test_a_cell_that_expresses_the_whole_panel_has_no_unexpressed_gene() -> None:
    cell = a_cell([CLS, *[10] * 9, EOS], [0, *range(3, 12), 0])
    batch = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=1, unexpressed_ratio=1)([cell])
    assert BIN_0 not in batch["labels"]


def test_a_high_ratio_draws_more_unexpressed_genes_than_the_cell_has_tokens() -> None:
    collator = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=1, unexpressed_ratio=6)
    (row,) = rows_of(collator([a_cell(*SHORT)]))
    assert len(set(unexpressed(row)) - {1}) == len(unexpressed(row)) == 6


def test_plain_dicts_are_masked_by_their_content(many_cells: list[Cell]) -> None:
    collator = DataCollatorForPhenotypicMLM(wide_tokenizer())
    plain = [dict(cell) for cell in many_cells[:30]]
    rows = rows_of(collator(plain))
    assert rows == [rows_of(collator([cell]))[0] for cell in plain]
    assert len({tuple(label != IGNORED for _, _, label in row) for row in rows}) > 20


@pytest.mark.parametrize("name", ["gene_mask_prob", "phenotype_mask_prob", "absent_prob"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_probabilities_outside_zero_and_one_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is .*, but a probability must be in 0..1. Change --{name}"):
        DataCollatorForPhenotypicMLM(a_tokenizer(), **{name: value})


def test_a_negative_ratio_of_unexpressed_genes_is_refused() -> None:
    with pytest.raises(InputError, match=r"unexpressed_ratio is -1.*must be >= 0"):
        DataCollatorForPhenotypicMLM(a_tokenizer(), unexpressed_ratio=-1)


# -- genes that are not expressed, in long cells and partial files -----------------------------------------------


@pytest.mark.parametrize("gene_mask_prob", [0.15, 1.0])
def test_genes_labelled_bin_0_are_never_expressed_and_cells_never_outgrow_max_length(
    gene_mask_prob: float,
) -> None:
    adata = random_cells(400, 60, density=0.5)
    tokenizer = wide_tokenizer(max_length=24)
    dataset = IterableAnnDataset(adata, tokenizer, seed=5, shuffle=True)
    dataset.set_epoch(3)
    cells = list(dataset)
    batch = DataCollatorForPhenotypicMLM(tokenizer, gene_mask_prob=gene_mask_prob, unexpressed_ratio=2, seed=1)(cells)
    assert batch["input_ids"].shape[1] <= 24
    for cell, row in zip(cells, rows_of(batch), strict=True):
        assert not adata.X[cell.index, unexpressed(row)].any()


def test_full_cells_still_get_unexpressed_genes() -> None:
    tokenizer = wide_tokenizer(max_length=24)
    cells = list(IterableAnnDataset(random_cells(40, 60, density=0.5), tokenizer))
    rows = rows_of(DataCollatorForPhenotypicMLM(tokenizer, unexpressed_ratio=1)(cells))
    assert sum(len(unexpressed(row)) for row in rows) > 40


def test_genes_that_a_file_does_not_measure_are_never_labelled_bin_0() -> None:
    part = random_cells(200, 60)[:, :40].copy()
    cells = list(IterableAnnDataset(part, wide_tokenizer()))
    rows = rows_of(DataCollatorForPhenotypicMLM(wide_tokenizer(), unexpressed_ratio=1)(cells))
    assert {gene for row in rows for gene in unexpressed(row)} == set(range(40))


def test_masks_are_the_same_in_a_batch_of_files_that_measure_different_genes() -> None:
    adata, collator = random_cells(40, 60), DataCollatorForPhenotypicMLM(wide_tokenizer(), unexpressed_ratio=1)
    parts = [adata[:10], adata[10:20, :40], adata[20:30, 20:], adata[30:]]
    cells = list(IterableAnnDataset([part.copy() for part in parts], wide_tokenizer(), shuffle=True))
    assert rows_of(collator(cells)) == [rows_of(collator([cell]))[0] for cell in cells]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cell_survives_any_masking(data: st.DataObject) -> None:
    genes = sorted(data.draw(st.sets(st.integers(0, 8), max_size=9)))
    phenotypes = data.draw(st.sampled_from([[], [(5, 1)], [(5, 1), (8, 2)]]))
    tokens = [(CLS, 0), *phenotypes, *((10 + gene % 2, 3 + gene) for gene in genes), (EOS, 0)]
    ids, types = (list(column) for column in zip(*tokens, strict=True))
    probability = st.sampled_from([0.0, 0.2, 0.7, 1.0])
    tokenizer = a_tokenizer(max_length=max(5, len(ids)))
    batch = DataCollatorForPhenotypicMLM(
        tokenizer,
        gene_mask_prob=data.draw(probability),
        phenotype_mask_prob=data.draw(probability),
        absent_prob=data.draw(probability),
        unexpressed_ratio=data.draw(st.sampled_from([0.0, 0.5, 3.0])),
    )([a_cell(ids, types, index=data.draw(st.integers(0, 10**9)))])
    (row,) = rows_of(batch)
    assert len(row) <= tokenizer.max_length
    assert set(restored(row)) <= set(tokens)
    assert not {gene for gene in unexpressed(row)} & set(genes)
    assert len({type_ for _, type_, _ in row if type_}) == len([type_ for _, type_, _ in row if type_])


# -- asking -------------------------------------------------------------------------------------------------------


def test_asked_slots_follow_cls_in_the_asked_order_and_others_leave() -> None:
    batch = ask(block_of([a_cell(*LONG)]), a_tokenizer(), asked=["tissue", "cell_type"])
    assert batch["input_ids"].tolist() == [CLS, MASK, MASK, 10, 11, 10, 11, EOS]
    assert batch["token_type_ids"].tolist() == [0, 2, 1, 3, 5, 6, 9, 0]
    assert batch["label_positions"].tolist() == [1, 2]


def test_given_phenotypes_keep_their_token_where_the_cell_has_one() -> None:
    batch = ask(block_of([a_cell(*LONG), a_cell(*SHORT)]), a_tokenizer(), asked=["cell_type"], given=["tissue"])
    assert batch["input_ids"].tolist() == [CLS, MASK, 8, 10, 11, 10, 11, EOS, CLS, MASK, 10, EOS]
    assert batch["token_type_ids"].tolist() == [0, 1, 2, 3, 5, 6, 9, 0, 0, 1, 4, 0]
    assert (batch["lengths"], batch["label_positions"].tolist()) == ([8, 4], [1, 9])


def test_phenotypes_neither_asked_nor_given_are_absent() -> None:
    batch = ask(block_of([a_cell(*LONG)]), a_tokenizer(), asked=["cell_type"])
    assert batch["token_type_ids"].tolist() == [0, 1, 3, 5, 6, 9, 0]


def test_a_label_that_is_there_does_not_change_what_is_asked() -> None:
    labelled = ask(block_of([a_cell(*LONG)]), a_tokenizer(), asked=["cell_type", "tissue"])
    bare = a_cell([LONG[0][0], *LONG[0][3:]], [LONG[1][0], *LONG[1][3:]])
    unlabelled = ask(block_of([bare]), a_tokenizer(), asked=["cell_type", "tissue"])
    assert all(torch.equal(torch.as_tensor(labelled[name]), torch.as_tensor(unlabelled[name])) for name in labelled)


def test_long_cells_are_asked_with_all_their_genes_and_masked_with_the_first() -> None:
    tokenizer, adata = a_tokenizer(max_length=7), ad.AnnData(np.full((1, 9), 2.0), var=pd.DataFrame(index=GENES))
    cell = tokenizer.reading(["cell_type", "tissue"], is_whole=True)(adata)
    assert ask(block_of([cell]), tokenizer, asked=["cell_type"])["token_type_ids"].tolist() == [0, 1, *range(3, 12), 0]
    masked = DataCollatorForPhenotypicMLM(tokenizer, packed=True, unexpressed_ratio=0)([cell])
    assert masked["token_type_ids"].tolist() == [0, *range(3, 8), 0]


def test_asking_an_unknown_phenotype_is_refused() -> None:
    with pytest.raises(InputError, match="phenotype 'age' is not in the vocabulary"):
        ask(block_of([a_cell(*LONG)]), a_tokenizer(), asked=["age"])
