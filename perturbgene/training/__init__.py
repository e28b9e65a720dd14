"""The verbs `mlm` and `cls`: from a corpus to a run folder.

Read `train` first, then `votes` (the regression that answers start from, and what the transformer adds),
`perturbgene.sharded_trainer` (the loop's data loading), `checkpoints` (whole or not there), `callbacks` (progress bar,
log lines, signals), `transfer` (from one run to another) and `cell_space` (where a run embeds cells).
"""
