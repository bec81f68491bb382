#!/usr/bin/env bash
# PFAN i-t (IJCAI 2019) on MS-COCO 1K, mean of five folds: bash scripts/pfan_coco_i2t.sh DATA_PATH
name=pfan_coco_i2t
title="PFAN i-t, MS-COCO"
data_name=coco_precomp
paper=""
positions=yes
flags=(
  --model pfan --agg_func Mean --cross_attn i2t --lambda_softmax 4 --num_epochs 30 --lr_update 15
  --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
