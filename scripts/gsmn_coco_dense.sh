#!/usr/bin/env bash
# GSMN dense (CVPR 2020) on MS-COCO 1K, mean of five folds: bash scripts/gsmn_coco_dense.sh DATA_PATH
name=gsmn_coco_dense
title="GSMN dense, MS-COCO"
data_name=coco_precomp
paper=""
flags=(
  --model gsmn --lambda_softmax 10 --num_epochs 20 --lr_update 5 --learning_rate 0.0005
  --batch_size 32 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
