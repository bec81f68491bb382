#!/usr/bin/env bash
# From nothing to a trained SCAN in minutes: bash scripts/demo.sh [more flags of train.py]
# Makes an environment, draws the demo set, builds its vocabulary, trains SCAN t-i, and tests it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
run=runs/demo

"$PYTHON" util/demo_data.py --out data
"$PYTHON" vocab.py --data_path data --data_name demo_precomp
"$PYTHON" train.py --data_path data --data_name demo_precomp --vocab_path vocab \
  --model_name "$run" --logger_name "$run" --workers 1 --log_step 50 --val_step 0 \
  --img_dim 256 --embed_size 256 --word_dim 128 --batch_size 128 \
  --cross_attn t2i --agg_func Mean --lambda_softmax 9 --bi_gru \
  --max_violation --vse_mean_warmup_epochs 1 --num_epochs 8 --learning_rate 0.002 --lr_update 6 \
  "$@"

echo
echo "R@1 on dev scenes, epoch by epoch (chance: 0.2 text to image)"
"$PYTHON" - "$run/log.jsonl" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    r = json.loads(line)
    bar = "#" * round(r["r1i"] / 2)
    print(f"epoch {r['epoch']:>2}  image to text {r['r1']:5.1f}  text to image {r['r1i']:5.1f}  {bar}")
PY
echo
echo "1,000 scenes never seen before (chance: 0.1 text to image)"
"$PYTHON" evaluation.py "$run/model_best.pth.tar" --data_path data --split test
