#!/usr/bin/env bash
# VSE-infinity with its bi-GRU and region features (CVPR 2021) on MS-COCO 1K, mean of five folds:
#   bash scripts/vse_coco_bigru.sh DATA_PATH
name=vse_coco_bigru
title="VSE-infinity bi-GRU, MS-COCO"
data_name=coco_precomp
paper="78.5 96.0 98.7 61.7 90.3 95.6"
flags=(
  --model vse --batch_size 128 --drop --vse_mean_warmup_epochs 1 --margin 0.2
  --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
