"""The direct path: solve the genes' votes as a regression, and find out how much the transformer may add to them.

Owns the regression's penalty and solution and the transformer's shares; leaves the linear term itself to
`model.heads`. Letters: n cells, g genes, t token types, k labels of a phenotype.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.model_selection import GroupKFold, KFold

from perturbgene.data_utils.data_collators import collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.eval_utils import Question, class_logits, question_logits, standard_questions, true_labels
from perturbgene.model import GeneBertForClassification
from perturbgene.model.layers import expression_levels

logger = logging.getLogger(__name__)

#: Weights of the penalty, strongest first, relative to the summed variance of the genes' expression.
PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
NUM_FOLDS = 3
#: Expressed genes that a regression is solved on, in all cells together (8 bytes each); more cells are thinned evenly.
MOST_VALUES = 50_000_000
MOST_ITERATIONS = 300
#: What the transformer's logits may be multiplied by.
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
#: Held-out cells that the shares are chosen on, and fewer of them than are worth a choice.
MOST_CELLS, LEAST_CELLS = 5_000, 30


# -- the regression -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """A multinomial regression on centered expression: `votes_gk` and the intercepts of cells as they are."""

    votes_gk: np.ndarray
    intercept_k: np.ndarray

    def logits(self, expression_ng: sparse.csr_matrix) -> np.ndarray:
        """Return the logits of cells, float64 of shape (n, k)."""
        return np.asarray(expression_ng @ self.votes_gk) + self.intercept_k


def solve(
    expression_ng: sparse.csr_matrix,
    label_n: np.ndarray,
    *,
    penalty: float,
    prior: Regression,
    start: Regression | None = None,
    weight_k: np.ndarray | None = None,
) -> Regression:
    """Return the multinomial regression with a squared penalty on how far the votes are from a prior's.

    Minimizes, by L-BFGS, the mean negative log-likelihood (nats) plus half of `penalty` times the summed squares of
    `votes - prior`, where expression is scaled so that the variances of all genes add up to 1. Intercepts are free.

    Args:
        expression_ng: Expression of n cells.
        label_n: Label of each cell, 0..k-1.
        penalty: Weight of the penalty.
        prior: What the votes are drawn to.
        start: Where to start; by default at the prior.
        weight_k: Weight of the cells of each label; by default 1.
    """
    num_cells, shape = expression_ng.shape[0], prior.votes_gk.shape
    start, transposed_gn = start or prior, expression_ng.T.tocsr()
    mean_g = np.asarray(expression_ng.mean(axis=0)).ravel()
    strength = penalty * max(total_variance(expression_ng), 1e-12)
    weight_n = np.ones(num_cells) if weight_k is None else weight_k[label_n]
    weight_n = (weight_n / weight_n.sum())[:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        step_gk, center_k = flat[: shape[0] * shape[1]].reshape(shape), flat[shape[0] * shape[1] :]
        votes_gk = prior.votes_gk + step_gk
        logits_nk = np.asarray(expression_ng @ votes_gk) + (center_k - mean_g @ votes_gk)
        losses_n = logsumexp(logits_nk, axis=1) - logits_nk[np.arange(num_cells), label_n]
        slope_nk = softmax(logits_nk, axis=1)
        slope_nk[np.arange(num_cells), label_n] -= 1
        slope_nk *= weight_n
        slope_k = slope_nk.sum(axis=0)
        slope_gk = np.asarray(transposed_gn @ slope_nk) - np.outer(mean_g, slope_k) + strength * step_gk
        value = float(weight_n[:, 0] @ losses_n + strength / 2 * (step_gk**2).sum())
        return value, np.concatenate([slope_gk.ravel(), slope_k])

    first = np.concatenate([(start.votes_gk - prior.votes_gk).ravel(), start.intercept_k + mean_g @ start.votes_gk])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": MOST_ITERATIONS, "gtol": 1e-6})
    votes_gk = prior.votes_gk + found.x[: shape[0] * shape[1]].reshape(shape)
    return Regression(votes_gk, found.x[shape[0] * shape[1] :] - mean_g @ votes_gk)


def total_variance(expression_ng: sparse.csr_matrix) -> float:
    """Return the summed variances of the genes' expression over cells."""
    mean_g = np.asarray(expression_ng.mean(axis=0)).ravel()
    return float(np.asarray(expression_ng.power(2).mean(axis=0)).sum() - (mean_g**2).sum())


def choose_penalty(
    expression_ng: sparse.csr_matrix,
    label_n: np.ndarray,
    *,
    group_n: np.ndarray | None,
    prior: Regression,
    **options: Any,
) -> tuple[float, float]:
    """Return the penalty with the lowest held-out log loss, and that loss (nats), by cross-validation.

    Args:
        expression_ng: Expression of n cells.
        label_n: Label of each cell, 0..k-1.
        group_n: The donor of each cell: folds keep donors whole if there are enough of them.
        prior, options: As for `solve`.
    """
    num_folds = min(NUM_FOLDS, len(label_n))
    if group_n is not None and len(np.unique(group_n)) >= num_folds:
        folds = list(GroupKFold(num_folds).split(label_n, groups=group_n))
    else:
        folds = list(KFold(num_folds, shuffle=True, random_state=0).split(label_n))
    found: list[Regression | None] = [None] * num_folds
    losses: list[float] = []
    for penalty in PENALTIES:
        total = 0.0
        for number, (fitted, held_out) in enumerate(folds):
            found[number] = one = solve(
                expression_ng[fitted], label_n[fitted], penalty=penalty, prior=prior, start=found[number], **options
            )
            logits_nk = one.logits(expression_ng[held_out])
            total += float(
                (logsumexp(logits_nk, axis=1) - logits_nk[np.arange(len(held_out)), label_n[held_out]]).sum()
            )
        losses.append(total / len(label_n))
        if len(losses) > 1 and losses[-1] > losses[-2]:
            break
    best = int(np.argmin(losses))
    return PENALTIES[best], losses[best]


# -- the votes of a model -----------------------------------------------------------------------------------------


def solve_votes(
    model: Any, cells: IterableAnnDataset, *, donor_column: str | None, class_weights: Sequence[float] | None = None
) -> None:
    """Set the votes of a model's direct path to the solution of a regression on the training cells.

    Votes that the model has already, from another run, are what the new ones are drawn to.

    Args:
        model: With a direct path.
        cells: All training cells, in the order of the files.
        donor_column: Column of `obs` whose cells stay in one fold; None, or where it is missing: cells are drawn.
        class_weights: One weight per class of a classifier.
    """
    tokenizer, is_classifier = cells.tokenizer, isinstance(model, GeneBertForClassification)
    path = model.direct_classes if is_classifier else model.direct_labels
    if path is None:  # no phenotype to vote for
        return
    votes_tk = path.votes_tk
    groups = _groups(cells, donor_column)
    expression_nt, labels, number_n = _read(model, cells)
    group_n = None if groups is None else groups[number_n]
    if is_classifier:
        columns = {model.config.phenotype_category: (0, votes_tk.shape[1])}
    else:
        first = model.config.first_label_id
        ranges = {name: tokenizer.vocabulary.id_range(name) for name in labels}
        columns = {name: (start - first, stop - first) for name, (start, stop) in ranges.items()}
    solved_tk = votes_tk.detach().cpu().double().numpy().copy()
    for name, (start, stop) in columns.items():
        label_n = labels[name]
        rows = np.flatnonzero(label_n >= 0)
        if len(rows) < NUM_FOLDS or len(np.unique(label_n[rows])) < 2:
            continue
        options: dict[str, Any] = {"prior": Regression(solved_tk[1:, start:stop], solved_tk[0, start:stop])}
        if class_weights is not None:
            options["weight_k"] = np.asarray(class_weights)
        known_nt, label_n = expression_nt[rows], label_n[rows]
        donor_n = None if group_n is None else group_n[rows]
        penalty, loss = choose_penalty(known_nt, label_n, group_n=donor_n, **options)
        found = solve(known_nt, label_n, penalty=penalty, **options)
        solved_tk[0, start:stop], solved_tk[1:, start:stop] = found.intercept_k, found.votes_gk
        logger.info(
            "%s: the genes' votes are a regression on %d cells, penalty %g (log loss %.3f in cross-validation by %s)",
            name, len(rows), penalty, loss, "cell" if donor_n is None else donor_column,
        )  # fmt: skip
    with torch.no_grad():
        votes_tk.copy_(torch.from_numpy(solved_tk))


def _groups(cells: IterableAnnDataset, donor_column: str | None) -> np.ndarray | None:
    """Return the donor of each cell as a number; None if a file does not say or there are fewer than three."""
    files = [cells.shards[index].source for index in range(len(cells.shards))]
    if donor_column is None or not all(donor_column in file.columns_of("obs") for file in files):
        return None
    names = np.concatenate([file.obs_column(donor_column).astype(str).to_numpy(dtype=object) for file in files])
    _, group_n = np.unique(names, return_inverse=True)
    return group_n if group_n.max(initial=0) + 1 >= NUM_FOLDS else None


def _read(model: Any, cells: IterableAnnDataset) -> tuple[sparse.csr_matrix, dict[str, np.ndarray], np.ndarray]:
    """Return the expression of cells by token type from 1 on, (n, t - 1); their labels by phenotype; their numbers."""
    tokenizer, level_v = cells.tokenizer, np.array(expression_levels(model.config), dtype=np.float32)
    level_v[: tokenizer.first_bin_id] = 0
    stride, parts = 1, list[tuple[TokenBlock, dict[str, np.ndarray]]]()
    num_values = 0
    for block in cells.blocks():
        rows = np.flatnonzero(block.cells_n % stride == 0)
        if not len(rows):
            continue
        block = block.take(rows)
        if block.labels_n is not None:
            labels = {str(cells.phenotype_category): block.labels_n}
        else:
            labels = {name: true_labels(block, tokenizer, name) for name in tokenizer.included_phenotypes}
        parts.append((block, labels))
        num_values += len(block.input_ids_l)
        if num_values > MOST_VALUES:
            stride *= 2
            parts = [_every(part, stride) for part in parts]
            num_values = sum(len(block.input_ids_l) for block, _ in parts)
    blocks = [block for block, _ in parts]
    values_l = np.concatenate([level_v[block.input_ids_l] for block in blocks])
    columns_l = np.concatenate([block.token_type_ids_l.astype(np.int32) - 1 for block in blocks])
    lengths_n = np.concatenate([np.diff(block.offsets_n1) for block in blocks])
    is_gene_l = values_l > 0
    offsets = np.concatenate([[0], np.cumsum(lengths_n)])
    genes_before = np.concatenate([[0], np.cumsum(is_gene_l)])[offsets]
    shape = (len(lengths_n), tokenizer.type_vocab_size - 1)
    expression_nt = sparse.csr_matrix((values_l[is_gene_l], columns_l[is_gene_l], genes_before), shape=shape)
    joined = {name: np.concatenate([labels[name] for _, labels in parts]) for name in parts[0][1]}
    return expression_nt, joined, np.concatenate([block.cells_n for block in blocks])


def _every(part: tuple[TokenBlock, dict[str, np.ndarray]], stride: int) -> tuple[TokenBlock, dict[str, np.ndarray]]:
    block, labels = part
    rows = np.flatnonzero(block.cells_n % stride == 0)
    return block.take(rows), {name: label_n[rows] for name, label_n in labels.items()}


# -- the transformer's shares -------------------------------------------------------------------------------------


def earned_share(own_nk: np.ndarray, votes_nk: np.ndarray, label_n: np.ndarray) -> tuple[float, float, float]:
    """Return how much of the transformer's logits to add to the votes, and the log losses without and with it (nats).

    The share is 0 unless the best one lowers the log loss by more than the standard error of the paired difference.

    Args:
        own_nk: Logits of the transformer.
        votes_nk: Logits of the direct path.
        label_n: True labels, 0..k-1.
    """
    rows = np.arange(len(label_n))
    losses_sn = np.empty((len(SHARES), len(label_n)))
    for number, share in enumerate(SHARES):
        logits_nk = share * own_nk + votes_nk
        losses_sn[number] = logsumexp(logits_nk, axis=1) - logits_nk[rows, label_n]
    best = int(losses_sn.mean(axis=1).argmin())
    gain_n = losses_sn[0] - losses_sn[best]
    is_earned = gain_n.mean() > gain_n.std() / np.sqrt(len(gain_n))
    chosen = best if is_earned else 0
    return SHARES[chosen], float(losses_sn[0].mean()), float(losses_sn[chosen].mean())


def fit_shares(model: Any, cells: IterableAnnDataset) -> None:
    """Set the transformer's shares by held-out cells, in the model's configuration."""
    config, tokenizer = model.config, cells.tokenizer
    is_classifier = isinstance(model, GeneBertForClassification)
    names = [config.phenotype_category] if is_classifier else list(tokenizer.vocabulary.categories)
    shares = [[1.0, 1.0] for _ in names]
    answers: dict[tuple[int, int], list[tuple[np.ndarray, ...]]] = {}
    for name, has_given, *parts in _answers(model, cells):
        answers.setdefault((names.index(name), int(has_given)), []).append(tuple(parts))
    for (number, has_given), parts in answers.items():
        own_nk, votes_nk, label_n = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if len(label_n) < LEAST_CELLS:
            continue
        share, before, after = earned_share(own_nk, votes_nk, label_n)
        shares[number][has_given] = share
        logger.info(
            "%s%s: the transformer's share is %g (held-out log loss %.3f, of the genes' votes alone %.3f)",
            names[number], " with other phenotypes given" if has_given else "", share, after, before,
        )  # fmt: skip
    config.direct_shares = shares if not is_classifier else [[shares[0][0]] * 2]


def _answers(model: Any, cells: IterableAnnDataset) -> Iterator[tuple[str, bool, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield phenotype, whether others are given, the transformer's and the votes' logits and the true labels."""
    stride = max(1, cells.num_cells // MOST_CELLS)
    tokenizer, collate = cells.tokenizer, collate_fn_wrapper(cells.tokenizer, packed=True)
    is_classifier = isinstance(model, GeneBertForClassification)
    if is_classifier:
        questions, num_shares = [Question("classifier", (str(cells.phenotype_category),))], 1
    else:
        questions = [one for one in standard_questions(tokenizer.included_phenotypes) if one.name != "together"]
        num_shares = len(tokenizer.vocabulary.categories)
    for block in cells.blocks():
        block = block.take(np.flatnonzero(block.cells_n % stride == 0))
        if not len(block):
            continue
        asked = [(question.asked[0], bool(question.given)) for question in questions]
        both: list[list[np.ndarray]] = []
        for share in (1.0, 0.0):
            model.config.direct_shares = [[share, share] for _ in range(num_shares)]
            if is_classifier:
                both.append([class_logits(model, block, collate)])
            else:
                found = [question_logits(model, block, tokenizer, question) for question in questions]
                both.append([logits[name] for logits, (name, _) in zip(found, asked, strict=True)])
        for (name, has_given), joined_nk, votes_nk in zip(asked, *both, strict=True):
            label_n = block.labels_n if is_classifier else true_labels(block, tokenizer, name)
            assert label_n is not None
            known = label_n >= 0
            yield name, has_given, (joined_nk - votes_nk)[known], votes_nk[known], label_n[known]
