"""Properties of any order, cell, label, edit and command line, drawn by hypothesis; docs/robustness.md lists them."""

import contextlib
import copy
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from scipy import sparse

from perturbgene.cli.parsing import is_flag, known_flags
from perturbgene.configs import CONFIGS, load_config
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.kernels import cell_key
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.main import main
from perturbgene.perturbation.edits import changed_pairs, edit, perturbations_of
from tests.lines import Line
from tests.nine_genes import GENES, a_tokenizer

_ORDER = "tests/data_utils/test_order.py::"
_MASKS = "tests/data_utils/test_data_collators.py::"
_TOKENS = "tests/data_utils/test_tokenization.py::"
_HERE = "tests/test_properties.py::"
PROPERTIES = [
    Line("P1-cells", "the order of an epoch, for any files, seed, epoch and buffer", "every cell once",
         f"{_ORDER}test_every_row_comes_exactly_once"),
    Line("P1-ranks", "the cells of all ranks in evaluation", "all cells, none twice",
         f"{_ORDER}test_ranks_share_the_cells_completely_in_evaluation"),
    Line("P1-even-ranks", "the cells of each rank in training", "as many each; the last ones of the order are left out",
         f"{_ORDER}test_ranks_share_the_cells_evenly_in_training"),
    Line("P1-workers", "batches of any number of loader workers in turn", "the batches of one worker",
         f"{_ORDER}test_batches_of_workers_in_turn_are_the_batches_of_one_worker"),
    Line("P2-tail", "an order that begins at any cell", "the tail of the whole order",
         f"{_ORDER}test_skipping_gives_the_tail_of_the_same_order"),
    Line("P2-shares", "shares of ranks and workers from any position on", "each position from there on, once",
         f"{_ORDER}test_shares_hold_each_position_from_the_begin_on_once"),
    Line("P3-tokens", "a matrix as dense, CSR, CSC, with columns in any order and columns of other genes",
         "the same tokens", f"{_HERE}test_tokens_do_not_depend_on_how_a_matrix_is_stored"),
    Line("P4-bins", "a value that grows", "its bin never falls", f"{_HERE}test_a_higher_value_never_has_a_lower_bin"),
    Line("P5-labels", "a vocabulary of any labels, saved and loaded", "the same ids",
         f"{_TOKENS}test_any_label_survives_saving_and_loading"),
    Line("P6-masks", "any cell under any rates of masking", "labels at masked tokens only, never at special tokens",
         f"{_MASKS}test_any_cell_survives_any_masking"),
    Line("P6-rate", "genes that are masked", "their rate within four standard deviations, and at least one a cell",
         f"{_MASKS}test_genes_are_masked_at_their_rate"),
    Line("P7-identity", "a knock-out of a gene that the cell does not express", "changes nothing",
         f"{_HERE}test_a_knock_out_of_what_is_not_expressed_changes_nothing"),
    Line("P7-restore", "a gene knocked out and set to its bin again", "the cell as it was",
         f"{_HERE}test_a_gene_that_is_restored_gives_the_cell_as_it_was"),
    Line("P7-order", "two knock-outs one after the other, in either order, and both at once", "the same cell",
         f"{_HERE}test_the_order_of_two_knock_outs_does_not_matter"),
    Line("P8-stream", "a stream stopped, killed, resumed, on other numbers of ranks and workers, again and again",
         "every batch is the one that an undisturbed stream gives next", f"{_HERE}test_any_history_of_a_stream"),
    Line("P10-flags", "an unknown flag, for every verb", "exit code 2, one line",
         f"{_HERE}test_any_unknown_flag_is_one_line"),
    Line("P10-keys", "an unknown key in a YAML file, for every verb", "exit code 2, one line",
         f"{_HERE}test_any_unknown_key_is_one_line"),
    Line("P10-yaml", "a YAML file of any text, for every verb", "exit code 2, one line",
         f"{_HERE}test_any_text_for_a_configuration_is_one_line"),
    Line("P10-nasty", "YAML with dates that do not exist, thousands of brackets, its own ancestors, code",
         "exit code 2, one line", f"{_HERE}test_text_that_is_hardly_yaml_is_one_line"),
]  # fmt: skip

# -- P3 and P4: tokens --------------------------------------------------------------------------------------------

VALUES = st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7]), min_size=9, max_size=9), min_size=1, max_size=4)


def tokens_of(values_ng: Any, genes: list[str]) -> list[tuple[list[int], list[int]]]:
    cells = ad.AnnData(values_ng, var=pd.DataFrame(index=genes))
    stream = IterableAnnDataset(cells, a_tokenizer(included_phenotypes=[], normalization="log1p_cp10k"), threads=1)
    return [(cell["input_ids"].tolist(), cell["token_type_ids"].tolist()) for cell in stream]


@settings(max_examples=15, deadline=None)
@given(values=VALUES, order=st.permutations(range(12)))
def test_tokens_do_not_depend_on_how_a_matrix_is_stored(values: list[list[int]], order: list[int]) -> None:
    """Genes outside the panel are part of the library size in all of them."""
    dense = np.column_stack([np.array(values), np.tile([1, 0, 4], (len(values), 1))]).astype(np.float32)
    genes = [*GENES, "X1", "X2", "X3"]
    plain = tokens_of(dense, genes)
    shuffled, names = dense[:, order], [genes[column] for column in order]
    for form in (sparse.csr_matrix(dense), sparse.csc_matrix(dense)):
        assert tokens_of(form, genes) == plain
    for form in (shuffled, sparse.csr_matrix(shuffled), sparse.csc_matrix(shuffled)):
        assert tokens_of(form, names) == plain


@settings(max_examples=60, deadline=None)
@given(
    edges=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=9, unique=True).map(sorted),
    values=st.lists(st.floats(0.0078125, 1e5, width=32), min_size=9, max_size=9).map(sorted),
)
def test_a_higher_value_never_has_a_lower_bin(edges: list[float], values: list[float]) -> None:
    """Values next to an edge are left out of the comparison with numpy: float32 may not hold the edge."""
    tokenizer = a_tokenizer(included_phenotypes=[], bin_edges=edges)
    cells = ad.AnnData(np.diag(np.array(values, dtype=np.float32)), var=pd.DataFrame(index=GENES))
    bins = [0] * 9
    for cell in IterableAnnDataset(cells, tokenizer, threads=1):
        if len(cell["input_ids"]) == 3:
            bins[cell.index] = int(cell["input_ids"][1]) - tokenizer.first_bin_id
    assert bins == sorted(bins)
    is_apart_g = ~np.isclose(np.array(values)[:, None], edges, rtol=1e-6).any(axis=1)
    assert np.array(bins)[is_apart_g].tolist() == np.digitize(values, edges)[is_apart_g].tolist()


# -- P7: edits ----------------------------------------------------------------------------------------------------

TOKENIZER = a_tokenizer()
#: The bin of every gene of a cell; 0 where it is not expressed.
BINS = st.lists(st.integers(0, 2), min_size=9, max_size=9)
Tokens = tuple[list[int], list[int]]


def block_of(bins: list[int]) -> TokenBlock:
    genes = [gene for gene, bin_ in enumerate(bins) if bin_]
    ids = [0, *(TOKENIZER.first_bin_id + bins[gene] for gene in genes), 1]
    types = [0, *(TOKENIZER.first_gene_type + gene for gene in genes), 0]
    offsets, cells = np.array([0, len(ids)]), np.zeros(1, dtype=np.int64)
    return TokenBlock(np.array(ids, dtype=np.int32), np.array(types, dtype=np.int32), offsets, cells)


def edited(block: TokenBlock, name: str, **options: Any) -> TokenBlock:
    """Apply one perturbation to the only cell; the cell itself if it does not change it."""
    perturbations = perturbations_of([name], TOKENIZER, **options)
    pairs = changed_pairs(block, perturbations, TOKENIZER)
    assert len(pairs[0]) in (0, 1)
    if not len(pairs[0]):
        return block
    return edit(block, perturbations, TOKENIZER, pairs=pairs, most_genes=TOKENIZER.most_genes)[0]


def spelled(block: TokenBlock) -> Tokens:
    return block.input_ids_l.tolist(), block.token_type_ids_l.tolist()


@settings(max_examples=60, deadline=None)
@given(bins=BINS, gene=st.integers(0, 8))
def test_a_knock_out_of_what_is_not_expressed_changes_nothing(bins: list[int], gene: int) -> None:
    bins[gene] = 0
    assert not len(changed_pairs(block_of(bins), perturbations_of([GENES[gene]], TOKENIZER), TOKENIZER)[0])


@settings(max_examples=60, deadline=None)
@given(bins=BINS, gene=st.integers(0, 8), level=st.integers(1, 2))
def test_a_gene_that_is_restored_gives_the_cell_as_it_was(bins: list[int], gene: int, level: int) -> None:
    bins[gene] = level
    without = edited(block_of(bins), GENES[gene])
    assert spelled(without) == spelled(block_of([*bins[:gene], 0, *bins[gene + 1 :]]))
    assert spelled(edited(without, GENES[gene], kind="set_bin", level=level)) == spelled(block_of(bins))


@settings(max_examples=60, deadline=None)
@given(bins=BINS, genes=st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True))
def test_the_order_of_two_knock_outs_does_not_matter(bins: list[int], genes: list[int]) -> None:
    block, (one, other) = block_of(bins), (GENES[gene] for gene in genes)
    both = spelled(edited(block, f"{one}+{other}"))
    assert spelled(edited(edited(block, one), other)) == spelled(edited(edited(block, other), one)) == both


# -- P8: any history of a stream ----------------------------------------------------------------------------------

MODULE = "perturbgene.data_utils.iterable_ann_dataset"


def _cells(num_cells: int, first: int) -> ad.AnnData:
    """Make cells of different lengths."""
    values_ng = np.array([[(cell_key(7, gene, first + row) % 3) for gene in range(9)] for row in range(num_cells)])
    return ad.AnnData(sparse.csr_matrix(values_ng.astype(np.float32) * 2), var=pd.DataFrame(index=GENES))


FILES = [_cells(10, 0), _cells(27, 10), _cells(4, 37)]


class Numbers:
    """A collator that keeps only which cells a batch holds."""

    def collate_block(self, block: TokenBlock) -> list[int]:
        return block.cells_n.tolist()


class StreamHistory(RuleBasedStateMachine):
    """A stream whose process is killed, resumed and given other ranks and workers, next to one that nothing disturbs.

    Loader workers are copies of the data set that share its memory, as after a fork, and give their batches in turn.
    """

    @initialize(has_budget=st.booleans(), world_size=st.integers(1, 3), num_workers=st.integers(0, 3))
    def begin(self, has_budget: bool, world_size: int, num_workers: int) -> None:
        self.options: dict[str, Any] = {"shuffle": True, "seed": 5, "block_rows": 2, "buffer_rows": 16, "threads": 1}
        self.options |= {"tokens_per_batch": 24} if has_budget else {"batch_size": 3}
        self.step = 1 if has_budget else 3
        self.epoch, self.position = 0, 0
        self.units = self._undisturbed()
        self.saved = self._dataset().state_dict()
        self._start(world_size=world_size, num_workers=num_workers)

    def _dataset(self, **ranks: int) -> IterableAnnDataset:
        return IterableAnnDataset(FILES, a_tokenizer(included_phenotypes=[]), **self.options, **ranks)

    def _undisturbed(self) -> list[list[int]]:
        """Return what positions of the epoch count: batches under a budget, else cells."""
        whole = self._dataset()
        whole.set_epoch(self.epoch)
        batches = list(whole.batches(Numbers()))  # type: ignore[arg-type]
        return batches if self.step == 1 else [[cell] for batch in batches for cell in batch]

    def _start(self, *, world_size: int, num_workers: int) -> None:
        """Begin processes at the saved position."""
        self.world_size = world_size
        self.ranks = [self._dataset(rank=rank, world_size=world_size) for rank in range(world_size)]
        for dataset in self.ranks:
            dataset.load_state_dict(json.loads(json.dumps(self.saved)))
        self.epoch, self.position = self.saved["epoch"], self.saved["consumed"]
        self.units = self._undisturbed()
        self._load(num_workers)

    def _load(self, num_workers: int) -> None:
        self.done = 0
        self.loaders = [self._loader(dataset, num_workers) for dataset in self.ranks]

    @staticmethod
    def _loader(dataset: IterableAnnDataset, num_workers: int) -> Iterator[list[int]]:
        infos: list[Any] = [SimpleNamespace(id=number, num_workers=num_workers) for number in range(num_workers)]
        owners = [copy.copy(dataset) for _ in infos] or [dataset]
        parts = [iter(owner.batches(Numbers())) for owner in owners]  # type: ignore[arg-type]
        turn = 0
        while True:
            at = turn % len(parts)
            with patch(f"{MODULE}.get_worker_info", lambda info=(infos or [None])[at]: info):
                batch = next(parts[at], None)
            if batch is None:
                return
            yield batch  # type: ignore[misc]
            turn += 1

    @rule(count=st.integers(1, 4))
    def train(self, count: int) -> None:
        """Take batches: each must be that of the undisturbed stream."""
        for _ in range(count):
            left = (len(self.units) - self.position) // self.world_size
            for rank, loader in enumerate(self.loaders):
                own = self.units[self.position + rank :: self.world_size][: min(self.step, left)]
                assert next(loader, []) == [cell for unit in own for cell in unit]
            self.position = min(self.position + self.step * self.world_size, len(self.units))
            self.done += 1

    @rule()
    def save(self) -> None:
        self.saved = self.ranks[0].state_after(self.done)

    @rule(world_size=st.integers(1, 3), num_workers=st.integers(0, 3))
    def kill_and_resume(self, world_size: int, num_workers: int) -> None:
        self._start(world_size=world_size, num_workers=num_workers)

    @rule(num_workers=st.integers(0, 3))
    def change_workers(self, num_workers: int) -> None:
        self.save()
        self._start(world_size=self.world_size, num_workers=num_workers)

    @rule(num_workers=st.integers(0, 2))
    def next_epoch(self, num_workers: int) -> None:
        self.epoch, self.position = self.epoch + 1, 0
        self.units = self._undisturbed()
        for dataset in self.ranks:
            dataset.set_epoch(self.epoch)
        self._load(num_workers)

    @invariant()
    def the_position_is_that_of_the_undisturbed_stream(self) -> None:
        if hasattr(self, "ranks"):
            assert {
                (one.state_after(self.done)["epoch"], one.state_after(self.done)["consumed"]) for one in self.ranks
            } == {(self.epoch, self.position)}


def test_any_history_of_a_stream() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        StreamHistory, settings=settings(max_examples=20, stateful_step_count=10, deadline=None)
    )


# -- P10: command lines -------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
KEYS = NAMES | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.dates()
#: Text at which PyYAML raises something else than its own errors, or nothing.
NASTY = [
    "[", "a: b: c", "? [a]\n: 1", "? {a: 1}\n: 1", "verb: [mlm]", "verb: {a: 1}", "2026-99-99", "x: 2026-13-41",
    "x: !!int y", "x: !!float y", "x: !!bool y", "x: !!binary ~", "!!timestamp x", "!!set {a}", "!!omap [1]",
    "x: !!python/name:os.system", "? !!python/tuple [1]\n: 2", "&a [*a]", "x: &a {y: *a}", "? &k [*k]\n: 1", "\x00",
    "- a", "x: 1\nx: 2", "'", "--- a\n--- b", "%YAML 9.9\n---\n", "[" * 500, "? " * 500, "<<: 1", "<<: [1]",
    "x: 0x", "x: 1__0:99", "=: 1", "x: =", "x: 2001-01-01T00:00:00+99:99",
]  # fmt: skip
every_verb = pytest.mark.parametrize("verb", CONFIGS)


def is_one_line(words: list[str]) -> None:
    """Expect exit code 2 and one line, which is no traceback."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(words)
    assert code == 2, said.getvalue()
    assert re.fullmatch("error: .*\n", said.getvalue()), said.getvalue()


def is_known(verb: str, name: str) -> bool:
    plain = name.lstrip("-").replace("-", "_")
    return bool({plain, plain.removeprefix("no_")} & {*known_flags(CONFIGS[verb]), "help", "debug", "help_all", "h"})


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "config.yaml"


@every_verb
@settings(max_examples=8, deadline=None)
@given(name=NAMES | st.from_regex(r"[a-z_]{1,12}", fullmatch=True), value=st.none() | NAMES, dashes=st.integers(1, 2))
def test_any_unknown_flag_is_one_line(verb: str, name: str, value: str | None, dashes: int) -> None:
    flag = "-" * dashes + name
    assume(is_flag(flag) and not is_known(verb, name.partition("=")[0]))
    is_one_line([verb, flag, *([] if value is None else [value])])


@every_verb
@settings(max_examples=6, deadline=None)
@given(key=KEYS, value=st.recursive(NAMES | st.integers() | st.none(), st.lists, max_leaves=3))
def test_any_unknown_key_is_one_line(config_path: Path, verb: str, key: Any, value: Any) -> None:
    assume(not is_known(verb, str(key)) and key != "verb")
    config_path.write_text(yaml.safe_dump({key: value}, allow_unicode=True), encoding="utf-8")
    is_one_line([verb, "--config", str(config_path)])


@settings(max_examples=40, deadline=None)
@given(
    verb=st.sampled_from([*CONFIGS]), text=st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8"), max_size=20)
)
def test_any_text_for_a_configuration_is_one_line(config_path: Path, verb: str, text: str) -> None:
    """An empty file leaves out what the verb needs."""
    config_path.write_text(text, encoding="utf-8")
    is_one_line([verb, "--config", str(config_path)])


def test_text_that_is_hardly_yaml_is_one_line(config_path: Path) -> None:
    for text in NASTY:
        config_path.write_text(text, encoding="utf-8")
        is_one_line(["predict", "--config", str(config_path)])
        with pytest.raises(InputError):
            load_config(config_path)
