#!/usr/bin/env bash
# CHAN with BERT (CVPR 2023) on Flickr30K, 1,000 test images:
#   bash scripts/chan_f30k_bert.sh DATA_PATH [--bert_path FOLDER]
# Its authors give no flags for this row; these are the flags of the COCO row.
name=chan_f30k_bert
title="CHAN BERT, Flickr30K"
data_name=f30k_precomp
paper="80.6 96.1 97.8 63.9 87.5 92.6"
bert=yes
flags=(
  --model chan --text_enc_type bert --batch_size 128 --drop --vse_mean_warmup_epochs 1
  --margin 0.05 --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
