"""A command walks straight: it expands each pattern once and reads a corpus's manifest once."""

from collections import Counter
from pathlib import Path

import pytest

from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils import opening
from perturbgene.main import main

TRAIN = "--model_arch tiny --num_hidden_layers 1 --max_steps 1 --max_length 40 --no_bf16 --report_to none"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each pattern was expanded, and each manifest read."""
    found: Counter[str] = Counter()
    expand, read = opening.expand_braces, Corpus.open.__func__

    def counting_expand(pattern: str) -> list[str]:
        found[pattern] += 1
        return expand(pattern)

    def counting_read(cls: type[Corpus], folder: str | Path) -> Corpus:
        found[str(folder)] += 1
        return read(cls, folder)

    monkeypatch.setattr(opening, "expand_braces", counting_expand)
    monkeypatch.setattr(Corpus, "open", classmethod(counting_read))
    return found


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"mlm --corpus corpus --output_dir out {TRAIN}", {"corpus": 1}),
        (
            f"mlm --train_data_paths corpus/train/*.h5ad --eval_data_paths corpus/eval/*.h5ad --output_dir out {TRAIN} "
            "--pretrained_model_path runs/mlm".replace("--model_arch tiny --num_hidden_layers 1 ", ""),
            {"corpus/train/*.h5ad": 1, "corpus/eval/*.h5ad": 1},
        ),
        ("evaluate runs/mlm --corpus corpus --output scores", {"corpus": 1}),
        ("evaluate runs/mlm --eval_data_paths cells.h5ad --no_baselines --output scores", {"cells.h5ad": 1}),
        ("predict runs/mlm cells.h5ad --output out.h5ad --ask cell_type", {"cells.h5ad": 1}),
        ("embed runs/mlm cells.h5ad --output out.h5ad", {"cells.h5ad": 1}),
        ("perturb runs/mlm cells.h5ad --output ko.csv --genes CD79A --num_controls 3", {"cells.h5ad": 1}),
        ("attribute runs/mlm cells.h5ad --output at.csv --ask cell_type", {"cells.h5ad": 1}),
        (
            "counterfactual runs/mlm cells.h5ad --output cf.h5ad --set tissue=lung --num_passes 1 --num_null 0 --force",
            {"cells.h5ad": 1},
        ),
        ("prepare cells.h5ad --output made --phenotypes cell_type --num_top_genes 50", {"cells.h5ad": 1}),
    ],
    ids=[
        "mlm on a corpus",
        "mlm on shards",
        "evaluate on a corpus",
        "evaluate on a file",
        "predict",
        "embed",
        "perturb",
        "attribute",
        "counterfactual",
        "prepare",
    ],
)
def test_patterns_are_expanded_and_manifests_read_once(
    command: str, expected: dict[str, int], in_folder: Path, counts: Counter[str]
) -> None:
    assert main(command.split()) == 0
    small = str((in_folder / "corpus").resolve())  # the run's own corpus, in which evaluate looks for training cells
    assert {name: count for name, count in counts.items() if name != small} == expected
    assert counts[small] <= 1
