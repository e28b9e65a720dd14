"""The model card: `README.md` of a run folder, with two parts that are written again and text that stays as it is.

Owns where these parts begin and end, and what they say; leaves scores to those who measure them.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbgene import __version__
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import listed
from perturbgene.files import write_text
from perturbgene.urls import shown_path

if TYPE_CHECKING:
    from perturbgene.configs import TrainingConfig

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
#: First lines of every card that we write.
FRONT = "---\nlibrary_name: transformers\ntags: [single-cell, gene-expression, perturbgene]\n---\n"
#: Around a part that is written again; other text is the reader's own.
BEGIN, END = "<!-- perturbgene writes this part again: {} -->", "<!-- end of {} -->"
TRAINING, SCORES = "training", "scores"


def part(name: str, lines: Sequence[str]) -> str:
    """Return a part of a card that may be written again."""
    return "\n".join([BEGIN.format(name), "", *lines, "", END.format(name)])


def with_part(text: str, name: str, lines: Sequence[str]) -> str | None:
    """Return the card with one part written again; None if the card does not have it, or has it twice.

    Example:
        >>> card = "mine\\n" + part("scores", ["old"]) + "\\nmine too"
        >>> with_part(card, "scores", ["new"]) == card.replace("old", "new"), with_part("mine", "scores", ["new"])
        (True, None)
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = text.partition(begin)
    _, is_closed, after = rest.partition(end)
    if not found or not is_closed or begin in after:
        return None
    return before + part(name, lines) + after


def one_line(text: object) -> str:
    """Write a name into a cell of a table, as it is: neither markup nor the end of the cell."""
    marks: dict[str, str | int | None] = {mark: f"\\{mark}" for mark in "\\|`*_[]<>#"}
    return " ".join(str(text).split()).translate(str.maketrans(marks))


def table_lines(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table in Markdown."""
    texts = [names, ["---"] * len(names), *([one_line(value) for value in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in texts]


def training_lines(
    config: "TrainingConfig", tokenizer: GeneTokenizer, *, corpus: Corpus | None, num_cells: int, kept: Sequence[str]
) -> list[str]:
    """Return what a card says of the training: cells, donors, labels, settings, and what was kept of a start."""
    rows: list[tuple[str, str]] = [("cells", f"{num_cells:,}"), ("genes", f"{len(tokenizer.panel):,}")]
    if corpus:
        rows += _about_corpus(corpus)
    for name in tokenizer.included_phenotypes:
        labels = tokenizer.phenotypes[name]
        rows.append((name, f"{len(labels):,} labels: {listed(labels, most=12)}"))
    rows.append(("model", f"{config.model_arch}; all settings are in run.yaml"))
    started = [f"Its weights started from {shown_path(str(config.pretrained_model_path))}:", ""] if kept else []
    return [
        "## Training", "", f"Trained by perturbgene {__version__} (`{config.verb}`).", "", *table_lines(("", ""), rows),
        *(["", *started, *(f"- {line}" for line in kept)] if kept else []),
    ]  # fmt: skip


def _about_corpus(corpus: Corpus) -> list[tuple[str, str]]:
    """Return rows about a corpus: its files, donors, and what `prepare` found."""
    manifest = corpus.manifest
    split, donors = manifest["split"], "no donors are named"
    if "train" in split:
        num_train, num_eval = len(split["train"]), len(split["eval"])
        donors = f"{num_train:,} in training, {num_eval:,} held out"
    found = [("found by prepare", finding) for finding in manifest["audit"]]
    num_files = len(manifest["inputs"])
    return [("corpus", f"{corpus.folder.name}, {num_files:,} file{'s' * (num_files > 1)}"), ("donors", donors), *found]


def score_lines(results: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return what a card says of held-out cells: every question and baseline, the best marked, and who that is.

    Args:
        results: As `evaluate` returns them, or as training has measured them, without baselines.
        names: What to call questions and baselines.
    """
    rows, sentences = [], []
    for category, scores_of in results.items():
        if category == "embedding":
            continue
        best = next((name for name, scores in scores_of.items() if scores.get("best")), "")
        if best:
            first, own = next(iter(scores_of.items()))
            text = f"the run is right in {own['accuracy']:.1%} of the cells, "
            rest = f"{one_line(names.get(best, best))} in {scores_of[best]['accuracy']:.1%}: use that, or train better"
            text += "at least as many as every baseline" if best == first else rest
            sentences.append(f"- {one_line(category)}: {text}.")
        for name, scores in scores_of.items():
            fitted, marked = scores.get("calibration", {}), " (best)" if name == best else ""
            rows.append([
                category, names.get(name, name) + marked, f"{scores['n']:,}", f"{scores['accuracy']:.3f}",
                f"{scores['macro_f1']:.3f}", _number(scores.get("log_loss")), _number(fitted.get("ece_after")),
            ])  # fmt: skip
    columns = ("phenotype", "question", "cells", "accuracy", "macro F1", "log loss", "calibration error")
    lines = ["## Scores on held-out cells", "", *table_lines(columns, rows), ""]
    return [*lines, *(sentences or ["Baselines come with `perturbgene evaluate`."])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def write_card(
    folder: Path, config: "TrainingConfig", tokenizer: GeneTokenizer, results: Mapping[str, Any], *,
    corpus: Corpus | None, num_cells: int, kept: Sequence[str],
) -> None:  # fmt: skip
    """Write the card of a new run, unless its folder has one by hand; of ours, text around the parts stays.

    Args:
        folder: Where the card is put; the run folder itself is `config.output_dir`.
        config, tokenizer: Of the run.
        results: Scores of held-out cells by phenotype and question.
        corpus: That it was trained on.
        num_cells: Training cells.
        kept: Lines about what was kept of the run's start.
    """
    training = training_lines(config, tokenizer, corpus=corpus, num_cells=num_cells, kept=kept)
    scores, older = score_lines(results, {}), Path(config.output_dir) / CARD_FILE
    text = older.read_bytes().decode(errors="replace") if older.is_file() else FRONT
    changed = with_part(text, TRAINING, training)
    changed = None if changed is None else with_part(changed, SCORES, scores)
    if changed is None and not text.startswith(FRONT):
        logger.warning("%s was not written by perturbgene and stays as it is", older)
        return
    name, use = Path(config.output_dir).name, f"perturbgene predict {config.output_dir} cells.h5ad --output out.h5ad"
    asked = getattr(config, "phenotype_category", "") or ", ".join(tokenizer.included_phenotypes) or "hidden genes"
    new = [
        f"# {one_line(name)}: GeneBERT {config.verb} model", "",
        f"Predicts {one_line(asked)} of single cells from their gene expression, for research. It is not made for "
        "diagnosis. Answers about other tissues, technologies or species than those of its training cells may be wrong "
        "however sure they sound; `predict --ood` says how unusual each cell is.", "",
        part(TRAINING, training), "", part(SCORES, scores), "", "## Use it", "", "```bash", use, "```", "",
        "```python", "import perturbgene as pg", "", f"cells = pg.predict('cells.h5ad', {config.output_dir!r})", "```",
        "",
    ]  # fmt: skip
    (folder / CARD_FILE).write_text(changed if changed is not None else FRONT + "\n".join(new), encoding="utf-8")


def refresh_scores(run: Path, results: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Write the scores of an evaluation into the card of a run; without the part for them, it stays as it is."""
    path = run / CARD_FILE
    try:
        text = path.read_bytes().decode()
        if (changed := with_part(text, SCORES, score_lines(results, names))) is None:
            logger.info("%s has no part for scores, so it stays as it is", path)
        elif changed != text:
            write_text(path, changed)
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("the scores are not in the model card: %s (%s)", path, error)
