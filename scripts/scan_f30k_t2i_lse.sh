#!/usr/bin/env bash
# SCAN t-i LSE (ECCV 2018) on Flickr30K, 1,000 test images: bash scripts/scan_f30k_t2i_lse.sh DATA_PATH
name=scan_f30k_t2i_lse
title="SCAN t-i LSE, Flickr30K"
data_name=f30k_precomp
paper="61.1 85.4 91.5 43.3 71.9 80.9"
flags=(
  --cross_attn t2i --agg_func LogSumExp --lambda_lse 6 --lambda_softmax 9 --max_violation --bi_gru
)
source "$(dirname "$0")/row.sh"
