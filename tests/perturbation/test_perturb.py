"""`perturb` end to end: files in, table out; screened next to exact, donors as units, interrupted and resumed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbgene.configs import parse_args
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.files import claimed
from perturbgene.inference.run import Run
from perturbgene.main import main
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM
from perturbgene.perturbation import cells as cells_module
from perturbgene.perturbation.cells import GroupedCells, PartStore, sum_effects
from perturbgene.perturbation.perturb import perturb
from perturbgene.perturbation.readouts import StateReadout
from perturbgene.training.train import tokenizer_facts
from tests.nine_genes import a_tokenizer
from tests.untrained import save_score

GENES = [f"G{i}" for i in range(40)]
TOKENIZER = a_tokenizer(genes=GENES, max_length=64)
TOWARDS = "cell_type=B cell"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run that tells cell types on held-out cells, as its folder says."""
    path = tmp_path_factory.mktemp("scored")
    save_score(path, "cell_type", accuracy=0.9)
    torch.manual_seed(0)
    config = GeneBertConfig(
        **tokenizer_facts(TOKENIZER), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        norm_position="branch", initializer_range=0.2, embedding_range=0.5,
    )  # fmt: skip
    return Run(GeneBertForPhenotypicMLM(config).eval(), TOKENIZER, str(path))


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """60 cells of 3 donors and 2 tissues; gene i is expressed in about 20 + 2 i percent, G0 in none."""
    random = np.random.default_rng(0)
    values = random.integers(1, 5, (60, 40)) * (random.random((60, 40)) < 0.2 + np.arange(40) / 50)
    values[:, 0] = 0
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(60)])
    obs["donor_id"] = pd.Categorical([f"d{i % 3}" for i in range(60)])
    obs["tissue"] = ["blood" if i < 40 else "spleen" for i in range(60)]
    return ad.AnnData(sparse.csr_matrix(values.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def folder(run: Run, cells: ad.AnnData, tmp_path_factory) -> Path:
    """A run folder `run` and a file `cells.h5ad`."""
    folder = tmp_path_factory.mktemp("perturb")
    run.model.save_pretrained(folder / "run")
    TOKENIZER.save_pretrained(folder / "run")
    save_score(folder / "run", "cell_type", accuracy=0.9)
    cells.write_h5ad(folder / "cells.h5ad")
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "perturb", f"{folder}/run", f"{folder}/cells.h5ad", "--output", str(output), "--genes", "all", "--towards",
        TOWARDS, "--top_k", "4", "--num_controls", "12", "--device", "cpu", *more,
    ]  # fmt: skip


def test_all_genes_are_screened_and_the_strongest_and_controls_are_exact(run, cells):
    table = perturb(cells, run, towards=TOWARDS, top_k=4, num_controls=12, min_cells=1)
    exact = perturb(cells, run, towards=TOWARDS, exact=True, min_cells=1)
    assert set(table["perturbation"]) == set(GENES[1:])  # nobody expresses G0
    assert 12 <= (table["method"] == "exact").sum() <= 16
    merged = table.merge(exact, on="perturbation", suffixes=("", "_all_exact"))
    is_exact = merged["method"] == "exact"
    np.testing.assert_allclose(merged["effect"][is_exact], merged["effect_all_exact"][is_exact], atol=1e-6)
    np.testing.assert_array_equal(merged["effect"][~is_exact], merged["screened_effect"][~is_exact])
    strongest = merged["screened_effect"].abs().nlargest(4).index
    assert is_exact[strongest].all()
    assert table.attrs["screen"]["num_genes"] == 12
    scale = table.attrs["screen"]["scale"]  # by which estimates are ranked among exact effects
    strength = table["effect"].abs() * np.where(table["method"] == "screened", scale, 1.0)
    assert strength.is_monotonic_decreasing and scale == pytest.approx(1.0, abs=0.2)


def test_exact_effects_are_tested_on_the_scale_of_the_screen(run, cells):
    """Random genes have the same p-values whether they are screened or computed exactly, which gives larger numbers."""
    options = {"embedding": "mean", "min_cells": 1, "top_k": 0}
    screened, exact = (
        perturb(cells, run, num_controls=count, **options).set_index("perturbation") for count in (3, 40)
    )
    assert exact.attrs["screen"]["scale"] > 1.1
    rows = screened.index[screened["method"] == "screened"]
    assert (exact.loc[rows, "method"] == "exact").all() and len(rows) == 36
    assert (exact.loc[rows, "effect"] / screened.loc[rows, "effect"]).median() > 1.1
    assert (exact.loc[rows, "p_value"] - screened.loc[rows, "p_value"]).abs().median() < 0.05
    assert (exact["p_value"] < 0.05).mean() < 0.1
    ratio = exact.loc[rows, "null_mean"] / screened.loc[rows, "null_mean"]
    np.testing.assert_allclose(ratio, exact.attrs["screen"]["scale"], rtol=1e-6)


def test_without_controls_exact_effects_beside_a_screen_have_no_p_value(run, cells, caplog):
    table = perturb(cells, run, towards=TOWARDS, top_k=4, num_controls=0, min_cells=1)
    assert table.loc[table["method"] == "exact", "p_value"].isna().all()
    assert table.loc[table["method"] == "screened", "p_value"].notna().all()
    assert "exact effects have no p-values" in caplog.text and "Raise --num_controls" in caplog.text


def test_effects_are_means_over_cells_then_donors(run, cells):
    """Of one gene, by hand: each donor's own table, averaged."""
    together = perturb(cells, run, genes="G30", towards=TOWARDS)
    own = [
        perturb(cells[cells.obs["donor_id"] == name].copy(), run, genes="G30", towards=TOWARDS)
        for name in ("d0", "d1", "d2")
    ]
    effects = [table["effect"][0] for table in own]
    assert together["effect"][0] == pytest.approx(np.mean(effects), abs=1e-6)
    assert together["num_donors"][0] == 3
    assert together["num_cells"][0] == sum(table["num_cells"][0] for table in own)
    assert together["ci_low"][0] < together["effect"][0] < together["ci_high"][0]


def test_named_genes_are_tested_against_the_screen_of_all(run, cells):
    table = perturb(cells, run, genes=["G30", "G31+G32"], towards=TOWARDS).set_index("perturbation")
    assert set(table.index) == {"G30", "G31+G32"}
    assert table["method"].tolist() == ["exact", "exact"]
    assert 0 < table["p_value"]["G30"] <= table["q_value"]["G30"] <= 1
    assert np.isnan(table["p_value"]["G31+G32"])  # single genes are no null for a pair


def test_a_pair_alone_and_a_gene_of_no_cell_have_rows_without_a_p_value(run, cells):
    table = perturb(cells, run, genes=["G38+G39"], towards=TOWARDS)
    assert table["num_donors"].tolist() == [3] and np.isfinite(table["effect"]).all() and table["p_value"].isna().all()
    table = perturb(cells, run, genes=["G0"], towards=TOWARDS)
    assert table[["perturbation", "effect", "num_cells"]].values.tolist() == [["G0", 0.0, 0]]
    table = perturb(cells, run, genes=["G0", "G39"], towards=TOWARDS, groupby="tissue").set_index("perturbation")
    assert table.loc["G0", "effect"].tolist() == [0.0, 0.0] and (table.loc["G39", "effect"] != 0).all()


def test_a_donor_counts_with_enough_changed_cells_and_few_cells_are_told(run, cells, caplog):
    obs = cells.obs.assign(donor_id=pd.Categorical(["a"] * 30 + ["b"] * 27 + ["c"] * 3))
    some = ad.AnnData(cells.X, obs=obs, var=cells.var)
    assert perturb(some, run, genes=["G39"], towards=TOWARDS)["num_donors"].tolist() == [2]
    assert perturb(some, run, genes=["G39"], towards=TOWARDS, min_cells=1)["num_donors"].tolist() == [3]
    lonely = perturb(some, run, genes=["G39"], towards=TOWARDS, min_cells=31)
    assert lonely["num_donors"].tolist() == [0] and "no donor has 31 cells in which a gene changes" in caplog.text


def test_a_single_donor_with_few_cells_counts_when_all_of_them_change(run, cells):
    alone = ad.AnnData(cells.X, obs=cells.obs.assign(donor_id="a"), var=cells.var)
    is_changed_n = cells.X[:, 39].toarray().ravel() > 0
    some = perturb(alone, run, genes=["G39"], towards=TOWARDS, min_cells=60)
    assert some["num_donors"].tolist() == [0] and some["num_cells"].tolist() == [is_changed_n.sum()]
    few = perturb(alone[np.flatnonzero(is_changed_n)[:3]].copy(), run, genes=["G39"], towards=TOWARDS)
    assert few["num_donors"].tolist() == [1] and np.isfinite(few["effect"]).all()


def test_without_donors_there_is_an_effect_and_no_p_value(run, cells, folder, tmp_path, capsys):
    alone = cells.copy()
    del alone.obs["donor_id"]
    table = perturb(alone, run, genes=["G30"], towards=TOWARDS)
    assert np.isfinite(table["effect"][0])
    assert table[["p_value", "ci_low"]].isna().all(axis=None)
    alone.write_h5ad(tmp_path / "cells.h5ad")
    assert (
        main(
            [
                *command(folder, tmp_path / "out.csv")[:2],
                f"{tmp_path}/cells.h5ad",
                "--output",
                f"{tmp_path}/out.csv",
                "--genes",
                "G30",
            ]
        )
        == 0
    )
    assert "No p-values: they need two donors or more" in capsys.readouterr().out


def test_over_expression_is_exact_and_has_random_genes_for_a_null(run, cells):
    table = perturb(cells, run, genes=["G0", "G5"], kind="over_express", towards=TOWARDS, num_controls=20)
    assert table.set_index("perturbation")["num_cells"]["G0"] == 60  # it comes into every cell
    assert set(table["perturbation"]) == {"G0", "G5"}
    assert table["p_value"].notna().all()


def test_groups_get_effects_of_their_own(run, cells):
    both = perturb(cells, run, genes=["G30"], towards=TOWARDS, groupby="tissue").set_index("group")
    spleen = perturb(cells[40:].copy(), run, genes=["G30"], towards=TOWARDS)
    assert set(both.index) == {"blood", "spleen"}
    assert both["effect"]["spleen"] == pytest.approx(spleen["effect"][0], abs=1e-6)


def test_names_do_for_what_is_given(run, cells):
    options = {"genes": ["G39"], "towards": TOWARDS}
    expected = perturb(cells, run, given={"tissue": None}, **options)
    pd.testing.assert_frame_equal(perturb(cells, run, given=["tissue"], **options), expected)


def test_given_phenotypes_stand_in_the_sequence(run, cells):
    plain, given, read = (
        perturb(cells, run, genes=["G30"], towards=TOWARDS, given=given)["effect"][0]
        for given in (None, {"tissue": "blood"}, {"tissue": None})
    )
    assert len({round(float(value), 6) for value in (plain, given, read)}) == 3


def test_the_state_moves_by_a_distance(run, cells):
    for embedding in ("cls", "mean"):
        table = perturb(cells, run, embedding=embedding, top_k=4, num_controls=12, min_cells=1)
        assert (table["effect"] > 0).all()


@pytest.mark.usefixtures("drawn_figures")
def test_the_verb_writes_table_picture_and_origin(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out.csv")) == 0
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == 39
    assert (tmp_path / "out.png").stat().st_size > 10_000
    origin = json.loads((tmp_path / "out.json").read_text())
    assert origin["towards"] == TOWARDS and origin["gene_coverage"] == 1.0
    assert origin["screen"]["num_genes"] == 12
    assert "rank correlation" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.png"]


def test_a_screen_that_cannot_be_checked_is_reported_and_has_no_numbers_in_the_record(folder, tmp_path, capsys):
    assert main([*command(folder, tmp_path / "out.csv"), "--num_controls", "1"]) == 0
    assert "The screen was not checked: effects of 1 random genes have no ranks." in capsys.readouterr().out
    screen = json.loads((tmp_path / "out.json").read_text())["screen"]
    assert screen == {"spearman": None, "recall": None, "scale": None, "num_genes": 1}


def test_a_parquet_table_reads_back_as_the_csv(folder, tmp_path):
    pytest.importorskip("pyarrow")
    for suffix in ("csv", "parquet"):
        assert main(command(folder, tmp_path / f"{suffix}.{suffix}")) == 0
    whole = pd.read_parquet(tmp_path / "parquet.parquet")
    pd.testing.assert_frame_equal(whole, pd.read_csv(tmp_path / "csv.csv"), rtol=1e-12)


def test_effects_are_summed_by_donor_and_group_and_missing_ones_do_not_count(run, cells, monkeypatch):
    monkeypatch.setattr(cells_module, "PART_CELLS", 7)
    opened = GroupedCells.open(cells, run, StateReadout(), given={}, groupby="tissue", batch_size=3)

    def effects_of(block: TokenBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The effect of perturbation 1 is a cell's number, missing in every fourth cell."""
        return np.arange(len(block)), np.ones(len(block), int), np.where(block.cells_n % 4, block.cells_n, np.nan)

    sums_uq2 = sum_effects("numbers", effects_of, opened, 2)
    assert opened.units_u2.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    numbers = pd.Series(np.where(np.arange(60) % 4, np.arange(60), np.nan))
    expected = numbers.groupby([np.arange(60) % 3, np.arange(60) >= 40]).agg(["count", "sum"])
    np.testing.assert_array_equal(sums_uq2[:, 1], expected)
    assert not sums_uq2[:, 0].any()


def test_an_interrupted_run_goes_on_to_the_same_table(folder, tmp_path, caplog, monkeypatch):
    """Ctrl-C comes when the fifth part has been written; a part that was damaged since is made again."""
    monkeypatch.setattr(cells_module, "PART_CELLS", 6)
    more = ("--batch_size", "3")
    assert main(command(folder, tmp_path / "whole.csv", *more)) == 0
    save, written = PartStore.save, []

    def save_and_interrupt(*arguments: Any) -> None:
        save(*arguments)
        written.append(arguments)
        if len(written) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "save", save_and_interrupt)
        code = main(command(folder, tmp_path / "out.csv", *more))
    assert code == 130
    assert not (tmp_path / "out.csv").exists()
    assert len(list(tmp_path.glob(".out.csv.*.parts/screened.*.npz"))) == 5
    damaged = next(iter(sorted(tmp_path.glob(".out.csv.*.parts/screened.*.npz"))))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with caplog.at_level("INFO", logger="perturbgene"):
        assert main(command(folder, tmp_path / "out.csv", *more)) == 0
    assert "screened: 4 of 10 parts were finished before" in caplog.text
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob(".out.csv.*"))


def test_a_run_killed_among_its_files_leaves_no_table_and_is_finished_by_the_same_command(
    folder, tmp_path, monkeypatch
):
    replace = os.replace

    def fail_at_the_table(source: Any, target: Any) -> None:
        if str(target).endswith("/out.csv"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_the_table)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up after a kill
        assert main(command(folder, tmp_path / "out.csv")) == 130
    assert (tmp_path / "out.json").exists() and not (tmp_path / "out.csv").exists()
    assert main(command(folder, tmp_path / "out.csv")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.png"]


def test_a_file_of_the_user_next_to_the_table_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "out.json").write_text("mine")
    assert main(command(folder, tmp_path / "out.csv")) == 2
    assert "out.json exists. Choose another --output, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "mine"


def test_a_second_process_with_the_same_output_is_refused(folder, tmp_path, capsys):
    with claimed(tmp_path / "out.csv", flag="output"):
        assert main(command(folder, tmp_path / "out.csv")) == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["perturb", "attribute"])
def test_the_number_of_tokens_at_once_suits_the_device_unless_it_is_given(verb):
    line = f"{verb} run cells.h5ad --output out.csv --{'ask' if verb == 'attribute' else 'genes'} x"
    assert parse_args(line.split()).batch_tokens is None
    assert parse_args([*line.split(), "--batch_tokens", "99"]).batch_tokens == 99


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--from", "cell_type=T cell", "--towards", "tissue=blood"], "are not two labels of one phenotype"),
        (["--kind", "set_bin"], "kind is set_bin and bin is None, but set_bin needs a bin"),
        (["--donor", "donor"], "no obs column 'donor'. Did you mean 'donor_id'"),
        (["--given", "cell_type=B cell"], "'cell_type' is given and asked at once"),
        (["--given", "tissue=brain"], "tissue=brain is not in the run's vocabulary"),
        (["--output", "out.txt"], "but it must end in .csv or .parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(folder, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path / "out.csv", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_label_to_leave_needs_one_to_go_to(run, cells):
    with pytest.raises(InputError, match="Give --towards as well"):
        perturb(cells, run, genes="G1", from_="cell_type=B cell")


@pytest.mark.parametrize("accuracy", [None, 0.3, 0.5])
def test_a_run_that_does_not_beat_the_most_frequent_label_gives_no_p_and_q(run, cells, tmp_path, caplog, accuracy):
    doubtful = Run(run.model, run.tokenizer, str(tmp_path))
    reason = f"{tmp_path} has no score of cell_type on held-out cells"
    if accuracy is not None:
        save_score(tmp_path, "cell_type", accuracy=accuracy)
        reason = "the run is not better than the most frequent label"
    options = {"genes": ["G30", "G31"], "towards": TOWARDS, "num_controls": 12}
    believed = perturb(cells, run, **options)
    table = perturb(cells, doubtful, **options)
    assert table[["p_value", "q_value"]].isna().all(axis=None) and believed["q_value"].notna().all()
    assert reason in caplog.text and reason in table.attrs["doubt"] and believed.attrs["doubt"] is None
    pd.testing.assert_frame_equal(
        table.drop(columns=["p_value", "q_value"]), believed[table.columns.drop(["p_value", "q_value"])]
    )
    pd.testing.assert_frame_equal(perturb(cells, doubtful, show_q=True, **options), believed)
    state = perturb(cells, doubtful, genes=["G30"], num_controls=12)  # no label is read
    assert state["q_value"].notna().all() and state.attrs["doubt"] is None


def test_the_command_says_the_held_out_score_first_and_why_there_is_no_q(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run")
    save_score(tmp_path / "run", "cell_type", accuracy=0.4)
    (tmp_path / "cells.h5ad").symlink_to(folder / "cells.h5ad")
    assert main(command(tmp_path, tmp_path / "out.csv")) == 0
    lines = capsys.readouterr().out.splitlines()
    score = "cell_type of 100 held-out cells: accuracy 0.400, the most frequent label alone 0.500"
    assert lines[0] == score
    why = f"No p and q: the run is not better than the most frequent label ({score}). --show_q gives them anyway."
    assert why in lines and not any("q_value" in line for line in lines)
    assert pd.read_csv(tmp_path / "out.csv")["q_value"].isna().all()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["held_out"]["majority"] == 0.5 and score in record["doubt"]
    assert main(command(tmp_path, tmp_path / "shown.csv", "--show_q")) == 0
    output = capsys.readouterr().out
    assert "Do not trust p and q, which --show_q asked for" in output and "q_value" in output
    assert pd.read_csv(tmp_path / "shown.csv")["q_value"].notna().any()


def labeled(cells: ad.AnnData) -> ad.AnnData:
    """20 B cells, 30 T cells and 10 without a label."""
    return ad.AnnData(
        cells.X, obs=cells.obs.assign(cell_type=["B cell"] * 20 + ["T cell"] * 30 + [None] * 10), var=cells.var
    )


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({}, "20 of 60 cells have cell_type=B cell, the label of --towards, already, but all of them are perturbed"),
        ({}, 'e.g. --where cell_type="T cell"'),
        (
            {"from_": "cell_type=T cell"},
            "only 30 of 60 cells have cell_type=T cell, the label of --from, but all of them",
        ),
        (
            {"from_": "cell_type=T cell"},
            'not in which cells. Choose cells with --where, e.g. --where cell_type="T cell"',
        ),
        ({"from_": "cell_type=T cell", "where": {"cell_type": ["B cell", "T cell"]}}, "only 30 of 50 cells have"),
        ({"from_": "cell_type=T cell", "where": {"cell_type": "T cell"}}, None),
        ({"where": {"cell_type": "T cell"}}, None),
        ({"where": {"cell_type": "B cell"}}, None),
        ({"towards": "tissue=blood"}, "40 of 60 cells have tissue=blood, the label of --towards, already"),
        ({"towards": None}, None),
    ],
)
def test_a_line_says_that_towards_and_from_choose_no_cells(run, cells, options, warning, caplog):
    perturb(labeled(cells), run, genes="G30", min_cells=1, num_controls=3, **{"towards": TOWARDS, **options})
    lines = [record.getMessage() for record in caplog.records if "perturbed" in record.getMessage()]
    assert len(lines) == (warning is not None) and (warning is None or warning in lines[0])


def test_cells_that_where_leaves_out_are_not_perturbed(run, cells, folder, tmp_path, capsys):
    """Controls do not count, neither in the effect nor in the screen nor in its check on random genes."""
    both = labeled(cells)
    options = {
        "genes": ["G30", "G31"],
        "towards": TOWARDS,
        "from_": "cell_type=T cell",
        "min_cells": 1,
        "num_controls": 5,
    }
    found = perturb(both, run, where={"cell_type": "T cell"}, **options)
    alone = perturb(both[20:50].copy(), run, **options)
    pd.testing.assert_frame_equal(found, alone)
    assert found.attrs == alone.attrs and (perturb(both, run, **options)["effect"] != found["effect"]).all()
    both.write_h5ad(tmp_path / "cells.h5ad")
    line = command(folder, tmp_path / "out.csv", "--where", "cell_type=T cell", "donor_id=d0", "donor_id=d1")
    line[2] = f"{tmp_path}/cells.h5ad"
    assert main(line) == 0
    assert "20 cells, 2 donors" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["where"] == [
        "cell_type=T cell",
        "donor_id=d0",
        "donor_id=d1",
    ]
