"""Trained runs on real cells: what predict writes, what evaluate counts, and which folders and files are refused."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from perturbgene.cli.verbs import AnswerOptions
from perturbgene.data_utils.data_collators import block_of
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.embedding.cells import embed
from perturbgene.errors import InputError
from perturbgene.eval_utils import Confusion, Question, question_logits, true_labels
from perturbgene.files import SUMS_FILE
from perturbgene.inference import baselines as baselines_module
from perturbgene.inference.baselines import baselines
from perturbgene.inference.classifiers import logistic_regression, majority_class
from perturbgene.inference.evaluate import evaluate
from perturbgene.inference.predict import Predictor, predict, predict_table
from perturbgene.inference.run import Run, choose_device, load_run
from perturbgene.main import main
from perturbgene.model import GeneBertConfig, GeneBertForClassification, load_preset
from perturbgene.perturbation.readouts import label_readout
from perturbgene.training.train import tokenizer_facts
from tests.forked import in_two_processes, needs_fork

STEPS = "--model_arch tiny --num_hidden_layers 1 --no_bf16 --report_to none --eval_strategy no --save_strategy no"
COLUMN, PROBABILITY = "predicted_cell_type", "predicted_cell_type_probability"
ENTROPY = "predicted_cell_type_entropy"


@dataclass(frozen=True)
class Trained:
    """A corpus of 700 PBMC cells and runs that were trained on it for a few steps."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        """Return the path of a run (`mlm`, `cls`, `binary`) or of the `corpus`."""
        return str(self.folder / name)

    @property
    def eval_shard(self) -> str:
        return str(self.folder / "corpus/eval/shard_00000.h5ad")

    @property
    def train_shard(self) -> str:
        return str(self.folder / "corpus/train/shard_00000.h5ad")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Prepare the corpus and train an mlm run, a classifier and a one-against-rest classifier."""
    import scanpy

    folder = tmp_path_factory.mktemp("trained")
    scanpy.datasets.pbmc68k_reduced().write_h5ad(folder / "pbmc.h5ad")
    common = f"--corpus {folder}/corpus {STEPS} --per_device_train_batch_size 32"
    for command in (
        f"prepare {folder}/pbmc.h5ad --output {folder}/corpus --layer raw --num_top_genes 100 "
        "--phenotypes cell_type=bulk_labels phase",
        f"mlm --output_dir {folder}/mlm {common} --max_steps 40 --learning_rate 5e-3 --phenotype_mask_prob 0.8",
        f"cls --output_dir {folder}/cls {common} --max_steps 3 --phenotype_category cell_type "
        "--included_phenotypes phase",
        f"cls --output_dir {folder}/binary {common} --max_steps 3 --phenotype_category cell_type "
        "--binary_label Dendritic",
    ):
        assert main(command.split()) == 0, command
    return Trained(folder)


@pytest.fixture(scope="module")
def mlm(trained: Trained) -> Run:
    return load_run(trained.mlm, device="cpu")


@pytest.fixture(scope="module")
def cls(trained: Trained) -> Run:
    return load_run(trained.cls, device="cpu")


@pytest.fixture(scope="module")
def held_out(trained: Trained) -> ad.AnnData:
    """The 140 held-out cells, log-normalised, as `prepare` wrote them; not to be changed."""
    return ad.read_h5ad(trained.eval_shard)


@pytest.fixture(scope="module")
def expected(held_out: ad.AnnData, mlm: Run) -> pd.DataFrame:
    """What the mlm run answers about the held-out cells with nothing given."""
    return predict_table(held_out, mlm, ask=["cell_type"])


@pytest.fixture
def cells(held_out: ad.AnnData) -> ad.AnnData:
    """A copy of the first 12 held-out cells, free to change."""
    return held_out[:12].copy()


@pytest.fixture
def copied_run(trained: Trained, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a run, so that a test may damage it."""

    def copy(name: str = "mlm") -> Path:
        return Path(shutil.copytree(trained.folder / name, tmp_path / name))

    return copy


def run_on(trained: Trained, source: str, target: Path, *flags: str, run: str = "mlm") -> int:
    return main(["predict", getattr(trained, run), source, "--output", str(target), *flags])


def answer(run: Run, block: TokenBlock, question: Question) -> dict[str, np.ndarray]:
    """The probabilities of each asked phenotype's labels."""
    logits = question_logits(run.model, block, run.tokenizer, question)
    return {name: softmax(logits_nk, axis=-1) for name, logits_nk in logits.items()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake prints, after what was logged before it."""
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


# -- predict: the answer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(trained: Trained, tmp_path_factory) -> ad.AnnData:
    """The held-out cells as the command line writes them."""
    target = tmp_path_factory.mktemp("out") / "out.h5ad"
    assert run_on(trained, trained.eval_shard, target, "--ask", "cell_type") == 0
    return ad.read_h5ad(target)


def test_the_few_steps_of_the_fixture_taught_more_than_one_label(expected):
    assert expected[COLUMN].nunique() > 1


def test_a_file_gets_its_answers_in_the_order_of_its_rows(written, held_out, mlm):
    one_by_one = [predict_table(held_out[[row]], mlm, ask=["cell_type"])[COLUMN][0] for row in range(20)]
    assert written.obs[COLUMN][:20].tolist() == one_by_one


def test_a_file_gets_the_probability_of_its_answers(written, expected):
    np.testing.assert_allclose(written.obs[PROBABILITY], expected[PROBABILITY], atol=1e-6)


def test_categories_of_the_answer_are_the_labels_of_the_vocabulary(written, mlm):
    assert list(written.obs[COLUMN].cat.categories) == list(mlm.tokenizer.phenotypes["cell_type"])


def test_everything_else_in_the_file_stays_as_it_was(written, held_out):
    rest = written.copy()
    rest.obs = rest.obs.drop(columns=[name for name in rest.obs if name.startswith("predicted_")])
    del rest.uns["perturbgene"], rest.obs["perturbgene_n_genes"]
    assert rest.X.dtype == held_out.X.dtype
    assert (rest.X != held_out.X).nnz == 0
    pd.testing.assert_frame_equal(rest.obs, held_out.obs)
    pd.testing.assert_frame_equal(rest.var, held_out.var)
    assert list(rest.uns) == [key for key in held_out.uns if key != "perturbgene"]


def test_provenance_says_which_run_answered_which_question(written, trained, mlm):
    facts = written.uns["perturbgene"]
    assert (facts["run"], facts["tokenizer_fingerprint"]) == (trained.mlm, mlm.tokenizer.fingerprint)
    assert (list(facts["ask"]), json.loads(facts["given"])) == (["cell_type"], {})


def test_the_function_on_anndata_answers_like_the_command_line(written, held_out, mlm):
    pd.testing.assert_frame_equal(predict(held_out, mlm, ask=["cell_type"]).obs, written.obs)


def test_the_function_leaves_its_input_alone(cells, mlm):
    before = cells.copy()
    predict(cells, mlm)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert (cells.X != before.X).nnz == 0
    assert "perturbgene" not in cells.uns or cells.uns["perturbgene"] == before.uns["perturbgene"]


def test_the_function_takes_a_run_folder(cells, trained, mlm):
    pd.testing.assert_frame_equal(predict(cells, trained.mlm, device="cpu").obs, predict(cells, mlm).obs)


def test_the_function_takes_cells_that_lie_on_disk(trained, mlm, expected):
    backed = ad.read_h5ad(trained.eval_shard, backed="r")
    result = predict(backed, mlm, ask=["cell_type"])
    assert result.obs[COLUMN].tolist() == expected[COLUMN].tolist()


def test_nothing_asked_means_every_phenotype(cells, mlm):
    table = predict_table(cells, mlm, options=AnswerOptions(top_k=1))
    assert list(table) == [
        COLUMN, PROBABILITY, ENTROPY, "predicted_phase", "predicted_phase_probability", "predicted_phase_entropy",
        "perturbgene_n_genes",
    ]  # fmt: skip


def test_nothing_asked_means_what_is_not_given(cells, mlm):
    assert list(predict_table(cells, mlm, given={"phase": "S"}, options=AnswerOptions(top_k=1))) == [
        COLUMN, PROBABILITY, ENTROPY, "perturbgene_n_genes",
    ]  # fmt: skip


def test_the_matrix_has_the_probabilities_of_all_labels(written, mlm, held_out):
    matrix_nk = written.obsm["predicted_cell_type_probabilities"]
    labels = written.uns["perturbgene"]["predicted_cell_type_probabilities"]
    assert list(labels) == list(mlm.tokenizer.phenotypes["cell_type"]) and matrix_nk.dtype == np.float32
    np.testing.assert_allclose(matrix_nk.sum(axis=1), 1, atol=1e-5)
    assert labels[matrix_nk.argmax(axis=1)].tolist() == written.obs[COLUMN].tolist()
    np.testing.assert_array_equal(matrix_nk.max(axis=1), written.obs[PROBABILITY])
    in_memory = predict(held_out, mlm, ask=["cell_type"])
    np.testing.assert_array_equal(in_memory.obsm["predicted_cell_type_probabilities"], matrix_nk)
    assert list(in_memory.uns["perturbgene"]["predicted_cell_type_probabilities"]) == list(labels)


def test_the_matrix_of_a_classifier_has_its_classes_and_none_where_a_cell_has_no_gene(cls, cells):
    cells.X[1] = 0
    result = predict(cells, cls)
    assert result.uns["perturbgene"]["predicted_cell_type_probabilities"] == cls.class_labels
    is_missing_n = np.isnan(result.obsm["predicted_cell_type_probabilities"]).all(axis=1)
    assert is_missing_n.tolist() == [False, True, *[False] * 10]


def test_the_matrix_can_be_left_out(trained, small, tmp_path):
    assert run_on(trained, small, tmp_path / "out.h5ad", "--no_probabilities") == 0
    assert not list(ad.read_h5ad(tmp_path / "out.h5ad").obsm)


def test_cells_with_few_genes_are_counted_and_flagged(mlm, cells, caplog):
    cells.X[:3, 1:] = 0
    result = predict(cells, mlm, ask=["cell_type"])
    assert "3 of 12 cells have few genes of the run (fewer than 10)" in caplog.text
    expected = np.asarray((cells.X > 0).sum(axis=1)).ravel()
    assert result.obs["perturbgene_n_genes"].tolist() == expected.tolist()


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_a_file_without_x_is_read_and_copied_by_its_layer(verb, trained, cells, tmp_path):
    cells.write_h5ad(tmp_path / "plain.h5ad")
    cells.layers["counts"], cells.X = cells.X.copy(), None
    cells.write_h5ad(tmp_path / "in.h5ad")
    command = [verb, trained.mlm]
    assert main([*command, str(tmp_path / "plain.h5ad"), "--output", str(tmp_path / "expected.h5ad")]) == 0
    flags = ("--layer", "counts", "--output", str(tmp_path / "out.h5ad"))
    assert main([*command, str(tmp_path / "in.h5ad"), *flags]) == 0
    found, expected = (ad.read_h5ad(tmp_path / name) for name in ("out.h5ad", "expected.h5ad"))
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    assert found.X is None and list(found.obsm)
    for key in expected.obsm:
        np.testing.assert_array_equal(found.obsm[key], expected.obsm[key])


def test_a_given_label_is_read_from_the_column_that_is_named(cells, mlm):
    expected = predict_table(cells, mlm, ask=["cell_type"], given=["phase"])
    cells.obs = cells.obs.rename(columns={"phase": "Cell.Phase"})
    found = predict_table(cells, mlm, ask=["cell_type"], given=["phase"], phenotypes={"phase": "Cell.Phase"})
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(InputError, match="no obs column 'phase'.*--phenotypes phase="):
        predict_table(cells, mlm, ask=["cell_type"], given=["phase"])


def test_no_label_column_is_needed(cells, mlm, expected):
    cells.obs = cells.obs[[]]
    table = predict_table(cells, mlm, ask=["cell_type"])
    pd.testing.assert_frame_equal(table, expected[:12])


def test_probability_is_a_softmax_over_the_labels_of_that_phenotype_alone(cells, mlm, expected):
    tokenizer = mlm.tokenizer
    start, stop = tokenizer.vocabulary.id_range("cell_type")
    block = tokenizer.with_settings(included=[])(cells[[0]].copy())
    ids = torch.cat([torch.tensor([0, 2]), block["input_ids"][1:]])[None]
    types = torch.cat([torch.tensor([0, tokenizer.vocabulary.token_type("cell_type")]), block["token_type_ids"][1:]])[
        None
    ]
    with torch.no_grad():
        logits_v = mlm.model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits[0, 1]
    odds = np.exp(logits_v[start:stop].numpy().astype(np.float64))
    assert expected[PROBABILITY][0] == pytest.approx((odds / odds.sum()).max(), abs=1e-5)


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_a_batch_of_64_answers_like_one_cell_at_a_time(kind, held_out, request):
    run, sample = request.getfixturevalue(kind), held_out[:64]
    together, alone = (predict_table(sample, run, ask=["cell_type"], batch_size=size) for size in (64, 1))
    np.testing.assert_allclose(together[PROBABILITY], alone[PROBABILITY], atol=1e-5, rtol=0)


def _shuffled_columns(cells: ad.AnnData) -> ad.AnnData:
    return cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()


def _with_strangers(cells: ad.AnnData) -> ad.AnnData:
    values = sparse.hstack([np.ones((cells.n_obs, 3), dtype=np.float32), cells.X]).tocsr()
    return ad.AnnData(values, obs=cells.obs, var=pd.DataFrame(index=["x", "y", "z", *cells.var_names]))


def _dense(cells: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(cells.X.toarray(), obs=cells.obs, var=cells.var)


def _by_columns(cells: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(cells.X.tocsc(), obs=cells.obs, var=cells.var)


def _with_symbols(cells: ad.AnnData) -> ad.AnnData:
    names = [f"probe_{number}" for number in range(cells.n_vars)]
    return ad.AnnData(
        cells.X, obs=cells.obs, var=pd.DataFrame({"feature_name": cells.var_names.to_numpy()}, index=names)
    )


@pytest.mark.parametrize("change", [_shuffled_columns, _with_strangers, _dense, _by_columns, _with_symbols])
def test_the_form_of_the_matrix_does_not_change_the_answer(change, cells, mlm, expected):
    table = predict_table(change(cells), mlm, ask=["cell_type"])
    pd.testing.assert_frame_equal(table, expected[:12])


def test_permuted_rows_permute_the_answers(held_out, mlm, expected):
    order = np.random.default_rng(1).permutation(held_out.n_obs)
    table = predict_table(held_out[order], mlm, ask=["cell_type"])
    np.testing.assert_allclose(table[PROBABILITY], expected[PROBABILITY].to_numpy()[order], atol=1e-6)


def test_some_cells_get_the_answers_that_they_get_among_all(held_out, mlm, expected):
    table = predict_table(held_out[30:50], mlm, ask=["cell_type"])
    assert table[COLUMN].tolist() == expected[COLUMN][30:50].tolist()


def test_a_column_that_names_the_genes_can_be_chosen(cells, trained, tmp_path, expected):
    strange = _with_symbols(cells)
    strange.var = strange.var.rename(columns={"feature_name": "own_names"})
    strange.write_h5ad(tmp_path / "in.h5ad")
    flags = ["--ask", "cell_type", "--gene_id_column", "own_names"]
    assert run_on(trained, str(tmp_path / "in.h5ad"), tmp_path / "out.h5ad", *flags) == 0
    assert ad.read_h5ad(tmp_path / "out.h5ad").obs[COLUMN].tolist() == expected[COLUMN][:12].tolist()


def test_counts_and_their_logarithms_get_the_same_answer(mlm):
    generator = np.random.default_rng(0)
    counts = sparse.csr_matrix(generator.poisson(1.5, size=(10, len(mlm.tokenizer.genes))).astype(np.float32))
    totals = np.asarray(counts.sum(axis=1))
    logs = counts.multiply(1e4 / totals).log1p().tocsr().astype(np.float32)
    var = pd.DataFrame(index=list(mlm.tokenizer.genes))
    of_counts, of_logs = (predict_table(ad.AnnData(values, var=var), mlm) for values in (counts, logs))
    pd.testing.assert_frame_equal(of_counts, of_logs)


def test_a_cell_without_any_panel_gene_keeps_its_row_and_gets_no_answer(cells, mlm, expected):
    values = cells.X.tolil()
    values[3] = 0
    cells.X = values.tocsr()
    table = predict_table(cells, mlm, ask=["cell_type"])
    assert table.index[table[COLUMN].isna()].tolist() == [3]
    assert table.index[table[PROBABILITY].isna()].tolist() == [3]
    assert table[COLUMN].drop(3).tolist() == expected[COLUMN][:12].drop(3).tolist()


def test_a_cell_without_any_panel_gene_is_kept_in_the_written_file(cells, trained, tmp_path):
    values = cells.X.tolil()
    values[0] = 0
    cells.X = values.tocsr()
    cells.write_h5ad(tmp_path / "in.h5ad")
    assert run_on(trained, str(tmp_path / "in.h5ad"), tmp_path / "out.h5ad") == 0
    obs = ad.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs[COLUMN].isna().tolist() == [True] + [False] * 11


def test_one_cell_is_enough(cells, mlm):
    assert len(predict_table(cells[[0]], mlm)) == 1


def test_no_cells_are_refused(cells, mlm):
    with pytest.raises(InputError, match="no cells"):
        predict_table(cells[:0].copy(), mlm)


# -- predict: what is given ---------------------------------------------------------------------------------------


def test_a_given_column_is_read_from_obs(cells, mlm):
    cells.obs["phase"] = "S"
    from_obs = predict_table(cells, mlm, ask=["cell_type"], given={"phase": None})
    pd.testing.assert_frame_equal(from_obs, predict_table(cells, mlm, ask=["cell_type"], given={"phase": "S"}))


def test_a_given_label_changes_the_probabilities(cells, mlm, expected):
    table = predict_table(cells, mlm, ask=["cell_type"], given={"phase": "S"})
    assert not np.allclose(table[PROBABILITY], expected[PROBABILITY][:12], atol=1e-6)


@pytest.mark.parametrize("ask", ["cell_type", "phase"])
def test_a_run_that_does_not_look_at_what_is_given_says_so(ask, cells, mlm, caplog):
    path, other = mlm.model.direct_labels, "phase" if ask == "cell_type" else "cell_type"
    shares = path.share_p2.clone()
    path.share_p2[mlm.tokenizer.vocabulary.token_type("phase") - 1] = torch.tensor([1.0, 0.0])
    path.share_p2[mlm.tokenizer.vocabulary.token_type("cell_type") - 1] = torch.tensor([0.0, 0.5])
    try:
        predict_table(cells[:20], mlm, ask=[ask], given={other: None})
        asked = label_readout(mlm, towards=f"{ask}={mlm.tokenizer.phenotypes[ask][0]}", given=[other])
    finally:
        path.share_p2[:] = shares
    said = [text for text in caplog.messages if f"answers {ask!r} by votes" in text and f"({other!r})" in text]
    assert asked.given and len(said) == (2 if ask == "phase" else 0), caplog.messages


def test_a_given_constant_needs_no_column(cells, mlm):
    with_column = predict_table(cells, mlm, ask=["cell_type"], given={"phase": "G1"})
    cells.obs = cells.obs[[]]
    pd.testing.assert_frame_equal(predict_table(cells, mlm, ask=["cell_type"], given={"phase": "G1"}), with_column)


def test_names_do_for_what_is_asked_and_given(cells, mlm):
    cells.obs["phase"] = ["G1", "S"] * 6
    expected = predict_table(cells, mlm, ask=["cell_type"], given={"phase": None})
    for given in (["phase"], "phase"):
        pd.testing.assert_frame_equal(predict_table(cells, mlm, ask="cell_type", given=given), expected)


def test_a_table_is_no_anndata(cells, mlm):
    with pytest.raises(InputError, match="a DataFrame is no AnnData. Make one"):
        predict_table(cells.to_df(), mlm)


def test_cells_whose_given_label_is_missing_are_asked_without_it(cells, mlm, expected):
    cells.obs["phase"] = [None] * 6 + ["S"] * 6
    table = predict_table(cells, mlm, ask=["cell_type"], given={"phase": None})
    np.testing.assert_allclose(table[PROBABILITY][:6], expected[PROBABILITY][:6], atol=1e-6)


def test_the_command_line_gives_labels(cells, trained, mlm, tmp_path):
    cells.write_h5ad(tmp_path / "in.h5ad")
    assert run_on(trained, str(tmp_path / "in.h5ad"), tmp_path / "out.h5ad", "--given", "phase=S") == 0
    by_function = predict_table(cells, mlm, given={"phase": "S"})[PROBABILITY]
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "out.h5ad").obs[PROBABILITY], by_function, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_a_given_column_that_is_missing_is_refused(kind, cells, request):
    cells.obs = cells.obs.drop(columns="phase")
    with pytest.raises(InputError, match="no obs column 'phase'"):
        predict_table(cells, request.getfixturevalue(kind), ask=["cell_type"], given={"phase": None})


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_an_unknown_given_label_is_refused_with_the_known_ones(kind, cells, request):
    with pytest.raises(InputError, match="phase=M is not in the run's vocabulary. Choose one of: 'G1', 'G2M', 'S'"):
        predict_table(cells, request.getfixturevalue(kind), ask=["cell_type"], given={"phase": "M"})


@pytest.mark.parametrize("kind", ["mlm", "cls"])
def test_a_given_phenotype_that_is_unknown_is_refused(kind, cells, request):
    with pytest.raises(InputError, match="'tissue'"):
        predict_table(cells, request.getfixturevalue(kind), ask=["cell_type"], given={"tissue": "lung"})


def test_a_classifier_is_not_given_what_it_was_trained_without(cells, trained):
    with pytest.raises(InputError, match="was trained without 'phase'"):
        predict_table(cells, load_run(trained.binary, device="cpu"), given={"phase": "S"})


def test_a_classifier_is_not_given_the_answer(cells, cls):
    with pytest.raises(InputError, match="'cell_type'"):
        predict_table(cells, cls, given={"cell_type": "Dendritic"})


def test_a_phenotype_is_not_asked_and_given_at_once(cells, mlm):
    with pytest.raises(InputError, match="'phase' cannot be both asked and given"):
        predict_table(cells, mlm, ask=["phase"], given={"phase": "S"})


def test_nothing_left_to_ask_is_refused(cells, mlm):
    with pytest.raises(InputError, match="nothing is asked"):
        predict_table(cells, mlm, given={"phase": "S", "cell_type": "Dendritic"})


def test_an_unknown_phenotype_is_refused_with_the_known_ones(cells, mlm):
    with pytest.raises(InputError, match="'tissue' is not in the vocabulary. Choose one of: 'cell_type', 'phase'"):
        predict_table(cells, mlm, ask=["tissue"])


def test_a_classifier_is_asked_its_own_phenotype_only(cells, cls):
    with pytest.raises(InputError, match="classifies 'cell_type' only, not 'phase'"):
        predict_table(cells, cls, ask=["phase"])


def test_a_classifier_answers_with_its_own_classes(cells, trained):
    table = predict_table(cells, load_run(trained.binary, device="cpu"))
    assert list(table[COLUMN].cat.categories) == ["not Dendritic", "Dendritic"]


def test_a_file_with_too_few_panel_genes_is_refused_with_its_names_and_the_flag(cells, mlm):
    cells.var = pd.DataFrame(index=[f"probe_{number}" for number in range(cells.n_vars)])
    with pytest.raises(InputError, match=r"0 of 100 panel genes .* first names are 'probe_0'.* --gene_id_column"):
        predict_table(cells, mlm)


def test_the_least_coverage_can_be_lowered(cells, mlm):
    assert len(predict_table(cells[:, :20].copy(), mlm, min_gene_coverage=0.1)) == 12


# -- predict: the file that is written ----------------------------------------------------------------------------


@pytest.fixture
def small(cells: ad.AnnData, tmp_path: Path) -> str:
    """Path of 12 cells."""
    cells.write_h5ad(tmp_path / "small.h5ad")
    return str(tmp_path / "small.h5ad")


@pytest.mark.filterwarnings("ignore")
def test_zarr_goes_in_and_comes_out_as_h5ad_does(trained, cells, small, tmp_path):
    cells.write_zarr(tmp_path / "small.zarr")
    for source in ("small.h5ad", "small.zarr"):
        for target in ("out.h5ad", "out.zarr"):
            assert run_on(trained, str(tmp_path / source), tmp_path / f"{source}_{target}") == 0
    answers = [ad.read_h5ad(tmp_path / f"{source}_out.h5ad") for source in ("small.h5ad", "small.zarr")]
    answers += [ad.read_zarr(tmp_path / f"{source}_out.zarr") for source in ("small.h5ad", "small.zarr")]
    for answer in answers[1:]:
        pd.testing.assert_frame_equal(answer.obs, answers[0].obs, check_categorical=False, check_dtype=False)
        assert (answer.X != answers[0].X).nnz == 0
    table = predict_table(str(tmp_path / "small.zarr"), trained.mlm, ask="cell_type")
    assert table[COLUMN].tolist() == answers[0].obs[COLUMN].tolist()
    assert predict(str(tmp_path / "small.zarr"), trained.mlm).obs[COLUMN].tolist() == answers[0].obs[COLUMN].tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_zarr_output_is_replaced_only_when_it_may_be_and_is_a_store(trained, small, tmp_path, capsys):
    (tmp_path / "mine.zarr").mkdir()
    assert run_on(trained, small, tmp_path / "mine.zarr", "--overwrite") == 2
    assert "it is a folder" in error_line(capsys)
    assert run_on(trained, small, tmp_path / "out.zarr") == 0
    assert run_on(trained, small, tmp_path / "out.zarr") == 2
    assert "--overwrite" in error_line(capsys)
    assert run_on(trained, small, tmp_path / "out.zarr", "--overwrite") == 0
    assert run_on(trained, str(tmp_path / "out.zarr"), tmp_path / "out.zarr", "--overwrite") == 2
    assert "the input itself" in error_line(capsys)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (np.eye(3), "a matrix .* is no AnnData"),
        ([ad.AnnData(np.eye(3)), ad.AnnData(np.eye(3))], "2 AnnData were given, but one is read"),
        ("cells.csv", "table of text.*read_csv"),
    ],
    ids=["a matrix", "a list", "a table"],
)
def test_the_functions_refuse_what_is_no_anndata_in_one_line(trained, tmp_path, monkeypatch, cells, message):
    monkeypatch.chdir(tmp_path)
    Path("cells.csv").write_text("cell,CD3E\nc,1\n")
    for function in (predict, predict_table, embed):
        with pytest.raises(InputError, match=message):
            function(cells, trained.mlm)


def test_an_output_that_exists_is_refused(trained, small, tmp_path, capsys):
    (tmp_path / "out.h5ad").write_text("mine")
    assert run_on(trained, small, tmp_path / "out.h5ad") == 2
    assert "--overwrite" in error_line(capsys)
    assert (tmp_path / "out.h5ad").read_text() == "mine"


def test_an_output_that_exists_is_replaced_when_asked(trained, small, tmp_path):
    (tmp_path / "out.h5ad").write_text("mine")
    assert run_on(trained, small, tmp_path / "out.h5ad", "--overwrite") == 0
    assert COLUMN in ad.read_h5ad(tmp_path / "out.h5ad").obs


def test_an_output_that_is_the_input_by_another_name_is_refused(trained, small, tmp_path, capsys):
    (tmp_path / "link.h5ad").symlink_to(small)
    before = Path(small).read_bytes()
    assert run_on(trained, small, tmp_path / "link.h5ad", "--overwrite") == 2
    assert "the input itself" in error_line(capsys)
    assert Path(small).read_bytes() == before


def test_an_output_in_a_missing_folder_makes_the_folder(trained, small, tmp_path):
    assert run_on(trained, small, tmp_path / "a/b/out.h5ad") == 0
    assert (tmp_path / "a/b/out.h5ad").exists()


def test_an_output_below_a_file_is_refused(trained, small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_on(trained, small, tmp_path / "file/out.h5ad") == 2
    assert "cannot be written" in error_line(capsys)


def test_an_output_that_is_a_folder_is_refused(trained, small, tmp_path, capsys):
    (tmp_path / "folder.h5ad").mkdir()
    assert run_on(trained, small, tmp_path / "folder.h5ad", "--overwrite") == 2
    assert "cannot be written" in error_line(capsys)


def test_several_inputs_are_refused_in_one_line(trained, small, tmp_path, capsys):
    shutil.copy(small, tmp_path / "second.h5ad")
    assert run_on(trained, str(tmp_path / "*.h5ad"), tmp_path / "o/out.h5ad") == 2
    assert "one file" in error_line(capsys)


def test_a_failure_while_writing_leaves_nothing_behind(trained, small, tmp_path, monkeypatch, capsys):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anndata.io.write_elem", full_disk)
    assert run_on(trained, small, tmp_path / "o/out.h5ad") == 3
    assert "No space left" in error_line(capsys)
    assert not (tmp_path / "o").exists()


def test_a_failure_while_writing_keeps_the_older_output(trained, small, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out.h5ad").write_text("older")
    monkeypatch.setattr("anndata.io.write_elem", interrupted)
    assert run_on(trained, small, tmp_path / "out.h5ad", "--overwrite") == 130
    assert (tmp_path / "out.h5ad").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5ad", "small.h5ad"]


def test_a_read_only_input_is_copied(trained, small, tmp_path):
    Path(small).chmod(0o444)
    assert run_on(trained, small, tmp_path / "out.h5ad") == 0


def _rewrite(path: str, target: Path, change: Callable[[ad.AnnData], None]) -> str:
    cells = ad.read_h5ad(path)
    change(cells)
    with ad.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(target)
    return str(target)


def _nullable(cells: ad.AnnData) -> None:
    cells.obs["count"] = pd.array([1, None] * 6, dtype="Int64")
    cells.obs["flag"] = pd.array([True, None] * 6, dtype="boolean")


def _nullable_text(cells: ad.AnnData) -> None:
    cells.obs["note"] = pd.array(["a", None] * 6, dtype="string")


def _string_index(cells: ad.AnnData) -> None:
    cells.obs.index = cells.obs.index.astype("string")


def _named_index(cells: ad.AnnData) -> None:
    cells.obs.index.name = "barcode"


def _own_layers(cells: ad.AnnData) -> None:
    cells.layers["twice"] = cells.X * 2
    cells.obsm["X_pca"] = np.ones((12, 2))
    cells.raw = cells.copy()


def _no_columns(cells: ad.AnnData) -> None:
    cells.obs = cells.obs[[]]


def _own_uns(cells: ad.AnnData) -> None:
    cells.uns["colors"], cells.uns["nested"] = np.array(["red"]), {"deep": {"value": 3}}


def _repeated_names(cells: ad.AnnData) -> None:
    cells.obs_names = ["same"] * 12


ODD = [_no_columns, _nullable, _nullable_text, _string_index, _named_index, _own_layers, _own_uns, _repeated_names]


@pytest.mark.parametrize("change", ODD)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_what_an_odd_file_holds_stays_as_it_was(change, trained, small, tmp_path):
    source = _rewrite(small, tmp_path / "in.h5ad", change)
    assert run_on(trained, source, tmp_path / "out.h5ad") == 0
    before, after = _contents(source), _contents(tmp_path / "out.h5ad")
    assert {name: after.get(name) for name in before} == before
    assert COLUMN in ad.read_h5ad(tmp_path / "out.h5ad").obs


def _contents(path: str | Path) -> dict[str, bytes]:
    """Every dataset of a file but those that predict replaces: name -> bytes."""
    contents = {}

    def visit(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith("uns/perturbgene"):
            contents[name] = repr(node[()].tolist()).encode()

    with h5py.File(path) as file:
        file.visititems(visit)
    return contents


@pytest.mark.parametrize(
    "old", [["a"] * 12, [1.5] * 12, pd.Categorical(["x", "y"] * 6)], ids=["text", "number", "category"]
)
def test_an_older_prediction_is_replaced(old, cells, trained, tmp_path, expected):
    cells.obs[COLUMN] = old
    cells.write_h5ad(tmp_path / "in.h5ad")
    assert run_on(trained, str(tmp_path / "in.h5ad"), tmp_path / "out.h5ad", "--ask", "cell_type") == 0
    obs = ad.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs[COLUMN].tolist() == expected[COLUMN][:12].tolist()
    assert list(obs).count(COLUMN) == 1


def test_predicting_twice_writes_the_same(trained, small, tmp_path):
    assert run_on(trained, small, tmp_path / "once.h5ad") == 0
    assert run_on(trained, str(tmp_path / "once.h5ad"), tmp_path / "twice.h5ad") == 0
    once, twice = (ad.read_h5ad(tmp_path / name).obs for name in ("once.h5ad", "twice.h5ad"))
    pd.testing.assert_frame_equal(once, twice)


def test_a_file_without_uns_gets_one(trained, small, tmp_path):
    with h5py.File(small, "r+") as file:
        del file["uns"]
    assert run_on(trained, small, tmp_path / "out.h5ad") == 0
    assert ad.read_h5ad(tmp_path / "out.h5ad").uns["perturbgene"]["run"] == trained.mlm


@pytest.mark.filterwarnings("ignore")
def test_obs_of_a_legacy_file_is_kept_beside_the_answer(trained, small, tmp_path):
    """anndata before 0.7 wrote obs as one table of records."""
    with h5py.File(small, "r+") as file:
        del file["obs"]
        records = np.array([(f"c{row}".encode(), row) for row in range(12)], dtype=[("index", "S4"), ("batch", "i4")])
        file.create_dataset("obs", data=records)
    assert run_on(trained, small, tmp_path / "out.h5ad") == 0
    obs = ad.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs.index.tolist() == [f"c{row}" for row in range(12)]
    assert obs["batch"].tolist() == list(range(12))
    assert obs[COLUMN].notna().all()


# -- a run folder -------------------------------------------------------------------------------------------------


def _without_weights(run: Path) -> None:
    (run / "model.safetensors").unlink()


def _half_the_weights(run: Path) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _empty_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"")


def _fewer_weights(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(run / "model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def _foreign_tokenizer(run: Path) -> None:
    content = json.loads((run / "tokenizer.json").read_text())
    content["genes"] = content["genes"][::-1]
    (run / "tokenizer.json").write_text(json.dumps(content))


def _without_tokenizer(run: Path) -> None:
    (run / "tokenizer.json").unlink()


def _without_config(run: Path) -> None:
    (run / "config.json").unlink()


def _broken_config(run: Path) -> None:
    (run / "config.json").write_text("{")


def _changed_config(**changes: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(content | changes))

    return change


DAMAGES = {
    "no weights": (_without_weights, "no finished run"),
    "half the weights": (_half_the_weights, "no finished run"),
    "empty weights": (_empty_weights, "no finished run"),
    "one tensor less": (_fewer_weights, "do not belong together"),
    "a tokenizer with other genes": (_foreign_tokenizer, "another tokenizer.json"),
    "no tokenizer": (_without_tokenizer, "no tokenizer can be read"),
    "no config": (_without_config, "no finished run"),
    "config is not JSON": (_broken_config, "no finished run"),
    "another width": (_changed_config(hidden_size=32), "no finished run|do not belong together"),
    "a missing layer": (_changed_config(num_hidden_layers=0), "no finished run|do not belong together"),
    "another kind of model": (_changed_config(architectures=["GeneBertForClassification"]), "do not belong together"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused(damage, copied_run):
    change, message = DAMAGES[damage]
    run = copied_run()
    (run / SUMS_FILE).unlink()  # as in runs of before: damage shows in what is read
    change(run)
    with pytest.raises(InputError, match=message):
        load_run(run)


def test_a_run_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_run(tmp_path / "nowhere")


def test_a_file_is_no_run(trained):
    with pytest.raises(InputError, match="is a file, not a folder"):
        load_run(trained.eval_shard)


def test_a_corpus_is_no_run(trained):
    with pytest.raises(InputError, match="no finished run"):
        load_run(trained.corpus)


def test_a_moved_run_answers_as_before(copied_run, cells, expected):
    table = predict_table(cells, load_run(copied_run(), device="cpu"), ask=["cell_type"])
    pd.testing.assert_frame_equal(table, expected[:12])


def test_predict_needs_no_settings_of_training(copied_run, cells, expected):
    run = copied_run()
    (run / "run.yaml").write_text("verb: mlm\nof_another_version: 1\n")
    table = predict_table(cells, load_run(run, device="cpu"), ask=["cell_type"])
    pd.testing.assert_frame_equal(table, expected[:12])


def test_a_loaded_model_is_ready_for_inference(mlm):
    assert not mlm.model.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device 'cuda' cannot be used here"):
        choose_device("cuda")


# -- evaluate -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(trained: Trained, tmp_path_factory) -> Path:
    """What `evaluate` writes about a copy of the mlm run, which it calibrates; the run itself stays as trained."""
    folder = tmp_path_factory.mktemp("evaluation")
    shutil.copytree(trained.mlm, folder / "mlm")
    assert main(["evaluate", str(folder / "mlm")]) == 0
    return folder / "mlm/evaluation"


@pytest.fixture(scope="module")
def metrics(evaluation: Path) -> dict:
    return json.loads((evaluation / "metrics.json").read_text())


def test_every_question_and_baseline_is_scored(metrics):
    questions = {"alone", "given_others", "together", "majority", "logistic_regression", "ridge", "nearest_neighbors"}
    assert {name: set(scores) for name, scores in metrics.items()} == {
        "cell_type": questions, "phase": questions, "genes": {"masked"}, "embedding": {"cell_type", "phase"},
    }  # fmt: skip


def test_every_phenotype_is_scored_on_all_labelled_cells(metrics, held_out):
    counts = {scores["n"] for name in ("cell_type", "phase") for scores in metrics[name].values()}
    assert counts == {held_out.n_obs}


def test_predict_and_evaluate_agree_to_the_last_cell(metrics, held_out, expected):
    is_right_n = expected[COLUMN].astype(str).to_numpy() == held_out.obs["cell_type"].astype(str).to_numpy()
    assert metrics["cell_type"]["alone"]["accuracy"] == is_right_n.mean()


def test_predict_is_as_right_as_training_said_at_its_end(trained, held_out, expected):
    at_the_end = json.loads((trained.folder / "mlm/metrics.json").read_text())["cell_type"]["alone"]
    is_right_n = expected[COLUMN].astype(str).to_numpy() == held_out.obs["cell_type"].astype(str).to_numpy()
    assert at_the_end["accuracy"] == is_right_n.mean() and at_the_end["n"] == len(is_right_n)


def test_predict_and_evaluate_agree_on_cells_that_are_too_long(copied_run, held_out):
    folder = copied_run()
    whole = predict_table(held_out, folder, ask=["cell_type"])[PROBABILITY]
    _changed_config(most_genes=8)(folder)
    run = load_run(folder, device="cpu")
    labelled = block_of(list(IterableAnnDataset(held_out, run.tokenizer)))
    asked = answer(run, labelled, Question("alone", ("cell_type",)))["cell_type"]
    by_predict = predict_table(held_out, run, ask=["cell_type"])[PROBABILITY]
    np.testing.assert_allclose(by_predict, asked.max(axis=1), atol=1e-5)
    assert np.abs(by_predict - whole).max() > 1e-3


def test_a_confusion_has_the_true_classes_as_rows(evaluation, held_out):
    table = pd.read_csv(evaluation / "confusion.cell_type.alone.csv", index_col="true")
    counts = held_out.obs["cell_type"].value_counts()
    assert table.sum(axis=1).to_dict() == {label: counts.get(label, 0) for label in table.index}


def test_a_confusion_has_the_predicted_classes_as_columns(evaluation, expected):
    table = pd.read_csv(evaluation / "confusion.cell_type.alone.csv", index_col="true")
    assert table.sum(axis=0).to_dict() == expected[COLUMN].value_counts().to_dict()


@pytest.mark.parametrize("name", ["cell_type.alone", "phase.given_others", "cell_type.together", "gene_bins"])
def test_every_confusion_is_drawn(name, evaluation):
    assert (evaluation / f"confusion.{name}.png").read_bytes().startswith(b"\x89PNG")


def test_per_class_scores_are_written(evaluation, held_out):
    table = pd.read_csv(evaluation / "per_class.phase.alone.csv", index_col="label")
    assert table["n"].sum() == held_out.n_obs


def test_evaluating_twice_gives_the_same(mlm, held_out):
    assert evaluate(mlm, held_out) == evaluate(mlm, held_out)


def test_the_batch_size_does_not_change_the_scores(mlm, held_out):
    large, small = (evaluate(mlm, held_out[:40], batch_size=size)["cell_type"]["alone"] for size in (64, 7))
    assert large == pytest.approx(small, abs=1e-6)


def test_cells_without_a_label_are_not_scored(mlm, cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[:5, cells.obs.columns.get_loc("cell_type")] = None
    results = evaluate(mlm, cells)
    assert (results["cell_type"]["alone"]["n"], results["phase"]["alone"]["n"]) == (7, 12)


def test_cells_whose_label_is_new_are_not_scored(mlm, cells):
    cells.obs["cell_type"] = ["a new type"] * 4 + cells.obs["cell_type"].astype(str).tolist()[4:]
    assert evaluate(mlm, cells)["cell_type"]["alone"]["n"] == 8


def test_one_question_can_be_put_in_place_of_the_standard_ones(mlm, cells):
    results = evaluate(mlm, cells, ask=["cell_type"], given=["phase"])
    assert list(results["cell_type"]) == ["asked"]


def test_asking_one_phenotype_leaves_the_others_out(mlm, cells):
    assert set(evaluate(mlm, cells, ask=["phase"])) == {"phase", "genes"}


def test_asking_an_unknown_phenotype_is_refused(mlm, cells):
    with pytest.raises(InputError, match="'tissue' is no phenotype"):
        evaluate(mlm, cells, ask=["tissue"])


def test_nothing_left_to_ask_is_refused_in_an_evaluation(mlm, cells):
    with pytest.raises(InputError, match="nothing is asked"):
        evaluate(mlm, cells, given=["phase", "cell_type"])


@pytest.mark.parametrize("question", [{"ask": ["phase"]}, {"given": ["tissue"]}], ids=["asked", "given"])
def test_a_classifier_is_not_evaluated_on_another_question(question, cls, cells):
    with pytest.raises(InputError, match="classifies 'cell_type' only"):
        evaluate(cls, cells, **question)


def test_a_classifier_is_scored_as_it_predicts(cls, held_out):
    table = predict_table(held_out, cls)
    is_right_n = table[COLUMN].astype(str).to_numpy() == held_out.obs["cell_type"].astype(str).to_numpy()
    assert evaluate(cls, held_out)["cell_type"]["classifier"]["accuracy"] == is_right_n.mean()


def test_a_one_against_rest_classifier_is_scored_on_its_two_classes(trained, held_out):
    run = load_run(trained.binary, device="cpu")
    answers = predict_table(held_out, run)[COLUMN].to_numpy() == "Dendritic"
    is_right_n = answers == (held_out.obs["cell_type"] == "Dendritic").to_numpy()
    assert evaluate(run, held_out)["cell_type"]["classifier"]["accuracy"] == is_right_n.mean()


def test_a_one_against_rest_classifier_of_two_labels_is_scored_on_its_own_classes(make_tokenizer, make_adata):
    tokenizer = make_tokenizer(included_phenotypes=())
    config = GeneBertConfig(
        **load_preset("tiny"), **tokenizer_facts(tokenizer), phenotype_category="sex",
        id2label={0: "not female", 1: "female"}, label2id={"not female": 0, "female": 1},
    )  # fmt: skip
    run = Run(GeneBertForClassification(config).eval(), tokenizer, "untrained")
    cells = make_adata([[1.0, 2.0, 0, 0]] * 5, obs={"sex": ["female"] * 5})
    answers = predict_table(cells, run)["predicted_sex"]
    assert evaluate(run, cells)["sex"]["classifier"]["accuracy"] == (answers == "female").mean()


def test_a_one_against_rest_classifier_stands_beside_no_baseline_of_all_classes(trained, held_out):
    run = load_run(trained.binary, device="cpu")
    assert list(evaluate(run, held_out, train_paths=trained.train_shard)["cell_type"]) == ["classifier"]


def test_a_classifier_cannot_be_scored_on_cells_without_its_label(cls, cells):
    cells.obs["cell_type"] = "a new type"
    with pytest.raises(InputError, match="no cell of .* has a known 'cell_type'"):
        evaluate(cls, cells)


def test_baselines_are_the_scores_of_the_same_cells(trained, mlm, metrics):
    matrices, labels = [], []
    for path in (trained.train_shard, trained.eval_shard):
        dataset = IterableAnnDataset(path, mlm.tokenizer)
        cells = ad.read_h5ad(path)
        matrices.append(sparse.csr_matrix(cells[:, list(mlm.tokenizer.genes)].X))
        labels.append(true_labels(block_of(list(dataset)), mlm.tokenizer, "phase"))
    for name, predicted_n in {
        "majority": np.full(len(labels[1]), majority_class(labels[0])),
        "logistic_regression": logistic_regression(matrices[0], labels[0], seed=0)(matrices[1]),
    }.items():
        confusion = Confusion(mlm.tokenizer.phenotypes["phase"])
        confusion.add(labels[1], predicted_n)
        scores = confusion.scores()
        assert {key: metrics["phase"][name][key] for key in scores} == scores


def test_baselines_see_at_most_so_many_training_cells(trained, mlm, monkeypatch):
    monkeypatch.setattr(baselines_module, "MOST_BASELINE_CELLS", 50)
    train, held_out = (IterableAnnDataset(path, mlm.tokenizer) for path in (trained.train_shard, trained.eval_shard))
    assert {one.scores["n_train"] for one in baselines(train, held_out, ["phase"])["phase"].values()} == {50}


def test_a_classifier_says_in_one_line_what_it_takes_from_an_mlm_run(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = logging.getLogger("transformers.modeling_utils")
    table.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="perturbgene")
    steps = STEPS.replace("--model_arch tiny --num_hidden_layers 1", "--max_steps 1 --per_device_train_batch_size 32")
    flags = f"--corpus {trained.corpus} --output_dir {tmp_path}/cls --phenotype_category phase {steps}".split()
    try:
        assert main(["cls", *flags, "--pretrained_model_path", trained.mlm]) == 0
    finally:
        table.removeHandler(caplog.handler)
    assert "LOAD REPORT" not in caplog.text
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("weights from")]
    assert line.startswith(f"weights from {trained.mlm}: ") and "head: " in line


def test_genes_are_masked_as_in_the_run_s_own_evaluation(trained: Trained, mlm: Run) -> None:
    own = json.loads((trained.folder / "mlm/metrics.json").read_text())["genes"]["masked"]
    found = evaluate(mlm, trained.eval_shard, calibrate=False)["genes"]["masked"]
    assert found == pytest.approx(own, nan_ok=True)


def test_genes_may_be_masked_at_another_rate(trained: Trained, mlm: Run, tmp_path: Path) -> None:
    own = json.loads((trained.folder / "mlm/metrics.json").read_text())["genes"]["masked"]["n"]
    flags = ["--no_baselines", "--no_calibrate", "--ask", "phase"]
    flags += ["--gene_mask_prob", "0.6", "--unexpressed_ratio", "0"]
    assert main(["evaluate", trained.mlm, "--output", str(tmp_path), *flags]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["genes"]["masked"]["n"]
    assert found == pytest.approx(own * 0.6 / (0.15 * 1.5), rel=0.1)


def test_nothing_need_be_masked(trained: Trained, mlm: Run) -> None:
    rates = {"gene_mask_prob": 0.0, "phenotype_mask_prob": 0.0}
    found = evaluate(mlm, trained.eval_shard, calibrate=False, mask_rates=rates)
    assert found["genes"]["masked"]["n"] == 0 and found["cell_type"]["alone"]["n"] > 0


def test_a_classifier_takes_no_rates_of_masking(trained: Trained) -> None:
    with pytest.raises(InputError, match="a classifier, which masks nothing. Remove 'gene_mask_prob'"):
        evaluate(load_run(trained.cls, device="cpu"), trained.eval_shard, mask_rates={"gene_mask_prob": 0.5})


def test_baselines_are_left_out_when_not_wanted(trained, tmp_path):
    assert main(["evaluate", trained.mlm, "--output", str(tmp_path), "--no_baselines", "--no_calibrate"]) == 0
    assert "majority" not in json.loads((tmp_path / "metrics.json").read_text())["phase"]


def test_metrics_are_written_as_strict_json(mlm, cells, tmp_path):
    evaluate(mlm, cells, mask_rates={"gene_mask_prob": 0.0}, output=tmp_path)  # scores of no gene are NaN

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)["genes"]["masked"]["n"] == 0


def test_a_confusion_adds_up_to_the_cells_that_were_scored(evaluation, metrics):
    table = pd.read_csv(evaluation / "confusion.phase.together.csv", index_col="true")
    confusion = Confusion(list(table.index))
    confusion.counts_kk[:] = table.to_numpy()
    assert confusion.scores()["accuracy"] == metrics["phase"]["together"]["accuracy"]


# -- predict: what is written for an answer ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(evaluation: Path) -> Run:
    """A copy of the mlm run with the temperatures that `evaluate` fitted on the held-out cells."""
    return load_run(evaluation.parent, device="cpu")


@pytest.fixture(scope="module")
def logits(mlm: Run, held_out: ad.AnnData) -> np.ndarray:
    """Logits of the cell types of the held-out cells, nothing given, (140, k)."""
    block = block_of(list(IterableAnnDataset(held_out, mlm.tokenizer)))
    return question_logits(mlm.model, block, mlm.tokenizer, Question("alone", ("cell_type",)))["cell_type"]


def test_the_best_labels_follow_with_their_probabilities(expected, logits, mlm):
    order = np.argsort(-logits, axis=1)
    labels = np.array(mlm.tokenizer.phenotypes["cell_type"])
    probabilities = np.sort(torch.softmax(torch.from_numpy(logits), dim=1).numpy(), axis=1)[:, ::-1]
    for rank in (2, 3):
        assert expected[f"{COLUMN}_{rank}"].tolist() == labels[order[:, rank - 1]].tolist()
        np.testing.assert_allclose(expected[f"{COLUMN}_{rank}_probability"], probabilities[:, rank - 1], atol=1e-6)


def test_entropy_is_in_nats(expected, logits):
    probability_nk = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    np.testing.assert_allclose(expected[ENTROPY], -(probability_nk * np.log(probability_nk)).sum(axis=1), atol=1e-5)


def test_there_are_no_more_labels_than_the_phenotype_has(cells, mlm):
    table = predict_table(cells, mlm, ask=["phase"], options=AnswerOptions(top_k=9))
    assert list(table)[-2] == f"predicted_phase_{len(mlm.tokenizer.phenotypes['phase'])}_probability"


def test_one_by_one_an_answer_does_not_depend_on_what_else_is_asked(cells, mlm, expected):
    table = predict_table(cells, mlm, ask=["phase", "cell_type"])
    np.testing.assert_allclose(table[PROBABILITY], expected[PROBABILITY][:12], atol=1e-6)


def test_jointly_all_are_asked_in_one_sequence(cells, mlm):
    block = block_of(list(IterableAnnDataset(cells, mlm.tokenizer)))
    together = answer(mlm, block, Question("together", ("cell_type", "phase")))
    table = predict_table(cells, mlm, options=AnswerOptions(joint=True))
    for name, probability_nk in together.items():
        np.testing.assert_allclose(table[f"predicted_{name}_probability"], probability_nk.max(axis=1), atol=1e-6)


def test_batches_of_few_tokens_answer_like_large_ones(held_out, mlm, expected):
    table = predict_table(held_out, mlm, ask=["cell_type"], batch_tokens=100)
    np.testing.assert_allclose(table[PROBABILITY], expected[PROBABILITY], atol=1e-5)


def test_a_given_label_that_the_vocabulary_lacks_counts_as_absent_and_is_reported(cells, mlm, expected, caplog):
    cells.obs["phase"] = ["mitosis"] * 11 + ["S"]
    result = predict(cells, mlm, ask=["cell_type"], given={"phase": None})
    assert "11 cells have a phase that the vocabulary lacks ('mitosis')" in caplog.text
    assert json.loads(result.uns["perturbgene"]["unknown_labels_count_as_absent"]) == {"phase": {"mitosis": 11}}
    np.testing.assert_allclose(result.obs[PROBABILITY][:11], expected[PROBABILITY][:11], atol=1e-6)


def test_cells_without_many_of_the_genes_are_warned_of_and_their_share_is_kept(cells, mlm, caplog):
    predict(cells[:, 10:].copy(), mlm)
    assert "answers can be wrong and sure" not in caplog.text
    assert predict(cells[:, 25:].copy(), mlm).uns["perturbgene"]["gene_coverage"] == 0.75
    assert "measured with 75 % of the run's genes, so answers can be wrong and sure" in caplog.text


def test_a_path_is_read_like_the_cells_in_it(trained, mlm, expected):
    assert predict(trained.eval_shard, mlm, ask=["cell_type"]).obs[COLUMN].tolist() == expected[COLUMN].tolist()


@needs_fork
def test_two_processes_write_what_one_writes(trained, written, tmp_path):
    """Real processes, gloo on the CPU."""
    target = tmp_path / "answers" / "out.h5ad"
    target.parent.mkdir()
    words = ["predict", trained.mlm, trained.eval_shard, "--device", "cpu", "--ask", "cell_type"]
    done = in_two_processes([*words, "--output", str(target)], tmp_path)
    assert done.codes == [0, 0], done.printed
    assert done.printed.count("140 cells predicted") == 1
    assert [path.name for path in target.parent.iterdir()] == ["out.h5ad"]
    found = ad.read_h5ad(target).obs
    assert found[COLUMN].tolist() == written.obs[COLUMN].tolist()
    np.testing.assert_allclose(found[PROBABILITY], written.obs[PROBABILITY], atol=1e-5)


# -- calibration --------------------------------------------------------------------------------------------------


def test_evaluate_fits_a_temperature_for_each_question_and_scores_it_on_other_cells(metrics, held_out):
    for name in ("cell_type", "phase"):
        for question in ("alone", "given_others", "together"):
            found = metrics[name][question]["calibration"]
            assert found["n_fitted"] + found["n"] == held_out.n_obs
            assert found["temperature"] != 1 and found["split_by"] == "cells"
            assert 0 <= found["ece_after"] <= 1


def test_predict_divides_logits_by_the_temperature_of_the_question(metrics, calibrated, held_out, logits):
    table = predict_table(held_out, calibrated, ask=["cell_type"])
    softened = torch.from_numpy(logits) / metrics["cell_type"]["alone"]["calibration"]["temperature"]
    np.testing.assert_allclose(table[PROBABILITY], torch.softmax(softened, dim=1).amax(dim=1), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "joint", "question"),
    [({}, False, "alone"), ({"phase": "S"}, False, "given_others"), ({}, True, "together")],
)
def test_the_file_says_which_temperature_was_taken(given, joint, question, metrics, calibrated, cells):
    ask = [] if joint else ["cell_type"]
    facts = predict(cells, calibrated, ask=ask, given=given, joint=joint).uns["perturbgene"]
    said = json.loads(facts["calibration"])["cell_type"]
    assert f"temperature {metrics['cell_type'][question]['calibration']['temperature']:.3f}" in said
    assert "nearest" not in said


def test_a_question_that_was_not_fitted_takes_the_nearest_and_says_so(calibrated, cells):
    predictor = Predictor(calibrated, ["cell_type"], {"phase": None}, AnswerOptions())
    lacking = replace(predictor.calibration, temperatures=predictor.calibration.temperatures[:1])
    predictor.calibration = lacking
    assert "the nearest question that was fitted" in predictor.describe_calibration()["cell_type"]


def test_without_evaluate_the_file_says_that_nothing_is_calibrated(cells, mlm, calibrated, expected):
    assert "run `perturbgene evaluate` first" in predict(cells, mlm).uns["perturbgene"]["calibration"]
    table = predict_table(cells, calibrated, ask=["cell_type"], options=AnswerOptions(calibrate=False))
    np.testing.assert_allclose(table[PROBABILITY], expected[PROBABILITY][:12], atol=1e-6)


def test_evaluate_on_other_cells_leaves_the_calibration_of_a_run_alone(copied_run, cells, tmp_path, caplog):
    run = copied_run()
    assert main(["evaluate", str(run), "--no_baselines"]) == 0
    before = (run / "calibration.json").read_bytes()
    cells.write_h5ad(tmp_path / "mine.h5ad")
    flags = ["--no_baselines", "--eval_data_paths", str(tmp_path / "mine.h5ad")]
    caplog.set_level(logging.INFO, logger="perturbgene")
    caplog.clear()
    assert main(["evaluate", str(run), *flags]) == 0
    evaluate(str(run), str(tmp_path / "mine.h5ad"))
    assert (run / "calibration.json").read_bytes() == before
    assert "stay as they are; --calibrate fits them" in caplog.text
    assert main(["evaluate", str(run), *flags, "--calibrate"]) == 0
    assert (run / "calibration.json").read_bytes() != before


def test_the_function_and_the_command_line_calibrate_alike_on_the_run_s_own_cells(copied_run, trained):
    run = copied_run()
    assert main(["evaluate", str(run), "--no_baselines"]) == 0
    expected = json.loads((run / "calibration.json").read_text())["temperatures"]
    (run / "calibration.json").unlink()
    evaluate(run, trained.eval_shard)
    assert json.loads((run / "calibration.json").read_text())["temperatures"] == expected


def test_evaluate_reads_a_layer_of_a_user_s_file(mlm, trained, cells, tmp_path):
    expected = evaluate(mlm, cells)["cell_type"]["alone"]["accuracy"]
    cells.layers["log"] = cells.X.copy()
    cells.X = cells.X * 0
    cells.write_h5ad(tmp_path / "in.h5ad")
    flags = ["--eval_data_paths", str(tmp_path / "in.h5ad"), "--layer", "log", "--output", str(tmp_path / "scores")]
    assert main(["evaluate", trained.mlm, *flags]) == 0
    found = json.loads((tmp_path / "scores/metrics.json").read_text())["cell_type"]["alone"]
    assert (found["accuracy"], found["n"]) == (expected, 12)


def test_evaluate_says_what_it_asks_before_it_starts(mlm, cells, caplog):
    caplog.set_level(logging.INFO, logger="perturbgene")
    evaluate(mlm, cells, ask=["phase"])
    assert "about 12 cells: phase; phase given cell_type" in caplog.text


def test_a_classifier_is_calibrated_too(copied_run, held_out):
    folder = copied_run("cls")
    before = predict_table(held_out, load_run(folder, device="cpu"))
    assert main(["evaluate", str(folder), "--no_baselines"]) == 0
    after = predict_table(held_out, load_run(folder, device="cpu"))
    assert after[COLUMN].tolist() == before[COLUMN].tolist()
    assert not np.allclose(after[PROBABILITY], before[PROBABILITY], atol=1e-4)


def test_donors_are_not_split_between_fitting_and_scoring(copied_run, held_out):
    cells = held_out.copy()
    cells.obs["patient"] = ["a"] * 100 + ["b"] * 40
    run = load_run(copied_run(), device="cpu")
    found = evaluate(run, cells, calibrate=True, donor_column="patient")["phase"]["alone"]["calibration"]
    assert found["split_by"] == "donors" and {found["n_fitted"], found["n"]} == {100, 40}


def test_a_split_by_cells_is_warned_of(copied_run, held_out, caplog):
    evaluate(load_run(copied_run(), device="cpu"), held_out, calibrate=True)
    assert "fewer than two donors" in caplog.text


def test_a_run_without_a_folder_cannot_be_calibrated(mlm, cells):
    with pytest.raises(InputError, match="cannot be written.*pass --no_calibrate"):
        evaluate(replace(mlm, path="nowhere"), cells, calibrate=True)


def test_an_answer_that_is_not_sure_enough_becomes_unknown(held_out, mlm, expected):
    table = predict_table(held_out, mlm, ask=["cell_type"], options=AnswerOptions(abstain=0.5))
    is_sure = expected[PROBABILITY] >= 0.5
    assert 0 < is_sure.sum() < len(is_sure)
    assert table[COLUMN].tolist() == expected[COLUMN].astype(object).where(is_sure, "unknown").tolist()
    assert list(table[COLUMN].cat.categories) == [*expected[COLUMN].cat.categories, "unknown"]
    assert table[f"{COLUMN}_1"].tolist() == expected[COLUMN].tolist()


def test_a_cell_without_genes_is_missing_and_not_unknown(cells, calibrated):
    cells.X[1:] = 0
    cells.X.eliminate_zeros()
    table = predict_table(cells, calibrated, ask=["cell_type"], options=AnswerOptions(abstain=0.9, ood=True))[1:]
    names = [COLUMN, "ood_gene_log_likelihood", "ood_cell_type_score", "ood_cell_type_score_percentile"]
    assert table[names].isna().all(axis=None)


# -- strange cells and wrong labels -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strangeness(held_out: ad.AnnData, calibrated: Run) -> pd.DataFrame:
    """How strange the calibrated run finds the held-out cells."""
    return predict_table(held_out, calibrated, ask=["cell_type"], options=AnswerOptions(ood=True))


def test_percentiles_are_shares_of_the_evaluation_cells_and_high_for_strange_ones(strangeness):
    for name, sign in (("ood_cell_type_score", 1), ("ood_gene_log_likelihood", -1)):
        ranks = 100 * np.argsort(np.argsort(sign * strangeness[name].to_numpy())) / 139
        np.testing.assert_allclose(strangeness[f"{name}_percentile"], ranks, atol=1.5)


def test_how_strange_a_cell_is_does_not_depend_on_its_row(strangeness, held_out, calibrated):
    rows = [120, 3, 77]
    found = predict_table(held_out[rows], calibrated, ask=["cell_type"], options=AnswerOptions(ood=True))
    for name in ("ood_gene_log_likelihood", "ood_cell_type_score"):
        np.testing.assert_allclose(found[name], strangeness[name].to_numpy()[rows], atol=1e-5)


def test_a_type_that_was_not_learned_scores_above_those_that_were(held_out, calibrated, strangeness):
    """Its cells are planted: each expresses other genes in place of its own."""
    planted = held_out.copy()
    planted.X = planted.X[:, np.roll(np.arange(planted.n_vars), 37)]
    found = predict_table(planted, calibrated, ask=["cell_type"], options=AnswerOptions(ood=True))
    scores = [table["ood_cell_type_score"] for table in (strangeness, found)]
    assert scores[1].quantile(0.25) > scores[0].median() and scores[1].median() > scores[0].quantile(0.9)


def test_strangeness_of_a_run_that_was_not_evaluated_is_refused(trained, small, tmp_path, capsys):
    assert run_on(trained, small, tmp_path / "out.h5ad", "--ood") == 2
    assert "does not hold statistics of its training cells" in error_line(capsys)
    assert not (tmp_path / "out.h5ad").exists()


def test_temperatures_do_not_change_how_strange_a_cell_is(held_out, calibrated, strangeness):
    options = AnswerOptions(ood=True, calibrate=False)
    table = predict_table(held_out, calibrated, ask=["cell_type"], options=options)
    np.testing.assert_allclose(table["ood_cell_type_score"], strangeness["ood_cell_type_score"])


@pytest.mark.parametrize("name", ["cls", "binary"])
def test_a_classifier_scores_new_types_too(name, copied_run, held_out):
    folder = copied_run(name)
    assert main(["evaluate", str(folder), "--no_baselines"]) == 0
    table = predict_table(held_out, load_run(folder, device="cpu"), options=AnswerOptions(ood=True))
    assert [name for name in table if name.startswith("ood_")] == [
        "ood_cell_type_score", "ood_cell_type_score_percentile",
    ]  # fmt: skip
    assert table["ood_cell_type_score"].notna().all()


def test_training_cells_that_are_gone_leave_temperatures_but_no_score(copied_run, held_out, caplog):
    folder = copied_run()
    text = (folder / "run.yaml").read_text()
    corpus = next(line for line in text.splitlines() if line.startswith("corpus:"))
    (folder / "run.yaml").write_text(text.replace(corpus, "corpus: gone"))
    run = load_run(folder, device="cpu")
    evaluate(run, held_out, calibrate=True)
    assert "`predict --ood` cannot say how unusual a cell is" in caplog.text
    assert predict_table(held_out, run).attrs["calibration"]
    with pytest.raises(InputError, match="does not hold statistics of its training cells"):
        predict_table(held_out, run, options=AnswerOptions(ood=True))


def test_an_audit_gives_the_probability_of_the_own_label_given_the_others(cells, mlm):
    block = block_of(list(IterableAnnDataset(cells, mlm.tokenizer)))
    others = Question("given_others", ("cell_type",), ("phase",))
    probability_nk = answer(mlm, block, others)["cell_type"]
    own_n = true_labels(block, mlm.tokenizer, "cell_type")
    table = predict_table(cells, mlm, ask=["cell_type"], options=AnswerOptions(audit=True))
    found_n = table["audit_cell_type_probability"]
    np.testing.assert_allclose(found_n, probability_nk[np.arange(12), own_n], atol=1e-6)
    assert table["audit_cell_type_rank"].tolist() == found_n.rank().astype(int).tolist()


def test_an_audit_does_not_change_the_answers(held_out, mlm, expected):
    table = predict_table(held_out, mlm, ask=["cell_type"], options=AnswerOptions(audit=True))
    np.testing.assert_allclose(table[PROBABILITY], expected[PROBABILITY], atol=1e-6)


def test_swapped_labels_are_improbable(held_out, mlm):
    cells, is_swapped = held_out.copy(), np.arange(140) % 20 == 0
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[is_swapped] = np.where(labels[is_swapped] == "Dendritic", "CD19+ B", "Dendritic")
    cells.obs["cell_type"] = labels
    table = predict_table(cells, mlm, ask=["cell_type"], options=AnswerOptions(audit=True))
    assert roc_auc_score(is_swapped, -table["audit_cell_type_probability"]) > 0.75


@pytest.mark.parametrize("kind", ["cls", "binary"])
def test_a_classifier_audits_its_own_phenotype(kind, cells, trained):
    table = predict_table(
        cells, load_run(getattr(trained, kind), device="cpu"), options=AnswerOptions(top_k=20, audit=True)
    )
    own = cells.obs["cell_type"].astype(str).to_numpy()
    if kind == "binary":
        own = np.where(own == "Dendritic", "Dendritic", "not Dendritic")
    ranked = [COLUMN, *(name for name in table if name.removeprefix(f"{COLUMN}_").isdigit())]
    for row, label in enumerate(own):
        (column,) = [name for name in ranked if table[name][row] == label]
        assert table["audit_cell_type_probability"][row] == table[f"{column}_probability"][row]


def test_cells_without_a_label_are_not_audited(cells, mlm):
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[3, cells.obs.columns.get_loc("cell_type")] = None
    table = predict_table(cells, mlm, ask=["cell_type"], options=AnswerOptions(audit=True))
    assert table.index[table["audit_cell_type_probability"].isna()].tolist() == [3]
    assert sorted(table["audit_cell_type_rank"]) == list(range(12))


def test_an_audit_without_labels_is_refused(cells, mlm):
    cells.obs = cells.obs.drop(columns="cell_type")
    with pytest.raises(InputError, match="no obs column 'cell_type'"):
        predict_table(cells, mlm, ask=["cell_type"], options=AnswerOptions(audit=True))


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"abstain": 1.5}], ids=str)
def test_an_option_out_of_range_is_refused(wrong):
    with pytest.raises(InputError, match=f"Change --{next(iter(wrong))}"):
        AnswerOptions(**wrong)


# -- command lines ------------------------------------------------------------------------------------------------

NONSENSE = {
    "predict nowhere {cells} --output {out}": "there is no such file or folder",
    "predict {mlm} nowhere.h5ad --output {out}": "there is no such file or folder",
    "predict {mlm} {mlm}/config.json --output {out}": "Give an .h5ad or .zarr file",
    "predict {mlm} {cells} --output {out} --ask tissue": "'tissue'",
    "predict {cls} {cells} --output {out} --ask phase": "classifies 'cell_type' only",
    "predict {mlm} {cells} --output {out} --given phase=M": "phase=M",
    "predict {mlm} {cells} --output {out} --given phase --ask phase": "asked and given",
    "predict {mlm} {cells} --output {out} --layer counts": "no matrix",
    "predict {mlm} {cells} --output {out} --gene_id_column nothing": "no var column",
    "predict {mlm} {cells} --output {out} --batch_size 0": "batch_size",
    "predict {mlm} {cells} --output {out} --min_gene_coverage 2": "min_gene_coverage",
    "predict {mlm} {cells} --output {out} --abstain 2": "abstain",
    "predict {mlm} {cells} --output {out} --top_k 0": "top_k",
    "predict {mlm} {bare} --output {out} --ask cell_type --audit": "no obs column 'cell_type'",
    "predict {mlm} {bare} --output {out} --given phase": "no obs column 'phase'",
    "predict {corpus} {cells} --output {out}": "no finished run",
    "evaluate nowhere": "there is no such file or folder",
    "evaluate {mlm} --ask tissue --output {out}": "'tissue'",
    "evaluate {cls} --ask phase --output {out}": "classifies 'cell_type' only",
    "evaluate {mlm} --corpus nowhere --output {out}": "there is no such file or folder",
    "evaluate {mlm} --eval_data_paths nowhere.h5ad --output {out}": "there is no such file or folder",
    "evaluate {mlm} --output {cells}": "but a folder is written",
}


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_ends_with_code_2_and_one_line(line, trained, small, tmp_path, capsys):
    names = {name: getattr(trained, name) for name in ("mlm", "cls", "corpus")}
    bare = _rewrite(small, tmp_path / "bare.h5ad", _no_columns)
    out = tmp_path / ("out" if line.startswith("evaluate") else "out.h5ad")
    assert main(line.format(**names, cells=small, bare=bare, out=out).split()) == 2
    assert NONSENSE[line] in error_line(capsys)
    assert not out.exists()
