"""The verbs: one dataclass each, whose docstring opens its manual page, with its own settings and checks.

Owns the table `CONFIGS` of all verbs; what `mlm` and `cls` share is in `training`, and the work in other rooms.
"""

import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from perturbgene.cli.base import BaseConfig, BinOptions, ReadingConfig
from perturbgene.cli.options import GENES, IN_OUT, RUNNING, TASK, check_question, named_values, option, own_flags
from perturbgene.cli.training import TrainingConfig
from perturbgene.errors import InputError

HvgFlavor = Literal["auto", "seurat", "seurat_v3"]
PerturbationKind = Literal["knock_out", "over_express", "set_bin"]
Pooling = Literal["cls", "mean"]

#: Settings of `DataCollatorForPhenotypicMLM` that say how much of a cell is hidden.
MASK_RATES = ("gene_mask_prob", "phenotype_mask_prob", "absent_prob", "unexpressed_ratio")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(BinOptions):
    """Turn h5ad files into a corpus to train on.

    Chooses the genes, brings all files to one scale, fits bins, collects the labels of phenotypes and holds out
    donors. Writes shuffled shards with a manifest and an audit.
    """

    verb = "prepare"
    example = "perturbgene prepare cells.h5ad --output corpus --phenotypes cell_type tissue --split_by donor_id"

    inputs: list[str] = option(
        [], "Files of cells (.h5ad, .zarr, 10x .h5 or matrix folders): paths, globs or brace patterns.", group=IN_OUT,
        is_positional=True, is_path=True,
    )  # fmt: skip
    output: str = option("", "Corpus folder to write.", group=IN_OUT, is_required=True, is_folder=True)
    overwrite: bool = option(False, "Replace an existing corpus; any other folder is refused.", group=IN_OUT)
    report: bool = option(True, "Also write a report.html that says what the corpus holds.", group=IN_OUT)
    phenotypes: list[str] = option(
        [], "Columns of obs that become phenotypes; NAME=COLUMN renames one (cell_type=bulk_labels).", is_named=True
    )
    split_by: str | None = option(
        None, "Column of obs whose cells stay on one side of the split, such as the donor, or `cell`. Default: the "
        "first of donor_id, donor, individual, patient and sample, or else single cells, with a warning.",
    )  # fmt: skip
    eval_fraction: float = option(0.2, "Share of donors (or cells) held out for evaluation.", within="(0, 1)")
    eval_donors: list[str] = option([], "Donors to hold out, instead of a share.", keeps_commas=True, is_unique=True)
    seed: int = option(0, "Seed of the split and the shuffle.", within="[0, 4294967295]")
    like: str | None = option(
        None, "Run or corpus whose genes, bins and labels to keep, in their order; genes and labels that it lacks "
        "follow behind (--num_top_genes counts all). Training that starts from it then keeps all that it has learned.",
        group=GENES, is_path=True, may_be_on_hub=True, excludes=("panel", "bin_edges", "bin_edges_path"),
    )  # fmt: skip
    num_bins: int = option(
        8, "Number of quantile bins of the expressed values. Bins of width 1 follow above the highest.", group=GENES,
        within="[1, inf)",
    )  # fmt: skip
    min_genes: int = option(1, "Drop cells that express fewer genes of the panel.", group=GENES, within="[0, inf)")
    shard_size: int = option(10000, "Number of cells per shard.", group=IN_OUT, within="[1, inf)")
    hvg_flavor: HvgFlavor = option(
        "auto", "How genes are ranked, as in scanpy: by the dispersion of log values (seurat) or by the variance of "
        "counts (seurat_v3). auto uses seurat_v3 for counts.", group=GENES,
    )  # fmt: skip
    num_processes: int = option(0, "Number of processes; 0 uses every core.", group=RUNNING, within="[0, inf)")
    scheduler: str | None = option(None, "Address of a Dask scheduler whose workers to use (tcp://...).", group=RUNNING)

    @property
    def column_of_phenotype(self) -> dict[str, str]:
        """Phenotype -> obs column."""
        return {name: column or name for name, column in named_values(self.phenotypes, flag="phenotypes").items()}

    def check(self) -> None:
        super().check()
        if self.like and self.num_bins != type(self).num_bins:
            raise InputError(
                f"num_bins is {self.num_bins}, but --like takes the bins of {self.like}. Remove --num_bins or --like."
            )
        if self.eval_donors and self.split_by == "cell":
            raise InputError(
                "eval_donors needs a split by donor, but split_by is cell. Give the donor column to --split_by."
            )


@dataclass(frozen=True, kw_only=True)
class MlmConfig(TrainingConfig):
    """Train by masking genes and phenotypes.

    Hides some genes' bins and some phenotypes of every cell and learns to predict them from the rest. The model can
    then predict any phenotype, given any others.
    """

    verb = "mlm"
    example = "perturbgene mlm --corpus corpus --output_dir runs/mlm"

    gene_mask_prob: float = option(0.15, "Share of a cell's expressed genes to hide.", within="[0, 1]")
    phenotype_mask_prob: float = option(0.5, "Share of the phenotypes in a sequence to hide.", within="[0, 1]")
    absent_prob: float = option(0.1, "Share of phenotypes to leave out of the sequence.", within="[0, 1]")
    unexpressed_ratio: float = option(
        0.5, "Number of unexpressed genes to ask for per hidden expressed gene; the answer is bin_0.", within="[0, inf)"
    )
    phenotype_loss_weight: float = option(1.0, "Weight of the phenotypes' mean loss.", within="[0, inf)")
    gene_loss_weight: float = option(0.3, "Weight of the genes' mean loss.", within="[0, inf)")

    @property
    def mask_rates(self) -> dict[str, float]:
        """How much of a cell is hidden, by the names of `DataCollatorForPhenotypicMLM`."""
        return {name: getattr(self, name) for name in MASK_RATES}

    def check(self) -> None:
        super().check()
        asked = self.phenotype_mask_prob * (1 - self.absent_prob)
        if not self.phenotype_loss_weight * asked and not self.gene_loss_weight * self.gene_mask_prob:
            raise InputError(
                "Nothing is hidden that has a weight, so there is nothing to learn. Raise --phenotype_mask_prob and "
                "--phenotype_loss_weight, or --gene_mask_prob and --gene_loss_weight."
            )
        if not (self.corpus or self.pretrained_model_path or self.vocab_path):
            raise InputError(
                "The phenotype vocabulary is missing, and there is no corpus or pretrained model to take it from. "
                "Give --vocab_path."
            )


@dataclass(frozen=True, kw_only=True)
class ClsConfig(TrainingConfig):
    """Train a classifier of one phenotype.

    Learns to predict one phenotype from a cell's genes and, optionally, its other phenotypes. It works best if it
    starts from an mlm run (--pretrained_model_path).
    """

    verb = "cls"
    example = (
        "perturbgene cls --corpus corpus --output_dir runs/cls --phenotype_category cell_type "
        "--pretrained_model_path runs/mlm"
    )
    best_metric = "eval_macro_f1"

    phenotype_category: str = option("", "Phenotype to classify.", is_required=True)
    binary_label: str | None = option(None, "Classify cells as this label or any other one.", none_is_text=True)
    balanced_dataset: bool = option(True, "Weight each class inversely to its number of training cells.")

    def check(self) -> None:
        super().check()
        if self.phenotype_category in self.included_phenotypes:
            raise InputError(
                f"included_phenotypes has {self.phenotype_category!r}, which is the phenotype to classify: the model "
                "would be given the answer. Remove it from --included_phenotypes."
            )


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(BaseConfig):
    """How a trained model is run on cells (evaluate, predict and all that ask a model)."""

    group = RUNNING

    run: str = option(
        "", "Run folder of mlm or cls, or its name on the Hugging Face Hub.", group=IN_OUT, is_positional=True,
        is_path=True, may_be_on_hub=True,
    )  # fmt: skip
    batch_size: int = option(256, "Maximum number of cells per batch.", within="[1, inf)")
    batch_tokens: int = option(
        32768, "Maximum tokens per batch (or one longer cell). Lower it if memory runs out.", within="[1, inf)"
    )
    device: str = option("auto", "Device to run on: auto, cpu, mps, cuda or cuda:N.")

    def check(self) -> None:
        super().check()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(
                f"device is {self.device!r}, which is none of auto, cpu, mps, cuda and cuda:N. Change --device."
            )


@dataclass(frozen=True, kw_only=True)
class FileOptions(QuestionOptions, ReadingConfig):
    """One h5ad file in, one file out (predict and all verbs that ask a model about new cells)."""

    group = IN_OUT

    input: str = option(
        "", "File of cells, or its URL: .h5ad, .zarr, 10x .h5 or a 10x matrix folder.", is_positional=True, is_path=True
    )
    output: str = option("", "File to write, .h5ad or .zarr.", is_required=True, suffixes=(".h5ad", ".zarr"))
    overwrite: bool = option(False, "Replace an output that already exists.")
    given: list[str] = option(
        [], "Known phenotypes: NAME reads each cell's label from obs, NAME=LABEL sets it for all cells.",
        group=TASK, keeps_commas=True, is_named=True,
    )  # fmt: skip

    @property
    def given_labels(self) -> dict[str, str | None]:
        """Label of each given phenotype, None where it is read from obs."""
        return named_values(self.given, flag="given")

    @property
    def piece(self) -> tuple[int, int] | None:
        """Which of how many pieces this command computes, counted from 1; None for all of it."""
        return None

    def check(self) -> None:
        super().check()
        if Path(self.output).absolute() == Path(self.input).absolute():
            raise InputError(f"output is {self.output!r}, the input itself, which must stay as it is. Change --output.")


@dataclass(frozen=True, kw_only=True)
class DividedOptions(FileOptions):
    """What the verbs share whose cells several jobs can divide among them."""

    part: str | None = option(
        None, "K/N computes only the K-th of N parts of the cells, K in 1..N, and keeps it in OUTPUT.parts; `merge "
        "OUTPUT` makes the output of all N. The parts may run at any time, in any order and on any machine.",
        group=RUNNING,
    )  # fmt: skip
    #: Folders of all pieces, from which `merge` makes the output; no option.
    pieces: tuple[str, ...] = ()

    @property
    def piece(self) -> tuple[int, int] | None:
        """Which of how many pieces this command computes, counted from 1; None for all of it."""
        if self.part is None:
            return None
        number, _, count = self.part.partition("/")
        return int(number), int(count)

    def check(self) -> None:
        super().check()
        if self.part is None:
            return
        if not re.fullmatch(r"\d+/\d+", self.part, re.ASCII):
            hint = " The number of the part is empty: is this an array job?" if self.part.startswith("/") else ""
            raise InputError(f"part is {self.part!r}, but it must be K/N, e.g. 3/10.{hint} Correct --part.")
        number, count = (int(word) for word in self.part.split("/"))
        if number == 0 or count == 0:
            last = max(count, 1)
            raise InputError(
                f"part is {self.part!r}, but parts count from 1. Give --part 1/{last} to {last}/{last}; for an array "
                f"of Slurm, --array=1-{last}."
            )
        if number > count:
            raise InputError(
                f"part is {self.part!r}, but the last of {count} parts is {count}/{count}. Correct --part."
            )

    def command(self) -> str:
        """Return a command line with these settings, in which URLs have no secrets."""
        settings, flags = self.to_dict(), own_flags(type(self)).values()
        words = ["perturbgene", self.verb, *(str(settings[flag.name]) for flag in flags if flag.is_positional)]
        words += ["--output", self.output]
        for flag in flags:
            value = settings[flag.name]
            if flag.is_positional or flag.name == "output" or value == flag.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag.spelling}" if value else f"--no_{flag.spelling}")
            else:
                words += [f"--{flag.spelling}", *map(str, value if isinstance(value, list) else [value])]
        return shlex.join(words)


def _report_option() -> Any:
    return option(True, "Also write a report: an HTML page that opens offline, and its figures.", group=IN_OUT)


def _mask_rate(what: str, within: str = "[0, 1]") -> Any:
    return option(None, f"{what} when genes are scored. Default: as in training.", within=within)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(QuestionOptions, ReadingConfig):
    """Score a run on held-out cells, next to its baselines.

    Asks for each phenotype alone and with each set of the others given (of more than four phenotypes: with each single
    one and with all), and for all at once. Writes accuracy, macro F1, confusion
    matrices and scores of masked genes, next to baselines on the same cells: the majority class, a logistic regression,
    ridge and nearest neighbors on all genes, and CellTypist if it is installed. The best is marked.
    """

    verb = "evaluate"
    example = "perturbgene evaluate runs/mlm"

    corpus: str | None = option(
        None, "Corpus whose evaluation cells are scored. Default: the corpus of the run.", group=IN_OUT, is_path=True,
        excludes=("eval_data_paths", "train_data_paths"),
    )  # fmt: skip
    eval_data_paths: list[str] = option([], "Files to score: paths, globs, brace patterns.", group=IN_OUT, is_path=True)
    train_data_paths: list[str] = option(
        [], "Files to fit the baselines on. Default: the training cells of the run.", group=IN_OUT, is_path=True
    )
    output: str | None = option(None, "Folder to write. Default: RUN/evaluation.", group=IN_OUT, is_folder=True)
    ask: list[str] = option([], "Phenotypes to ask for. Default: all phenotypes of the run.")
    given: list[str] = option(
        [], "Phenotypes whose labels are given. Default: each set of the phenotypes that are not asked for.",
        is_unique=True,
    )  # fmt: skip
    baselines: bool = option(
        True,
        "Also fit and score the baselines: majority class, logistic regression on the genes of the run; on all genes "
        "of the files, ridge, nearest neighbors and, if installed, CellTypist.",
    )
    calibrate: bool | None = option(
        None, "Fit temperatures on half of the donors and store them in the run, where predict finds them. Default: "
        "only if the run's own evaluation cells are scored.",
    )  # fmt: skip
    scib: bool = option(
        False, "Also compute the scIB metrics of the embedding next to those of principal components, which takes "
        "minutes (needs scib-metrics).",
    )  # fmt: skip
    report: bool = _report_option()
    gene_mask_prob: float | None = _mask_rate("Share of expressed genes to hide")
    phenotype_mask_prob: float | None = _mask_rate("Share of phenotypes to hide")
    absent_prob: float | None = _mask_rate("Share of phenotypes to leave out")
    unexpressed_ratio: float | None = _mask_rate("Number of unexpressed genes per hidden expressed gene", "[0, inf)")

    @property
    def mask_rates(self) -> dict[str, float]:
        """Rates that replace the run's own."""
        return {name: getattr(self, name) for name in MASK_RATES if getattr(self, name) is not None}

    def check(self) -> None:
        super().check()
        check_question(self.ask, self.given)
        if self.scib and find_spec("scib_metrics") is None:
            raise InputError("scib needs the package scib-metrics. Install it with `pip install 'perturbgene[scib]'`.")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(BaseConfig):
    """Which columns to write for each prediction (predict)."""

    joint: bool = option(
        False, "Ask for all phenotypes in one sequence, which is faster. Default: one sequence for each, so that an "
        "answer does not depend on what else is asked.",
    )  # fmt: skip
    top_k: int = option(3, "Number of most probable labels to write.", within="[1, inf)")
    probabilities: bool = option(
        True, "Write the matrix of probabilities of every label (cells x labels) to obsm['predicted_X_probabilities'] "
        "for each phenotype X; its labels are in uns['perturbgene'] under the same name.",
    )  # fmt: skip
    abstain: float = option(0.0, "Write `unknown` if the calibrated probability is below this.", within="[0, 1]")
    coarse: bool = option(
        False, "Where no label reaches --abstain (at least 0.5), answer with the finest term of the Cell Ontology "
        "whose labels together do. Needs perturbgene[ontology].",
    )  # fmt: skip
    conformal: float | None = option(
        None, "Write for each cell the set of labels that holds the true one in this share of the cells of a new "
        "donor, such as 0.9, and its size. Needs evaluate.", within="(0, 1)",
    )  # fmt: skip
    calibrate: bool = option(True, "Divide logits by the temperatures that evaluate fitted.")
    ood: bool = option(
        False, "Write how unusual each cell is: a score of new types (far from the training cells of its label, and a "
        "doubtful label), the log-likelihood of masked genes (a second forward pass), and their percentiles among "
        "the run's evaluation cells. The run must have been evaluated.",
    )  # fmt: skip
    audit: bool = option(False, "Write the probability of each cell's own label, given its genes and other phenotypes.")
    majority_by: str | None = option(
        None, "Also write the label that most cells of each cluster get (majority_X), and their share. COLUMN of obs "
        "with the clusters, or `embedding` to cluster the cells by their embedding (needs igraph).",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.majority_by == "embedding" and find_spec("igraph") is None:
            raise InputError(
                "majority_by is embedding, which needs the package igraph. Install it with `pip install "
                "'perturbgene[leiden]'`, or name a column of obs."
            )
        if self.conformal is not None and not self.calibrate:
            raise InputError("conformal sets need calibrated probabilities. Remove --no_calibrate or --conformal.")
        if self.coarse and self.abstain < 0.5:
            raise InputError(
                f"coarse answers need a probability to reach, but abstain is {self.abstain:g}; below 0.5, two separate "
                "terms could reach it. Give --abstain 0.9 (or another one from 0.5 to 1), or remove --coarse."
            )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(AnswerOptions, DividedOptions):
    """Predict phenotypes of new cells.

    Reads any file of cells whose genes overlap the run's panel, asks for phenotypes and writes the answers with their
    probabilities to obs, and the probabilities of all labels to obsm. No label column is needed, and cells keep their
    order.
    """

    verb = "predict"
    example = "perturbgene predict runs/mlm new.h5ad --output out.h5ad --ask cell_type --given tissue=lung"

    ask: list[str] = option([], "Phenotypes to predict. Default: all that are not given.")
    report: bool = _report_option()

    def check(self) -> None:
        super().check()
        check_question(self.ask, self.given_labels)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ReadingConfig):
    """Look at files before the work: what they hold and what would be done.

    Reads all cells as the other commands do and reports what each matrix is, its scale, genes, library sizes, labels
    and donors, what will be done with them, and what should be looked at. With --run it checks what a command that
    asks the run would read; without, what prepare would. Ends with exit code 2 if they would refuse the files.
    """

    verb = "check"
    example = "perturbgene check cells.h5ad --run runs/mlm"
    group = IN_OUT

    inputs: list[str] = option(
        [], "Files of cells (.h5ad, .zarr, 10x .h5 or matrix folders): paths, globs or brace patterns.",
        is_positional=True, is_path=True,
    )  # fmt: skip
    run: str | None = option(None, "Run that the cells are for: folder or hub id.", is_path=True, may_be_on_hub=True)
    split_by: str | None = option(None, "Column of obs with the donors. Default: as prepare finds it.", group=TASK)
    json: bool = option(False, "Print JSON for a program instead of a table for a person.")

    def check(self) -> None:
        super().check()
        if self.run and self.split_by:
            raise InputError("split_by is for files that become a corpus, not for a run. Remove --split_by or --run.")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(BaseConfig):
    """Download files, and resume interrupted downloads.

    Downloads files from URLs, tries again if a server fails, and compares checksums.
    """

    verb = "download"
    example = "perturbgene download https://host/shard_{0..3}.h5ad --output_dir data"
    group = IN_OUT

    sources: list[str] = option([], "URLs or brace patterns of URLs.", is_positional=True)
    output_dir: str = option(".", "Folder to write.", is_folder=True)
    checksums: str | None = option(None, "File with lines `SHA256  NAME`.", is_path=True)
    retries: int = option(5, "Number of failed tries in a row before a download stops.", group=TASK, within="[0, inf)")
    overwrite: bool = option(False, "Download files again that already exist.")

    def check(self) -> None:
        super().check()
        for source in self.sources:
            if "://" not in source:
                raise InputError(f"{source!r} is not a URL. Write it as https://host/file.h5ad.")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(DividedOptions):
    """Write embeddings of cells, phenotypes or genes.

    Copies the file and adds each cell's embedding as obsm['X_perturbgene'], ready for scanpy. The model sees no
    phenotypes unless they are given, so no label leaks in. With --groupby or --network it writes mean embeddings of
    all genes in each group of cells instead, their networks and how they differ between groups.
    """

    verb = "embed"
    example = "perturbgene embed runs/mlm cells.h5ad --output embedded.h5ad"

    pooling: Literal["auto", "joined", "asked", "cls", "genes"] = option(
        "auto",
        "A cell's embedding. asked: the mean of the final states of its asked phenotypes ([MASK]), which their loss "
        "has trained; cls: the final state of [CLS], which a classifier has trained; genes: the mean of the final "
        "states of its genes; joined: principal components of the training cells, the genes' votes for labels and the "
        "states that the loss has trained, side by side. auto: joined, unless the run has no file for it.",
    )
    phenotype: list[str] = option(
        [], "Phenotypes to ask for; the final state of each [MASK] goes to obsm.", is_unique=True
    )
    genes: list[str] = option([], "Genes, by id or symbol, whose embedding in each cell goes to obsm.", is_unique=True)
    groupby: str | None = option(None, "Column of obs; mean embeddings of genes are written for each of its groups.")
    network: bool = option(False, "Link genes with similar means within a group; also written as GraphML.")
    top_k: int = option(10, "Maximum number of links per gene.", within="[1, inf)")
    min_similarity: float = option(0.5, "Minimum cosine similarity of linked genes.", within="[-1, 1]")
    min_cells: int = option(10, "Minimum number of a group's cells that express a linked gene.", within="[1, inf)")

    def check(self) -> None:
        super().check()
        if (self.groupby or self.network) and Path(self.output).suffix != ".h5ad":
            raise InputError(f"output is {self.output!r}, but means of groups are an .h5ad file. Change --output.")
        if (self.groupby or self.network) and (self.genes or self.phenotype):
            raise InputError(
                "groupby and network average over cells, so no cell's own genes or phenotype can be written. Remove "
                "--genes and --phenotype, or run a second command for them."
            )
        if (self.groupby or self.network) and self.part:
            raise InputError(
                "part divides what is written about each cell, but groupby and network average over all cells. Remove "
                "--part; torchrun divides the cells among processes."
            )
        check_question(self.phenotype, self.given_labels, flag="phenotype")


@dataclass(frozen=True, kw_only=True)
class CounterfactualConfig(FileOptions):
    """Change one phenotype of cells and see which genes should change.

    Predicts hidden genes of each cell with its own label and with the one that is set, all else equal. Writes the
    mean change of every gene, with a null from random changes and the observed difference, as .h5ad, .csv and
    .png, and a report (.html). It shows what the model has learned to go with a label, not what causes what.
    """

    verb = "counterfactual"
    example = "perturbgene counterfactual runs/mlm cells.h5ad --output changes.h5ad --set disease=normal"
    output: str = option("", "h5ad file to write.", group=IN_OUT, is_required=True, suffixes=(".h5ad",))
    set: str = option("", "Phenotype and label to set, as NAME=LABEL.", is_required=True, is_named=True)
    given: list[str] = option(
        [], "Other known phenotypes: NAME reads obs, NAME=LABEL sets it for all cells, `nothing` gives none. "
        "Default: all phenotypes of the run that obs has.", keeps_commas=True, is_named=True,
    )  # fmt: skip
    groupby: str | None = option(None, "Column of obs; changes are computed for each of its groups.")
    num_passes: int = option(4, "Number of masks per cell.", within="[1, inf)")
    gene_mask_prob: float | None = option(
        None, "Share of genes to hide; a larger one makes the label count more. Default: as in training.",
        within="(0, 1]",
    )  # fmt: skip
    num_null: int = option(20, "Number of random changes that form the null; 0 means no test.", within="[0, inf)")
    report: bool = _report_option()
    force: bool = option(False, "Allow combinations of phenotypes that the run has never seen.")
    show_q: bool = option(
        False, "Give p and q even where the run is not better than the most frequent label on held-out cells, or where "
        "nothing can be checked.",
    )  # fmt: skip
    seed: int = option(0, "Seed of the masks and the null.", within="[0, 4294967295]", group=RUNNING)

    @property
    def set_label(self) -> dict[str, str]:
        """The phenotype and its label."""
        return {name: str(label) for name, label in named_values([self.set], flag="set").items()}

    @property
    def given_labels(self) -> dict[str, str | None] | None:  # type: ignore[override]
        """Label of each given phenotype, None where it is read from obs; None in its place means all of the run."""
        return None if not self.given else {} if self.given == ["nothing"] else named_values(self.given, flag="given")

    def check(self) -> None:
        super().check()
        if "=" not in self.set:
            raise InputError(f"set is {self.set!r}, but it must read NAME=LABEL, e.g. disease=normal. Correct --set.")
        if 0 < self.num_null < 5:
            raise InputError(f"num_null is {self.num_null}, too few to know their spread. Give 0, or 5 or more.")
        if self.set_label.keys() & (self.given_labels or {}).keys():
            raise InputError(f"set and given both have {next(iter(self.set_label))!r}. Remove it from --given.")


def check_bin(kind: str, bin: int | None) -> None:
    """Refuse `set_bin` without a bin, and a bin without `set_bin`."""
    if (kind == "set_bin") != (bin is not None):
        raise InputError(
            f"kind is {kind} and bin is {bin}, but set_bin needs a bin and no other kind takes one. "
            "Change --kind or --bin."
        )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(DividedOptions):
    """What `perturb` and `attribute` share, which score genes."""

    batch_tokens: int | None = option(  # type: ignore[assignment]
        None, "Maximum number of tokens per batch. Default: what suits the device.", group=RUNNING, within="[1, inf)"
    )


@dataclass(frozen=True, kw_only=True)
class PerturbConfig(ScoringOptions):
    """Knock out or raise genes in silico.

    Removes or changes genes in every cell and measures how far that moves the cell's state, or the log-odds of a
    label. Screens all genes with gradients and computes the strongest ones and random controls exactly. Writes a
    table with statistics over donors (.csv or .parquet), a picture (.png), a record (.json) and a report (.html). An
    interrupted run continues where it stopped.
    """

    verb = "perturb"
    example = "perturbgene perturb runs/mlm cells.h5ad --output ko.csv --genes all --towards disease=normal"
    output: str = option("", "Table to write.", group=IN_OUT, is_required=True, suffixes=(".csv", ".parquet"))
    genes: list[str] = option(
        [], "Genes by id or symbol; A+B for both at once, `all` for all genes.", is_required=True, is_unique=True
    )
    kind: PerturbationKind = option(
        "knock_out", "Remove the gene's token, set it to the highest bin, or set it to --bin. The last two insert "
        "genes that a cell does not express."
    )  # fmt: skip
    bin: int | None = option(None, "Bin for set_bin.", within="[1, inf)")
    towards: str | None = option(
        None, "PHENOTYPE=LABEL whose log-odds to measure. Default: how far the cell's state moves (cosine distance)."
    )
    from_: str | None = option(
        None, "PHENOTYPE=LABEL to compare --towards with. Default: all other labels. It chooses no cells; --where does."
    )
    embedding: Pooling = option("cls", "The cell's state: that of [CLS], or the mean of its unperturbed genes.")
    exact: bool = option(False, "Compute every effect exactly instead of screening.")
    top_k: int = option(64, "Number of strongest genes of the screen to compute exactly.", within="[0, inf)")
    num_controls: int = option(
        64, "Number of random genes to compute exactly. They show how good the screen is, and what an ordinary gene "
        "does.", within="[0, inf)",
    )  # fmt: skip
    donor: str | None = option(None, "Column of obs with donors, the unit of statistics. Default: donor_id, if any.")
    groupby: str | None = option(None, "Column of obs; effects are computed for each of its groups.")
    min_cells: int = option(5, "Ignore a donor for a gene if fewer of its cells change.", within="[1, inf)")
    report: bool = _report_option()
    show_q: bool = option(
        False, "Give p and q of --towards even where the run is not better than the most frequent label on held-out "
        "cells, or has no such score.",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        check_bin(self.kind, self.bin)
        if self.from_ and not self.towards:
            raise InputError("--from needs a label to compare with. Give --towards as well.")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(BaseConfig):
    """Make one output of the pieces that --part wrote.

    Checks that all pieces of predict, embed, perturb or attribute are there, and that they have the same settings, run
    and cells. Then writes exactly what the command without --part writes, with its report, and deletes the pieces.
    """

    verb = "merge"
    example = "perturbgene merge predicted.h5ad"
    group = IN_OUT

    output: str = option("", "File to write, as the pieces' --output has it.", is_positional=True)
    pieces: list[str] = option(
        [], "Folders of the pieces (part-1-of-10 ...). Default: all that are in OUTPUT.parts.", is_path=True,
        is_positional=True, is_required=False,
    )  # fmt: skip
    overwrite: bool = option(False, "Replace an output that already exists.")
    report: bool = option(True, "Also write the report of commands that write one.")
    device: str = option(
        "auto", "Device that checks the screen of perturb and the order of attribute: auto, cpu, mps, cuda or cuda:N.",
        group=RUNNING,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(ScoringOptions):
    """Find the genes from which the model reads a label.

    Scores each gene of every cell by how much it adds to the log-odds of the label that the model predicts,
    averages by label (the model's marker genes), and checks the scores by removing genes in that order. Writes a
    table (.csv), a picture of the check (.png) and a record (.json). An interrupted run continues where it stopped.
    """

    verb = "attribute"
    example = "perturbgene attribute runs/mlm cells.h5ad --output markers.csv --ask cell_type"
    output: str = option("", "Table to write.", group=IN_OUT, is_required=True, suffixes=(".csv",))
    ask: str = option("", "Phenotype whose labels are explained.", is_required=True)
    num_check_cells: int = option(50, "Number of cells whose genes are removed as a check.", within="[1, inf)")

    def check(self) -> None:
        super().check()
        check_question([self.ask], self.given_labels)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ReadingConfig):
    """Write what a run or its answers are worth as one HTML page.

    Of predictions, shows a map of the cells, how sure the answers are, what a threshold leaves, and, where labels are
    known, scores next to baselines, by donor and by label. Of knock-outs and counterfactuals, shows how far to believe
    them, the ranked effects and their null; of a corpus, what it holds. The page opens offline; its figures are also
    written as .png. `prepare`, `evaluate`, `predict`, `perturb` and `counterfactual` write it too.
    """

    verb = "report"
    example = "perturbgene report runs/mlm"
    group = IN_OUT

    source: str = option(
        "", "Run folder that was evaluated, an output folder of evaluate, an output file of predict, perturb, "
        "counterfactual or embed --network, or a corpus.",
        is_positional=True, is_path=True,
    )  # fmt: skip
    output: str | None = option(
        None, "Page to write. Default: report.html in the folder, or FILE.report.html.", suffixes=(".html",)
    )
    device: str = option("auto", "Device that embeds cells: auto, cpu, mps, cuda or cuda:N.", group=RUNNING)


CONFIGS: dict[str, type[BaseConfig]] = {config_class.verb: config_class for config_class in (
    PrepareConfig, CheckConfig, MlmConfig, ClsConfig, EvaluateConfig, PredictConfig, EmbedConfig, CounterfactualConfig,
    PerturbConfig, AttributeConfig, MergeConfig, ReportConfig, DownloadConfig,
)}  # fmt: skip
