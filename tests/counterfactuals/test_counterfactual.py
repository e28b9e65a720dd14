"""Counterfactuals: what is hidden and predicted, how it is averaged and tested, and which questions are refused."""

import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import perturbgene as pg
from perturbgene.cli.verbs import CounterfactualConfig
from perturbgene.configs import MlmConfig, parse_args
from perturbgene.counterfactuals import counterfactual as counterfactuals
from perturbgene.counterfactuals.contrast import Contrast, GenePredictor, Sums, add_block
from perturbgene.counterfactuals.counterfactual import (
    CounterfactualTask,
    choose_cells,
    counterfactual,
    expected_changes,
    unseen_combinations,
)
from perturbgene.counterfactuals.statistics import against_null, pool_groups, squared_errors, weigh_strata
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, pack
from perturbgene.errors import InputError
from perturbgene.eval_utils import content_hash
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import open_cells
from perturbgene.main import main
from perturbgene.plots import MOST_CHANGES, changes_figure
from tests.inference.test_streaming import ThreadRanks
from tests.nine_genes import LABELS
from tests.untrained import a_run, save, save_score, some_cells

DOCS = Path(__file__).parents[2] / "docs/embedding.md"
SPLEEN = 8  # input id of tissue=spleen
QUICK: dict[str, Any] = {"num_passes": 2, "num_null": 5, "force": True}


@pytest.fixture(scope="module")
def run() -> Run:
    return a_run()


@pytest.fixture
def cells() -> ad.AnnData:
    return some_cells(40)


def block_of(run: Run, cells: ad.AnnData) -> Any:
    """All cells as one block, with both phenotypes."""
    return next(open_cells(cells, run, {"cell_type": None, "tissue": None}).blocks())


# -- one contrast -------------------------------------------------------------------------------------------------


def test_setting_a_label_changes_its_token_and_no_other(run: Run, cells: ad.AnnData) -> None:
    batch = pack(block_of(run, cells))
    changed = GenePredictor(run, Contrast("tissue", SPLEEN), tokenizer=run.tokenizer).with_label(batch)
    is_tissue = batch["token_type_ids"] == 2
    assert set(changed["input_ids"][is_tissue].tolist()) == {SPLEEN}
    assert torch.equal(changed["input_ids"][~is_tissue], batch["input_ids"][~is_tissue])


def test_a_null_moves_both_labels_as_far_as_the_real_change_and_nothing_else(run: Run, cells: ad.AnnData) -> None:
    predictor = GenePredictor(run, Contrast("tissue", SPLEEN, num_null=5), tokenizer=run.tokenizer)
    batch = pack(block_of(run, cells))
    embeddings = run.model.genebert.embeddings
    with torch.no_grad():
        own = embeddings.summed(batch["input_ids"], batch["token_type_ids"])
        real = embeddings.summed(predictor.with_label(batch)["input_ids"], batch["token_type_ids"]) - own
    moves = []
    for draw in range(5):
        from_own, to_set = (moved["inputs_embeds"] for moved in predictor.with_null(batch, draw))
        moves.append(from_own - own)
        torch.testing.assert_close(moves[-1].norm(dim=1), real.norm(dim=1))
        torch.testing.assert_close(own + real - to_set, moves[-1])
    is_moved = real.norm(dim=1) > 0
    assert not torch.allclose(moves[0][is_moved], moves[1][is_moved])


def test_both_directions_of_an_edit_have_one_null(run: Run, cells: ad.AnnData) -> None:
    """The same cells, called blood and set to spleen, and called spleen and set to blood."""
    tables = []
    for own, other in (("blood", "spleen"), ("spleen", "blood")):
        named = cells.copy()
        named.obs["tissue"] = own
        table = counterfactual(named, run, set={"tissue": other}, **QUICK)
        tables.append(table.set_index("gene").sort_index())
    there, back = tables
    assert (there["null_sd"] > 0).all() and there["change"].abs().max() > 0.01
    for name in ("change", "null_mean", "t"):
        np.testing.assert_allclose(there[name], -back[name], rtol=1e-3, atol=1e-5)
    for name in ("null_sd", "p_value"):
        np.testing.assert_allclose(there[name], back[name], rtol=1e-3, atol=1e-6)


def test_a_change_is_the_difference_of_expected_values_of_the_hidden_genes(run: Run, cells: ad.AnnData) -> None:
    one = cells[[0]].copy()
    one.obs["tissue"] = "blood"
    collator = DataCollatorForPhenotypicMLM(run.tokenizer, packed=False, phenotype_mask_prob=0, absent_prob=0)
    block = block_of(run, one)
    batch = collator.collate_block(replace(block, cells_n=content_hash(block, run.tokenizer)))
    labels, types = batch.pop("labels"), batch["token_type_ids"]
    changed = {**batch, "input_ids": torch.where(types == 2, SPLEEN, batch["input_ids"])}
    with torch.no_grad():
        bins = [torch.softmax(run.model(**side).logits[..., 9:], dim=-1) for side in (batch, changed)]
    expected = ((bins[1] - bins[0]) @ torch.tensor([0.0, 2.25, 4.0]))[labels != -100]
    found = Sums.zeros(num_groups=1, num_genes=9, num_null=0)
    predictor = GenePredictor(run, Contrast("tissue", SPLEEN, num_passes=1, num_null=0), tokenizer=run.tokenizer)
    collator = DataCollatorForPhenotypicMLM(run.tokenizer, packed=True, phenotype_mask_prob=0, absent_prob=0)
    add_block(found, predictor, collator, block_of(run, one), group_n=np.zeros(1, int), is_null_n=np.zeros(1, bool))
    strata = np.where(labels[labels != -100].numpy() == 9, 1, 0)
    genes = types[labels != -100].numpy() - 3
    np.testing.assert_allclose(found.changes_2skg[0, strata, 0, genes], expected.numpy(), atol=1e-6)
    assert found.counts_skg.sum() == len(genes) and found.changes_2skg[0].sum() == pytest.approx(
        float(expected.sum()), abs=1e-6
    )


def test_a_label_without_meaning_changes_nothing_at_all(cells: ad.AnnData) -> None:
    run = a_run()
    with torch.no_grad():
        run.model.genebert.embeddings.word_embeddings.weight[7] = run.model.genebert.embeddings.word_embeddings.weight[
            8
        ]
    assert (counterfactual(cells, run, set={"tissue": "spleen"}, num_null=0, force=True)["change"] == 0).all()


def test_batches_do_not_change_the_table(run: Run, cells: ad.AnnData) -> None:
    options = {**QUICK, "set": {"tissue": "spleen"}, "groupby": "donor"}
    together, single = (counterfactual(cells, run, batch_size=size, **options) for size in (64, 1))
    pd.testing.assert_frame_equal(together, single, atol=1e-4, rtol=1e-3)


def test_ranks_add_up_to_the_table_of_one_process(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    meeting = threading.Barrier(2)
    options: dict[str, Any] = {"num_passes": 2, "num_null": 5, "force": True, "groupby": "donor"}
    config = CounterfactualConfig(run="run", input="in", output="out.h5ad", set="tissue=spleen", **options)

    def table_of(rank: int) -> pd.DataFrame:
        ranks = ThreadRanks(rank, 2, meeting=meeting)
        task = CounterfactualTask.open(cells, run, config, {"cell_type": None}, ranks=ranks)
        return expected_changes(task, target=tmp_path / "out", ranks=ranks)

    with ThreadPoolExecutor(2) as pool:
        found = next(iter(pool.map(table_of, range(2))))
    expected = counterfactual(cells, run, set={"tissue": "spleen"}, groupby="donor", **QUICK)
    pd.testing.assert_frame_equal(found, expected, atol=1e-4, rtol=1e-3)


# -- which cells --------------------------------------------------------------------------------------------------


def test_cells_that_have_the_label_or_none_are_not_changed(run: Run, cells: ad.AnnData) -> None:
    cells.obs["tissue"] = ["spleen"] * 10 + ["unknown"] * 5 + ["blood"] * 25
    table = counterfactual(cells, run, set={"tissue": "spleen"}, **QUICK)
    assert set(table["n_cells"]) == {25}
    alone = counterfactual(cells[15:].copy(), run, set={"tissue": "spleen"}, num_null=0, num_passes=1, force=True)
    assert set(alone["n_cells"]) == {25} and alone["observed"].isna().all()


def test_the_observed_difference_is_between_cells_that_have_the_label_and_cells_that_are_changed(
    run: Run, cells: ad.AnnData
) -> None:
    table = counterfactual(cells, run, set={"tissue": "spleen"}, num_null=0, force=True).set_index("gene")
    values = pd.DataFrame(
        np.select([cells.X.toarray() >= 3, cells.X.toarray() >= 1], [4.0, 2.25]), columns=cells.var_names
    )
    has_genes = (values > 0).any(axis=1).to_numpy()  # the others are left out
    assert 0 < (~has_genes).sum() < 20
    means = values[has_genes].groupby(cells.obs["tissue"].to_numpy()[has_genes]).mean()
    np.testing.assert_allclose(table["observed"], (means.loc["spleen"] - means.loc["blood"])[table.index], atol=1e-9)


def test_the_null_is_computed_on_so_many_cells_of_each_group(run: Run, cells: ad.AnnData) -> None:
    dataset = open_cells(cells, run, {"tissue": None})
    chosen = choose_cells(dataset, Contrast("tissue", SPLEEN), groupby="donor", null_cells=3)
    for group in range(2):
        assert chosen.is_null_n[chosen.group_n == group].sum() == 3
    assert not (chosen.is_null_n & ~chosen.is_changed_n).any()


def test_other_phenotypes_stay_as_they_are_unless_nothing_is_given(run: Run, cells: ad.AnnData) -> None:
    changed = cells.copy()
    changed.obs["cell_type"] = "B cell"
    options = {**QUICK, "set": {"tissue": "spleen"}}
    own, other = (
        counterfactual(some, run, **options).set_index("gene")["change"].sort_index() for some in (cells, changed)
    )
    assert not np.allclose(own, other)
    free = [counterfactual(some, run, given={}, **options) for some in (cells, changed)]
    pd.testing.assert_frame_equal(*free)


# -- statistics ---------------------------------------------------------------------------------------------------


def test_strata_weigh_as_their_cells_do_and_too_small_a_share_gives_no_change() -> None:
    share = np.array([[[0.25, 0.25, 0.6, 0.4]], [[0.75, 0.75, 0.4, 0.6]]])
    counts = np.array([[[2, 2, 1, 1]], [[3, 0, 0, 0]]])
    sums = np.array([[[4.0, 4.0, 7.0, 7.0]], [[3.0, 0, 0, 0]]])
    np.testing.assert_allclose(weigh_strata(sums, counts, share)[0], [0.25 * 2 + 0.75, np.nan, 7.0, np.nan])


def test_groups_are_pooled_by_their_cells_and_those_without_a_value_drop_out() -> None:
    values = np.array([[1.0, np.nan, np.nan], [5.0, 2.0, np.nan]])
    np.testing.assert_allclose(pool_groups(values, np.array([3, 1])), [2.0, 2.0, np.nan])


def test_a_change_is_tested_as_one_more_draw_of_the_null() -> None:
    null = np.array([[1.0, 0], [2.0, 0], [3.0, 0]])
    found = against_null(np.array([6.0, 1.0]), null, np.zeros(2), np.full(2, 9))
    t = 4.0 / np.sqrt(4 / 3)
    assert found["t"][0] == pytest.approx(t) and found["p_value"][0] == pytest.approx(2 * stats.t.sf(t, 2))
    assert np.isnan(found["t"][1]) and np.isnan(found["q_value"][1])


def test_p_values_are_uniform_where_the_change_means_no_more_than_the_null() -> None:
    rng = np.random.default_rng(0)
    known = np.zeros(4000), np.full(4000, 9)
    found = against_null(rng.normal(1, 2, 4000), rng.normal(1, 2, (8, 4000)), *known)
    assert stats.kstest(found["p_value"], "uniform").pvalue > 0.01 and (found["q_value"] < 0.05).sum() == 0


def test_p_values_are_uniform_where_the_change_is_noise_of_the_masks() -> None:
    """Meaningless changes come from the same masks, so they do not tell how another draw of masks would come out."""
    rng = np.random.default_rng(0)
    sample = rng.normal(0, 3, (12, 4000))
    error = sample.std(axis=0, ddof=1) / np.sqrt(12)
    null = rng.normal(0, 0.1, (8, 4000))
    found = against_null(sample.mean(axis=0), null, error, np.full(4000, 12))
    assert stats.kstest(found["p_value"], "uniform").statistic < 0.04 and (found["q_value"] < 0.05).sum() == 0
    unknown = against_null(sample.mean(axis=0), null, np.zeros(4000), np.full(4000, 12))
    assert (unknown["q_value"] < 0.05).mean() > 0.5


def test_the_standard_error_is_that_of_a_stratified_mean() -> None:
    rng = np.random.default_rng(0)
    sums = Sums.zeros(num_groups=1, num_genes=1, num_null=0)
    strata = [rng.normal(1, 2, 40), rng.normal(3, 1, 10)]
    for stratum, values in enumerate(strata):
        sums.add_changes(np.stack([values, values], axis=1), np.full(len(values), stratum))
    share = np.array([0.25, 0.75]).reshape(2, 1, 1)
    expected = sum((weight * stats.sem(values)) ** 2 for weight, values in zip((0.25, 0.75), strata, strict=True))
    assert squared_errors(sums, share).item() == pytest.approx(expected)


def test_names_do_for_what_is_given_and_none_is_taken_for_a_part_of_another(run: Run, cells: ad.AnnData) -> None:
    options = {**QUICK, "set": {"tissue": "spleen"}}
    expected = counterfactual(cells, run, given={"cell_type": None}, **options)
    for given in (["cell_type"], "cell_type"):
        pd.testing.assert_frame_equal(counterfactual(cells, run, given=given, **options), expected)
    with pytest.raises(InputError, match="tissue_of_origin"):  # unknown, not the one that is set
        counterfactual(cells, run, given="tissue_of_origin", **options)


def test_a_group_that_is_called_all_does_not_lend_its_error_to_all_groups(run: Run, cells: ad.AnnData) -> None:
    renamed = cells.copy()
    renamed.obs["donor"] = ["all" if name == cells.obs["donor"].iloc[0] else "other" for name in cells.obs["donor"]]
    options = {**QUICK, "set": {"tissue": "spleen"}, "groupby": "donor"}
    tables = [counterfactual(some, run, **options) for some in (renamed, cells)]
    found, expected = (
        table[table["n_cells"] == table["n_cells"].max()].set_index("gene")["standard_error"] for table in tables
    )
    pd.testing.assert_series_equal(found, expected)


def test_without_a_null_there_is_no_p_value(run: Run, cells: ad.AnnData) -> None:
    table = counterfactual(cells, run, set={"tissue": "spleen"}, num_null=0, force=True)
    assert table[["t", "p_value", "q_value"]].isna().all(axis=None) and table["change"].notna().all()


# -- q only where something supports it ---------------------------------------------------------------------------


def scored(run: Run, folder: Path, *, accuracy: float | None = 0.9) -> Run:
    """The run, with a held-out score of tissue in its folder."""
    if accuracy is not None:
        save_score(folder, "tissue", accuracy=accuracy)
    return Run(run.model, run.tokenizer, str(folder))


def cells_that(run: Run, *, agree: bool) -> ad.AnnData:
    """Draw cells until their differences between tissues agree, or do not, with what the untrained run expects."""
    for seed in range(30):
        cells = some_cells(40, seed=seed)
        table = counterfactual(cells, run, set={"tissue": "spleen"}, num_null=0, num_passes=2, force=True)
        if (table.attrs["agreement"][0]["spearman"] > 0.1) == agree:
            return cells
    raise AssertionError("no such cells")


@pytest.mark.parametrize(
    ("accuracy", "agree", "others", "doubt"),
    [
        (0.9, True, True, None),
        (0.5, True, True, "the run is not better than the most frequent label (tissue of 100 held-out cells"),
        (None, True, True, "has no score of tissue on held-out cells"),
        (0.9, True, False, "no cell here has tissue=spleen, so the changes cannot be checked"),
        (0.9, False, True, "cells that have tissue=spleen contradict the changes of all"),
    ],
    ids=["supported", "not better than the majority", "no score", "no cells to compare with", "contradicted"],
)
def test_p_and_q_need_a_held_out_score_and_cells_that_agree(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, accuracy: float | None, agree: bool, others: bool,
    doubt: str | None,
) -> None:  # fmt: skip
    cells = cells_that(run, agree=agree)
    cells = cells if others else cells[(cells.obs["tissue"] != "spleen").to_numpy()].copy()
    model, options = scored(run, tmp_path, accuracy=accuracy), {**QUICK, "set": {"tissue": "spleen"}}
    table = counterfactual(cells, model, **options)
    shown = counterfactual(cells, model, show_q=True, **options)
    tested = ["p_value", "q_value"]
    assert shown[tested].notna().all(axis=None)
    if doubt is None:
        pd.testing.assert_frame_equal(table, shown)
        assert table.attrs["doubts"] == {} and "No p and q" not in caplog.text
        return
    assert table[tested].isna().all(axis=None) and list(table.columns) == list(shown.columns)
    pd.testing.assert_frame_equal(table.drop(columns=tested), shown.drop(columns=tested))
    assert doubt in table.attrs["doubts"]["all"] and doubt in shown.attrs["doubts"]["all"]
    lines = [record.getMessage() for record in caplog.records if doubt in record.getMessage()]
    assert [line.partition(":")[0] for line in lines] == [
        "No p and q",
        "Do not trust p and q, which --show_q asked for",
    ]


def test_only_the_group_that_is_contradicted_loses_its_p_and_q(run: Run, tmp_path: Path) -> None:
    cells = ad.concat([cells_that(run, agree=True), cells_that(run, agree=False)], merge="same")
    cells.obs_names_make_unique()
    cells.obs["batch"] = ["good"] * 40 + ["bad"] * 40
    table = counterfactual(cells, scored(run, tmp_path), set={"tissue": "spleen"}, groupby="batch", **QUICK)
    of_group = {row["group"]: row["spearman"] for row in table.attrs["agreement"]}
    assert of_group["good"] > 0 > of_group["bad"]
    has_q = table["q_value"].notna().groupby(table["group"]).all()
    assert has_q["good"] and not table["q_value"][table["group"] == "bad"].notna().any()
    assert "bad" in table.attrs["doubts"] and "good" not in table.attrs["doubts"]


@pytest.mark.parametrize("accuracy", [0.9, 0.4])
def test_the_command_says_first_how_the_changes_agree_with_cells_that_have_the_label(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], accuracy: float
) -> None:
    cells = cells_that(run, agree=True)
    cells.write_h5ad(tmp_path / "in.h5ad")
    path = save(run, tmp_path / "run")
    save_score(tmp_path / "run", "tissue", accuracy=accuracy)
    line = f"counterfactual {path} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad --set tissue=spleen --device cpu"
    assert main([*line.split(), "--num_passes", "2", "--num_null", "5", "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = ad.read_h5ad(tmp_path / "out.h5ad").uns["perturbgene"]["agreement"].to_dict("records")
    share = f"all {row['spearman']:.2f} over {row['num_genes']} genes"
    num_labeled = int((cells.obs["tissue"] == "spleen").sum())
    assert lines[0] == f"agreement with {num_labeled} cells that have tissue=spleen (rank correlation): {share}"
    score = f"tissue of 100 held-out cells: accuracy {accuracy:.3f}, the most frequent label alone 0.500"
    assert lines[1] == score
    facts = ad.read_h5ad(tmp_path / "out.h5ad").uns["perturbgene"]
    assert json.loads(facts["held_out"])["accuracy"] == accuracy
    is_counted = any("genes with q < 0.05" in line for line in lines)
    if accuracy > 0.5:
        assert is_counted and json.loads(facts["doubts"]) == {}
        return
    why = f"the run is not better than the most frequent label ({score})"
    assert not is_counted and lines[2] == f"No p and q: {why}. --show_q gives them anyway."
    assert json.loads(facts["doubts"]) == {"all": why}
    assert pd.read_csv(tmp_path / "out.csv")["q_value"].isna().all()


# -- combinations that were never seen ----------------------------------------------------------------------------


def trained_on(run: Run, folder: Path, cells: ad.AnnData, **more: Any) -> str:
    """Save a run that says it was trained on these cells."""
    path = save(run, folder / "run")
    cells.write_h5ad(folder / "train.h5ad")
    (folder / "vocab.json").write_text(json.dumps(LABELS))
    settings = {"train_data_paths": [f"{folder}/train.h5ad"], "vocab_path": f"{folder}/vocab.json"}
    MlmConfig(output_dir=path, bin_edges=[1.0, 3.0], **settings, **more).save(folder / "run/run.yaml")
    return path


def test_a_combination_without_a_training_cell_is_refused_unless_forced(
    run: Run, cells: ad.AnnData, tmp_path: Path
) -> None:
    trained = cells[~((cells.obs["cell_type"] == "NK cell") & (cells.obs["tissue"] == "spleen"))].copy()
    path = trained_on(run, tmp_path, trained)
    quick = {"num_passes": 1, "num_null": 0, "device": "cpu"}
    with pytest.raises(InputError, match="no training cell is 'spleen \\+ NK cell', so the model has never seen"):
        counterfactual(cells, path, set={"tissue": "spleen"}, **quick)
    others = cells[cells.obs["cell_type"] != "NK cell"].copy()
    assert len(counterfactual(others, path, set={"tissue": "spleen"}, **quick))
    assert len(counterfactual(cells, path, set={"tissue": "spleen"}, given={}, **quick))
    assert len(counterfactual(cells, path, set={"tissue": "spleen"}, force=True, **quick))


def test_training_cells_are_those_that_the_run_was_trained_on(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    """Chosen by `where`, with labels of a column by another name and others that mean "not known"."""
    trained = cells.copy()
    trained.obs = trained.obs.rename(columns={"tissue": "organ"})
    trained.obs["organ"] = trained.obs["organ"].replace("blood", "peripheral")
    settings = {"where": ["donor=D0"], "phenotypes": ["tissue=organ"], "missing_labels": ["NK cell"]}
    trained.obs["donor"] = ["D0" if tissue == "spleen" else "D1" for tissue in cells.obs["tissue"]]
    path = trained_on(run, tmp_path, trained, **settings)
    found = counterfactuals.training_combinations(pg.load_run(path), ["tissue", "cell_type"])
    assert set(found[:, 0]) == {SPLEEN} and -1 in found[:, 1]
    quick = {"num_passes": 1, "num_null": 0, "device": "cpu", "given": {}}
    assert len(counterfactual(cells, path, set={"tissue": "spleen"}, **quick))
    with pytest.raises(InputError, match="no training cell is 'blood'"):
        counterfactual(cells, path, set={"tissue": "blood"}, **quick)


def test_columns_by_another_name_are_read(run: Run, cells: ad.AnnData) -> None:
    renamed = cells.copy()
    renamed.obs = renamed.obs.rename(columns={"tissue": "organ", "cell_type": "type"})
    options = {**QUICK, "set": {"tissue": "spleen"}}
    columns = {"tissue": "organ", "cell_type": "type"}
    found = counterfactual(renamed, run, phenotypes=["tissue=organ", "cell_type=type"], **options)
    pd.testing.assert_frame_equal(found, counterfactual(cells, run, **options))
    pd.testing.assert_frame_equal(found, pg.counterfactual(renamed, run, phenotypes=columns, **options))


def test_a_run_that_does_not_say_what_it_was_trained_on_needs_force(
    run: Run, cells: ad.AnnData, tmp_path: Path
) -> None:
    path = trained_on(run, tmp_path, cells)
    (tmp_path / "train.h5ad").unlink()
    for model in (path, run):
        with pytest.raises(InputError, match="does not say which cells it was trained on.*pass --force"):
            counterfactual(cells, model, set={"tissue": "spleen"})


def test_a_missing_label_agrees_with_any_training_cell() -> None:
    trained = np.array([[7, 4], [8, 5]])
    asked = np.array([[7, -1], [8, 4], [8, 5], [8, 4], [-1, 6]])
    np.testing.assert_array_equal(unseen_combinations(asked, trained), [[-1, 6], [8, 4]])


# -- refusals and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"set": {"age": "old"}}, "phenotype 'age' is not in the vocabulary"),
        ({"set": {"tissue": "splen"}}, "tissue=splen is not in the run's vocabulary. Did you mean 'spleen'"),
        ({"set": {}}, "one phenotype is changed at a time, but none are set"),
        ({"set": {"tissue": "spleen"}, "given": {"tissue": None}}, "'tissue' is set, so it cannot be given too"),
        ({"set": {"tissue": "spleen"}, "groupby": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_set_is_refused(run: Run, cells: ad.AnnData, question: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        counterfactual(cells, run, force=True, **question)


def test_cells_that_all_have_the_label_leave_nothing_to_change(run: Run, cells: ad.AnnData) -> None:
    cells.obs["tissue"] = "spleen"
    with pytest.raises(InputError, match="no cell has another known tissue"):
        counterfactual(cells, run, set={"tissue": "spleen"}, force=True)


def test_a_classifier_predicts_no_genes(cells: ad.AnnData) -> None:
    with pytest.raises(InputError, match="is a classifier, which cannot be asked for genes. Give an mlm run"):
        counterfactual(cells, a_run("cls"), set={"tissue": "spleen"})


def test_the_verb_is_a_function_of_the_package_though_its_module_was_imported() -> None:
    assert pg.counterfactual.__wrapped__ is counterfactuals.counterfactual


def test_the_command_writes_the_table_as_h5ad_csv_and_figure(run: Run, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    path = trained_on(run, tmp_path, cells)
    line = f"counterfactual {path} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad --set tissue=spleen --device cpu"
    flags = "--groupby donor --num_passes 2 --num_null 5 --given nothing"
    assert main([*line.split(), *flags.split()]) == 0
    expected = counterfactual(cells, run, set={"tissue": "spleen"}, groupby="donor", given={}, **QUICK)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv"), expected, atol=1e-4, rtol=1e-3)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(written.obs["change"], expected["change"], atol=1e-6)
    facts = written.uns["perturbgene"]
    assert (facts["set"], facts["groupby"], facts["run"]) == ("tissue=spleen", "donor", path)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_run_killed_among_its_files_leaves_no_main_file_and_is_finished_by_the_same_command(
    run: Run, cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    paths = [save(run, tmp_path / "run"), str(tmp_path / "in.h5ad"), "--output", str(tmp_path / "out/out.h5ad")]
    options = "--set tissue=spleen --num_passes 1 --num_null 0 --force --device cpu"
    command = ["counterfactual", *paths, *options.split()]
    replace = os.replace

    def fail_at_the_main_file(source: Any, target: Any) -> None:
        if str(target).endswith("out/out.h5ad"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_the_main_file)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up after a kill
        assert main(command) == 130
    assert (tmp_path / "out/out.csv").exists() and not (tmp_path / "out/out.h5ad").exists()
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["out.csv", "out.h5ad", "out.png"]


NONSENSE = {
    "--set tissue": "it must read NAME=LABEL",
    "--set tissue=spleen --given tissue": "set and given both have 'tissue'",
    "--set tissue=spleen --num_null 3": "num_null is 3, too few",
    "--set tissue=nowhere": "tissue=nowhere",
    "--set tissue=spleen": "does not say which cells it was trained on",
    "--num_passes 2": "set is missing",
    "--set tissue=spleen --output changes.csv": "but it must end in .h5ad",
}


@pytest.mark.parametrize("line", re.findall(r"^perturbgene (.*)$", DOCS.read_text(encoding="utf-8"), flags=re.M))
def test_every_command_of_the_manual_is_understood(line: str) -> None:
    assert parse_args(line.split()).verb in ("embed", "counterfactual")


@pytest.mark.parametrize("flags", NONSENSE)
def test_nonsense_ends_with_code_2_and_leaves_nothing(
    flags: str, run: Run, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    line = f"counterfactual {save(run, tmp_path / 'run')} {tmp_path}/in.h5ad --output {tmp_path}/out.h5ad {flags}"
    assert main([*line.split(), "--device", "cpu"]) == 2
    assert NONSENSE[flags] in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "run"]


def test_the_figure_shows_the_largest_changes_of_each_group() -> None:
    genes = [f"g{at}" for at in range(50)]
    facts = {"null_mean": 0.0, "null_sd": 0.1, "q_value": 0.5, "observed": 0.2}
    part = pd.DataFrame({"symbol": genes, "change": np.linspace(-1, 1, 50), **facts})
    figure = changes_figure(pd.concat([part.assign(group=g) for g in "ab"]), title="set", value="change")
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(figure.axes) == 2 and names == genes[:MOST_CHANGES] + genes[-MOST_CHANGES:]
