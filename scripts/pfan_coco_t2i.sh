#!/usr/bin/env bash
# PFAN t-i (IJCAI 2019) on MS-COCO 1K, mean of five folds: bash scripts/pfan_coco_t2i.sh DATA_PATH
name=pfan_coco_t2i
title="PFAN t-i, MS-COCO"
data_name=coco_precomp
paper=""
positions=yes
flags=(
  --model pfan --agg_func Mean --cross_attn t2i --lambda_softmax 9 --num_epochs 30 --lr_update 15
  --learning_rate 0.0005 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
