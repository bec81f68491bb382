#!/usr/bin/env bash
# Serves the scores of the sentence model on port 5091: bash scripts/serve_sentence.sh CHECKPOINT [flags of serve.py]
name=serve_sentence
port=5091
source "$(dirname "$0")/serve.sh"
