"""What do in-silico knock-outs tell of real ones? `python -m benchmarks.papalexi --data CELLS.h5ad --folder FOLDER`.

Owns one experiment on cells of a CRISPR screen (`perturbation` in `obs`: the gene that was knocked out, or "control";
`bio_rep`: the replicate): a small masked model learns from all replicates but one, and what it answers on the control
cells of the last is held against what the knock-outs did to the cells of the last. Letters: g genes, s strata.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, stats

from perturbgene.counterfactuals.contrast import Contrast, GenePredictor
from perturbgene.counterfactuals.counterfactual import counterfactual
from perturbgene.counterfactuals.statistics import weigh_strata
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM, pack
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.inference.run import Run, load_run
from perturbgene.inference.streaming import open_cells, stream_batches
from perturbgene.main import main as perturbgene
from perturbgene.perturbation.perturb import perturb

LABEL, CONTROL, REPLICATE = "perturbation", "control", "bio_rep"
HIDDEN, PASSES, SEED = 0.5, 4, 0  # share of genes hidden when others are predicted, masks per cell
LEAST_SHARE = 0.05  # genes that fewer control cells express are left out: what is observed of them is noise
#: A knock-out is strong if so many genes change by so large a t in the training replicates, and in so many cells.
MOVED_T, MOVED_GENES, MOVED_CELLS = 4.0, 10, 100
RANDOM_GENES, RANDOM_SHARE = 20, 0.5  # knock-outs for comparison, of genes that at least half of the controls express


def read_cells(path: Path) -> ad.AnnData:
    """Read counts with the two columns; symbols (`feature_name`) tell which gene a label means."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file, and these cells do not ship with perturbgene. Change --data.")
    cells = ad.read_h5ad(path)
    missing = [name for name in (LABEL, REPLICATE) if name not in cells.obs]
    if missing:
        raise InputError(f"obs of {str(path)!r} has no {' and no '.join(missing)}. Add the column, or change --data.")
    cells.obs[[LABEL, REPLICATE]] = cells.obs[[LABEL, REPLICATE]].astype(str)
    return cells


def log_values(cells: ad.AnnData) -> pd.DataFrame:
    """Return log1p of counts per 10,000, cells x genes."""
    counts_ng = sparse.csr_matrix(cells.X).toarray()
    return pd.DataFrame(np.log1p(counts_ng * (1e4 / counts_ng.sum(1, keepdims=True))), columns=cells.var_names)


def observed_changes(cells: ad.AnnData, labels: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the mean change against control and Welch's t, each genes x labels."""
    values, own_n = log_values(cells), cells.obs[LABEL].to_numpy()
    controls = values[own_n == CONTROL]
    changes = {label: values[own_n == label].mean() - controls.mean() for label in labels}
    with np.errstate(divide="ignore", invalid="ignore"):
        tests = {label: stats.ttest_ind(values[own_n == label], controls, equal_var=False)[0] for label in labels}
    return pd.DataFrame(changes), pd.DataFrame(tests, index=values.columns).fillna(0.0)


def train(data: Path, folder: Path, *, held_out: str, epochs: int) -> Run:
    """Prepare a corpus without a replicate and train one layer on it; what is there already is used again."""
    corpus, run = folder / "corpus", folder / "mlm"
    split = ["--phenotypes", LABEL, "--split_by", REPLICATE, "--eval_donors", held_out]
    rates = ["--gene_mask_prob", "0.6", "--phenotype_mask_prob", "0.3", "--absent_prob", "0", "--gene_loss_weight", "3"]
    size = f"--model_arch tiny --num_hidden_layers 1 --learning_rate 2e-3 --num_train_epochs {epochs}".split()
    quiet = ["--report_to", "none", "--eval_strategy", "no", "--save_strategy", "no", "--no_bf16", "--use_cpu"]
    if not corpus.exists() and perturbgene(["prepare", str(data), "--output", str(corpus), *split]):
        raise SystemExit(2)  # the verb has said why
    mlm = ["mlm", "--corpus", str(corpus), "--output_dir", str(run), *rates, *size, *quiet]
    if not (run / "model.safetensors").exists() and perturbgene(mlm):
        raise SystemExit(2)
    return load_run(run, device="cpu")


def label_changes(run: Run, controls: ad.AnnData, labels: Iterable[str]) -> pd.DataFrame:
    """Return the change that `counterfactual` expects of each gene when the label is set, genes x labels."""
    asking: dict[str, Any] = {"given": {}, "num_null": 0, "gene_mask_prob": HIDDEN, "num_passes": PASSES}
    tables = {label: counterfactual(controls, run, set={LABEL: label}, **asking) for label in labels}
    return pd.DataFrame({label: table.set_index("gene")["change"] for label, table in tables.items()})


def label_effects(run: Run, controls: ad.AnnData, labels: Iterable[str]) -> pd.DataFrame:
    """Return how far `perturb`'s knock-out of each gene moves controls towards the label, in nats, genes x labels."""
    asking: dict[str, Any] = {"from_": f"{LABEL}={CONTROL}", "top_k": 0, "num_controls": 0}
    tables = {label: perturb(controls, run, towards=f"{LABEL}={label}", **asking) for label in labels}
    effects = pd.DataFrame({label: table.set_index("perturbation")["effect"] for label, table in tables.items()})
    return effects.set_axis(
        [run.tokenizer.panel.genes[at] for at in run.tokenizer.panel.find_all(effects.index, flag="genes")]
    )


def _without(block: TokenBlock, labels_l: np.ndarray, token_type: int) -> tuple[TokenBlock, np.ndarray]:
    """Remove a gene's token from masked cells, where it is not hidden itself."""
    stays_l = (block.token_type_ids_l != token_type) | (labels_l != -100)
    offsets_n1 = np.concatenate([[0], np.cumsum(stays_l)])[block.offsets_n1]
    tokens = block.input_ids_l[stays_l], block.token_type_ids_l[stays_l]
    return TokenBlock(*tokens, offsets_n1, block.cells_n), labels_l[stays_l]


def token_changes(run: Run, controls: ad.AnnData, genes: Iterable[str]) -> pd.DataFrame:
    """Return the expected change of hidden genes when a gene's token is removed, no label given, genes x knock-outs."""
    dataset = open_cells(controls, run, {})
    tokenizer, names = dataset.tokenizer, list(genes)
    num_genes, types = len(tokenizer.panel), tokenizer.first_gene_type + tokenizer.panel.find_all(names, flag="genes")
    predictor = GenePredictor(run, Contrast(LABEL, 0, num_null=0), tokenizer=tokenizer)
    collator = DataCollatorForPhenotypicMLM(tokenizer, packed=True, seed=SEED, gene_mask_prob=HIDDEN)
    sums, counts_sg = np.zeros((len(names), 2 * num_genes)), np.zeros(2 * num_genes)
    for block in stream_batches(dataset, text="knock-outs"):
        for number in range(PASSES):
            masked, labels_l = collator.mask(replace(block, epochs_n=np.full(len(block), number, dtype=np.int64)))
            hidden = labels_l != -100
            gene_m = masked.token_type_ids_l[hidden].astype(np.int64) - tokenizer.first_gene_type
            place_m = gene_m + num_genes * (labels_l[hidden] == tokenizer.first_bin_id)
            counts_sg += np.bincount(place_m, minlength=2 * num_genes)
            before_m = _expected(predictor, masked, labels_l)
            for row, token_type in enumerate(types):
                change_m = _expected(predictor, *_without(masked, labels_l, token_type)) - before_m
                sums[row] += np.bincount(place_m, change_m, minlength=2 * num_genes)
    share_g = (log_values(controls) > 0).mean()[list(tokenizer.panel.genes)]
    share_skg = np.stack([share_g, 1 - share_g]).reshape(2, 1, -1)
    changes = weigh_strata(sums.reshape(-1, 2, 1, num_genes), counts_sg.reshape(2, 1, -1), share_skg)[:, 0]
    return pd.DataFrame(changes.T, index=share_g.index, columns=names)


def _expected(predictor: GenePredictor, block: TokenBlock, labels_l: np.ndarray) -> np.ndarray:
    return predictor.expected({name: t for name, t in pack(block, labels_l=labels_l).items() if name != "labels"})[:, 0]


def correlations(predicted: pd.DataFrame, observed: pd.DataFrame, *, without: dict[str, str]) -> pd.DataFrame:
    """Return Spearman's correlation with a label's own prediction, its mean with all others, and Pearson's, by label.

    Genes that either lacks do not count, nor does the gene that `without` names for a label: that it falls is no news.
    """
    rows = {}
    for label in observed:
        both = predicted.drop(index=without.get(label, []), errors="ignore")
        truth = observed[label].reindex(both.index)
        ranks, linear = both.corrwith(truth, method="spearman"), both.corrwith(truth)
        rows[label] = [ranks.get(label, np.nan), ranks.drop(label, errors="ignore").mean(), linear.get(label, np.nan)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["own", "others", "pearson"])


def compare(data: Path, folder: Path, *, held_out: str, epochs: int) -> pd.DataFrame:
    """Run the experiment; returns a row per knock-out, the one that moves most genes first."""
    cells = read_cells(data)
    labels = sorted(set(cells.obs[LABEL]) - {CONTROL})
    is_new_n = (cells.obs[REPLICATE] == held_out).to_numpy()
    old, new = cells[~is_new_n], cells[is_new_n]
    controls = new[(new.obs[LABEL] == CONTROL).to_numpy()].copy()
    if not len(controls):
        raise InputError(f"no {CONTROL} cell is of {REPLICATE} {held_out!r}. Change --held_out.")
    run = train(data, folder.resolve(), held_out=held_out, epochs=epochs)
    share_g = (log_values(controls) > 0).mean()
    symbols = cells.var.get("feature_name", pd.Series(cells.var_names, cells.var_names)).astype(str)
    gene_of = {label: gene for gene, label in symbols.items() if label in labels and share_g[gene] >= LEAST_SHARE}
    common = share_g.index[(share_g >= RANDOM_SHARE) & ~share_g.index.isin(gene_of.values())]
    drawn = np.random.default_rng(SEED).permutation(common)[:RANDOM_GENES]
    looked_up, t = observed_changes(old, labels)
    effects, tokens = label_effects(run, controls, labels), token_changes(run, controls, [*gene_of.values(), *drawn])
    answers = {
        "table": looked_up,
        "others' mean": pd.DataFrame({label: looked_up.drop(columns=label).mean(axis=1) for label in labels}),
        "set label": label_changes(run, controls, labels),
        "knock-outs": -effects,  # a gene that falls is one whose removal leads towards the label
        "token": tokens.rename(columns={gene: label for label, gene in gene_of.items()}),
    }
    observed = observed_changes(new, labels)[0][share_g >= LEAST_SHARE]
    found = pd.DataFrame({"genes moved": (t.abs() > MOVED_T).sum()})
    for name, part in {"trained on": old, "held out": new}.items():
        found[name] = part.obs[LABEL].value_counts().reindex(labels, fill_value=0)
    for name, predicted in answers.items():
        found[[name, f"{name}, others", f"{name}, r"]] = correlations(predicted, observed, without=gene_of)
    ranks = effects.rank(ascending=False)
    found["rank"] = pd.Series({label: ranks[label].get(gene, np.nan) for label, gene in gene_of.items()}, dtype=float)
    return found.sort_values("genes moved", ascending=False)


def with_means(found: pd.DataFrame) -> pd.DataFrame:
    """Add the means of strong knock-outs and of the rest; t of few cells is no evidence."""
    is_strong = (found["genes moved"] >= MOVED_GENES) & (found["trained on"] >= MOVED_CELLS)
    return pd.concat([found, pd.DataFrame({"strong": found[is_strong].mean(), "the rest": found[~is_strong].mean()}).T])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papalexi", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="h5ad with counts, obs perturbation and bio_rep")
    parser.add_argument("--folder", type=Path, required=True, help="for the corpus and the run")
    parser.add_argument("--held_out", default="rep_3", help="replicate that the model never sees")
    parser.add_argument("--epochs", type=int, default=20, help="of training")
    try:
        table = with_means(compare(**vars(parser.parse_args())))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    print(table.to_string(float_format="{:.2f}".format, na_rep=""))
