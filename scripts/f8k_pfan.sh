#!/usr/bin/env bash
# PFAN-A t-i AVG with the flags found for Flickr8K's small features, about 20 minutes of one core a seed:
#   bash scripts/f8k_pfan.sh DATA_PATH
name=f8k_pfan
system=pfan
epochs=5
flags=(
  --embed_size 256 --batch_size 64 --learning_rate 0.001
)
source "$(dirname "$0")/recipe.sh"
