#!/usr/bin/env bash
# Serves the scores of the tag model on port 5092: bash scripts/serve_tag.sh CHECKPOINT [flags of serve.py]
name=serve_tag
port=5092
source "$(dirname "$0")/serve.sh"
