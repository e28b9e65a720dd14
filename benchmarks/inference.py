"""How fast a trained run answers: predict, embed and perturb, against one cell at a time and padded batches.

    python -m benchmarks.inference RUN CELLS.h5ad --towards "cell_type=B cell" --lengths 200 500 1000

Cells are cut to a number of genes, so that speed at several lengths is measured on the same model. Exact knock-outs are
timed on a sample of genes and scaled: `x` is against one edited cell at a time, `x ours` against our exact runs.
Seconds are processor seconds of one thread on the CPU (other work on the machine does not count), else by the clock.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.instructions import LIMITS, limit
from perturbgene.data_utils.data_collators import pad
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.eval_utils import inference_mode, to_device
from perturbgene.inference.run import Run, load_run
from perturbgene.perturbation.edits import changed_pairs, edit, perturbations_of
from perturbgene.perturbation.readouts import (
    LabelReadout,
    Readout,
    StateReadout,
    exact_effects,
    label_readout,
    read_block,
    sequences,
    token_budget,
)
from perturbgene.perturbation.screening import screen_removals

PADDED_CELLS = 64
EXACT_AFTER_SCREEN = 64


@dataclass
class Clock:
    """Seconds that named pieces of work took."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] = self.now() - start


def cut(block: TokenBlock, tokenizer_first_gene_type: int, num_genes: int) -> TokenBlock:
    """Keep the cells that express so many genes, each with so many drawn at random."""
    random = np.random.default_rng(0)
    kept = []
    for row in range(len(block)):
        types_l = block.cell(row)[1]
        genes = np.flatnonzero(types_l >= tokenizer_first_gene_type)
        if len(genes) >= num_genes:
            chosen = np.sort(random.choice(genes, num_genes, replace=False))
            others = np.flatnonzero(types_l < tokenizer_first_gene_type)
            kept.append((row, np.sort(np.concatenate([chosen, others]))))
    ids = [block.cell(row)[0][tokens] for row, tokens in kept]
    types = [block.cell(row)[1][tokens] for row, tokens in kept]
    if not ids:
        return TokenBlock(np.zeros(0, int), np.zeros(0, int), np.zeros(1, int), np.zeros(0, int))
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return TokenBlock(np.concatenate(ids), np.concatenate(types), offsets, np.arange(len(ids)))


def read_padded(run: Run, block: TokenBlock, readout: Readout, *, batch_size: int) -> np.ndarray:
    """Read cells as a plain implementation does: padded batches, every layer on every token."""
    values = []
    for start in range(0, len(block), batch_size):
        batch = to_device(pad(block.take(np.arange(start, min(start + batch_size, len(block))))), run.model.device)
        with inference_mode(run.model):
            if isinstance(readout, LabelReadout):
                first = readout.first_id or 0
                logits_nlv = run.model(**batch).logits
                values.append(
                    readout.log_odds(logits_nlv[:, 1, first : first + readout.num_labels].float()).cpu().numpy()
                )
            else:
                values.append(run.model.genebert(**batch).last_hidden_state[:, 0].float().cpu().numpy())
    return np.concatenate(values)


def reading_rows(run: Run, block: TokenBlock, towards: str) -> Iterator[dict[str, object]]:
    """Time `predict` and `embed` on whole cells."""
    readouts: dict[str, Readout] = {
        "predict": replace(label_readout(run, towards=towards), temperature=1.0),
        "embed": StateReadout("cls"),
    }
    for verb, readout in readouts.items():
        asked = sequences(block, run.tokenizer, readout)
        is_gene_l = asked.token_type_ids_l >= run.tokenizer.first_gene_type
        ways: dict[str, Callable[[], np.ndarray]] = {
            "one cell at a time": lambda asked=asked, readout=readout: read_padded(run, asked, readout, batch_size=1),
            f"padded batches of {PADDED_CELLS}": lambda asked=asked, readout=readout: read_padded(
                run, asked, readout, batch_size=PADDED_CELLS
            ),
            "ours": lambda asked=asked, readout=readout, is_gene_l=is_gene_l: read_block(
                run.model, asked, readout, is_counted_l=is_gene_l, budget=token_budget(run.model)
            ),
        }
        clock, found = Clock(run.model.device), {}
        for name, way in ways.items():
            way()  # warm up
            with clock.timing(name):
                found[name] = way()
        for name, seconds in clock.seconds.items():
            assert np.allclose(found[name], found["ours"], atol=1e-3), f"{verb}, {name}: another answer"
            yield {
                "verb": verb, "how": name, "cells": len(asked), "tokens/cell": len(asked.input_ids_l) / len(asked),
                "cells/s": len(asked) / seconds, "x": clock.seconds["one cell at a time"] / seconds,
            }  # fmt: skip


def knock_out_rows(
    run: Run, block: TokenBlock, towards: str, *, num_genes: int, sample: int
) -> Iterator[dict[str, object]]:
    """Time all knock-outs of cells with so many genes: plainly, exactly, screened; and say how good the screen is."""
    readout = replace(label_readout(run, towards=towards), temperature=1.0)
    asked = sequences(block, run.tokenizer, readout)
    every_gene = perturbations_of(["all"], run.tokenizer)
    cell_m, gene_m = changed_pairs(asked, every_gene, run.tokenizer)
    random = np.random.default_rng(0)
    chosen = np.sort(
        np.concatenate([random.permutation(np.flatnonzero(cell_m == cell))[:sample] for cell in range(len(asked))])
    )
    few = np.sort(random.choice(chosen, min(12, len(chosen)), replace=False))
    rooms = {"most_genes": len(run.tokenizer.panel)}  # as for every readout of a label
    clock = Clock(run.model.device)
    screen_removals(run, asked.take(np.arange(1)), readout)  # warm up
    exact_effects(run, asked, every_gene, readout, pairs=(cell_m[few], gene_m[few]))
    for name, batch_size in (("one edited cell at a time", 1), ("padded batches of 16", 16)):
        rows = few if batch_size == 1 else chosen[:48]
        with clock.timing(name):
            edited, _ = edit(asked, every_gene, run.tokenizer, pairs=(cell_m[rows], gene_m[rows]), **rooms)
            read_padded(run, edited, readout, batch_size=batch_size)
        clock.seconds[name] *= len(cell_m) / len(rows)
    with clock.timing("screen"):
        screened_l = screen_removals(run, asked, readout)
    with clock.timing("screen, float32"):
        screened_in_full_l = screen_removals(run, asked, readout, is_half=False)
    with clock.timing("ours, exact"):
        exact_m = exact_effects(run, asked, every_gene, readout, pairs=(cell_m[chosen], gene_m[chosen]))
    half = Run(copy.deepcopy(run.model).bfloat16(), run.tokenizer, run.path)
    with clock.timing("ours, exact, bfloat16"):
        half_m = exact_effects(half, asked, every_gene, readout, pairs=(cell_m[chosen], gene_m[chosen]))
    share = EXACT_AFTER_SCREEN * len(asked) / len(cell_m)
    for name in ("ours, exact", "ours, exact, bfloat16"):
        clock.seconds[name] *= len(cell_m) / len(chosen)
        both = name.replace("ours,", f"screen and {EXACT_AFTER_SCREEN}")
        clock.seconds[both] = clock.seconds["screen"] + share * clock.seconds[name]
    quality = {"ours, exact, bfloat16": half_m}
    for name, estimate_l in (("screen", screened_l), ("screen, float32", screened_in_full_l)):
        quality[name] = estimate_l[np.isfinite(estimate_l)][chosen]
    is_whole = sample >= num_genes
    for name, seconds in clock.seconds.items():
        row = {
            "verb": "perturb", "how": name, "cells": len(asked), "tokens/cell": len(asked.input_ids_l) / len(asked),
            "cells/s": len(asked) / seconds, "x": clock.seconds["one edited cell at a time"] / seconds,
            "x ours": clock.seconds["ours, exact"] / seconds,
        }  # fmt: skip
        if name in quality:
            row["spearman"], row["recall"] = _quality(cell_m[chosen], exact_m, quality[name], is_whole=is_whole)
        yield row


def _quality(cell_m: np.ndarray, exact_m: np.ndarray, screened_m: np.ndarray, *, is_whole: bool) -> tuple[float, float]:
    """Return means over cells: the rank correlation, and the share of the exact top 20 in the screened top 40."""
    orders, recalls = [], []
    for cell in np.unique(cell_m):
        exact, screened = exact_m[cell_m == cell], screened_m[cell_m == cell]
        orders.append(spearmanr(exact, screened).statistic)
        top = np.argsort(-np.abs(exact))[:20]
        recalls.append(np.isin(top, np.argsort(-np.abs(screened))[:40]).mean())
    return float(np.mean(orders)), float(np.mean(recalls)) if is_whole else float("nan")


def main() -> None:
    """Print one table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("cells")
    parser.add_argument("--towards", required=True, help="PHENOTYPE=LABEL")
    parser.add_argument("--lengths", type=int, nargs="*", default=[200, 500, 1000], help="genes per cell, for perturb")
    parser.add_argument("--num_cells", type=int, default=50)
    parser.add_argument("--sample", type=int, default=64, help="knock-outs per cell that are run exactly")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no_reading", action="store_true", help="leave predict and embed out")
    parser.add_argument("--isa", choices=LIMITS, default="own", help="instructions of the CPU; avx2: as most laptops")
    arguments = parser.parse_args()
    limit(arguments.isa, module="benchmarks.inference")
    torch.set_num_threads(1)
    run = load_run(arguments.run, device=arguments.device)
    bare = run.tokenizer.with_settings(included=[])
    block = next(IterableAnnDataset(arguments.cells, bare, batch_size=100_000).blocks())
    rows = (
        []
        if arguments.no_reading
        else list(reading_rows(run, block.take(np.arange(min(200, len(block)))), arguments.towards))
    )
    for num_genes in arguments.lengths:
        shorter = cut(block, run.tokenizer.first_gene_type, num_genes)
        if not len(shorter):
            print(f"no cell expresses {num_genes} genes of the panel")
            continue
        shorter = shorter.take(np.arange(min(arguments.num_cells, len(shorter))))
        rows += knock_out_rows(run, shorter, arguments.towards, num_genes=num_genes, sample=arguments.sample)
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep=""))


if __name__ == "__main__":
    main()
