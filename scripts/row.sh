# Sourced by the scripts of single rows: trains one model, and prints the paper's recalls and its own.
# Use:
#   bash scripts/ROW.sh DATA_PATH [more flags of train.py]
# A row sets: name; title; data_name; flags, the whole command line of train.py except folders;
# paper, its six recalls (nan: not known), or nothing. For COCO, paper is the 1K row, and paper_5k the
# 5K row. The paper's recalls are printed where as many images are ranked as in the paper. Optional:
# sent=sent_ if its captions may be in {split}_sent_caps.txt; bert=yes if BERT reads them;
# dependencies=yes or positions=yes if it needs these files. util/dependency_parser.py and
# util/positions.py make the missing ones.
# Checkpoints and logs go to runs/$name (or $RUNS/$name). The vocabulary is read from vocab (or
# $VOCAB_PATH, a folder or a file), where it must be of the captions in DATA_PATH, or built there. All
# paths start at the folder where the script is called. With --resume it goes on in the folder of that
# checkpoint; if it is one of this row, with the flags of that run, except those that are given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
more="[more flags of train.py]"
source "$root/scripts/data_path.sh"
shift
run=$(home "${RUNS:-runs}")/$name
vocabulary=$(home "${VOCAB_PATH:-vocab}")
resume= reset= before=
for flag in "$@"; do
  case ${flag%%=*} in
    --data_path | --data_name | --vocab_path | --model_name | --logger_name)
      # With another folder or name it would test what this run has not trained.
      echo "error: ${flag%%=*}: this script sets it; RUNS=FOLDER before bash is for other folders of" \
        "runs, VOCAB_PATH=FOLDER for other vocabularies" >&2
      exit 2
      ;;
    --resume) resume=${flag#--resume=} ;; # or the next argument
    --reset_start_epoch) reset=yes ;;
  esac
  [ "$before" != --resume ] || resume=$flag
  before=$flag
done
if [ -n "$resume" ] && [ -z "$reset" ]; then
  folder=$(dirname -- "$(home "$resume")")
  [ ! "$folder" -ef "$run" ] || flags=() # its options are those of the row, and what was given then
  run=$folder
fi
locks="core${dependencies:+ parser}${bert:+ bert}"
source "$root/scripts/environment.sh"
[ -f "$data_path/$data_name/train_sent_caps.txt" ] || sent=
case $vocabulary in
  *.json | *.pkl) ;;
  *)
    vocabulary=$vocabulary/${data_name}_${sent:-}vocab.json
    older=${vocabulary%json}pkl # of an older program
    [ -f "$vocabulary" ] || [ ! -f "$older" ] || vocabulary=$older
    ;;
esac
if [ -z "${bert:-}" ]; then
  check=
  [ ! -f "$vocabulary" ] || check=yes # it may be of other captions that lie under the same name
  "$PYTHON" "$root/vocab.py" --data_path "$data_path" --data_name "$data_name" ${sent:+--sent} \
    --out "$vocabulary" ${check:+--check}
fi
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
      --vocab_path "$vocabulary" --splits "${missing[@]}"
fi
if [ -n "${positions:-}" ]; then
  find_missing ims.npy boxes.npy
  [ ${#missing[@]} -eq 0 ] ||
    "$PYTHON" "$root/util/positions.py" --data_path "$data_path" --data_name "$data_name" \
      --splits "${missing[@]}"
fi
echo "$title"
"$PYTHON" "$root/train.py" --data_path "$data_path" --data_name "$data_name" --vocab_path "$vocabulary" \
  --model_name "$run" --logger_name "$run" ${flags[@]+"${flags[@]}"} "$@"
test_it() { # arguments: title, the images that the paper ranks, its recalls or nothing, flags
  echo "$1"
  local images=$2 paper=$3
  shift 3
  "$PYTHON" "$root/evaluation.py" "$run/model_best.pth.tar" --data_path "$data_path" "$@" \
    ${paper:+--paper_images $images --paper $paper}
}
if [ "$data_name" = coco_precomp ]; then
  test_it "$title, mean of five folds" 1000 "$paper" --split testall --fold5
  [ -z "${paper_5k:-}" ] || test_it "$title, whole split" 5000 "$paper_5k" --split testall
else
  test_it "$title" 1000 "$paper" --split test
fi
