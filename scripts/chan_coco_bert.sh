#!/usr/bin/env bash
# CHAN with BERT (CVPR 2023) on MS-COCO:
#   bash scripts/chan_coco_bert.sh DATA_PATH [--bert_path FOLDER]
name=chan_coco_bert
title="CHAN BERT, MS-COCO"
data_name=coco_precomp
paper=""
paper_5k="59.8 87.2 93.3 44.9 74.5 84.2"
bert=yes
flags=(
  --model chan --text_enc_type bert --batch_size 128 --drop --vse_mean_warmup_epochs 1
  --margin 0.05 --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
