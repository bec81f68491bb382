#!/usr/bin/env bash
# GSMN sparse (CVPR 2020) on Flickr30K, 1,000 test images: bash scripts/gsmn_f30k_sparse.sh DATA_PATH
# The row beside ours is what its authors report for the weights they published.
name=gsmn_f30k_sparse
title="GSMN sparse, Flickr30K (paper: as its authors report their weights)"
data_name=f30k_precomp
paper="72.8 91.0 95.8 52.8 78.8 85.6"
dependencies=yes
# With the dense row's seed it would be the dense model: on real parses they are one function.
flags=(
  --model gsmn --lambda_softmax 20 --num_epochs 30 --lr_update 15 --learning_rate 0.0002
  --batch_size 64 --is_sparse --seed 1 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
