#!/usr/bin/env bash
# VSE-infinity with BERT and region features (CVPR 2021) on Flickr30K, 1,000 test images:
#   bash scripts/vse_f30k_bert.sh DATA_PATH [--bert_path FOLDER]
name=vse_f30k_bert
title="VSE-infinity BERT, Flickr30K"
data_name=f30k_precomp
paper="81.7 95.4 97.6 61.4 85.9 91.5"
bert=yes
flags=(
  --model vse --text_enc_type bert --batch_size 128 --drop --vse_mean_warmup_epochs 1 --margin 0.2
  --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --embed_size 1024
)
source "$(dirname "$0")/row.sh"
