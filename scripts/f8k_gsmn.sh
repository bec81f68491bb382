#!/usr/bin/env bash
# GSMN dense with the flags found for Flickr8K's small features, about 28 minutes of one core a seed:
#   bash scripts/f8k_gsmn.sh DATA_PATH
name=f8k_gsmn
system=gsmn
epochs=5
flags=(
  --embed_size 128 --batch_size 64 --learning_rate 0.002
)
source "$(dirname "$0")/recipe.sh"
