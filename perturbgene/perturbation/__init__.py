"""The verbs `perturb` and `attribute`: genes knocked out in silico, and the genes from which a label is read.

Read `perturb` first: `edits` (changed sequences), `readouts` (what is compared), `screening` (all genes by gradient),
`cells_in_parts` (resumable passes over cells), `statistics` (donors, null). `attribute` stands on the same parts.
"""
