#!/usr/bin/env bash
# SCAN i-t AVG (ECCV 2018) on Flickr30K, 1,000 test images: bash scripts/scan_f30k_i2t_avg.sh DATA_PATH
name=scan_f30k_i2t_avg
title="SCAN i-t AVG, Flickr30K"
data_name=f30k_precomp
paper="67.9 89.0 94.4 43.9 74.2 82.8"
flags=(
  --cross_attn i2t --agg_func Mean --lambda_softmax 4 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
