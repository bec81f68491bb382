#!/usr/bin/env bash
# SCAN i-t AVG (ECCV 2018) on MS-COCO 1K, mean of five folds: bash scripts/scan_coco_i2t_avg.sh DATA_PATH
name=scan_coco_i2t_avg
title="SCAN i-t AVG, MS-COCO"
data_name=coco_precomp
paper="69.2 93.2 97.5 54.4 86.0 93.6"
flags=(
  --cross_attn i2t --agg_func Mean --lambda_softmax 4 --num_epochs 20 --lr_update 10
  --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
