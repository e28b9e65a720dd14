"""Files in, batches out. The data path, in order:

1. `read.expand_paths`                 patterns -> list of paths and URLs (`remote` opens the latter)
2. `read.H5adFile`                     path -> CSR rows, obs and var columns
3. `genes.GenePanel.align`             column names -> `GeneAlignment` (column -> gene of the panel)
4. `vocab.Vocabulary.encode`           obs column -> input ids of labels, -1 absent
5. `shards.Shard.read`                 row numbers -> `ExpressionBlock` (CSR values, alignment, labels, cell numbers)
6. `tokenization.GeneTokenizer.tokenize_block`   `ExpressionBlock` -> `TokenBlock` (ragged input ids and token types)
7. `partition.RowPlan`                 (seed, epoch) -> the order of cells, for ranks and workers
   `budget.BatchPlan`                  cells of a round -> batches, filled to a budget by what `lengths` tells
8. `iterable_ann_dataset.IterableAnnDataset`     paths -> one `Cell` (dict of 1-D tensors) after the other
9. `data_collators`                    list of `Cell` -> batch, padded or packed, masked for MLM
"""
