"""How far to believe a knock-out or a counterfactual: held-out scores, and what is known from a real screen.

Owns reading scores of a run folder and the sentences about them; leaves what the cells say to `effects`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perturbgene.eval_utils import GIVEN
from perturbgene.files import read_json
from perturbgene.inference.evaluate import row_name
from perturbgene.inference.held_out import SCORE_FILES

SOURCE = "Papalexi 2021, 20,729 cells, 6 strong knock-outs; docs/perturbation.md says more"
#: How far answers of a kind were right on a real screen, as docs/perturbation.md reports it.
REAL_SCREEN = {
    "label": (
        "On a real CRISPR screen, knock-outs towards a label agreed with what the real ones did by a rank correlation "
        "of 0.51 to 0.52, below a table of what other replicates showed (0.64 to 0.71), and not at all (0.04 or less) "
        f"for weak ones ({SOURCE})."
    ),
    "state": (
        "How far a cell's state moves was never compared with a real screen; effects on a label were, with a rank "
        f"correlation of 0.51 to 0.52 for strong knock-outs ({SOURCE})."
    ),
    "counterfactual": (
        "On a real CRISPR screen, such changes agreed with the observed ones by a rank correlation of 0.40 to 0.45, "
        "below a table of what other replicates showed (0.64 to 0.71), were about a tenth of their size, and said "
        f"nothing (0.04 or less) about weak ones ({SOURCE})."
    ),
}


def read_scores(run: str) -> tuple[dict[str, Any], bool]:
    """Return the scores of a run on held-out cells by phenotype, and whether `evaluate` has computed them.

    Those of its training come without baselines other than the most frequent label; a run that is no folder has none.
    """
    for name in reversed(SCORE_FILES):
        try:
            found = read_json(Path(run) / name)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found, name != SCORE_FILES[0]
    return {}, False


def score_rows(scores: Mapping[str, Any], phenotypes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each phenotype, question with nothing given and baseline; also of training the majority's."""
    rows = []
    for name in phenotypes:
        of_phenotype = scores.get(name) or {}
        for kind, one in of_phenotype.items():
            if kind.startswith(GIVEN):
                continue
            text = row_name(kind)
            row = {"phenotype": name, "name": text.removeprefix("(baseline) "), "best": bool(one.get("best"))}
            row |= {key: one.get(key) for key in ("n", "accuracy", "macro_f1")}
            rows.append({**row, "is_baseline": text.startswith("(baseline)")})
        share = next((one["majority_share"] for one in of_phenotype.values() if "majority_share" in one), None)
        if share is not None and "majority" not in of_phenotype:
            most = {"name": "most frequent label", "accuracy": share, "n": rows[-1]["n"], "macro_f1": None}
            rows.append({"phenotype": name, "is_baseline": True, "best": False, **most})
    return rows


def about_scores(run: str, phenotypes: Sequence[str]) -> list[str]:
    """Say how often the run is right about the first phenotype, and the best baseline; or that nobody has looked."""
    if not phenotypes:
        return ["The effects are on no label, so no score of the run says how far to believe them."]
    scores, is_evaluated = read_scores(run)
    name, rows = phenotypes[0], score_rows(scores, phenotypes[:1])
    own = next((row for row in rows if not row["is_baseline"]), None)
    todo = f"`perturbgene evaluate {run}` compares it with baselines"
    if own is None or own["accuracy"] is None:
        return [f"The run was never scored on {name} of held-out cells, so nothing says how well it knows it ({todo})."]
    text = f"{name}: the run is right in {100 * own['accuracy']:.1f} % of {own['n']:,} held-out cells"
    others = [row for row in rows if row["is_baseline"] and row["accuracy"] is not None]
    best = max(others, key=lambda row: row["accuracy"], default=None)
    if best is not None:
        text += f", {best['name']} in {100 * best['accuracy']:.1f} %"
    if num_seen := scores[name][next(iter(scores[name]))].get("n_training_cells"):
        text += f"; {num_seen:,} of them are training cells, so the score is too good"
    return [f"{text}." if is_evaluated else f"{text}. It was never evaluated ({todo})."]
