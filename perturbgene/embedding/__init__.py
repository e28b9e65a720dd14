"""The verb `embed`: hidden states of a run as arrays.

Read `cells` (embeddings of cells, of asked phenotypes and of named genes), then `genes` (mean embeddings of all genes
by group of cells, their networks, and how they differ between groups).
"""
