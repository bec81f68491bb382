# Sourced by the ensemble scripts: evaluates the mean of two trained models' score matrices, and
# prints the paper's recalls and its own. The calling script sets: name, title, data_name, paper (1K
# or f30k), paper_5k (COCO), pair (two row names). The paper's recalls are printed where as many
# images are ranked as in the paper, and not if two checkpoints are given: they belong to the paper's
# pair.
set -euo pipefail
[ $# -eq 1 ] || [ $# -eq 3 ] || set -- # so that the use is explained
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
more="[CHECKPOINT CHECKPOINT]"
source "$root/scripts/data_path.sh"
if [ $# -eq 3 ]; then
  models=("$2" "$3")
  title="ensemble of $2 and $3"
  paper=
  paper_5k=
else
  models=()
  for row in "${pair[@]}"; do
    model=$(home "${RUNS:-runs}")/$row/model_best.pth.tar
    [ -f "$model" ] || {
      echo "error: $model: no such checkpoint; train it with scripts/$row.sh" >&2
      exit 1
    }
    models+=("$model")
  done
fi
source "$root/scripts/environment.sh"
score() { # arguments: title, the images that the paper ranks, its recalls or nothing, flags
  echo "$1"
  local images=$2 paper=$3
  shift 3
  "$PYTHON" "$root/evaluation.py" "${models[@]}" --data_path "$data_path" \
    --data_name "$data_name" "$@" ${VOCAB_PATH:+--vocab_path "$VOCAB_PATH"} \
    ${paper:+--paper_images $images --paper $paper}
}
if [ "$data_name" = coco_precomp ]; then
  score "$title, mean of five folds" 1000 "$paper" --split testall --fold5
  score "$title, whole split" 5000 "$paper_5k" --split testall
else
  score "$title" 1000 "$paper" --split test
fi
