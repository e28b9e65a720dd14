"""Files in, batches out. The data path in order, with types at the arrows:

1. `opening.expand_paths`              patterns -> `FileList` of paths and URLs (`remote` fetches URLs)
2. `opening.open_source`               path or AnnData -> `sources.CellSource`: CSR rows, columns of obs and var
3. `genes.names_of`, `GenePanel.align` column names -> `GeneAlignment` (column -> gene of the panel)
4. `labels.Vocabulary.encode`          obs column -> input ids of labels, -1 where `labels.is_missing`
5. `shards.Shard.read`                 row numbers -> `ExpressionBlock` (CSR values, labels; `scale` known)
6. `tokenization.GeneTokenizer.tokenize_block`   `ExpressionBlock` -> `TokenBlock` (ids and types)
7. `order.CellSampler`, `BudgetSampler`          (seed, epoch) -> the order of cells, in batches
8. `iterable_ann_dataset.IterableAnnDataset`     paths -> cells (dicts of 1-D tensors), or whole batches
9. `data_collators`                    cells -> a batch, padded or packed, masked for mlm

To open a file (2): `foreign` names what cannot be read, `decode` reads its arrays, `chosen_cells` shows only the cells
that `--where` names. To read it (5): `values` has the genes and library sizes of one file, `recognition` finds its
scale, `scale` brings it to ours. `binning` has the bins of 6, and `kernels` the compiled loops of 5 to 9.
`h5ad_writing` writes shards and copies; `download` is the verb.
"""
