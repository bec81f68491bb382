# Sourced by row.sh, recipe.sh and ensemble.sh, which set name, data_name and more (the arguments after
# the first): sets data_path to the script's first argument. If that is none, or the data set is not
# there, it says so and ends the script. If it is the folder of the data set itself, data_path becomes
# its parent.
home() { # argument: a path; prints it with a ~ at its beginning, which stood in quotes, replaced
  case $1 in
    "~" | "~/"*) printf '%s\n' "$HOME${1#\~}" ;;
    *) printf '%s\n' "$1" ;;
  esac
}
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "use: bash scripts/$name.sh DATA_PATH $more" >&2
  echo "DATA_PATH holds $data_name/" >&2
  exit 2
fi
data_path=$(home "$1")
if [ ! -d "$data_path/$data_name" ] && [ -d "$data_path" ]; then
  itself=$(cd "$data_path" >/dev/null && pwd) # data_path may be a dot
  [ "${itself##*/}" != "$data_name" ] || data_path=$(dirname "$itself")
fi
if [ ! -d "$data_path/$data_name" ]; then
  echo "error: $data_path/$data_name: no such data folder; DATA_PATH must be the folder that holds" \
    "$data_name/, or $data_name/ itself" >&2
  exit 1
fi
