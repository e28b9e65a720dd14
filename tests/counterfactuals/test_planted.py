"""Genes that really differ between two labels are named by `counterfactual`, and no others."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbgene.corpus.prepare import prepare
from perturbgene.counterfactuals.counterfactual import counterfactual
from tests.small_run import train

GENES = [f"G{at:02d}" for at in range(24)]
RISE, FALL = ["G03", "G11"], ["G07", "G17"]


def planted_cells() -> ad.AnnData:
    """400 cells, half of them treated; a gene is expressed in half of the cells, but planted ones in 1 or 9 of 10."""
    random = np.random.default_rng(0)
    is_treated_n = np.arange(400) % 2 == 1
    share_ng = np.full((400, len(GENES)), 0.5)
    for genes, treated, normal in ((RISE, 0.9, 0.1), (FALL, 0.1, 0.9)):
        share_ng[:, [GENES.index(gene) for gene in genes]] = np.where(is_treated_n, treated, normal)[:, None]
    values_ng = (random.random(share_ng.shape) < share_ng) * random.choice([1.5, 3.5], share_ng.shape)
    obs = pd.DataFrame(
        {
            "treatment": np.where(is_treated_n, "treated", "normal"),
            "donor_id": [f"D{at // 2 % 4}" for at in range(400)],
        },
        index=[f"cell_{at}" for at in range(400)],
    )
    return ad.AnnData(sparse.csr_matrix(values_ng.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("planted")
    planted_cells().write_h5ad(folder / "cells.h5ad")
    prepare(
        folder / "cells.h5ad", folder / "corpus", phenotypes=["treatment"], split_by="donor_id",
        normalization="none", bin_edges=[1.0, 3.0], num_top_genes=len(GENES),
    )  # fmt: skip
    train(
        folder / "corpus",
        folder / "run",
        num_epochs=70,
        wide=True,
        gene_mask_prob=0.4,
        phenotype_mask_prob=0.1,
    )
    return counterfactual(folder / "cells.h5ad", folder / "run", set={"treatment": "treated"}, device="cpu")


def test_planted_genes_are_named_with_their_direction_and_no_other_gene_is(table: pd.DataFrame) -> None:
    named = table[table["q_value"] < 0.05]
    assert set(named["gene"][named["change"] > 0]) == set(RISE)
    assert set(named["gene"][named["change"] < 0]) == set(FALL)


def test_planted_changes_have_the_sign_and_order_of_size_of_the_truth(table: pd.DataFrame) -> None:
    planted = table[table["gene"].isin([*RISE, *FALL])]
    ratio = planted["change"] / planted["observed"]
    assert ratio.between(0.3, 1.3).all()
    others = table[~table["gene"].isin([*RISE, *FALL])]
    assert others["change"].abs().max() < planted["change"].abs().min() / 3
