#!/usr/bin/env bash
# PFAN t-i + i-t on MS-COCO, from the two trained models:
#   bash scripts/pfan_coco_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
name=pfan_coco_ensemble
title="PFAN t-i + i-t, MS-COCO"
data_name=coco_precomp
paper=""
paper_5k=""
pair=(pfan_coco_t2i pfan_coco_i2t)
source "$(dirname "$0")/ensemble.sh"
