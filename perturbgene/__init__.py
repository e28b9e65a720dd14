"""BERT-style transformers on single-cell gene expression: a cell is a sentence."""

__version__ = "0.1.0"
