#!/usr/bin/env bash
# CHAN VHA LSE with the flags found for Flickr8K's small features, about 25 minutes of one core a seed:
#   bash scripts/f8k_chan.sh DATA_PATH
name=f8k_chan
system=chan
epochs=8
flags=(
  --embed_size 256 --batch_size 64 --learning_rate 0.001 --margin 0.2
)
source "$(dirname "$0")/recipe.sh"
