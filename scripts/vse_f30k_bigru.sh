#!/usr/bin/env bash
# VSE-infinity with its bi-GRU and region features (CVPR 2021) on Flickr30K, 1,000 test images:
#   bash scripts/vse_f30k_bigru.sh DATA_PATH
name=vse_f30k_bigru
title="VSE-infinity bi-GRU, Flickr30K"
data_name=f30k_precomp
paper="76.5 94.2 97.7 56.4 83.4 89.9"
flags=(
  --model vse --batch_size 128 --drop --vse_mean_warmup_epochs 1 --margin 0.2
  --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
