#!/usr/bin/env bash
# SCAN t-i LSE (ECCV 2018) on MS-COCO 1K, mean of five folds: bash scripts/scan_coco_t2i_lse.sh DATA_PATH
name=scan_coco_t2i_lse
title="SCAN t-i LSE, MS-COCO"
data_name=coco_precomp
paper="67.5 92.9 97.6 53.0 85.4 92.9"
flags=(
  --cross_attn t2i --agg_func LogSumExp --lambda_lse 6 --lambda_softmax 9 --num_epochs 20
  --lr_update 10 --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
