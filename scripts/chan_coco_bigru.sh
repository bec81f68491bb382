#!/usr/bin/env bash
# CHAN with its bi-GRU (CVPR 2023) on MS-COCO, from GloVe's vectors:
#   bash scripts/chan_coco_bigru.sh DATA_PATH --wemb_path glove.840B.300d.txt
# Its authors give no flags of this row; these are those of the Flickr30K one.
name=chan_coco_bigru
title="CHAN bi-GRU, MS-COCO"
data_name=coco_precomp
paper=""
paper_5k="60.2 85.9 nan 41.7 71.5 nan"
flags=(
  --model chan --wemb_type glove --precomp_enc_type selfattention --batch_size 384 --drop
  --vse_mean_warmup_epochs 1 --margin 0.05 --num_epochs 25 --lr_update 15 --learning_rate 0.0005
  --embed_size 1024
)
source "$(dirname "$0")/row.sh"
