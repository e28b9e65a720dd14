"""Pages about networks of genes: what is drawn is what `embed --network` wrote."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import pytest

import perturbgene as pg
from perturbgene.errors import InputError
from perturbgene.inference.held_out import about_untrained
from perturbgene.main import main
from perturbgene.reports.networks import MOST_GENES, of_networks, read_networks
from perturbgene.reports.report import report


@pytest.fixture(scope="module")
def genes(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mean embeddings of genes in two groups, with networks; one gene has an odd name."""
    path = tmp_path_factory.mktemp("networks") / "genes.h5ad"
    words = ["embed", str(small_folder / "runs/mlm"), str(small_folder / "cells.h5ad"), "--output", str(path)]
    assert main([*words, "--groupby", "tissue", "--network", "--min_similarity", "0"]) == 0
    table = ad.read_h5ad(path)
    strongest = int(table.obsp["perturbgene_network"].tocoo().row[table.obsp["perturbgene_network"].data.argmax()])
    table.obs["symbol"] = table.obs["symbol"].astype(str)
    table.obs.loc[table.obs_names[strongest], "symbol"] = "</script><b>odd"
    table.write_h5ad(path)
    return path


def test_the_strongest_links_are_drawn_and_listed(genes: Path) -> None:
    networks, table = read_networks(genes), ad.read_h5ad(genes)
    assert networks is not None
    page, weights = of_networks(networks), table.obsp["perturbgene_network"]
    assert [group["title"] for group in page.sections["groups"]] == ["blood", "lung"]
    assert sum(group["count"] for group in page.sections["groups"]) == weights.nnz / 2
    assert page.sections["groups"][0]["rows"][0]["weight"] == pytest.approx(
        weights[:, (table.obs["group"] == "blood").to_numpy()].max()
    )
    for group in page.sections["groups"]:
        names = {node["name"] for node in group["nodes"]}
        assert 1 < len(names) <= MOST_GENES and {line[end] for line in group["lines"] for end in "ab"} == names
        assert all(0 < node["x"] < 720 and 0 < node["y"] < 480 for node in group["nodes"])


def test_a_report_of_networks_is_written_with_figures_and_names_stay_text(genes: Path) -> None:
    text = report(genes).read_text()
    assert "no evidence that one regulates the other" in text
    assert "<b>odd" not in text and "&lt;/script&gt;&lt;b&gt;odd" in text
    assert all((genes.parent / f"genes.report.network{number}.png").exists() for number in range(2))


def test_genes_without_a_network_are_refused(genes: Path, tmp_path: Path) -> None:
    table = ad.read_h5ad(genes)
    del table.obsp["perturbgene_network"]
    table.write_h5ad(tmp_path / "genes.h5ad")
    with pytest.raises(InputError, match="has no network of genes. Run `perturbgene embed` again, with --network"):
        report(tmp_path / "genes.h5ad")


def test_a_transformer_that_has_learned_nothing_is_named_first(
    genes: Path, small_folder: Path, tmp_path: Path, caplog
) -> None:
    run = shutil.copytree(small_folder / "runs/mlm", tmp_path / "run")
    settings = (run / "run.yaml").read_text()
    assert not about_untrained(run)
    (run / "run.yaml").write_text(re.sub("(?m)^train_only: .*$", "train_only: votes", settings))
    [line] = about_untrained(run)
    assert "was trained with --train_only votes, so its transformer is random" in line
    networks = read_networks(genes)
    assert networks is not None and of_networks(replace(networks, run=str(run))).findings[0] == line
    pg.gene_embeddings(ad.read_h5ad(small_folder / "cells.h5ad")[:5].copy(), model=run)
    assert line in caplog.messages
    (run / "run.yaml").write_text((run / "run.yaml").read_text() + "pretrained_model_path: a_start\n")
    assert not about_untrained(run)  # the start was trained
