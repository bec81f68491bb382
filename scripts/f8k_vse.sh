#!/usr/bin/env bash
# VSE-infinity with the flags found for Flickr8K's small features, about 25 minutes of one core a seed:
#   bash scripts/f8k_vse.sh DATA_PATH
name=f8k_vse
system=vse
epochs=10
flags=(
  --embed_size 256 --learning_rate 0.001 --margin 0.2 --drop --vse_mean_warmup_epochs 2
)
source "$(dirname "$0")/recipe.sh"
