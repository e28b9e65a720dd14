"""A model that starts from the weights of another run, matched by name: genes, labels, phenotypes, bins and heads.

Owns which old rows make each new row of a weight, where fresh rows start, and the report of both; leaves training to
`train`. Letters: v input ids, t token types, h hidden size, k labels or classes of a head, o old rows.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from transformers import PreTrainedModel

from perturbgene.cli.training import SHAPE
from perturbgene.data_utils.labels import ABSENT, SPECIAL_TOKENS
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, listed
from perturbgene.files import damaged_file
from perturbgene.hub import local_run
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM, GeneBertModel
from perturbgene.training import checkpoints

if TYPE_CHECKING:
    from perturbgene.configs import TrainingConfig

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound="TrainingConfig")

_KINDS = {kind.__name__: kind for kind in (GeneBertForPhenotypicMLM, GeneBertForClassification, GeneBertModel)}
_NUM_SPECIAL = len(SPECIAL_TOKENS)
_WORDS, _TYPES = (f"genebert.embeddings.{name}_embeddings.weight" for name in ("word", "token_type"))
LOADING = "transformers.modeling_utils"  # prints a table of weights, for which our line is the summary
CONFIG_FILE = "config.json"
#: Folder within a run of the same run from scratch (--compare_scratch).
SCRATCH_FOLDER = "scratch"


# -- names --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NameMap:
    """Which old rows make each new one; a row without old ones is fresh."""

    ids_vo: sparse.csr_matrix  # share of each old input id in each new one
    types_to: sparse.csr_matrix  # share of each old token type in each new one
    first_gene_type: int  # of the new ones
    level_scale: float  # expression of a new bin of level 1 / that of an old one
    lines: tuple[str, ...]  # what is kept, fresh, dropped and carried over


def name_map(old: GeneTokenizer, new: GeneTokenizer, *, source: str) -> NameMap:
    """Match the names of two tokenizers: genes by id or symbol, labels by category and label, bins by expression.

    Raises:
        InputError: They have no gene in common, or only one of them takes values as they are.
    """
    if old.normalization != new.normalization and "none" in (old.normalization, new.normalization):
        raise InputError(
            f"{source} was trained with --normalization {old.normalization}, but here it is {new.normalization}, so "
            f"its bins mean other things. Give `prepare` --normalization {old.normalization}, or leave out "
            "--pretrained_model_path."
        )
    # The old panel index of each new gene; -1 if there is none, or if several new genes claim it by a symbol.
    alignment = old.panel.align(new.genes, other_names_c=[new.gene_symbols] if new.gene_symbols else [])
    gene_g = alignment.gene_of_column_c.astype(np.int64)
    times = Counter(gene_g.tolist())
    is_other_id_g = np.array([old.genes[at] != gene for at, gene in zip(gene_g, new.genes, strict=True)])
    gene_g = np.where(is_other_id_g & np.array([times[at] > 1 for at in gene_g.tolist()]), -1, gene_g)
    num_kept = int((gene_g >= 0).sum())
    if not num_kept:
        raise InputError(
            f"{source} knows none of the {len(gene_g):,} genes (it has {listed(old.genes, most=3)}; these are "
            f"{listed(new.genes, most=3)}), so its weights would be of no use. Name genes as it does "
            "(--gene_id_column), or leave out --pretrained_model_path."
        )
    type_of = {name: 1 + index for index, name in enumerate(old.vocabulary.categories)}
    types = [0, *(type_of.get(name, -1) for name in new.vocabulary.categories)]
    types += np.where(gene_g >= 0, old.first_gene_type + gene_g, -1).tolist()
    label_rows, labels_line = _label_rows(old, new)
    bin_rows, bins_line = _bin_rows(old, new, gene_g)
    special_rows: list[dict[int, float]] = [{id_: 1.0} for id_ in range(_NUM_SPECIAL)]
    genes = {"kept": num_kept, "fresh": len(gene_g) - num_kept, "dropped": len(old.panel) - num_kept}
    return NameMap(
        ids_vo=_sparse([*special_rows, *label_rows, *bin_rows], num_old=old.vocab_size),
        types_to=_sparse([{type_: 1.0} if type_ >= 0 else {} for type_ in types], num_old=old.type_vocab_size),
        first_gene_type=new.first_gene_type,
        level_scale=_mean_value(new) / _mean_value(old),
        lines=("genes: " + ", ".join(f"{count:,} {what}" for what, count in genes.items()), labels_line, bins_line),
    )


def _mean_value(tokenizer: GeneTokenizer) -> float:
    """Return the expression that the levels of bins are relative to."""
    return float(tokenizer.bin_edges.values().mean(axis=0)[1:].mean())


def _label_rows(old: GeneTokenizer, new: GeneTokenizer) -> tuple[list[dict[int, float]], str]:
    """Return the old ids of each new label, and what became of labels; a new one is the mean of its phenotype's."""
    rows, fresh = [], []
    for category, labels in new.phenotypes.items():
        known = range(*old.vocabulary.id_range(category)) if category in old.phenotypes else ()
        for label in labels:
            id_ = old.vocabulary.label_id(category, label)
            rows.append({id_: 1.0} if id_ != ABSENT else dict.fromkeys(known, 1 / max(1, len(known))))
            fresh += [] if id_ != ABSENT else [f"{category} {label}"]
    dropped = [
        f"{category} {label}"
        for category, labels in old.phenotypes.items()
        for label in labels
        if new.vocabulary.label_id(category, label) == ABSENT
    ]
    counts = [f"{len(rows) - len(fresh):,} kept"]
    for what, names in (("fresh", fresh), ("dropped", dropped)):
        counts.append(f"{len(names):,} {what}" + (f" ({listed(names)})" if names else ""))
    return rows, "labels: " + ", ".join(counts)


def _bin_rows(old: GeneTokenizer, new: GeneTokenizer, gene_g: np.ndarray) -> tuple[list[dict[int, float]], str]:
    """Return the old ids of each new bin, and whether bins are kept; others mix the two nearest in expression."""
    shared = gene_g >= 0
    old_ge, new_ge = (
        np.broadcast_to(tokenizer.bin_edges.edges_ge, (len(tokenizer.panel), tokenizer.bin_edges.num_edges))[genes]
        for tokenizer, genes in ((old, gene_g[shared]), (new, shared))
    )
    first, num_bins = old.first_bin_id, new.bin_edges.num_edges + 1
    if np.array_equal(old_ge, new_ge):
        return [{first + b: 1.0} for b in range(num_bins)], "bins: kept"
    old_b, new_b = (tokenizer.bin_edges.values().mean(axis=0) for tokenizer in (old, new))
    place_b = np.interp(new_b[1:], old_b[1:], np.arange(1, len(old_b)))
    rows = [{first: 1.0}]
    for place in place_b.tolist():
        below, share = first + int(place), place % 1
        rows.append({below: 1 - share, below + 1: share} if share else {below: 1.0})
    line = f"bins: {num_bins - 1} carried over from {len(old_b) - 1} with other edges, by the expression of each"
    return rows, line


def _sparse(rows: Sequence[Mapping[int, float]], *, num_old: int) -> sparse.csr_matrix:
    starts = np.cumsum([0, *map(len, rows)])
    old = [index for row in rows for index in row]
    shares = np.array([share for row in rows for share in row.values()], dtype=np.float32)
    return sparse.csr_matrix((shares, np.array(old, dtype=np.int64), starts), shape=(len(rows), num_old))


# -- weights ------------------------------------------------------------------------------------------------------


def _mixed(weight_oh: Tensor, shares_no: sparse.csr_matrix, fresh: Tensor | float = 0.0) -> Tensor:
    """Return new rows made of old ones; rows without old ones are `fresh`. A row that is kept keeps its bits."""
    rows = torch.from_numpy(shares_no @ weight_oh.float().numpy()).to(weight_oh.dtype)
    is_fresh = torch.from_numpy(np.diff(shares_no.indptr) == 0)
    rows[is_fresh] = fresh[is_fresh] if isinstance(fresh, Tensor) else fresh
    return rows


def _embeddings(
    state: Mapping[str, Tensor], names: NameMap, old: GeneTokenizer, new: GeneTokenizer, *, seed: int
) -> dict[str, Tensor]:
    """Return the embeddings of the new ids and types."""
    words, types, gain = _WORDS, _TYPES, "genebert.embeddings.type_gain"
    generator, fresh = torch.Generator().manual_seed(seed), {}
    groups = {
        words: [(slice(_NUM_SPECIAL, old.first_bin_id), slice(_NUM_SPECIAL, new.first_bin_id))],
        types: [
            (slice(1, old.first_gene_type), slice(1, new.first_gene_type)),
            (slice(old.first_gene_type, None), slice(new.first_gene_type, None)),
        ],
    }
    for key, shares in ((words, names.ids_vo), (types, names.types_to)):
        fresh[key] = torch.zeros(shares.shape[0], state[key].shape[1])
        for old_rows, new_rows in groups[key]:
            learnt = state[key][old_rows].float()
            learnt = learnt if len(learnt) else state[types].float()  # a run without phenotypes
            # Around the mean of the learnt rows, as far from it as those are.
            mean_h = learnt.mean(dim=0)
            spread = (learnt - mean_h).std() if len(learnt) > 1 else learnt.std()
            drawn = torch.randn(len(fresh[key][new_rows]), len(mean_h), generator=generator)
            fresh[key][new_rows] = mean_h + spread * drawn
    embeddings = {
        words: _mixed(state[words], names.ids_vo, fresh[words].to(state[words].dtype)),
        types: _mixed(state[types], names.types_to, fresh[types].to(state[types].dtype)),
    }
    return {**embeddings, gain: _mixed(state[gain], names.ids_vo, 1.0)} if gain in state else embeddings


@dataclass(frozen=True)
class _Head:
    """What a model answers: its kind, and the ids of the labels that its outputs mean, if they mean labels."""

    kind: type
    label_ids: slice | None
    category: str | None
    classes: tuple[str, ...]

    @classmethod
    def of(cls, kind: type, config: GeneBertConfig, tokenizer: GeneTokenizer) -> "_Head":
        if kind is not GeneBertForClassification:
            return cls(kind, slice(_NUM_SPECIAL, tokenizer.first_bin_id), None, ())
        category, classes = config.phenotype_category, tuple((config.id2label or {}).values())
        is_labels = classes == tokenizer.phenotypes.get(category or "", ())
        ids = slice(*tokenizer.vocabulary.id_range(str(category))) if is_labels else None  # else one against the rest
        return cls(kind, ids, category, classes)


def _head_weights(state: Mapping[str, Tensor], names: NameMap, old: _Head, new: _Head) -> dict[str, Tensor]:
    """Return the weights of the head and of the direct path that mean the same; what is left out starts fresh."""
    weights: dict[str, Tensor] = {}
    classes_ko: sparse.csr_matrix | None = None  # share of each old output in each new one, if they mean the same
    if old.label_ids is not None and new.label_ids is not None:
        shares = names.ids_vo[new.label_ids, old.label_ids]
        classes_ko = shares if shares.nnz else None
    elif (new.kind, new.category, new.classes) == (old.kind, old.category, old.classes):
        classes_ko = sparse.identity(len(new.classes), dtype=np.float32, format="csr")
    votes = "direct_classes.votes_tk" if new.kind is GeneBertForClassification else "direct_labels.votes_tk"
    for key, tensor in state.items():
        part = key.partition(".")[0]
        if key.endswith(".share_p2"):
            if new.kind is old.kind and classes_ko is not None:
                is_one = new.kind is GeneBertForClassification
                phenotypes_po = names.types_to[1 : names.first_gene_type, 1 : 1 + len(tensor)]
                weights[key] = tensor if is_one else _mixed(tensor, phenotypes_po, 1.0)
            continue
        if part.startswith("direct_") and classes_ko is not None:
            weights[votes] = _mixed(_mixed(tensor, names.types_to).T, classes_ko).T.contiguous()
            weights[votes][1:] *= names.level_scale  # row 0 has the intercepts
        elif part == "genebert" or part.startswith("direct_") or new.kind is not old.kind:
            continue
        elif part == "mlm_projection":  # a label of a new phenotype is as likely as its phenotype's others
            labels = tensor[old.label_ids] if old.label_ids != slice(_NUM_SPECIAL, _NUM_SPECIAL) else tensor
            weights[key] = _mixed(
                tensor, names.ids_vo, labels.mean(dim=0).expand(names.ids_vo.shape[0], *tensor.shape[1:])
            )
        elif part == "classifier" and classes_ko is not None:
            weights[key] = _mixed(tensor, classes_ko)
        elif part not in ("classifier", "pre_classifier") or classes_ko is not None:
            weights[key] = tensor
    return weights


# -- the model ----------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """A model that starts from another run."""

    model: Any
    lines: tuple[str, ...]  # what was kept
    is_new: dict[str, Tensor]  # name of an embedding -> True for rows that are not a row of the run, (v,) and (t,)
    has_head: bool  # True if the head means the same as the run's


@contextmanager
def errors_of_weights(path: str) -> Iterator[None]:
    """Explain what transformers raises for a folder without our weights."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} holds no GeneBERT weights ({error}). Give a run folder of mlm or cls.") from error


def weights_folder(path: str) -> Path:
    """Return the folder with the weights of a run to start from; one on the Hugging Face Hub is fetched.

    Of a run that is not finished, it is the newest whole checkpoint.

    Raises:
        InputError: There are none.
    """
    folder = local_run(path)
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"pretrained_model_path {path} {reason}. Give a run folder of mlm or cls.")
    if (folder / CONFIG_FILE).exists() and any(folder.glob("*.safetensors")):
        return folder
    if (newest := checkpoints.newest_whole(folder)) is None:
        raise InputError(
            f"pretrained_model_path {path} holds no GeneBERT weights: it has neither {CONFIG_FILE} with *.safetensors "
            "nor a whole checkpoint. Give a run folder of mlm or cls."
        )
    return newest


def run_config(path: str) -> GeneBertConfig:
    """Read the configuration of the run to start from, in a folder or on the Hugging Face hub."""
    with errors_of_weights(path):
        folder = weights_folder(path)
        config: GeneBertConfig = GeneBertConfig.from_pretrained(folder, trust_remote_code=False, name_or_path=folder)
        config.check_size(folder)
    return config


def start_from(
    kind: type[PreTrainedModel], config: "TrainingConfig", tokenizer: GeneTokenizer, *, seed: int, **settings: Any
) -> Start:
    """Return a model that starts from the run at `config.pretrained_model_path`, and what was kept.

    Args:
        kind: Class of the model.
        seed: Of rows that start fresh.
        settings: Of the model's configuration: what its tokenizer decides, and what the verb does.

    Raises:
        InputError: There are no such weights, or nothing of them can be used.
    """
    path = str(weights_folder(str(config.pretrained_model_path)))
    if damage := damaged_file(Path(path)):
        raise InputError(f"run {path} cannot be used: {damage}. Restore the folder as it was written.")
    then, now = run_config(path), run_config(path)
    if kind is not GeneBertForClassification:
        settings = {"phenotype_category": None, "class_weights": None, "num_labels": 2, **settings}
    for name, value in {"attention_kernel": config.attn_implementation, **settings}.items():
        setattr(now, name, value)
    old_kind = _KINDS.get((then.architectures or [""])[0], GeneBertModel)
    with quiet(LOADING), torch.random.fork_rng(), errors_of_weights(path):
        state = old_kind.from_pretrained(path).state_dict()
    if old_kind is GeneBertModel:
        state = {f"genebert.{key}": tensor for key, tensor in state.items()}
    old = tokenizer
    if then.tokenizer_fingerprint != tokenizer.fingerprint:
        old = GeneTokenizer.from_pretrained(path)
        if then.tokenizer_fingerprint not in (None, old.fingerprint):
            raise InputError(f"{path}: weights and tokenizer.json do not belong together. Restore the folder.")
    names = name_map(old, tokenizer, source=path)
    heads = [_Head.of(old_kind, then, old), _Head.of(kind, now, tokenizer)]
    weights = {key: tensor for key, tensor in state.items() if key.startswith("genebert.")}
    weights |= _embeddings(state, names, old, tokenizer, seed=seed) | _head_weights(state, names, *heads)
    with quiet(LOADING):
        pair: Any = kind.from_pretrained(None, config=now, state_dict=weights, output_loading_info=True)
    model, report = pair
    missing = [key for key in report["missing_keys"] if not key.endswith(".share_p2")]
    fresh = {"direct path" if key.startswith("direct_") else "head" for key in missing}
    asked = f" (the run predicts {heads[0].category})" if heads[0].category not in (None, heads[1].category) else ""
    lines = (*names.lines, "head: " + (f"fresh{asked}" if "head" in fresh else "kept"))
    if now.direct_path:
        lines = (*lines, f"genes' votes for labels: {'fresh' if 'direct path' in fresh else 'kept'}")
    logger.info("weights from %s: %s", path, "; ".join(lines))
    is_new = {
        key: torch.from_numpy(shares.max(axis=1).toarray().ravel() < 1)
        for key, shares in ((_WORDS, names.ids_vo), (_TYPES, names.types_to))
    }
    return Start(model, lines, is_new, has_head="head" not in fresh)


def from_scratch(config: "ConfigT") -> "ConfigT":
    """Return the settings of the same run without the weights that it starts from, in a folder within its own.

    The model has the same shape. What was not given (passes, learning rate) suits a run without a start.
    """
    then = run_config(str(config.pretrained_model_path))
    shape = {name: getattr(then, name) for name in SHAPE}
    folder = Path(config.output_dir) / SCRATCH_FOLDER
    overrides = {name: value for name, value in config.training_overrides.items() if name != "push_to_hub"}
    return replace(
        config, pretrained_model_path=None, compare_scratch=False, output_dir=str(folder),
        resume_from_checkpoint="latest" if config.resume_from_checkpoint and folder.is_dir() else None,
        train_only="votes" if config.train_only == "votes" else "all", training_overrides=overrides,
        direct_path="auto" if then.direct_path else "never", **shape,
    )  # fmt: skip


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger, and those below it, say nothing but errors for a while."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
