#!/usr/bin/env bash
# GSMN sparse (CVPR 2020) on MS-COCO 1K, mean of five folds: bash scripts/gsmn_coco_sparse.sh DATA_PATH
name=gsmn_coco_sparse
title="GSMN sparse, MS-COCO"
data_name=coco_precomp
paper=""
dependencies=yes
# With the dense row's seed it would be the dense model: on real parses they are one function.
flags=(
  --model gsmn --lambda_softmax 10 --num_epochs 20 --lr_update 5 --learning_rate 0.0005
  --batch_size 32 --is_sparse --seed 1 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
