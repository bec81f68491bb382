#!/usr/bin/env bash
# SCAN i-t LSE (ECCV 2018) on Flickr30K, 1,000 test images: bash scripts/scan_f30k_i2t_lse.sh DATA_PATH
name=scan_f30k_i2t_lse
title="SCAN i-t LSE, Flickr30K"
data_name=f30k_precomp
paper="67.7 88.9 94.0 44.0 74.2 82.6"
flags=(
  --cross_attn i2t --agg_func LogSumExp --lambda_lse 5 --lambda_softmax 4 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
