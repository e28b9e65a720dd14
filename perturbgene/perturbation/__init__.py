"""The verbs `perturb` and `attribute`: genes knocked out in silico, and the genes from which the model reads a label.

Read `perturb` first, then `readouts` (what is compared, and how a knock-out is scored exactly), `edits` (edited
sequences), `screening` (all knock-outs of a cell estimated by gradients), `cells` (donors, groups and resumable sums
over all cells), `statistics` (donors, null). `attribute` uses the same parts.
"""
