"""The verb `prepare`: h5ad files of any kind in, a corpus to train on out.

Read `prepare` first: survey the files (`survey`), count (`statistics`), choose genes (`panel`), write shuffled shards
(`spool`), each step in parts that `workers` runs and resumes.
"""
