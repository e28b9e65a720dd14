"""The verbs: one dataclass each, with its manual page's words, its own settings and the checks across them.

Owns the table `CONFIGS` of all verbs; leaves what `mlm` and `cls` share to `training`, and doing the work to the module
that is named like the verb.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from perturbgene.cli.base import BaseConfig, BinOptions, MatrixOptions
from perturbgene.cli.options import (
    check_no_repeats,
    check_not_both,
    check_question,
    check_suffix,
    named_values,
    option,
)
from perturbgene.cli.training import TrainingConfig
from perturbgene.errors import InputError

HvgFlavor = Literal["auto", "seurat", "seurat_v3"]

#: Settings of `DataCollatorForPhenotypicMLM` that say how much of a cell is hidden.
MASK_RATES = ("gene_mask_prob", "phenotype_mask_prob", "absent_prob", "unexpressed_ratio")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(BinOptions):
    """Settings of `prepare`."""

    verb: ClassVar[str] = "prepare"
    summary: ClassVar[str] = "Turn h5ad files into a corpus to train on."
    about: ClassVar[str] = (
        "Brings all files to the same ranked genes and the same scale, fits bins, collects the labels of phenotypes, "
        "holds out donors, and writes shuffled shards with a manifest and an audit."
    )
    example: ClassVar[str] = (
        "perturbgene prepare cells.h5ad --output corpus --phenotypes cell_type tissue --split_by donor_id"
    )

    inputs: list[str] = option(
        [],
        help="h5ad files: paths, globs or brace patterns.",
        group="Input and output",
        is_required=True,
        is_positional=True,
        is_path=True,
    )
    output: str = option("", help="Corpus folder to write.", group="Input and output", is_required=True)
    overwrite: bool = option(
        False, help="Replace a corpus that is already there; other folders are left alone.", group="Input and output"
    )
    phenotypes: list[str] = option(
        [], help="Columns of obs that become phenotypes; NAME=COLUMN renames one (cell_type=bulk_labels)."
    )
    split_by: str | None = option(
        None,
        help="Column of obs whose cells stay on one side of the split, such as the donor, or `cell`. By default the "
        "first donor column (donor_id, donor, individual, patient, sample), else single cells with a warning.",
    )
    eval_fraction: float = option(0.2, help="Share of donors (or cells) held out for evaluation.", within="(0, 1)")
    eval_donors: list[str] = option([], help="Donors to hold out, by name, instead of a share.", keeps_commas=True)
    seed: int = option(0, help="Seed of the split and the shuffle.", within="[0, 4294967295]")
    num_bins: int = option(
        8, help="Number of quantile bins to fit on the expressed values.", group="Genes and bins", within="[1, inf)"
    )
    min_genes: int = option(
        1, help="Drop cells that express fewer genes of the panel.", group="Genes and bins", within="[0, inf)"
    )
    shard_size: int = option(10000, help="Number of cells per shard.", group="Input and output", within="[1, inf)")
    hvg_flavor: HvgFlavor = option(
        "auto",
        help="How genes are ranked, as in scanpy: by the dispersion of log values (seurat) or by the variance of "
        "counts (seurat_v3). auto uses seurat_v3 for counts.",
        group="Genes and bins",
    )
    num_processes: int = option(0, help="Number of processes; 0 uses every core.", group="Running", within="[0, inf)")
    scheduler: str | None = option(
        None, help="Address of a Dask scheduler (tcp://...) whose workers do the work.", group="Running"
    )

    @property
    def column_of_phenotype(self) -> dict[str, str]:
        """Phenotype -> obs column."""
        return {name: column or name for name, column in named_values(self.phenotypes, flag="phenotypes").items()}

    def check(self) -> None:
        super().check()
        check_no_repeats(self.eval_donors, flag="eval_donors")
        named_values(self.phenotypes, flag="phenotypes")
        if self.eval_donors and self.split_by == "cell":
            raise InputError(
                "eval_donors needs a split by donor, but split_by is cell. Give the donor column to --split_by."
            )


@dataclass(frozen=True, kw_only=True)
class MlmConfig(TrainingConfig):
    """Settings of `mlm`."""

    verb: ClassVar[str] = "mlm"
    summary: ClassVar[str] = "Train by masking genes and phenotypes."
    about: ClassVar[str] = (
        "Hides some genes' bins and some phenotypes of every cell and learns to tell them from the rest, so that one "
        "model answers any question: which phenotype, given which others. Every field of "
        "transformers.TrainingArguments is a flag too (--help-all)."
    )
    example: ClassVar[str] = (
        "perturbgene mlm --corpus corpus --output_dir runs/mlm --model_arch small --num_train_epochs 20"
    )

    gene_mask_prob: float = option(0.15, help="Share of a cell's expressed genes that are hidden.", within="[0, 1]")
    phenotype_mask_prob: float = option(
        0.5, help="Share of the phenotypes in a sequence that are asked (hidden).", within="[0, 1]"
    )
    absent_prob: float = option(0.1, help="Share of phenotypes that leave the sequence.", within="[0, 1]")
    unexpressed_ratio: float = option(
        0.5,
        help="Genes not expressed that are asked too, as a share of the hidden expressed ones; the answer is bin_0.",
        within="[0, inf)",
    )
    phenotype_loss_weight: float = option(1.0, help="Weight of the phenotypes' mean loss.", within="[0, inf)")
    gene_loss_weight: float = option(0.3, help="Weight of the genes' mean loss.", within="[0, inf)")

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
                "The phenotype vocabulary is missing: a corpus or a pretrained model would bring it, but none is "
                "given. Give --vocab_path."
            )


@dataclass(frozen=True, kw_only=True)
class ClsConfig(TrainingConfig):
    """Settings of `cls`."""

    verb: ClassVar[str] = "cls"
    summary: ClassVar[str] = "Train a classifier of one phenotype."
    about: ClassVar[str] = (
        "Learns one phenotype from a cell's genes and, if wanted, its other phenotypes; best started from an mlm run. "
        "Every field of transformers.TrainingArguments is a flag too (--help-all)."
    )
    example: ClassVar[str] = (
        "perturbgene cls --corpus corpus --output_dir runs/cls --phenotype_category cell_type "
        "--pretrained_model_path runs/mlm"
    )
    best_metric: ClassVar[str] = "eval_macro_f1"

    phenotype_category: str = option("", help="Phenotype to classify.", is_required=True)
    binary_label: str | None = option(
        None, help="Tell this label from all others, in place of all classes.", none_is_text=True
    )
    balanced_dataset: bool = option(
        True, help="Weight each class inversely to its number of training cells, so that rare classes count as much."
    )

    def check(self) -> None:
        super().check()
        if self.phenotype_category in self.included_phenotypes:
            raise InputError(
                f"included_phenotypes holds {self.phenotype_category!r}, which is the phenotype to classify: the model "
                "would be given the answer. Remove it from --included_phenotypes."
            )


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(BaseConfig):
    """How a trained model is run on cells (evaluate, predict and all that ask a model)."""

    group: ClassVar[str] = "Running"

    run: str = option(
        "", help="Run folder of mlm or cls.",
        group="Input and output", is_required=True, is_positional=True, is_path=True,
    )  # fmt: skip
    batch_size: int = option(256, help="Maximum number of cells per batch.", within="[1, inf)")
    batch_tokens: int = option(
        32768, help="Maximum number of tokens per batch; a longer cell has its own. Lower it if memory runs out.",
        within="[1, inf)",
    )  # fmt: skip
    device: str = option("auto", help="auto, cpu, mps, cuda or cuda:N.")

    def check(self) -> None:
        super().check()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(
                f"device is {self.device!r}, which is none of auto, cpu, mps, cuda and cuda:N. Change --device."
            )


@dataclass(frozen=True, kw_only=True)
class FileOptions(QuestionOptions, MatrixOptions):
    """One h5ad file in, one file out (predict and all verbs that ask a model about new cells)."""

    group: ClassVar[str] = "Input and output"

    input: str = option(
        "", help="h5ad file with the cells, or its URL.", is_required=True, is_positional=True, is_path=True
    )
    output: str = option("", help="File to write.", is_required=True)
    overwrite: bool = option(False, help="Replace an output that already exists.")
    min_gene_coverage: float = option(
        0.5, help="Stop if the file has less than this share of the panel.", group="Genes and bins", within="[0, 1]"
    )

    given: list[str] = option(
        [], help="Known phenotypes: NAME reads each cell's label from obs, NAME=LABEL sets it for all cells.",
        group="Task", keeps_commas=True,
    )  # fmt: skip

    @property
    def given_labels(self) -> dict[str, str | None]:
        """Label of each given phenotype, None where it is read from obs."""
        return named_values(self.given, flag="given")

    def check(self) -> None:
        super().check()
        if Path(self.output).absolute() == Path(self.input).absolute():
            raise InputError(f"output is {self.output!r}, the input itself, which must stay as it is. Change --output.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(QuestionOptions, MatrixOptions):
    """Settings of `evaluate`."""

    verb: ClassVar[str] = "evaluate"
    summary: ClassVar[str] = "Score a run on held-out cells, next to its baselines."
    about: ClassVar[str] = (
        "Asks for each phenotype alone, with the others given, and for all at once. Writes accuracy, macro F1, "
        "confusion matrices and scores of masked genes, next to two baselines on the same cells: the majority class "
        "and a logistic regression."
    )
    example: ClassVar[str] = "perturbgene evaluate runs/mlm"

    corpus: str | None = option(
        None,
        help="Corpus whose evaluation cells are scored; by default the run's own.",
        group="Input and output",
        is_path=True,
    )
    eval_data_paths: list[str] = option(
        [],
        help="Files to score instead of a corpus: paths, globs, brace patterns.",
        group="Input and output",
        is_path=True,
    )
    train_data_paths: list[str] = option(
        [],
        help="Files to fit the baselines on; by default the run's training cells.",
        group="Input and output",
        is_path=True,
    )
    output: str | None = option(None, help="Folder to write; by default RUN/evaluation.", group="Input and output")
    ask: list[str] = option([], help="Phenotypes to ask for; by default each of the run.")
    given: list[str] = option(
        [], help="Phenotypes whose labels are given; by default nothing, and then all phenotypes but the one asked."
    )
    baselines: bool = option(True, help="Also score the majority class and a logistic regression.")
    calibrate: bool | None = option(
        None,
        help="Fit temperatures on half of the donors and store them in the run, where predict finds them. By default "
        "only if the run's own evaluation cells are scored.",
    )
    gene_mask_prob: float | None = option(
        None, help="Share of expressed genes masked to score genes; by default the run's own.", within="[0, 1]"
    )
    phenotype_mask_prob: float | None = option(
        None, help="Share of phenotypes masked together with those genes; by default the run's own.", within="[0, 1]"
    )
    absent_prob: float | None = option(
        None, help="Share of phenotypes left out of those sequences; by default the run's own.", within="[0, 1]"
    )
    unexpressed_ratio: float | None = option(
        None,
        help="Unexpressed genes masked with them, per masked expressed gene; by default the run's own.",
        within="[0, inf)",
    )

    @property
    def mask_rates(self) -> dict[str, float]:
        """Rates that replace the run's own."""
        return {name: getattr(self, name) for name in MASK_RATES if getattr(self, name) is not None}

    def check(self) -> None:
        super().check()
        check_not_both(self, "corpus", "eval_data_paths")
        check_not_both(self, "corpus", "train_data_paths")
        check_no_repeats(self.given, flag="given")
        check_question(self.ask, self.given)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(BaseConfig):
    """Which columns to write for each prediction (predict)."""

    joint: bool = option(
        False,
        help="Ask for all phenotypes in one sequence: one forward pass instead of several. By default each has a "
        "sequence of its own, so an answer does not depend on what else is asked.",
    )
    top_k: int = option(3, help="Number of most probable labels to write.", within="[1, inf)")
    abstain: float = option(0.0, help="Write `unknown` if the calibrated probability is below this.", within="[0, 1]")
    calibrate: bool = option(True, help="Divide logits by the temperatures that evaluate fitted.")
    ood: bool = option(
        False,
        help="Write how unusual each cell is: energy, log-likelihood of masked genes (a second forward pass), and "
        "their percentiles among the run's evaluation cells.",
    )
    audit: bool = option(
        False, help="Write the probability of each cell's own label, given its genes and its other phenotypes."
    )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(AnswerOptions, FileOptions):
    """Settings of `predict`."""

    verb: ClassVar[str] = "predict"
    summary: ClassVar[str] = "Predict phenotypes of new cells."
    about: ClassVar[str] = (
        "Reads any h5ad file whose genes overlap the run's panel, asks for phenotypes and writes the answers with "
        "their probabilities to obs. No label column is needed, and cells keep their order."
    )
    example: ClassVar[str] = (
        "perturbgene predict runs/mlm new.h5ad --output out.h5ad --ask cell_type --given tissue=lung"
    )

    ask: list[str] = option([], help="Phenotypes to predict; by default all that are not given.")

    def check(self) -> None:
        super().check()
        check_question(self.ask, list(self.given_labels))


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(BaseConfig):
    """Settings of `download`."""

    verb: ClassVar[str] = "download"
    summary: ClassVar[str] = "Download files and resume where a download stopped."
    about: ClassVar[str] = "Downloads files from URLs; resumes, retries and compares checksums."
    example: ClassVar[str] = "perturbgene download https://host/shard_{0..3}.h5ad --output_dir data"

    sources: list[str] = option(
        [],
        help="URLs, also with brace patterns.",
        group="Input and output",
        is_required=True,
        is_positional=True,
    )
    output_dir: str = option(".", help="Folder to write.", group="Input and output")
    checksums: str | None = option(None, help="File with lines `SHA256  NAME`.", group="Input and output", is_path=True)
    retries: int = option(5, help="Number of failed tries in a row before a download stops.", within="[0, inf)")
    overwrite: bool = option(False, help="Download files again that are already there.", group="Input and output")

    def check(self) -> None:
        super().check()
        for source in self.sources:
            if "://" not in source:
                raise InputError(f"{source!r} is not a URL. Write it as https://host/file.h5ad.")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(FileOptions):
    """Settings of `embed`."""

    verb: ClassVar[str] = "embed"
    summary: ClassVar[str] = "Write embeddings of cells, phenotypes or genes."
    about: ClassVar[str] = (
        "Copies the file and adds each cell's embedding as obsm['X_perturbgene'], ready for scanpy. Phenotypes are "
        "absent unless given, so no label leaks in. With --groupby or --network it writes mean embeddings of all genes "
        "in each group of cells instead, their networks and how they differ between groups."
    )
    example: ClassVar[str] = "perturbgene embed runs/mlm cells.h5ad --output embedded.h5ad --pooling genes"

    pooling: Literal["cls", "genes"] = option(
        "cls", help="Final state of [CLS], or the mean of the final states of the cell's genes."
    )
    phenotype: list[str] = option(
        [], help="Phenotypes to ask for, one at a time; the final state of each [MASK] goes to obsm."
    )
    genes: list[str] = option([], help="Genes, by id or symbol, whose embedding in each cell goes to obsm.")
    groupby: str | None = option(None, help="Column of obs; write mean embeddings of all genes in each of its groups.")
    network: bool = option(False, help="Link genes with similar means within a group; also written as GraphML.")
    top_k: int = option(10, help="Maximum number of links per gene.", within="[1, inf)")
    min_similarity: float = option(0.5, help="Minimum cosine similarity of linked genes.", within="[-1, 1]")
    min_cells: int = option(
        10, help="Minimum number of cells of a group that express a gene, for its links and roles.", within="[1, inf)"
    )

    @property
    def is_of_genes(self) -> bool:
        """True if means of genes are written instead of embeddings of cells."""
        return bool(self.groupby or self.network)

    def check(self) -> None:
        super().check()
        check_no_repeats(self.genes, flag="genes")
        check_no_repeats(self.phenotype, flag="phenotype")
        if self.is_of_genes and (self.genes or self.phenotype):
            raise InputError(
                "groupby and network average over cells, so no cell's own genes or phenotype can be written. Remove "
                "--genes and --phenotype, or run a second command for them."
            )
        if both := sorted(set(self.phenotype) & set(self.given_labels)):
            raise InputError(f"{both[0]!r} cannot be asked and given at once. Remove it from --phenotype or --given.")


@dataclass(frozen=True, kw_only=True)
class CounterfactualConfig(FileOptions):
    """Settings of `counterfactual`."""

    verb: ClassVar[str] = "counterfactual"
    summary: ClassVar[str] = "Change one phenotype of cells and see which genes should change."
    about: ClassVar[str] = (
        "Predicts hidden genes of each cell with its own label and with the one that is set, all else equal. Writes "
        "the mean change of every gene, with a null of meaningless changes and the observed difference, as .h5ad, .csv "
        "and .png. It shows what the model has learned to go with a label, not what causes what."
    )
    example: ClassVar[str] = "perturbgene counterfactual runs/mlm cells.h5ad --output changes.h5ad --set disease=normal"

    set: str = option("", help="Phenotype and label to set, as NAME=LABEL.", is_required=True, keeps_commas=True)
    given: list[str] = option(
        [], help="Other known phenotypes: NAME reads obs, NAME=LABEL sets it for all cells, `nothing` gives none. "
        "Default: all phenotypes of the run that obs has.", keeps_commas=True,
    )  # fmt: skip
    groupby: str | None = option(None, help="Column of obs; changes are computed for each of its groups.")
    num_passes: int = option(4, help="Number of masks per cell.", within="[1, inf)")
    gene_mask_prob: float | None = option(
        None, help="Share of genes to hide; the more is hidden, the more the label counts. Default: as in training.",
        within="(0, 1]",
    )  # fmt: skip
    num_null: int = option(
        20, help="Number of meaningless changes that make the null; 0 means no test.", within="[0, inf)"
    )
    force: bool = option(False, help="Allow combinations of phenotypes that the run has never seen.")
    seed: int = option(0, help="Seed of the masks and the null.", within="[0, 4294967295]", group="Running")

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
        check_suffix(self.output, ".h5ad", verb=self.verb)
        if "=" not in self.set:
            raise InputError(f"set is {self.set!r}, but it must read NAME=LABEL, e.g. disease=normal. Correct --set.")
        if 0 < self.num_null < 5:
            raise InputError(f"num_null is {self.num_null}, too few to know their spread. Give 0, or 5 or more.")
        if self.set_label.keys() & (self.given_labels or {}).keys():
            raise InputError(f"set and given both hold {next(iter(self.set_label))!r}. Remove it from --given.")


PerturbationKind = Literal["knock_out", "over_express", "set_bin"]
Precision = Literal["float32", "bfloat16"]
Pooling = Literal["cls", "mean"]


def check_bin(kind: str, bin: int | None) -> None:
    """Refuse `set_bin` without a bin, and a bin without `set_bin`."""
    if (kind == "set_bin") != (bin is not None):
        raise InputError(
            f"kind is {kind} and bin is {bin}, but set_bin needs a bin and no other kind takes one. "
            "Change --kind or --bin."
        )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(FileOptions):
    """What `perturb` and `attribute` share, which score genes."""

    batch_tokens: int | None = option(  # type: ignore[assignment]
        None, help="Maximum number of tokens that run at once. Default: what suits the device.", group="Running",
        within="[1, inf)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PerturbConfig(ScoringOptions):
    """Settings of `perturb`."""

    verb: ClassVar[str] = "perturb"
    summary: ClassVar[str] = "Knock out or raise genes in silico."
    about: ClassVar[str] = (
        "Removes or changes genes in every cell and measures how far that moves the cell's state, or the log-odds of a "
        "label. Writes a table with statistics over donors (.csv or .parquet), a picture (.png) and a record (.json). "
        "All genes are screened by gradients; the strongest and a random control set are computed exactly. An "
        "interrupted run continues where it stopped."
    )
    example: ClassVar[str] = (
        "perturbgene perturb runs/mlm cells.h5ad --output ko.csv --genes all --towards disease=normal --donor donor_id"
    )

    genes: list[str] = option(
        [], help="Genes by id or symbol, A+B for both at once; or `all` genes that a cell expresses.", is_required=True
    )
    kind: PerturbationKind = option(
        "knock_out", help="Remove the gene's token, set it to the highest bin, or to --bin; the last two insert genes "
        "that a cell does not express."
    )  # fmt: skip
    bin: int | None = option(None, help="Bin for set_bin.", within="[1, inf)")
    towards: str | None = option(
        None, help="PHENOTYPE=LABEL whose log-odds are measured. Default: the cell's state (cosine distance)."
    )
    from_: str | None = option(
        None, help="PHENOTYPE=LABEL to compare --towards with. Default: all other labels of the phenotype."
    )
    embedding: Pooling = option("cls", help="State: that of [CLS], or the mean over genes other than the perturbed.")
    exact: bool = option(False, help="Compute every effect exactly instead of screening.")
    top_k: int = option(64, help="Number of strongest genes of the screen to compute exactly.", within="[0, inf)")
    num_controls: int = option(
        64, help="Number of random genes to compute exactly: they show how good the screen is, and what an ordinary "
        "gene does.", within="[0, inf)",
    )  # fmt: skip
    donor: str | None = option(
        None, help="Column of obs with donors, the unit of the statistics. Default: donor_id if there is one."
    )
    groupby: str | None = option(None, help="Column of obs; effects are computed for each of its groups.")
    min_cells: int = option(
        5, help="Minimum number of changed cells per donor; donors with fewer are ignored for that gene.",
        within="[1, inf)",
    )  # fmt: skip
    precision: Precision = option("float32", help="bfloat16 is faster on some machines.", group="Running")

    def check(self) -> None:
        super().check()
        check_suffix(self.output, ".csv", ".parquet", verb=self.verb)
        named_values(self.given, flag="given")
        check_no_repeats(self.genes, flag="genes")
        check_bin(self.kind, self.bin)
        if self.from_ and not self.towards:
            raise InputError("--from needs a label to compare with. Give --towards as well.")


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(ScoringOptions):
    """Settings of `attribute`."""

    verb: ClassVar[str] = "attribute"
    summary: ClassVar[str] = "Find the genes from which the model reads a label."
    about: ClassVar[str] = (
        "Scores each gene of every cell by what it adds to the log-odds of the label that the model predicts, averages "
        "by label (the model's marker genes), and checks the scores by removing genes in their order. Writes a table "
        "(.csv), the check as a picture (.png) and a record (.json). An interrupted run continues where it stopped."
    )
    example: ClassVar[str] = "perturbgene attribute runs/mlm cells.h5ad --output markers.csv --ask cell_type"

    ask: str = option("", help="Phenotype whose labels are explained.", is_required=True)
    num_check_cells: int = option(50, help="Number of cells whose genes are removed as a check.", within="[1, inf)")

    def check(self) -> None:
        super().check()
        check_suffix(self.output, ".csv", verb=self.verb)
        check_question([self.ask], list(self.given_labels))


CONFIGS: dict[str, type[BaseConfig]] = {
    config_class.verb: config_class
    for config_class in (
        PrepareConfig,
        MlmConfig,
        ClsConfig,
        EvaluateConfig,
        PredictConfig,
        EmbedConfig,
        CounterfactualConfig,
        PerturbConfig,
        AttributeConfig,
        DownloadConfig,
    )
}
