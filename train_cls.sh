#!/usr/bin/env bash
# Worked example: train a classifier of one phenotype, starting from the weights of an mlm run.
# Runs as it is, on the 700 PBMC cells that ship inside scanpy:  ./train_cls.sh [FOLDER]
# `perturbgene cls -h` lists every flag.
set -euo pipefail
cd "$(dirname "$0")"
work=${1:-runs/example}
[ -e "$work/mlm/model.safetensors" ] || ./train_mlm.sh "$work"   # corpus and weights to start from
perturbgene=.venv/bin/perturbgene

cls=(
  --corpus "$work/corpus"             # from train_mlm.sh
  --output_dir "$work/cls"            # run folder (must not exist yet)
  --pretrained_model_path "$work/mlm" # weights and sizes to start from; leave out to train from scratch
  --phenotype_category cell_type      # what to classify; its token is never shown to the model
  --included_phenotypes phase         # other phenotypes that the classifier may see; leave out for genes alone
  --max_length 512                    # as in train_mlm.sh
  --num_train_epochs 12               # passes over the labelled training cells
  --per_device_train_batch_size 32    # cells per step
  --learning_rate 5e-4                # less than for fresh weights: these are already trained
  --gene_drop_prob 0.5                # remove up to this share of each cell's genes, redrawn each epoch: few cells, many epochs
  --weight_decay 1                    # strong, for so few cells
  --no_bf16                           # float32, as in train_mlm.sh
  --eval_strategy epoch               # the checkpoint with the best macro F1 is kept
  --report_to tensorboard             # or wandb, or none
  --seed 42                           # same seed, same result
)
# --binary_label "CD19+ B"              one class against all others
# --no_balanced_dataset                 count classes as they come; by default rare ones weigh more
"$perturbgene" cls "${cls[@]}"
exec "$perturbgene" evaluate "$work/cls"
