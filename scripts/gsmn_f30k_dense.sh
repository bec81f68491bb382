#!/usr/bin/env bash
# GSMN dense (CVPR 2020) on Flickr30K, 1,000 test images: bash scripts/gsmn_f30k_dense.sh DATA_PATH
# The row beside ours is what its authors report for the weights they published.
name=gsmn_f30k_dense
title="GSMN dense, Flickr30K (paper: as its authors report their weights)"
data_name=f30k_precomp
paper="74.4 91.1 95.4 54.1 79.9 86.5"
flags=(
  --model gsmn --lambda_softmax 20 --num_epochs 30 --lr_update 15 --learning_rate 0.0002
  --batch_size 64 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
