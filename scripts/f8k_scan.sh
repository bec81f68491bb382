#!/usr/bin/env bash
# SCAN t-i LSE with the flags found for Flickr8K's small features, about 15 minutes of one core a seed:
#   bash scripts/f8k_scan.sh DATA_PATH
name=f8k_scan
system=scan
epochs=5
flags=(
  --agg_func LogSumExp --lambda_lse 6 --embed_size 256 --batch_size 64 --learning_rate 0.001
)
source "$(dirname "$0")/recipe.sh"
