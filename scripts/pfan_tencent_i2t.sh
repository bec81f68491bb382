#!/usr/bin/env bash
# PFAN's whole-image variant, i-t, on Tencent-News: bash scripts/pfan_tencent_i2t.sh DATA_PATH
name=pfan_tencent_i2t
title="PFAN with whole images i-t, Tencent-News"
data_name=tencent_data
paper=""
positions=yes
sent=sent_
flags=(
  --model pfan_whole --agg_func Mean --cross_attn i2t --lambda_softmax 4 --num_epochs 30
  --lr_update 15 --learning_rate 0.0002 --lambda_whole 2 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
