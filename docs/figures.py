"""Draw the figures of docs/concepts.md: three sketches, and the calibration of a run on real cells.

`python docs/figures.py` writes docs/figures/*.svg; it takes a minute. The cells are the 700 blood cells that come with
scanpy, of which 140 train a run without votes, 280 fit its temperature and 280 are drawn.
"""

import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
#: Width and height of a box, colors of phenotypes, genes and marks; all are read on a white ground in dark mode, too.
WIDTH, HEIGHT = 92, 30
PHENOTYPE, GENE, MARK = "#cfe3f5", "#fde2c4", "#e6e6e6"


def box(x: float, y: float, text: str, color: str, below: str = "") -> str:
    """Return a box with a text in it, and one below it."""
    middle = x + WIDTH / 2
    note = f'<text x="{middle}" y="{y + HEIGHT + 14}" font-size="11" text-anchor="middle">{below}</text>'
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{color}" stroke="#555"/>'
        f'<text x="{middle}" y="{y + 19}" font-size="12" text-anchor="middle">{text}</text>{note * bool(below)}'
    )


def words(x: float, y: float, text: str, size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}">{text}</text>'


def write(name: str, width: int, height: int, parts: list[str]) -> None:
    """Write a picture with a white ground."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    text = "\n".join([f'{head} font-family="sans-serif" fill="#222">', ground, *parts, "</svg>\n"])
    (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def row(y: float, boxes: list[tuple[str, str, str]], *, x: float = 10) -> list[str]:
    return [box(x + number * (WIDTH + 6), y, *one) for number, one in enumerate(boxes)]


def sketches() -> None:
    """Draw a cell as a sentence, the three ways to treat a phenotype, and a knock-out."""
    phenotypes = [("[CLS]", MARK, ""), ("T cell", PHENOTYPE, "cell_type"), ("lung", PHENOTYPE, "tissue")]
    genes = [("bin_7", GENE, "GATA3"), ("bin_2", GENE, "CD3D"), ("[EOS]", MARK, "")]
    write("tokens", 606, 66, row(10, [*phenotypes, *genes]))
    told = [
        ("given", "lung", "this cell is from lung"),
        ("asked", "[MASK]", "which tissue is it from?"),
        ("absent", "", "nothing is said about it"),
    ]
    parts = []
    for number, (name, text, meaning) in enumerate(told):
        boxes = [
            ("[CLS]", MARK, ""),
            *([(text, PHENOTYPE, "")] if text else []),
            ("bin_7", GENE, ""),
            ("...", GENE, ""),
        ]
        y = 10 + 44 * number
        parts += [words(10, y + 19, name), *row(y, boxes, x=68), words(470, y + 19, meaning)]
    write("given", 640, 140, parts)
    after = [("[CLS]", MARK, ""), ("[MASK]", PHENOTYPE, ""), ("bin_2", GENE, "CD3D")]
    before = [*after[:2], ("bin_7", GENE, "GATA3"), after[2]]
    parts = [words(10, 29, "before"), *row(10, before, x=68), words(470, 29, "log-odds of T cell: a")]
    parts += [words(10, 89, "after"), *row(70, after, x=68), words(470, 89, "log-odds of T cell: b")]
    write("knock_out", 640, 142, [*parts, words(470, 130, "effect = b - a")])


def calibration() -> None:
    """Draw probabilities against shares of right answers, before and after the temperature."""
    import anndata as ad
    import matplotlib.pyplot as plt
    import numpy as np
    import scanpy as sc

    import perturbgene as pg

    whole = sc.datasets.pbmc68k_reduced()
    cells = whole.raw.to_adata()
    cells.obs["cell_type"] = whole.obs["bulk_labels"].astype(str)
    with tempfile.TemporaryDirectory() as folder:
        corpus = pg.prepare(cells, f"{folder}/corpus", phenotypes="cell_type", split_by="cell", eval_fraction=0.8)
        run = pg.mlm(
            corpus=corpus, output_dir=f"{folder}/run", direct_path="never", num_hidden_layers=1, max_length=128,
            num_train_epochs=60, gene_drop_prob=0.0, weight_decay=0.0, eval_strategy="no", save_strategy="no",
            report_to="none",
        )  # fmt: skip
        scores = pg.evaluate(run, output=f"{folder}/evaluation")["cell_type"]["alone"]
        obs = ad.read_h5ad(f"{folder}/evaluation/cells.h5ad").obs
    print(scores["calibration"])
    tested = obs[~obs["fitted_cell_type"].to_numpy(dtype=bool)]
    right_n = (tested["predicted_cell_type"].astype(str) == tested["cell_type"].astype(str)).to_numpy()
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    columns = {"before": "predicted_cell_type_raw_probability", "after evaluate": "predicted_cell_type_probability"}
    for (label, column), marker in zip(columns.items(), "os", strict=True):
        probability_n = tested[column].to_numpy()
        groups = np.array_split(np.argsort(probability_n), 5)
        shares = [right_n[group].mean() for group in groups]
        errors = [right_n[group].std() / np.sqrt(len(group)) for group in groups]
        means = [probability_n[group].mean() for group in groups]
        axis.errorbar(means, shares, errors, label=label, marker=marker, capsize=3, lw=1)
    axis.plot([0.2, 1], [0.2, 1], color="gray", lw=1)
    axis.set(xlabel="mean probability of the answer", ylabel="share of answers that are right")
    axis.set_title(f"cell type of {len(tested)} held-out blood cells, fifths", fontsize=10)
    axis.legend()
    plt.rcParams |= {"svg.hashsalt": "perturbgene", "svg.fonttype": "none"}  # text stays text, so the file is small
    figure.savefig(FOLDER / "calibration.svg", metadata={"Date": None})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    sketches()
    calibration()
