"""The verb `prepare`: h5ad files of any kind in, a corpus to train on out.

Read in the order of the work: `prepare` (the verb), `survey` (what the files hold, who is held out), `statistics`
(counts over training cells), `panel` (the genes), `spool` (cells to shuffled shards), `audit` (findings, manifest).
`workers` runs and resumes the parts of a step. `manifest` is the finished corpus as the other commands read it.
"""
