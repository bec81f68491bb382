#!/usr/bin/env bash
# SCAN t-i AVG (ECCV 2018) on MS-COCO 1K, mean of five folds: bash scripts/scan_coco_t2i_avg.sh DATA_PATH
name=scan_coco_t2i_avg
title="SCAN t-i AVG, MS-COCO"
data_name=coco_precomp
paper="70.9 94.5 97.8 56.4 87.0 93.9"
flags=(
  --cross_attn t2i --agg_func Mean --lambda_softmax 9 --num_epochs 20 --lr_update 10
  --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
