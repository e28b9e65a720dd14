"""The model card: what is written again, and what is left as it is."""

from pathlib import Path

import pytest

from perturbgene.configs import MlmConfig
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.training.card import CARD_FILE, refresh_scores, write_card

SCORES = {"n": 90, "accuracy": 0.8, "macro_f1": 0.7, "log_loss": 0.5}
RESULTS = {"cell_type": {"alone": SCORES, "ridge": {**SCORES, "accuracy": 0.9, "best": True, "log_loss": None}}}
NAMES = {"alone": "nothing given", "ridge": "(baseline) ridge"}


@pytest.fixture
def run(tmp_path: Path, four_gene_tokenizer: GeneTokenizer) -> Path:
    """The folder of a run with a card as training writes it."""
    write(tmp_path / "run|x", four_gene_tokenizer)
    return tmp_path / "run|x"


def write(folder: Path, tokenizer: GeneTokenizer) -> str:
    """Write the card and return its text."""
    folder.mkdir(exist_ok=True)
    config = MlmConfig(output_dir=str(folder), corpus=str(folder / "moved"))
    own = {name: {"alone": SCORES} for name in ("cell_type", "sex")}
    write_card(folder, config, tokenizer, own, corpus=None, num_cells=1_234, kept=["labels: 2 kept"])
    return (folder / CARD_FILE).read_text()


def test_a_card_says_what_the_run_is_for_and_what_it_was_trained_on(run: Path) -> None:
    text = (run / CARD_FILE).read_text()
    assert "Predicts sex, cell\\_type of single cells" in text and "It is not made for diagnosis" in text
    assert "| cells | 1,234 |" in text and "2 labels: 'B cell', 'T cell' |" in text and "- labels: 2 kept" in text
    assert "| cell\\_type | alone | 90 | 0.800 | 0.700 | 0.500 |  |" in text
    assert "perturbgene predict" in text and "# run\\|x: GeneBERT mlm model" in text


def test_evaluate_adds_the_baselines_and_says_who_wins(run: Path) -> None:
    refresh_scores(run, RESULTS, NAMES)
    text = (run / CARD_FILE).read_text()
    assert "- cell\\_type: the run is right in 80.0% of the cells, (baseline) ridge in 90.0%: use that" in text
    assert "(baseline) ridge (best) | 90 | 0.900" in text and "| sex | alone" not in text
    refresh_scores(run, RESULTS, NAMES)
    assert (run / CARD_FILE).read_text() == text


def test_text_by_hand_stays(run: Path, four_gene_tokenizer: GeneTokenizer) -> None:
    path = run / CARD_FILE
    text = path.read_text()
    path.write_text(text.replace("## Use it", "## Ours\r\n\nAsk Ada.\n## Use it"), newline="")
    refresh_scores(run, RESULTS, NAMES)
    refreshed = path.read_bytes()
    assert b"## Ours\r\n\nAsk Ada.\n" in refreshed and b"(baseline) ridge" in refreshed
    assert "Ask Ada." in write(run, four_gene_tokenizer)  # also when the run is trained again


def test_a_file_that_is_not_ours_is_never_replaced(tmp_path: Path, four_gene_tokenizer: GeneTokenizer, caplog) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CARD_FILE).write_text("My own words.")
    assert write(folder, four_gene_tokenizer) == "My own words."
    assert "was not written by perturbgene and stays as it is" in caplog.text
    refresh_scores(folder, RESULTS, NAMES)
    assert (folder / CARD_FILE).read_text() == "My own words."
    (folder / CARD_FILE).write_bytes(b"\xff\xfe")
    refresh_scores(folder, RESULTS, NAMES)
    assert (folder / CARD_FILE).read_bytes() == b"\xff\xfe" and "are not in the model card" in caplog.text
