#!/usr/bin/env bash
# SCAN t-i AVG + i-t LSE on Flickr30K, the paper's best row, from the two trained models:
#   bash scripts/scan_f30k_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
# For i-t AVG + t-i AVG, or published weights, name the two checkpoints.
name=scan_f30k_ensemble
title="SCAN t-i AVG + i-t LSE, Flickr30K"
data_name=f30k_precomp
paper="67.4 90.3 95.8 48.6 77.7 85.2"
pair=(scan_f30k_t2i_avg scan_f30k_i2t_lse)
source "$(dirname "$0")/ensemble.sh"
