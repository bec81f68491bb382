# Sourced by the scripts f8k_*.sh: trains one system with three seeds on Flickr8K's small features, a run
# per core, and prints the table of scripts/compare.py.
# Use:
#   bash scripts/RECIPE.sh DATA_PATH [more flags of train.py]
# A recipe sets: name; system, as scripts/compare.py calls it; epochs; flags, of train.py.
# Tables, curves, checkpoints and logs go to runs/$name (or $RUNS/$name). If it is stopped, the same
# command goes on. Without a test split, the models are tested on dev, and another dev is cut off train.
set -euo pipefail
data_name=flickr8k_precomp
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
more="[more flags of train.py]"
source "$root/scripts/data_path.sh"
shift
locks="core compare"
source "$root/scripts/environment.sh"
"$PYTHON" "$root/scripts/compare.py" --data_path "$data_path" --data_name "$data_name" \
  --vocab_path "$(home "${VOCAB_PATH:-vocab}")" --systems "$system" --num_epochs "$epochs" --seeds 3 \
  --out "$(home "${RUNS:-runs}")/$name" -- "${flags[@]}" "$@"
