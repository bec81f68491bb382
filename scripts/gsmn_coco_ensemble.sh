#!/usr/bin/env bash
# GSMN dense + sparse on MS-COCO, from the two trained models:
#   bash scripts/gsmn_coco_ensemble.sh DATA_PATH [CHECKPOINT CHECKPOINT]
# For published weights name the two checkpoints.
name=gsmn_coco_ensemble
title="GSMN dense + sparse, MS-COCO"
data_name=coco_precomp
paper="78.4 96.4 98.6 63.3 90.1 95.7"
paper_5k=""
pair=(gsmn_coco_dense gsmn_coco_sparse)
source "$(dirname "$0")/ensemble.sh"
