#!/usr/bin/env bash
# PFAN's whole-image variant, t-i, on Tencent-News: bash scripts/pfan_tencent_t2i.sh DATA_PATH
name=pfan_tencent_t2i
title="PFAN with whole images t-i, Tencent-News"
data_name=tencent_data
paper=""
positions=yes
sent=sent_
flags=(
  --model pfan_whole --agg_func Mean --cross_attn t2i --lambda_softmax 9 --num_epochs 30
  --lr_update 15 --learning_rate 0.0002 --lambda_whole 2 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
