"""`mlm` and `cls` learn what is there and nothing else, and leave a run folder that loads again."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from perturbgene.configs import load_config, parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.corpus.prepare import prepare
from perturbgene.data_utils.data_collators import collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError
from perturbgene.inference.run import load_run
from perturbgene.main import main
from perturbgene.model import GeneBertForPhenotypicMLM
from perturbgene.training.tokenizer import tokenizer_of
from perturbgene.training.train import class_weights, model_config, run_cls, run_mlm

COMMON = "--model_arch tiny --no_bf16 --report_to none --max_length 130 --logging_steps 1000"
QUIET = f"{COMMON} --eval_strategy no --save_strategy no"


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    import scanpy as sc

    whole = sc.datasets.pbmc68k_reduced()
    return ad.AnnData(whole.raw.X.copy(), obs=whole.obs[["bulk_labels", "phase"]], var=whole.raw.var)


@pytest.fixture(scope="module")
def corpus(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "corpus"
    return prepare(cells[:400], folder, phenotypes=["cell_type=bulk_labels", "phase"], num_top_genes=100)


def mlm(text: str, **paths: object) -> Path:
    return run_mlm(parse_args(["mlm", *text.format(**paths).split()]))  # type: ignore[arg-type]


def cls(text: str, **paths: object) -> Path:
    return run_cls(parse_args(["cls", *text.format(**paths).split()]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def short_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "mlm"
    return mlm(f"--corpus {corpus} --output_dir {out} {COMMON} --max_steps 4 --eval_steps 2")


def test_a_tiny_model_learns_64_cells_by_heart(cells: ad.AnnData, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).permutation(cells.n_obs)[:80]
    corpus = prepare(cells[rows], tmp_path / "c", phenotypes=["cell_type=bulk_labels"], num_top_genes=120)
    train = Corpus.open(corpus).paths("train")[0]
    run = mlm(
        f"--corpus {corpus} --eval_data_paths {train} --allow_overlap --output_dir {tmp_path}/run {QUIET} "
        "--num_train_epochs 60 --learning_rate 3e-3 --dropout 0 --phenotype_mask_prob 1 --absent_prob 0 "
        "--gene_mask_prob 0.05 --gene_loss_weight 0.1 --per_device_train_batch_size 16"
    )
    scores = json.loads((run / "metrics.json").read_text())["cell_type"]["alone"]
    assert scores["n"] == 64
    assert scores["accuracy"] > 0.95


def test_permuted_labels_do_not_beat_the_majority_on_held_out_cells(cells: ad.AnnData, tmp_path: Path) -> None:
    broken = cells[np.random.default_rng(1).permutation(cells.n_obs)[:400]].copy()
    broken.obs["bulk_labels"] = np.random.default_rng(0).permutation(broken.obs["bulk_labels"].astype(str))
    corpus = prepare(broken, tmp_path / "c", phenotypes=["cell_type=bulk_labels"], num_top_genes=80, eval_fraction=0.4)
    run = cls(
        f"--corpus {corpus} --output_dir {tmp_path}/run {QUIET} --phenotype_category cell_type --no_balanced_dataset "
        "--num_train_epochs 6 --learning_rate 2e-3"
    )
    scores = json.loads((run / "metrics.json").read_text())["cell_type"]["classifier"]
    labels = ad.read_h5ad(Corpus.open(corpus).paths("eval")[0]).obs["cell_type"]
    majority = labels.value_counts(normalize=True).max()
    noise = 2 * np.sqrt(majority * (1 - majority) / len(labels))
    assert scores["accuracy"] <= majority + noise


def test_a_run_folder_holds_weights_tokenizer_settings_scores_and_a_card(short_run: Path) -> None:
    names = {path.name for path in short_run.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "metrics.json", "README.md"} <= names


def test_a_run_folder_holds_no_pickle_of_ours(short_run: Path) -> None:
    assert not list(short_run.glob("*.pkl"))


def test_the_resolved_configuration_loads_again(short_run: Path, corpus: Path) -> None:
    config = load_config(short_run / "run.yaml")
    assert (config.corpus, config.max_steps) == (str(corpus), 4)  # type: ignore[attr-defined]
    settings = yaml.safe_load((short_run / "run.yaml").read_text())
    assert (settings["verb"], settings["learning_rate"]) == ("mlm", 2e-3)  # none given: that of 64 wide


def test_a_loaded_model_gives_the_same_logits(short_run: Path, corpus: Path) -> None:
    tokenizer = GeneTokenizer.from_pretrained(short_run)
    cells = list(IterableAnnDataset(Corpus.open(corpus).paths("eval"), tokenizer))[:4]
    batch = collate_fn_wrapper(tokenizer, packed=True)(cells)
    first, second = (GeneBertForPhenotypicMLM.from_pretrained(short_run).eval() for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(**batch).logits, second(**batch).logits)


def test_training_twice_with_one_seed_gives_the_same_weights(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    again = mlm(f"--corpus {corpus} --output_dir {tmp_path}/again {COMMON} --max_steps 4 --eval_steps 2")
    assert (again / "model.safetensors").read_bytes() == (short_run / "model.safetensors").read_bytes()


def test_loader_workers_do_not_change_the_weights(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    again = mlm(
        f"--corpus {corpus} --output_dir {tmp_path}/w {COMMON} --max_steps 4 --eval_steps 2 --dataloader_num_workers 2"
    )
    assert (again / "model.safetensors").read_bytes() == (short_run / "model.safetensors").read_bytes()


def test_evaluation_does_not_change_the_weights(corpus: Path, tmp_path: Path) -> None:
    text = f"--corpus {corpus} {COMMON} --max_steps 4 --load_best_model_at_end false --direct_path never"
    watched = mlm(f"{text} --output_dir {tmp_path}/watched --eval_steps 1")
    again = mlm(f"{text} --output_dir {tmp_path}/again --eval_strategy no --save_strategy no")
    assert (again / "model.safetensors").read_bytes() == (watched / "model.safetensors").read_bytes()


def test_resuming_a_finished_run_trains_no_further_step(
    short_run: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (short_run / "model.safetensors").read_bytes()
    with caplog.at_level("INFO", logger="perturbgene"):
        mlm(
            f"--corpus {corpus} --output_dir {short_run} {COMMON} --max_steps 4 --eval_steps 2 --resume_from_checkpoint"
        )
    assert "finished" in caplog.text
    assert (short_run / "model.safetensors").read_bytes() == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", flip, "model.safetensors is damaged"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "model.safetensors has 0 bytes instead of"),
        ("embedding.safetensors", Path.unlink, "embedding.safetensors is missing"),
        ("tokenizer.json", flip, "tokenizer.json is damaged"),
        ("sums.json", lambda path: path.write_text("{"), "sums.json is damaged"),
    ],
)
def test_a_run_with_a_damaged_file_is_refused(
    name: str, harm: Callable[[Path], Any], message: str, short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    (run / "README.md").write_text("Notes of our own.")
    load_run(run, device="cpu")
    harm(run / name)
    with pytest.raises(InputError, match=message):
        load_run(run, device="cpu")


def test_a_finished_run_with_damaged_weights_is_finished_again(
    short_run: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    before = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(b"")
    os.truncate(run / "trainer_state.json", 1000)
    mlm(f"--corpus {corpus} --output_dir {run} {COMMON} --max_steps 4 --eval_steps 2 --resume_from_checkpoint")
    assert "so the final files are written again" in caplog.text
    assert (run / "model.safetensors").read_bytes() == before
    load_run(run, device="cpu")


@pytest.mark.parametrize(
    "change", ["--direct_path never", "--num_hidden_layers 1", "--bin_gain_range 0", "--train_only votes"]
)
@pytest.mark.parametrize("more", ["", "--allow_changed"])
def test_a_checkpoint_of_another_shape_is_refused(change: str, more: str, short_run: Path, corpus: Path) -> None:
    before = (short_run / "run.yaml").read_bytes()
    name = change.split()[0].removeprefix("--")
    with pytest.raises(InputError, match=f"weights that do not fit these settings: {name} was"):
        mlm(
            f"--corpus {corpus} --output_dir {short_run} {COMMON} --max_steps 6 --eval_steps 2 "
            f"--resume_from_checkpoint {change} {more}"
        )
    assert (short_run / "run.yaml").read_bytes() == before


def test_a_classifier_starts_from_the_masked_model(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    run = cls(
        f"--corpus {corpus} --output_dir {tmp_path}/cls {QUIET} --pretrained_model_path {short_run} "
        "--phenotype_category cell_type --max_steps 1 --learning_rate 1e-9"
    )
    ours, theirs = load_run(run).model.genebert, GeneBertForPhenotypicMLM.from_pretrained(short_run).genebert
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_a_classifier_starts_with_the_votes_of_the_masked_model(
    short_run: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="perturbgene")
    run = cls(
        f"--corpus {corpus} --output_dir {tmp_path}/cls {QUIET} --phenotype_category phase "
        f"--pretrained_model_path {short_run} --max_steps 1 --learning_rate 1e-12"
    )
    masked, classifier = (load_file(folder / "model.safetensors") for folder in (short_run, run))
    tokenizer = GeneTokenizer.from_pretrained(short_run)
    start, stop = (bound - tokenizer.phenotype_id_ranges[0][0] for bound in tokenizer.vocabulary.id_range("phase"))
    votes_tk = masked["direct_labels.votes_tk"][:, start:stop]
    assert votes_tk.any() and "genes' votes for labels: kept" in caplog.text
    moved_tk = classifier["direct_classes.votes_tk"] - votes_tk  # the regression is drawn to them
    assert moved_tk.norm() < 0.5 * votes_tk.norm()


@pytest.mark.parametrize(("choice", "has_votes"), [("auto", True), ("always", True), ("never", False)])
def test_genes_vote_for_any_number_of_labels(choice: str, has_votes: bool, corpus: Path) -> None:
    config = parse_args(["mlm", "--corpus", str(corpus), "--output_dir", "x", "--model_arch", "tiny",
                         "--hidden_size", "8", "--num_attention_heads", "4", "--direct_path", choice])  # fmt: skip
    tokenizer = tokenizer_of(config, FileList())
    assert sum(map(len, tokenizer.phenotypes.values())) > 8
    found = model_config(config, tokenizer)
    assert found.direct_path is has_votes
    assert found.bin_levels[0] == 0 and found.bin_levels == sorted(found.bin_levels)


def test_a_classifier_never_sees_the_token_of_its_class(corpus: Path, tmp_path: Path) -> None:
    run = cls(f"--corpus {corpus} --output_dir {tmp_path}/cls {QUIET} --phenotype_category cell_type --max_steps 1")
    assert "cell_type" not in GeneTokenizer.from_pretrained(run).included_phenotypes


def test_one_against_the_rest_has_two_classes(corpus: Path, tmp_path: Path) -> None:
    config = parse_args(
        ["cls", *f"--corpus {corpus} --output_dir {tmp_path}/b {QUIET} --phenotype_category cell_type".split(),
         "--max_steps", "1", "--binary_label", "CD19+ B"]
    )  # fmt: skip
    assert load_run(run_cls(config)).class_labels == ["not CD19+ B", "CD19+ B"]  # type: ignore[arg-type]


def test_class_weights_average_one_over_the_training_cells() -> None:
    counts_k = np.array([30, 10, 0])
    weights_k = np.array(class_weights(counts_k))
    assert weights_k @ counts_k / counts_k.sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("flag", "is_balanced"), [("", True), ("--no_balanced_dataset", False)])
def test_a_balanced_dataset_weights_rare_classes_more(
    flag: str, is_balanced: bool, corpus: Path, tmp_path: Path
) -> None:
    run = cls(
        f"--corpus {corpus} --output_dir {tmp_path}/cls {QUIET} --phenotype_category cell_type --max_steps 1 "
        f"--direct_path never {flag}"
    )
    weights_k = json.loads((run / "config.json").read_text()).get("class_weights")
    assert (weights_k is not None) is is_balanced
    labels = pd.concat([ad.read_h5ad(path).obs["cell_type"] for path in Corpus.open(corpus).paths("train")])
    counts_k = labels.value_counts().reindex(load_run(run).class_labels)
    assert not is_balanced or np.argmax(weights_k) == np.argmin(counts_k)


def test_one_class_only_is_refused(cells: ad.AnnData, tmp_path: Path) -> None:
    alike = cells[cells.obs["bulk_labels"] == "Dendritic"].copy()
    corpus = prepare(alike, tmp_path / "c", phenotypes=["cell_type=bulk_labels"], num_top_genes=50)
    with pytest.raises(InputError, match="nothing to classify"):
        cls(f"--corpus {corpus} --output_dir {tmp_path}/r {QUIET} --phenotype_category cell_type --max_steps 1")


def test_an_output_folder_in_use_is_refused(short_run: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        mlm(f"--corpus {corpus} --output_dir {short_run} {QUIET} --max_steps 1")


def test_a_run_folder_that_another_process_writes_is_refused(corpus: Path, tmp_path: Path) -> None:
    holder = "import sys; from perturbgene.files import claimed\nwith claimed(sys.argv[1], flag='x', is_inside=True): "
    with subprocess.Popen(
        [sys.executable, "-c", holder + "print(flush=True); input()", str(tmp_path / "run")], stdin=-1, stdout=-1
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InputError, match="being written by another process.*--output_dir"):
            mlm(f"--corpus {corpus} --output_dir {tmp_path}/run {QUIET} --max_steps 1")
        process.kill()  # the lock goes with its process
    mlm(f"--corpus {corpus} --output_dir {tmp_path}/run {QUIET} --max_steps 1 --direct_path never")


def test_the_last_step_is_evaluated_once_with_every_question(short_run: Path) -> None:
    history = json.loads((short_run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    questions = json.loads((short_run / "metrics.json").read_text())["cell_type"]
    assert set(questions) > {"alone"}


def test_the_same_file_in_training_and_evaluation_is_refused(corpus: Path, tmp_path: Path) -> None:
    train = Corpus.open(corpus).paths("train")[0]
    with pytest.raises(InputError, match="allow_overlap"):
        mlm(f"--corpus {corpus} --eval_data_paths {train} --output_dir {tmp_path}/r {QUIET} --max_steps 1")


def test_the_same_url_in_training_and_evaluation_is_refused_without_its_token(short_run: Path, tmp_path: Path) -> None:
    files = "--train_data_paths https://host/a.h5ad?id=1 --eval_data_paths HTTPS://me:secret@HOST/a.h5ad?id=1"
    with pytest.raises(InputError, match=r"^'https://\*\*\*@HOST/a.h5ad\?\*\*\*' are in both .*allow_overlap"):
        mlm(f"--pretrained_model_path {short_run} {files} --output_dir {tmp_path}/r {QUIET} --max_steps 1")


def test_ranked_shards_train_without_a_corpus(corpus: Path, tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({"phase": ["[G1]", "[S]", "[G2M]"]}))
    run = mlm(
        f"--train_data_paths {corpus}/train/shard_*.h5ad --vocab_path {vocabulary} --bin_edges 0.5 1.5 "
        f"--num_top_genes 40 --output_dir {tmp_path}/r {QUIET} --max_steps 1"
    )
    tokenizer = GeneTokenizer.from_pretrained(run)
    assert (len(tokenizer.panel), tokenizer.included_phenotypes) == (40, ("phase",))


NONSENSE = {
    "a direct path for a model that is there": (
        "mlm --corpus {corpus} --pretrained_model_path {corpus} --direct_path never",
        "has its own. Remove --direct_path",
    ),
    "no corpus there": ("mlm --corpus {empty}", "is not a corpus|no tokenizer"),
    "unknown phenotype": ("cls --corpus {corpus} --phenotype_category mood", "not in the vocabulary"),
    "unknown included phenotype": ("mlm --corpus {corpus} --included_phenotypes mood", "not in the vocabulary"),
    "batch above the data": ("mlm --corpus {corpus} --per_device_train_batch_size 5000", "fewer than one batch"),
    "no weights there": ("mlm --corpus {corpus} --pretrained_model_path {empty}", "no GeneBERT weights"),
    "output below a file": ("mlm --corpus {corpus} --output_dir {corpus}/tokenizer.json/x", "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_gets_one_line_and_exit_code_2(
    arguments: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = arguments.format(corpus=corpus, empty=empty).split()
    code = main(words if "--output_dir" in words else [*words, "--output_dir", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])
