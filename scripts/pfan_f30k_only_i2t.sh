#!/usr/bin/env bash
# PFAN-P i-t, position-only (IJCAI 2019), on Flickr30K: bash scripts/pfan_f30k_only_i2t.sh DATA_PATH
name=pfan_f30k_only_i2t
title="PFAN-P (position only) i-t, Flickr30K"
data_name=f30k_precomp
paper=""
positions=yes
flags=(
  --model pfan --agg_func Mean --position only --cross_attn i2t --lambda_softmax 4 --num_epochs 30
  --lr_update 15 --learning_rate 0.0002 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
