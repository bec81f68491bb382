#!/usr/bin/env bash
# SCAN t-i AVG (ECCV 2018) on Flickr30K, 1,000 test images: bash scripts/scan_f30k_t2i_avg.sh DATA_PATH
name=scan_f30k_t2i_avg
title="SCAN t-i AVG, Flickr30K"
data_name=f30k_precomp
paper="61.8 87.5 93.7 45.8 74.4 83.0"
flags=(
  --cross_attn t2i --agg_func Mean --lambda_softmax 9 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
