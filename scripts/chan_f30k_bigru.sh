#!/usr/bin/env bash
# CHAN with its bi-GRU (CVPR 2023) on Flickr30K, 1,000 test images, from GloVe's vectors:
#   bash scripts/chan_f30k_bigru.sh DATA_PATH --wemb_path glove.840B.300d.txt
name=chan_f30k_bigru
title="CHAN bi-GRU, Flickr30K"
data_name=f30k_precomp
paper="79.7 94.5 nan 60.2 85.3 nan"
flags=(
  --model chan --wemb_type glove --precomp_enc_type selfattention --batch_size 384 --drop
  --vse_mean_warmup_epochs 1 --margin 0.05 --num_epochs 25 --lr_update 15 --learning_rate 0.0005
  --embed_size 1024
)
source "$(dirname "$0")/row.sh"
