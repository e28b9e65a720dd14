"""The direct path: solve the genes' votes as a regression, and find out how much the transformer may add to them.

Owns the regression's penalty and solution and the transformer's shares; leaves the linear term itself to
`model.heads`. Letters: n cells, g genes, t token types, k labels of a phenotype.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.model_selection import GroupKFold, KFold
from threadpoolctl import threadpool_limits

from perturbgene.data_utils.data_collators import collate_fn_wrapper
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, donors_of
from perturbgene.data_utils.tokenization import GeneTokenizer, TokenBlock
from perturbgene.errors import InputError
from perturbgene.eval_utils import (
    class_logits,
    inference_mode,
    question_logits,
    standard_questions,
    to_device,
    true_labels,
)
from perturbgene.model import GeneBertConfig, GeneBertForClassification
from perturbgene.model.heads import DirectPath
from perturbgene.model.layers import expression_levels
from perturbgene.model.packing import pack_cells
from perturbgene.training.transfer import quiet

logger = logging.getLogger(__name__)

#: Weights of the penalty, strongest first, relative to the summed variance of the genes' expression. The strongest are
#: for labels that genes do not show, and for votes of another run that are better than what the cells say.
PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
#: With more cells than choose the penalty it is not weaker: gene by gene, the weakest ends before it has converged.
LEAST_OF_MANY = 1e-8
#: What a gene's standard deviation may be raised to before its expression is divided by it, and the least deviation
#: that counts, relative to the greatest.
POWERS, LEAST_DEVIATION = (0.0, 0.5, 1.0), 0.01
#: What another power or a stronger penalty has to gain (nats): where all are nearly perfect, a difference says nothing
#: of other cells.
LEAST_GAIN = 0.01
#: Folds of up to `FEW_CELLS` cells, and of more; fewer donors than the latter are not kept whole.
MOST_FOLDS, LEAST_FOLDS, FEW_CELLS = 5, 3, 1_000
READING = "perturbgene.data_utils"  # says nothing new of cells that are read a second time
#: Expressed genes that a regression is solved on, in all cells together (8 bytes each); more cells are thinned evenly.
MOST_VALUES = 50_000_000
#: Cells that choose the penalty, in their principal axes; and cells up to which a regression with many labels is solved
#: in them, which takes more than solving it gene by gene with few labels.
MOST_CHOOSING, MOST_CELLS_OF_AXES = 2_000, 4_000
#: Expressed genes times labels that a solution on more cells may cost at each iteration.
MOST_PRODUCTS = 1_000_000_000
#: Votes of a phenotype, genes times labels: beyond, the genes that vary least have none.
MOST_VOTES = 10_000_000
MOST_STEPS, MOST_STEPS_OF_CHOICE, TOLERANCE = 300, 100, 1e-5
#: With more labels, only every second penalty is tried, and genes stay as they are.
MANY_LABELS = 200
#: Numbers that L-BFGS may keep of earlier steps (8 bytes each).
MOST_REMEMBERED = 200_000_000
#: What the transformer's logits may be multiplied by.
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
#: Held-out cells that the shares are chosen on, and fewer of them than are worth a choice.
MOST_CELLS, LEAST_CELLS = 2_000, 30


# -- the regression -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """A multinomial regression: `votes_gk` and the intercepts of cells as they are."""

    votes_gk: np.ndarray
    intercept_k: np.ndarray

    def logits(self, expression_ng: sparse.csr_matrix) -> np.ndarray:
        """Return the logits of cells, float64 of shape (n, k)."""
        return np.asarray(expression_ng @ self.votes_gk) + self.intercept_k


@dataclass(frozen=True)
class Scaled:
    """Expression of n cells, each gene divided by a power of its standard deviation."""

    values_ng: sparse.csr_matrix
    mean_g: np.ndarray
    variance_g: np.ndarray
    scale_g: np.ndarray  # what each gene was multiplied by

    @classmethod
    def of(cls, expression_ng: sparse.csr_matrix, *, power: float) -> "Scaled":
        mean_g = np.asarray(expression_ng.mean(axis=0)).ravel()
        variance_g = np.maximum(np.asarray(expression_ng.power(2).mean(axis=0)).ravel() - mean_g**2, 0)
        deviation_g = np.sqrt(variance_g)
        scale_g = np.maximum(deviation_g, max(LEAST_DEVIATION * deviation_g.max(), 1e-12)) ** -power
        values_ng = (expression_ng.astype(np.float64) @ sparse.diags_array(scale_g)).tocsr()
        return cls(values_ng, mean_g * scale_g, variance_g * scale_g**2, scale_g)

    @property
    def total_variance(self) -> float:
        return max(float(self.variance_g.sum()), 1e-12)


@dataclass(frozen=True)
class _Axes:
    """The r principal axes of some cells without the direction of their mean.

    A regression with a squared penalty is the same in them, and much smaller.
    """

    values_nr: np.ndarray  # of the cells themselves, with a mean of 0
    axes_nr: np.ndarray  # turns products with these cells into values
    mean_n: np.ndarray  # products of these cells with the direction of their mean

    @classmethod
    def of(cls, products_nn: np.ndarray) -> "_Axes":
        mean_n = products_nn.mean(axis=1) / np.sqrt(max(products_nn.mean(), 1e-12))
        squares_r, axes_nr = np.linalg.eigh(products_nn - np.outer(mean_n, mean_n))
        kept = squares_r > 1e-10 * max(squares_r[-1], 1e-12)
        length_r = np.sqrt(squares_r[kept])
        return cls(axes_nr[:, kept] * length_r, axes_nr[:, kept] / length_r, mean_n)

    def of_others(self, products_mn: np.ndarray) -> np.ndarray:
        """Return the values of other cells, of which the products with these ones are known, (m, r)."""
        others_m = products_mn.mean(axis=1) / max(self.mean_n.mean(), 1e-12)
        return np.asarray((products_mn - np.outer(others_m, self.mean_n)) @ self.axes_nr)


def _without(votes_rk: np.ndarray, mean_r: np.ndarray | None) -> np.ndarray:
    """Return votes without their part along the mean, so that those of a cell like the mean add up to 0."""
    if mean_r is None or not mean_r.any():
        return votes_rk
    return votes_rk - np.outer(mean_r, mean_r @ votes_rk / (mean_r @ mean_r))


def _fit(
    values_nr: Any, label_n: np.ndarray, *, strength: float, offset_nk: np.ndarray, weight_n: np.ndarray,
    mean_r: np.ndarray | None = None, variance_r: np.ndarray | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None, most_steps: int = MOST_STEPS,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Minimize the weighted negative log-likelihood plus `strength / 2` times the summed squares of `votes_rk`.

    Where `mean_r` is given, the votes of a cell like it add up to 0. By L-BFGS on votes that are scaled so that their
    curvatures are about equal, which saves most of the iterations.

    Returns:
        The votes of values, (r, k), and the intercepts, (k,), which both come on top of `offset_nk`.
    """
    num_cells, num_values = values_nr.shape
    shape = (num_values, offset_nk.shape[1])
    variance_r = (values_nr**2).mean(axis=0) if variance_r is None else variance_r
    step_r1 = 1 / np.sqrt(variance_r / shape[1] + strength)[:, None]
    transposed_rn = values_nr.T.tocsr() if sparse.issparse(values_nr) else values_nr.T
    weight_n1 = (weight_n / weight_n.sum())[:, None]
    rows_n = np.arange(num_cells)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        votes_rk = _without(flat[: num_values * shape[1]].reshape(shape) * step_r1, mean_r)
        logits_nk = np.asarray(values_nr @ votes_rk) + flat[num_values * shape[1] :] + offset_nk
        top_n1 = logits_nk.max(axis=1, keepdims=True)
        slope_nk = np.exp(logits_nk - top_n1)
        total_n1 = slope_nk.sum(axis=1, keepdims=True)
        losses_n = np.log(total_n1[:, 0]) + top_n1[:, 0] - logits_nk[rows_n, label_n]
        slope_nk /= total_n1
        slope_nk[rows_n, label_n] -= 1
        slope_nk *= weight_n1
        slope_rk = _without(np.asarray(transposed_rn @ slope_nk), mean_r) + strength * votes_rk
        value = float(weight_n1[:, 0] @ losses_n + strength / 2 * (votes_rk**2).sum())
        return value, np.concatenate([(slope_rk * step_r1).ravel(), slope_nk.sum(axis=0)])

    votes_rk, intercept_k = start or (np.zeros(shape), np.zeros(shape[1]))
    first = np.concatenate([(votes_rk / step_r1).ravel(), intercept_k])
    memory = int(np.clip(MOST_REMEMBERED // (2 * len(first)), 3, 10))
    limits = {"maxiter": most_steps, "gtol": TOLERANCE, "ftol": TOLERANCE**2, "maxcor": memory}
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=limits)
    votes_rk = _without(found.x[: num_values * shape[1]].reshape(shape) * step_r1, mean_r)
    return votes_rk, found.x[num_values * shape[1] :]


def solve(
    expression_ng: sparse.csr_matrix,
    label_n: np.ndarray,
    *,
    penalty: float,
    prior: Regression,
    power: float = 0.0,
    start: Regression | None = None,
    weight_n: np.ndarray | None = None,
) -> Regression:
    """Return the multinomial regression with a squared penalty on how far the votes are from a prior's.

    Minimizes the mean negative log-likelihood (nats) plus half of `penalty` times the summed squares of
    `votes - prior`, where each gene is divided by its standard deviation to a power, and then all by a number that
    makes their variances add up to 1. Intercepts are free. For each label, what is added to the prior's votes adds up
    to 0 in a cell like the mean of all: so votes know nothing of cells that express all genes more or less than others,
    as cells of another technology do. Of few cells it is solved in their principal axes.

    Args:
        expression_ng: Expression of n cells.
        label_n: Label of each cell, 0..k-1.
        penalty: Weight of the penalty.
        prior: What the votes are drawn to.
        power: 0 leaves genes as they are, 1 makes the penalty of all genes equal whatever their variance.
        start: Where to start with many cells; by default at the prior.
        weight_n: Weight of each cell; by default 1.
    """
    scaled = Scaled.of(expression_ng, power=power)
    weight_n = np.ones(len(label_n)) if weight_n is None else weight_n
    settings: dict[str, Any] = {"strength": penalty * scaled.total_variance, "weight_n": weight_n}
    settings["offset_nk"] = prior.logits(expression_ng)
    is_costly = expression_ng.nnz * prior.votes_gk.shape[1] > MOST_PRODUCTS
    if len(label_n) <= (MOST_CELLS_OF_AXES if is_costly else MOST_CHOOSING):
        axes = _Axes.of((scaled.values_ng @ scaled.values_ng.T).toarray())
        votes_rk, intercept_k = _fit(axes.values_nr, label_n, **settings)
        step_gk = _without(np.asarray(scaled.values_ng.T @ (axes.axes_nr @ votes_rk)), scaled.mean_g)
    else:
        of_genes: dict[str, Any] = {"mean_r": scaled.mean_g, "variance_r": scaled.variance_g}
        if start is not None:
            start_gk = (start.votes_gk - prior.votes_gk) / scaled.scale_g[:, None]
            of_genes["start"] = (start_gk, start.intercept_k - prior.intercept_k)
        step_gk, intercept_k = _fit(scaled.values_ng, label_n, **settings, **of_genes)
    return Regression(prior.votes_gk + step_gk * scaled.scale_g[:, None], prior.intercept_k + intercept_k)


@dataclass(frozen=True)
class Choice:
    """What cross-validation chose."""

    penalty: float
    power: float
    losses_n: np.ndarray  # of each cell, in the fold that held it out (nats)
    loss: float  # their weighted mean

    def error(self, other: "Choice", weight_n: np.ndarray) -> float:
        """Return the standard error of the difference from another loss on the same cells."""
        gain_n, gain = self.losses_n - other.losses_n, self.loss - other.loss
        return float(np.sqrt(np.square(weight_n * (gain_n - gain)).sum()) / weight_n.sum())


def choose(
    expression_ng: sparse.csr_matrix,
    label_n: np.ndarray,
    *,
    group_n: np.ndarray | None,
    prior: Regression,
    weight_n: np.ndarray | None = None,
) -> Choice:
    """Return a penalty and a power by their held-out log loss in cross-validation.

    The penalty is the weakest whose loss exceeds the lowest by no more than the standard error of the paired difference
    and `LEAST_GAIN`: cells like those that votes are solved on cannot tell such penalties apart, but cells of another
    technology are answered best with the weakest. Next to votes of another run, which the penalty keeps, it is the one
    with the lowest loss.

    Genes stay as they are (power 0) unless another power is better by more than the standard error of the paired
    difference and by `LEAST_GAIN`: equal penalties make more of weakly expressed genes, which other technologies
    measure worst.

    Args:
        expression_ng: Expression of n cells, of which all products are held at once.
        label_n: Label of each cell, 0..k-1.
        group_n: The donor of each cell: folds keep donors whole if there are enough of them.
        prior, weight_n: As for `solve`.
    """
    num_folds = min(MOST_FOLDS if len(label_n) <= FEW_CELLS else LEAST_FOLDS, len(label_n))
    num_donors = 0 if group_n is None else len(np.unique(group_n))
    if num_donors >= LEAST_FOLDS:
        folds = list(GroupKFold(min(num_folds, num_donors)).split(label_n, groups=group_n))
    else:
        folds = list(KFold(num_folds, shuffle=True, random_state=0).split(label_n))
    offset_nk = prior.logits(expression_ng)
    weight_n = np.ones(len(label_n)) if weight_n is None else weight_n
    has_many = offset_nk.shape[1] > MANY_LABELS
    best: Choice | None = None
    for power in POWERS[:1] if has_many else POWERS:
        scaled = Scaled.of(expression_ng, power=power)
        products_nn = (scaled.values_ng @ scaled.values_ng.T).toarray()
        axes, others, found = [], [], list[Any]([None] * len(folds))
        for fitted, held_out in folds:
            axes.append(_Axes.of(products_nn[np.ix_(fitted, fitted)]))
            others.append(axes[-1].of_others(products_nn[np.ix_(held_out, fitted)]))
        tried: list[Choice] = []
        for penalty in PENALTIES[::2] if has_many else PENALTIES:
            losses_n = np.empty(len(label_n))
            for number, (fitted, held_out) in enumerate(folds):
                votes_rk, intercept_k = found[number] = _fit(
                    axes[number].values_nr, label_n[fitted], strength=penalty * scaled.total_variance,
                    offset_nk=offset_nk[fitted], weight_n=weight_n[fitted], start=found[number],
                    most_steps=MOST_STEPS_OF_CHOICE,
                )  # fmt: skip
                logits_nk = others[number] @ votes_rk + intercept_k + offset_nk[held_out]
                losses_n[held_out] = log_losses(logits_nk, label_n[held_out])
            tried.append(Choice(penalty, power, losses_n, float(np.average(losses_n, weights=weight_n))))
            means = [choice.loss for choice in tried]
            if len(means) > 2 and means[-1] > means[-2] > means[-3] and means[-1] > min(means) + LEAST_GAIN:
                break
        other = tried[int(np.argmin(means))]
        if not prior.votes_gk.any():
            other = [one for one in tried if one.loss - other.loss <= min(one.error(other, weight_n), LEAST_GAIN)][-1]
        if best is None or best.loss - other.loss > max(best.error(other, weight_n), LEAST_GAIN):
            best = other
    assert best is not None
    return best


def log_losses(logits_nk: np.ndarray, label_n: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of each cell's label (nats), shape (n,)."""
    return np.asarray(logsumexp(logits_nk, axis=1) - logits_nk[np.arange(len(label_n)), label_n])


def thinned(label_n: np.ndarray, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about so many cells, evenly spaced and equally many of each label where it has them.

    Returns:
        Rows of the cells, ascending, and how many cells each stands for.

    Example:
        >>> rows, weights = thinned(np.array([0, 0, 0, 0, 0, 0, 1, 1]), most=5)
        >>> rows.tolist(), weights.tolist()
        ([0, 2, 4, 6, 7], [2.0, 2.0, 2.0, 1.0, 1.0])
    """
    count_k = np.bincount(label_n)
    if len(label_n) <= most:
        return np.arange(len(label_n)), np.ones(len(label_n))
    kept = 1
    while np.minimum(count_k, kept + 1).sum() <= most:
        kept += 1
    order_n = np.argsort(label_n, kind="stable")
    number_n = np.empty(len(label_n), dtype=np.int64)  # of each cell among those of its label
    number_n[order_n] = np.arange(len(label_n)) - np.repeat(np.cumsum(count_k) - count_k, count_k)
    kept_k = np.minimum(count_k, kept)
    place_n, of_label_n = number_n * kept_k[label_n], count_k[label_n]
    rows = np.flatnonzero((place_n - 1) // of_label_n != (place_n + kept_k[label_n] - 1) // of_label_n)
    return rows, (count_k / np.maximum(kept_k, 1))[label_n[rows]]


# -- the votes of a model -----------------------------------------------------------------------------------------


def direct_path(model: Any) -> DirectPath | None:
    """Return the direct path of a masked model or a classifier; None where there is none, or nothing to vote for."""
    path: DirectPath | None = getattr(model, "direct_classes", None) or getattr(model, "direct_labels", None)
    return path


def vote_alone(model: Any, *, has_head: bool) -> None:
    """Check that a model has votes to solve, and let an untrained head add nothing to them.

    Raises:
        InputError: It has none.
    """
    path = direct_path(model)
    if path is None:
        raise InputError(
            "train_only is votes, but the model has no genes' votes for labels: its run was trained with --direct_path "
            "never, or there is no phenotype. Change --train_only."
        )
    if not has_head:
        path.share_p2.zero_()
        logger.warning(
            "--train_only votes: the transformer has not learned to answer this and adds nothing. Only answers about "
            "phenotypes mean something, not those about genes"
        )


def solve_votes(
    model: Any,
    cells: IterableAnnDataset,
    *,
    donor_column: str | None,
    class_weights: Sequence[float] | None = None,
    rate_n: np.ndarray | None = None,
) -> None:
    """Set the votes of a model's direct path to the solution of a regression on the training cells.

    Votes that the model has already, from another run, are what the new ones are drawn to.

    Args:
        model: With a direct path.
        cells: All training cells, in the order of the files.
        donor_column: Column of `obs` whose cells stay in one fold; None, or where it is missing: cells are drawn.
        class_weights: One weight per class of a classifier.
        rate_n: How often training draws each cell, which is its weight; by default 1.
    """
    tokenizer, path = cells.tokenizer, direct_path(model)
    if path is None:
        return
    votes_tk = path.votes_tk
    logger.info("solving the genes' votes for labels")
    with quiet(READING):
        donors, (expression_nt, labels, number_n) = donors_of(cells, donor_column), _read(model, cells)
    group_n = None if donors is None else np.unique(donors, return_inverse=True)[1][number_n]
    if donors is not None and len(np.unique(donors)) < LEAST_FOLDS:
        group_n = None
    if isinstance(model, GeneBertForClassification):
        columns = {str(model.config.phenotype_category): (0, votes_tk.shape[1])}
    else:
        first_id = model.config.first_label_id
        ranges = {name: tokenizer.vocabulary.id_range(name) for name in labels}
        columns = {name: (start - first_id, stop - first_id) for name, (start, stop) in ranges.items()}
    solved_tk = votes_tk.detach().cpu().double().numpy().copy()
    for name, (start, stop) in columns.items():
        label_n = labels[name]
        rows = np.flatnonzero(label_n >= 0)
        if len(rows) < LEAST_FOLDS or len(np.unique(label_n[rows])) < 2:
            continue
        num_labels, prior_gk = stop - start, solved_tk[1:, start:stop]
        per_cell = max(1.0, expression_nt.nnz / expression_nt.shape[0])
        label_n = label_n[rows]
        most = max(MOST_CELLS_OF_AXES, int(MOST_PRODUCTS / num_labels / per_cell))
        chosen_n, weight_n = thinned(label_n, most=most)
        rows, label_n = rows[chosen_n], label_n[chosen_n]
        genes = _voters(expression_nt[rows], most=MOST_VOTES // num_labels)
        known_ng = expression_nt[rows][:, genes]
        weight_n = weight_n if rate_n is None else weight_n * rate_n[number_n[rows]]
        weight_n = weight_n if class_weights is None else weight_n * np.asarray(class_weights)[label_n]
        prior = Regression(prior_gk[genes], solved_tk[0, start:stop])
        few, times_n = thinned(label_n, most=MOST_CHOOSING)
        of_few: dict[str, Any] = {"prior": prior, "weight_n": weight_n[few] * times_n}
        few_donor_n = None if group_n is None else group_n[rows][few]
        with threadpool_limits(None if num_labels > MANY_LABELS else 1):  # threads make thin products 8 times as slow
            chosen = choose(known_ng[few], label_n[few], group_n=few_donor_n, **of_few)
            penalty = chosen.penalty if len(few) == len(rows) else max(chosen.penalty, LEAST_OF_MANY)
            settings: dict[str, Any] = {"penalty": penalty, "power": chosen.power}
            found = solve(known_ng[few], label_n[few], **settings, **of_few)
            if len(few) < len(rows):
                found = solve(known_ng, label_n, prior=prior, weight_n=weight_n, start=found, **settings)
        prior_gk[genes] = found.votes_gk
        solved_tk[0, start:stop] = found.intercept_k
        logger.info(
            "%s: the genes' votes are a regression on %s cells: penalty %g, expression divided by its standard "
            "deviation to the power of %g (log loss %.3f in cross-validation by %s)",
            name, f"{len(rows):,}", penalty, chosen.power, chosen.loss,
            "cell" if group_n is None else donor_column,
        )  # fmt: skip
    votes_tk.copy_(torch.from_numpy(solved_tk))


def _voters(expression_ng: sparse.csr_matrix, *, most: int) -> np.ndarray:
    """Return which genes may vote, ascending: all, or those whose expression varies most."""
    if expression_ng.shape[1] <= most:
        return np.arange(expression_ng.shape[1])
    variance_g = Scaled.of(expression_ng, power=0.0).variance_g
    logger.warning("%s of %s genes vote, those that vary most: more votes would not fit into memory",
                   f"{most:,}", f"{len(variance_g):,}")  # fmt: skip
    return np.sort(np.argsort(-variance_g, kind="stable")[:most])


def expression_of(block: TokenBlock, config: GeneBertConfig) -> sparse.csr_matrix:
    """Return the expression of all genes of cells by token type, float32 (n, t): of a bin its level, as genes vote."""
    level_v = np.array(expression_levels(config), dtype=np.float32)
    level_v[: config.first_bin_id] = 0
    shape = (len(block), config.type_vocab_size)
    types_l = block.token_type_ids_l.astype(np.int32)
    expression_nt = sparse.csr_matrix((level_v[block.input_ids_l], types_l, block.offsets_n1), shape=shape)
    expression_nt.eliminate_zeros()
    return expression_nt


def _read(model: Any, cells: IterableAnnDataset) -> tuple[sparse.csr_matrix, dict[str, np.ndarray], np.ndarray]:
    """Return the expression of cells by token type from 1 on, (n, t - 1); their labels by phenotype; their numbers."""
    tokenizer, stride, num_values = cells.tokenizer, 1, 0
    parts = list[tuple[TokenBlock, dict[str, np.ndarray]]]()
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
    expression_nt = sparse.vstack([expression_of(block, model.config) for block, _ in parts], format="csr")[:, 1:]
    joined = {name: np.concatenate([labels[name] for _, labels in parts]) for name in parts[0][1]}
    return expression_nt, joined, np.concatenate([block.cells_n for block, _ in parts])


def _every(part: tuple[TokenBlock, dict[str, np.ndarray]], stride: int) -> tuple[TokenBlock, dict[str, np.ndarray]]:
    block, labels = part
    rows = np.flatnonzero(block.cells_n % stride == 0)
    return block.take(rows), {name: label_n[rows] for name, label_n in labels.items()}


# -- the transformer's shares -------------------------------------------------------------------------------------


def earned_share(own_nk: np.ndarray, votes_nk: np.ndarray, label_n: np.ndarray) -> float:
    """Return what to multiply the transformer's logits by before the votes are added.

    The share is 0 unless another lowers the log loss by more than the standard error of the paired difference, and
    is right in at least as many cells.

    Args:
        own_nk: Logits of the transformer.
        votes_nk: Logits of the direct path.
        label_n: True labels, 0..k-1.

    Example:
        >>> votes_nk = np.array([[0.1, 0.0], [0.0, 0.1]] * 20)
        >>> earned_share(10 * votes_nk, votes_nk, np.array([0, 1] * 20)), earned_share(
        ...     -votes_nk, votes_nk, np.array([0, 1] * 20))
        (2.0, 0.0)
    """
    losses_sn, right_s = np.empty((len(SHARES), len(label_n))), np.empty(len(SHARES))
    for number, share in enumerate(SHARES):
        logits_nk = share * own_nk + votes_nk
        losses_sn[number] = log_losses(logits_nk, label_n)
        right_s[number] = (logits_nk.argmax(axis=1) == label_n).sum()
    losses_s = np.where(right_s >= right_s[0], losses_sn.mean(axis=1), np.inf)
    best = int(losses_s.argmin())
    gain_n = losses_sn[0] - losses_sn[best]
    return SHARES[best] if gain_n.mean() > gain_n.std() / np.sqrt(len(gain_n)) else 0.0


@contextmanager
def without_votes(model: Any) -> Iterator[None]:
    """Let a model answer by its transformer alone for a while."""
    path = direct_path(model)
    if path is not None:
        path.is_on = False
    try:
        yield
    finally:
        if path is not None:
            path.is_on = True


def fit_shares(model: Any, cells: IterableAnnDataset) -> None:
    """Set the transformer's shares by held-out cells; where these are too few to say, it adds nothing to the votes.

    Args:
        model: With a direct path.
        cells: Held-out cells, of which at most `MOST_CELLS` are asked.
    """
    path = direct_path(model)
    if path is None:
        return
    answers: dict[tuple[int, int], list[tuple[np.ndarray, ...]]] = {}
    with quiet(READING):
        for number, has_given, *arrays in _answers(model, path, cells):
            answers.setdefault((number, has_given), []).append(tuple(arrays))
    path.share_p2.zero_()
    for place, batches in answers.items():
        own_nk, votes_nk, label_n = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        if len(label_n) >= LEAST_CELLS:
            path.share_p2[place] = earned_share(own_nk, votes_nk, label_n)


def describe_shares(model: Any, tokenizer: GeneTokenizer) -> list[str]:
    """Return a line for each phenotype that says how much the transformer adds to the genes' votes."""
    path, category = direct_path(model), model.config.phenotype_category
    if path is None:
        return []
    shares = path.share_p2.tolist()
    if category:
        return [f"{category}: the genes' votes + {shares[0][0]:g} x the transformer"]
    return [
        f"{name}: the genes' votes + {shares[number][0]:g} x the transformer"
        + (f" ({shares[number][1]:g} x with other phenotypes given)" if len(tokenizer.included_phenotypes) > 1 else "")
        for number, name in enumerate(tokenizer.vocabulary.categories)
        if name in tokenizer.included_phenotypes
    ]


def _answers(
    model: Any, path: DirectPath, cells: IterableAnnDataset
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield phenotype, whether others are given, the transformer's and the votes' logits and the true labels."""
    tokenizer, config = cells.tokenizer, model.config
    collate, stride = collate_fn_wrapper(tokenizer, packed=True), max(1, cells.num_cells // MOST_CELLS)
    is_classifier = isinstance(model, GeneBertForClassification)
    questions = [] if is_classifier else standard_questions(tokenizer.included_phenotypes)
    shares, path.share_p2 = path.share_p2, torch.ones_like(path.share_p2)
    try:
        for block in cells.blocks():
            block = block.take(np.flatnonzero(block.cells_n % stride == 0))
            if not len(block):
                continue
            packed = to_device(collate.collate_block(replace(block, labels_n=None)), path.votes_tk.device)
            with inference_mode(model):
                whole = pack_cells(**packed, pad_token_id=config.pad_token_id)
                votes_nk = path(whole, model.genebert.embeddings.expression(whole)).cpu().numpy()
            if is_classifier:
                assert block.labels_n is not None
                known = block.labels_n >= 0
                own_nk = class_logits(model, block, collate) - votes_nk
                yield 0, 0, own_nk[known], votes_nk[known], block.labels_n[known]
            for question in questions:
                if question.name == "together":
                    continue
                [name] = question.asked
                label_n, (start, stop) = true_labels(block, tokenizer, name), tokenizer.vocabulary.id_range(name)
                known = label_n >= 0
                own_nk = votes_nk[known, start - config.first_label_id : stop - config.first_label_id]
                joined_nk = question_logits(model, block, tokenizer, question)[name][known]
                number = tokenizer.vocabulary.token_type(name) - 1
                yield number, int(bool(question.given)), joined_nk - own_nk, own_nk, label_n[known]
    finally:
        path.share_p2 = shares
