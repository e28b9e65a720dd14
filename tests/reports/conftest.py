"""Corpora with planted faults, which the page of a corpus and that of an evaluation must both name."""

from pathlib import Path

import pytest

from perturbgene.corpus.prepare import prepare
from tests.corpus.test_prepare import cells, counts


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corpora with nothing to find, with cells that were split one by one, and with copies and a phenotype = donor."""
    folder, values_ng = tmp_path_factory.mktemp("corpora"), counts(50)
    made = {"clean": prepare(cells(values_ng), folder / "clean", phenotypes=["cell_type"])}
    made["by cell"] = prepare(cells(values_ng), folder / "by_cell", phenotypes=["cell_type"], split_by="cell")
    values_ng[[1, 2, 3, 8]] = values_ng[0]  # of donors a, b, c and, held out, d twice
    planted = cells(values_ng)
    planted.obs["batch"] = "run " + planted.obs["donor_id"].astype(str)
    planted.obs["sex"] = planted.obs["donor_id"].map({"a": "f", "b": "m", "c": "m", "d": "f", "e": "f"})
    options = {"phenotypes": ["cell_type", "batch", "sex"], "eval_donors": ["d", "e"]}
    return made | {"planted": prepare(planted, folder / "planted", **options)}
