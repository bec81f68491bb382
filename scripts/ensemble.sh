# Sourced by the ensemble scripts: evaluates the mean of two trained models' score matrices, and
# prints the paper's recalls and its own. The calling script sets: name, title, data_name, paper (1K
# or f30k), paper_5k (COCO), pair (two row names). If two checkpoints are given, the paper's recalls
# are not printed: they belong to the paper's pair.
set -euo pipefail
if [ $# -ne 1 ] && [ $# -ne 3 ]; then
  echo "use: bash scripts/$name.sh DATA_PATH [CHECKPOINT CHECKPOINT]" >&2
  exit 2
fi
data_path=$1
if [ $# -eq 3 ]; then
  models=("$2" "$3")
  title="ensemble of $2 and $3"
  paper=
  paper_5k=
else
  models=()
  for row in "${pair[@]}"; do
    model=${RUNS:-runs}/$row/model_best.pth.tar
    [ -f "$model" ] || {
      echo "error: $model: no such checkpoint; train it with scripts/$row.sh" >&2
      exit 1
    }
    models+=("$model")
  done
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh"
score() { # arguments: title, the paper's six recalls or nothing, flags
  echo "$1"
  local paper=$2
  shift 2
  "$PYTHON" "$root/evaluation.py" "${models[@]}" --data_path "$data_path" "$@" \
    ${VOCAB_PATH:+--vocab_path "$VOCAB_PATH"} ${paper:+--paper $paper}
}
if [ "$data_name" = coco_precomp ]; then
  score "$title, 1K (mean of five folds)" "$paper" --split testall --fold5
  score "$title, 5K" "$paper_5k" --split testall
else
  score "$title" "$paper" --split test
fi
