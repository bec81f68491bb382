# Sourced by the ensemble scripts: the mean of two trained models' score matrices beside the paper's.
# The script sets: name, title, data_name, paper (1K or f30k), paper_5k (COCO), pair (two row names).
set -euo pipefail
if [ $# -ne 1 ] && [ $# -ne 3 ]; then
  echo "use: bash scripts/$name.sh DATA_PATH [CHECKPOINT CHECKPOINT]" >&2
  exit 2
fi
data_path=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
models=("${RUNS:-runs}/${pair[0]}/model_best.pth.tar" "${RUNS:-runs}/${pair[1]}/model_best.pth.tar")
[ $# -eq 1 ] || models=("$2" "$3")
for i in 0 1; do
  [ -f "${models[$i]}" ] || {
    echo "error: ${models[$i]}: no such checkpoint; train it with scripts/${pair[$i]}.sh" >&2
    exit 1
  }
done
source scripts/environment.sh
vocab=(${VOCAB_PATH:+--vocab_path "$VOCAB_PATH"})
score() {
  echo "$1"
  shift
  "$PYTHON" evaluation.py "${models[@]}" --data_path "$data_path" ${vocab[@]+"${vocab[@]}"} "$@"
}
if [ "$data_name" = coco_precomp ]; then
  score "$title, 1K (mean of five folds)" --split testall --fold5 --paper $paper
  score "$title, 5K" --split testall --paper $paper_5k
else
  score "$title" --split test --paper $paper
fi
