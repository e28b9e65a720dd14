"""The verbs `predict` and `evaluate`: a run asked about cells.

Read `run` (loading), `predict`, `evaluate`, then `scores` (baselines), `calibration` (temperatures) and `streaming`
(ranks, batches and per-cell results of every verb that reads cells and writes a file).
"""
