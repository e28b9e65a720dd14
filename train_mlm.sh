#!/usr/bin/env bash
# Worked example: train a model by masking genes and phenotypes together.
# Runs as it is, on the 700 PBMC cells that ship inside scanpy:  ./train_mlm.sh [FOLDER]
# For your own cells, change the two lines marked (*). `perturbgene mlm -h` lists every flag.
set -euo pipefail
cd "$(dirname "$0")"
make -s install                       # makes .venv on the first call
work=${1:-runs/example}
perturbgene=.venv/bin/perturbgene

if [ ! -e "$work/corpus" ]; then
  mkdir -p "$work"
  .venv/bin/python -m perturbgene.demo --only_cells "$work/cells.h5ad"   # (*) leave out, and name your files below
  prepare=(
    "$work/cells.h5ad"                # (*) your h5ad files: paths, globs or shard_{0..43}.h5ad
    --output "$work/corpus"           # the corpus folder: shards, vocabulary, bins, audit
    --layer raw                       # where the counts or log values are: a layer, raw for .raw; leave out for X
    --phenotypes cell_type=bulk_labels phase   # columns of obs to learn; NAME=COLUMN renames one
    --split_by cell                   # donor_id for real data: cells of one donor must not be on both sides
    --eval_fraction 0.2               # share of donors (here: cells) held out
    --num_bins 8                      # expression bins, fitted as quantiles of the expressed values
    --num_top_genes 500               # the most variable genes; leave out to keep all expressed ones
  )
  "$perturbgene" prepare "${prepare[@]}"
fi

mlm=(
  --corpus "$work/corpus"             # made above
  --output_dir "$work/mlm"            # run folder: weights, tokenizer, settings, scores (must not exist yet)
  --model_arch tiny                   # tiny, small (laptop); base, large (GPU)
  --included_phenotypes cell_type phase   # phenotypes in a cell's sequence, in this order
  --max_length 512                    # longest sequence; longer cells keep their most variable genes
  --gene_mask_prob 0.15               # share of the expressed genes that are hidden
  --phenotype_mask_prob 0.8           # share of the phenotypes that are asked
  --absent_prob 0.1                   # share of the phenotypes that are left out, so that the model never depends on one
  --unexpressed_ratio 0.5             # hidden genes that the cell does not express, per hidden expressed one
  --phenotype_loss_weight 1.0         # weight of the phenotypes' mean loss
  --gene_loss_weight 0.3              # weight of the genes' mean loss
  --gene_drop_prob 0.9                # remove up to this share of each cell's genes, redrawn each epoch: for small data sets
  --num_hidden_layers 1               # instead of the preset's two: enough for so few cells
  --num_train_epochs 10               # passes over the training cells; 64 for a good model of so few cells
  --per_device_train_batch_size 32    # cells per step
  --learning_rate 7.5e-4              # peak; small models take more
  --weight_decay 0.3                  # strong, for so few cells; 0.01 for many
  --lr_scheduler_type cosine          # course after the warm-up
  --warmup_steps 0.1                  # below 1: share of all steps
  --no_bf16                           # float32: faster than bfloat16 for so narrow a model on a CPU
  --eval_strategy epoch               # evaluate and save after each epoch; the best checkpoint is kept
  --save_total_limit 2                # checkpoints on disk
  --report_to tensorboard             # or wandb (WANDB_MODE=offline works), or none
  --seed 42                           # same seed, same result
)
exec "$perturbgene" mlm "${mlm[@]}"
