#!/usr/bin/env bash
# PFAN-P (position only) t-i + i-t on Flickr30K, from the two trained models:
#   bash scripts/pfan_f30k_only_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
name=pfan_f30k_only_ensemble
title="PFAN-P (position only) t-i + i-t, Flickr30K"
data_name=f30k_precomp
paper="66.0 89.4 94.1 48.6 76.9 85.1"
paper_5k=""
pair=(pfan_f30k_only_t2i pfan_f30k_only_i2t)
source "$(dirname "$0")/ensemble.sh"
