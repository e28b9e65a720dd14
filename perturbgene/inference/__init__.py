"""The verbs `check`, `predict` and `evaluate`: files are looked at, and a trained run is asked about cells.

Read `run` (load a run), `streaming` (open cells, ranks, batches with their progress bar, and per-cell results of every
verb that writes a file), `heartbeat` (processes that hang), `predict` (questions and answers), `evaluate` (scores),
`baselines`, `starts` (what a run started from, next to it), `calibration` (temperatures), `conformal` (sets of labels),
`novelty` (unusual cells), `embedding_scores`, `evaluated_cells` (what `evaluate` keeps of each cell), `check` (what
files hold and what verbs would do with them).
"""
