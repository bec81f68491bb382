#!/usr/bin/env bash
# PFAN-P t-i, position-only (IJCAI 2019), on Flickr30K: bash scripts/pfan_f30k_only_t2i.sh DATA_PATH
name=pfan_f30k_only_t2i
title="PFAN-P (position only) t-i, Flickr30K"
data_name=f30k_precomp
paper=""
positions=yes
flags=(
  --model pfan --agg_func Mean --position only --cross_attn t2i --lambda_softmax 9 --num_epochs 30
  --lr_update 15 --learning_rate 0.0002 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
