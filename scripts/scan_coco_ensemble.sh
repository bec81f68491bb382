#!/usr/bin/env bash
# SCAN t-i AVG + i-t LSE on MS-COCO, the paper's best row, from the two trained models:
#   bash scripts/scan_coco_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
# For i-t AVG + t-i AVG, or published weights, name the two checkpoints.
name=scan_coco_ensemble
title="SCAN t-i AVG + i-t LSE, MS-COCO"
data_name=coco_precomp
paper="72.7 94.8 98.4 58.8 88.4 94.8"
paper_5k="50.4 82.2 90.0 38.6 69.3 80.4"
pair=(scan_coco_t2i_avg scan_coco_i2t_lse)
source "$(dirname "$0")/ensemble.sh"
