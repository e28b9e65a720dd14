"""The verb `counterfactual`: the same cells with one phenotype changed.

Read `counterfactual` first, then `contrast` (predictions under two labels) and `statistics` (null and observed change).
The room has a plural name because `pg.counterfactual` is the function.
"""
