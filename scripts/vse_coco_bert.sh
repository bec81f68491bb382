#!/usr/bin/env bash
# VSE-infinity with BERT and region features (CVPR 2021) on MS-COCO 1K, mean of five folds:
#   bash scripts/vse_coco_bert.sh DATA_PATH [--bert_path FOLDER]
name=vse_coco_bert
title="VSE-infinity BERT, MS-COCO"
data_name=coco_precomp
paper="79.7 96.4 98.9 64.8 91.4 96.3"
bert=yes
flags=(
  --model vse --text_enc_type bert --batch_size 128 --drop --vse_mean_warmup_epochs 1 --margin 0.2
  --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
