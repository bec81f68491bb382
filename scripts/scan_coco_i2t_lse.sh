#!/usr/bin/env bash
# SCAN i-t LSE (ECCV 2018) on MS-COCO 1K, mean of five folds: bash scripts/scan_coco_i2t_lse.sh DATA_PATH
name=scan_coco_i2t_lse
title="SCAN i-t LSE, MS-COCO"
data_name=coco_precomp
paper="68.4 93.9 98.0 54.8 86.1 93.3"
flags=(
  --cross_attn i2t --agg_func LogSumExp --lambda_lse 20 --lambda_softmax 4 --num_epochs 20
  --lr_update 10 --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
