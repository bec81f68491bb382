#!/usr/bin/env bash
# GSMN dense + sparse on Flickr30K, from the two trained models:
#   bash scripts/gsmn_f30k_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
# For published weights name the two checkpoints.
name=gsmn_f30k_ensemble
title="GSMN dense + sparse, Flickr30K"
data_name=f30k_precomp
paper="76.4 94.3 97.3 57.4 82.3 89.0"
paper_5k=""
pair=(gsmn_f30k_dense gsmn_f30k_sparse)
source "$(dirname "$0")/ensemble.sh"
