"""What is repeatable: the weights of a training to the bit whatever does not concern them; docs/robustness.md lists it.

`make test` changes much of it at once, and `make faults` one thing after another.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.utils.data import get_worker_info

from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.iterable_ann_dataset import Batches, IterableAnnDataset
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.main import main
from tests.lines import Checked, params
from tests.small_training import COMMON, make_corpus

GOLDEN = Path(__file__).parent / "golden_cells.json"
#: Neither evaluated nor saved on the way. What is evaluated would choose the weights, if it were let.
PLAIN = (
    f"{COMMON.partition(' --max_steps')[0]} --max_steps 5 --eval_strategy no --save_strategy no --logging_steps 99 "
    "--load_best_model_at_end false"
)


@dataclass
class Trainings:
    """A corpus, the weights of a plain training on it, and a way to train again with something changed."""

    corpus: Path
    folder: Path
    plain: str

    def weights(self, more: str = "", *, corpus: str | Path | None = None) -> str:
        """Train; return the sum of the weights."""
        out = self.folder / f"run{len(list(self.folder.iterdir()))}"
        assert (
            main(["mlm", "--corpus", str(corpus or self.corpus), "--output_dir", str(out), *f"{PLAIN} {more}".split()])
            == 0
        )
        return sum_of(out)

    def same(self, more: str = "", **options: Any) -> None:
        """Expect the weights of the plain training."""
        assert self.weights(more, **options) == self.plain


def sum_of(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


PROMISES: list[Checked] = []
WEIGHTS = "the same weights, bit by bit"


def promise(id: str, what: str, outcome: str = WEIGHTS, *, is_sampled: bool = False) -> Callable[[Any], Any]:
    """Register the check of a promise."""

    def register(check: Callable[[Trainings], object]) -> Callable[[Trainings], object]:
        PROMISES.append(Checked(id, what, outcome, check=check, is_sampled=is_sampled))
        return check

    return register


def elsewhere(id: str, what: str, outcome: str, test: str) -> None:
    """List a promise whose test is in another file."""
    PROMISES.append(Checked(id, what, outcome, f"tests/{test}", is_sampled=True))


# -- training -----------------------------------------------------------------------------------------------------


def _poison() -> None:
    """Let every function that draws from a generator of the whole process fail."""

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("data code drew from a generator of the whole process")

    drawing = {name for name in dir(random.Random) if not name.startswith("_")} - {"getstate", "setstate"}
    numpys = {name for name in dir(np.random.RandomState) if not name.startswith("_")} - {"get_state", "set_state"}
    torchs = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal", "multinomial")
    for module, names in ((random, drawing), (np.random, numpys), (torch, torchs)):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, fail)


@contextmanager
def poisoned_workers() -> Iterator[None]:
    """Let loader workers fail when they draw from a generator of the whole process; they are processes of their own."""
    whole = Batches.__iter__

    def iterate(batches: Batches) -> Iterator[dict[str, Any]]:
        assert get_worker_info() is not None, "the loader has no workers"
        _poison()
        return whole(batches)

    with patch.object(Batches, "__iter__", iterate):
        yield


@promise("D0-all-at-once", "three loader workers that read ahead, checkpoints, a log of each step, shards of 10 "
         "cells, a path through a link, and poisoned generators", is_sampled=True)  # fmt: skip
def _(t: Trainings) -> None:
    corpus = make_corpus(t.folder / "small_shards", shard_size=10)
    assert len(Corpus.open(corpus).paths("train")) == 10
    (t.folder / "link").symlink_to(corpus)
    with poisoned_workers():
        t.same(
            "--dataloader_num_workers 3 --dataloader_prefetch_factor 4 --save_strategy steps --save_steps 2 "
            "--logging_steps 1",
            corpus=t.folder / "link",
        )


@promise("D1-same-seed", "the same command again", is_sampled=True)
def _(t: Trainings) -> None:
    t.same()
    assert t.weights("--seed 7") != t.plain


for _workers in (1, 2, 3):
    promise(f"D2-workers-{_workers}", f"`--dataloader_num_workers {_workers}`")(
        partial(Trainings.same, more=f"--dataloader_num_workers {_workers}")
    )
CHANGES = {
    "D3-prefetch": "--dataloader_num_workers 2 --dataloader_prefetch_factor 4",
    "D3-persistent": "--dataloader_num_workers 2 --dataloader_persistent_workers",
    "D4-evaluation": "--eval_strategy steps --eval_steps 1",
    "D5-saving": "--save_strategy steps --save_steps 1",
    "D6-logging": "--logging_steps 1",
    "D7-report-to": "--report_to tensorboard --logging_steps 1",
}
for _id, _flags in CHANGES.items():
    promise(_id, f"`{_flags}`")(partial(Trainings.same, more=_flags))


@promise("D8-hash-seed", "`PYTHONHASHSEED`, also of `prepare`", f"the same shards; {WEIGHTS}")
def _(t: Trainings) -> None:
    corpus, out = t.folder / "corpus", t.folder / "run"
    code = (
        "import sys, pathlib; from perturbgene.main import main; from tests.small_training import make_corpus;"
        "make_corpus(pathlib.Path(sys.argv[1])); sys.exit(main(sys.argv[2:]))"
    )
    words = [str(corpus), "mlm", "--corpus", str(corpus), "--output_dir", str(out), *PLAIN.split()]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, *words], env=environment, check=True, capture_output=True, timeout=280)
    assert sum_of(out) == t.plain
    for ours, theirs in zip(Corpus.open(corpus).paths("train"), Corpus.open(t.corpus).paths("train"), strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


@promise("D9-paths", "the corpus by a relative path, a path with `..`, a link and a copy")
def _(t: Trainings) -> None:
    (t.folder / "link").symlink_to(t.corpus)
    copied = shutil.copytree(t.corpus, t.folder / "a copy")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(t.corpus.parent)
        for corpus in (t.corpus.name, f"{t.corpus.name}/../{t.corpus.name}/", t.folder / "link", copied):
            t.same(corpus=corpus)


@promise("D10-shards", "the same cells in one shard, in shards of 50 cells and in shards of 10")
def _(t: Trainings) -> None:
    for size in (50, 10):
        t.same(corpus=make_corpus(t.folder / f"shards_of_{size}", shard_size=size))


@promise("D11-generators", "loader workers in which `torch.rand`, `np.random` and `random` fail")
def _(t: Trainings) -> None:
    with poisoned_workers():
        t.same("--dataloader_num_workers 2")


_TRAINER, _SAFE = "training/test_sharded_trainer.py::", "training/test_safe_trainer.py::"
elsewhere("D12-resume", "stopped at any step and resumed, with other loader workers", f"{WEIGHTS}; the same log",
          f"{_TRAINER}test_a_resumed_run_ends_with_the_same_weights_and_the_same_log")  # fmt: skip
elsewhere("D12-killed", "killed again and again, in any phase, and resumed", f"{WEIGHTS}; the same log",
          f"{_SAFE}test_a_run_killed_again_and_again_ends_with_the_same_weights_and_log")  # fmt: skip
elsewhere("D12-budget", "the same under a budget of tokens", f"{WEIGHTS}; the same log",
          f"{_TRAINER}test_a_run_of_planned_batches_resumes_with_the_same_weights_and_log")  # fmt: skip
elsewhere("D12-sampled", "the same where rare labels are drawn more often", WEIGHTS,
          f"{_SAFE}test_a_killed_run_that_samples_by_label_ends_with_the_same_weights")  # fmt: skip
elsewhere("D13-accumulation", "8 cells a step, as 1 x 8, 2 x 4 and 4 x 2 (without dropout)", "weights within 1e-6",
          f"{_TRAINER}test_accumulated_batches_make_the_step_of_8")  # fmt: skip
elsewhere("D13-processes", "8 cells a step, by one process and by two (without dropout)", "weights within 1e-6",
          f"{_TRAINER}test_two_processes_of_4_cells_make_the_step_of_8")  # fmt: skip

# -- tokens, masks and corpora ------------------------------------------------------------------------------------


def golden_cells() -> ad.AnnData:
    """Return the stored cells."""
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    counts_ng = np.zeros((len(stored["counts"]), len(stored["genes"])), dtype=np.float32)
    for row, counts in enumerate(stored["counts"]):
        counts_ng[row, [int(column) for column in counts]] = list(counts.values())
    obs = pd.DataFrame(stored["obs"], index=[f"cell_{row}" for row in range(len(counts_ng))])
    return ad.AnnData(sparse.csr_matrix(counts_ng), obs=obs, var=pd.DataFrame(index=stored["genes"]))


def golden_tokens(cells: ad.AnnData) -> list[list[list[int]]]:
    """Return ids and types of each cell by the stored tokenizer."""
    tokenizer = GeneTokenizer(**json.loads(GOLDEN.read_text(encoding="utf-8"))["tokenizer"])
    stream = IterableAnnDataset(cells, tokenizer)
    return [[cell["input_ids"].tolist(), cell["token_type_ids"].tolist()] for cell in stream]


@promise("D14-tokens", "20 stored cells of counts: versions of ids, missing and unknown labels, a cell that is cut, "
         "one of one count", "the tokens that they have had since they were stored", is_sampled=True)  # fmt: skip
def _(t: Trainings) -> None:
    assert golden_tokens(golden_cells()) == json.loads(GOLDEN.read_text(encoding="utf-8"))["tokens"]


elsewhere("D14-order", "the order of cells, on any machine and in any version", "as it was stored",
          "data_utils/test_order.py::test_the_order_never_changes_between_versions")  # fmt: skip
elsewhere("D14-masks", "the masks of a cell, on any machine and in any version", "as they were stored",
          "data_utils/test_data_collators.py::test_masks_of_one_cell_never_change_between_versions")  # fmt: skip
elsewhere("D15-generators", "streaming and masking", "leave the generators of the process as they are",
          "data_utils/test_iterable_ann_dataset.py::test_streaming_leaves_all_global_generators_alone")  # fmt: skip
elsewhere("D16-corpus", "`prepare` of the same files in another order, by any number of processes", "the same bytes",
          "corpus/test_prepare.py::test_shards_have_the_same_bytes_in_any_order_of_files_and_on_any_number_of_processes",
          )  # fmt: skip
elsewhere("D16-names", "`prepare` of files with other names", "the same bytes",
          "corpus/test_prepare.py::test_names_of_files_change_nothing")  # fmt: skip

# -- answers ------------------------------------------------------------------------------------------------------

elsewhere("D17-answers", "cells one by one and in batches of 64", "the same answers, within 1e-5",
          "inference/test_predict.py::test_a_batch_of_64_answers_like_one_cell_at_a_time")  # fmt: skip
elsewhere("D17-embeddings", "cells one by one and in batches of 64", "the same embeddings, within 1e-5",
          "embedding/test_cells.py::test_batches_of_64_equal_one_cell_at_a_time")  # fmt: skip
elsewhere("D17-padding", "a batch padded, padded on the left and without padding", "the same states, within 1e-5",
          "model/test_packing.py::test_packed_hidden_states_equal_padded_ones")  # fmt: skip
elsewhere("D18-processes", "`predict` by one process and by two", "the same file",
          "inference/test_predict.py::test_two_processes_write_what_one_writes")  # fmt: skip
elsewhere("D18-parts", "cells divided among jobs (`--part`, `merge`)", "the same bytes",
          "test_parts.py::test_parts_merge_to_the_bytes_that_one_command_writes")  # fmt: skip


@pytest.fixture(scope="module")
def plain(training_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("plain") / "run"
    assert main(["mlm", "--corpus", str(training_corpus), "--output_dir", str(out), *PLAIN.split()]) == 0
    return sum_of(out)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("promise", params(PROMISES))
def test_repeatable(promise: Checked, training_corpus: Path, plain: str, tmp_path: Path) -> None:
    assert promise.check
    promise.check(Trainings(training_corpus, tmp_path, plain))
