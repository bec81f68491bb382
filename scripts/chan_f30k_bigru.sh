#!/usr/bin/env bash
# CHAN with its bi-GRU (CVPR 2023) on Flickr30K, 1,000 test images, from GloVe's vectors:
#   bash scripts/chan_f30k_bigru.sh DATA_PATH --wemb_path glove.840B.300d.txt
name=chan_f30k_bigru
title="CHAN bi-GRU, Flickr30K, 1,000 test images (paper: R@1 79.7, R@5 94.5; R@1 60.2, R@5 85.3)"
data_name=f30k_precomp
paper=""
flags=(--model chan --wemb_type glove --precomp_enc_type selfattention --drop --vse_mean_warmup_epochs 1 --margin 0.05 --num_epochs 25 --lr_update 15 --learning_rate 0.0005 --batch_size 384 --embed_size 1024)
source "$(dirname "$0")/row.sh"
