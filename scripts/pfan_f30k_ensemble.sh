#!/usr/bin/env bash
# PFAN-A t-i + i-t on Flickr30K, from the two trained models:
#   bash scripts/pfan_f30k_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
name=pfan_f30k_ensemble
title="PFAN t-i + i-t, Flickr30K"
data_name=f30k_precomp
paper="70.0 91.8 95.0 50.4 78.7 86.1"
paper_5k=""
pair=(pfan_f30k_t2i pfan_f30k_i2t)
source "$(dirname "$0")/ensemble.sh"
