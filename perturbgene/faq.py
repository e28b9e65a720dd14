"""Which entry of docs/faq.md explains an error: the words of messages, and the anchors of the page's headings.

Owns this table; the command line puts the pointer at the end of its last line. `tests/test_faq.py` holds table and page
equal.
"""

#: Anchor of an entry -> words that its messages have, and messages of no other entry.
ENTRIES = {
    "is-not-a-verb": ("is not a verb", "The verb is missing. Give one of"),
    "is-unknown-to": ("is unknown to",),
    "is-a-setting-of": ("is a setting of",),
    "is-missing": ("is missing. Give", "no input file was given"),
    "value-of-a-flag": (
        "needs a value, but none follows", "takes no value, but was given", "belongs to no flag", " was given "
    ),
    "but-it-must-be-in": ("but it must be in",),
    "column-and-value": (
        "but must be COLUMN=VALUE", "it must read NAME=LABEL", "it must read PHENOTYPE=LABEL", "must be NAME or NAME="
    ),
    "more-than-once": ("more than once. Keep", "names a gene twice", "name a perturbation twice"),
    "asked-and-given": ("cannot be both asked and given", "is given and asked at once", "so it cannot be given too"),
    "edges-of-bins": ("must increase, but edge", "must be finite and above 0, but edge"),
    "file-of-settings": ("`name: value` lines", "is not plain YAML", "does not name its verb", "is for the verb"),
    "is-gone-from-transformers-5": ("is gone from transformers 5",),
    "needs-a-package": ("needs the package", "needs a package", "a .parquet file needs pyarrow"),
    "no-such-file-or-folder": ("but there is no such file or folder", "does not exist. Check the path"),
    "no-cells-in-the-folder": ("holds no .h5ad file and no .zarr store",),
    "not-an-anndata-file": (
        "a web page (an error", "a pointer of Git LFS", "an R object", "a table of text", "a table in Parquet",
        "an Excel sheet", "a matrix without names", "a Python pickle", "a zip archive", "compressed with gzip",
        "a Loom file", "a Seurat file", "a MuData file", "a 10x file by its content", "not an AnnData (it has no",
    ),
    "truncated-or-damaged": ("truncated or damaged", "is empty (0 bytes)", "is damaged", "damaged or changes while"),
    "locked-by-a-program": ("locked by a program that writes it",),
    "links-to-another-file": ("to another place, which is refused", "in another file, which is refused"),
    "no-such-matrix": ("has no matrix", "has no .raw", "has no layer"),
    "written-by-a-newer-anndata": ("was written by a newer anndata",),
    "would-count-twice": ("its cells would count twice",),
    "not-fetched": ("could not be fetched in", "answers with status"),
    "negative-values": ("holds negative expression values",),
    "nan-or-infinite-values": ("NaN or infinite expression values",),
    "scale-is-not-known": ("whose scale is not known",),
    "mixed-scales": ("mixes scales: rows",),
    "only-zeros": ("holds no value other than 0", "is X empty?"),
    "genes-are-not-found": ("under --min_gene_coverage",),
    "no-gene-in-common": ("shares no gene with the other files",),
    "genes-without-names": ("the files hold no genes",),
    "columns-of-the-same-gene": ("several columns are the same gene",),
    "not-a-gene-of-the-panel": ("genes of the run's panel",),
    "genes-are-in-no-file": ("genes are in no file",),
    "more-genes-than-there-are": ("expressed genes. Lower it", "genes of the panel. Lower --num_top_genes"),
    "no-such-column": ("has no obs column", "names no column of obs"),
    "labels-that-the-run-does-not-know": ("has a known",),
    "not-in-the-vocabulary": ("is not in the run's vocabulary", "is no label of the run", "is not in the vocabulary"),
    "no-labels": ("its column in obs is empty", "no training cell has a"),
    "numbers-as-labels": ("too many to be labels of",),
    "two-labels-are-the-same": ("are the same token",),
    "nothing-to-classify": ("there is nothing to classify",),
    "nothing-can-be-held-out": ("so nothing can be held out", "so nothing is left to train on", "are not in obs["),
    "no-cell-is-chosen": ("Change --where",),
    "exists-and-is-not-empty": ("exists and is not empty",),
    "fewer-than-one-batch": ("are fewer than one batch",),
    "cells-in-training-and-evaluation": ("are in both --train_data_paths and --eval_data_paths",),
    "nothing-to-evaluate-on": ("there is nothing to evaluate on", "there is no cell to evaluate on"),
    "another-normalization": ("was trained with --normalization", "was prepared with --normalization"),
    "knows-none-of-the-genes": ("so its weights would be of no use",),
    "changed-cells": (
        "since `prepare` wrote it", "since the run began", "changed while the run read it", "was changed after it was"
    ),
    "other-settings": ("was trained with other settings", "weights that do not fit these settings"),
    "no-such-checkpoint": ("or --resume_from_checkpoint alone",),
    "gradient-is-not-a-number": ("so training stopped. Its",),
    "needs-bfloat16": ("needs bfloat16, but this",),
    "needs-several-processes": ("needs several processes",),
    "no-finished-run": (
        "holds no finished run", "no tokenizer can be read from", "cannot be fetched from the Hugging Face Hub"
    ),
    "run-of-another-version": ("reads formats up to", "was trained before genes' votes"),
    "run-is-damaged": ("Restore the folder",),
    "classifies-only": ("is a classifier, which cannot", "Ask an mlm run", "or ask an mlm run"),
    "needs-evaluate": ("which --ood needs", "has not fitted them"),
    "cells-of-the-run-are-gone": ("as run.yaml says, but they are not", "cells it has. Give --corpus"),
    "never-seen-in-training": ("so the model has never seen what is asked",),
    "no-gpu": ("cannot be used here",),
    "no-parts": ("has no parts of", "cannot be merged any more"),
    "ending-of-the-output": ("but it must end in", "but a folder is written"),
    "output-exists": ("exists. Choose another",),
    "output-is-the-input": ("the input itself, which must stay",),
    "written-by-another-process": ("is being written by another process",),
    "cannot-be-written": ("cannot be written (",),
    "written-by-another-command": ("was not written by `perturbgene",),
    "disk-is-full": (
        "No space left on device", "Make room on the disk", "Make room within the quota", "make room and continue",
        "Make room and finish", "Allow larger files",
    ),
    "memory-ran-out": ("Free memory, or", "does not hold a batch of", "Allow more shared memory"),
    "process-was-killed": ("Look for the first error above", "a worker process was killed from outside"),
    "too-many-open-files": ("Allow more open files",),
}  # fmt: skip


def pointer(message: str) -> str:
    """Return where docs/faq.md explains a message, by the longest words that it has of an entry; '' if nowhere.

    Example:
        >>> pointer("X holds negative expression values (lowest -1): they look scaled.")
        ' [docs/faq.md#negative-values]'
    """
    found = [(len(words), anchor) for anchor, all_words in ENTRIES.items() for words in all_words if words in message]
    return f" [docs/faq.md#{max(found)[1]}]" if found else ""
