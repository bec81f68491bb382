#!/usr/bin/env bash
# GSMN dense + sparse on MS-COCO, from the two trained models:
#   bash scripts/gsmn_coco_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
# For published weights name the two checkpoints.
name=gsmn_coco_ensemble
title="GSMN dense + sparse, MS-COCO"
data_name=coco_precomp
paper=""
paper_5k=""
pair=(gsmn_coco_dense gsmn_coco_sparse)
source "$(dirname "$0")/ensemble.sh"
