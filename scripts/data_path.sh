# Sourced by row.sh and ensemble.sh, which set data_path and data_name: ends the script if the data
# set is not there. data_path may be the folder of the data set itself; then it becomes its parent.
home() { # argument: a path; prints it with a ~ at its beginning, which stood in quotes, replaced
  case $1 in
    "~" | "~/"*) printf '%s\n' "$HOME${1#\~}" ;;
    *) printf '%s\n' "$1" ;;
  esac
}
data_path=$(home "$data_path")
if [ ! -d "$data_path/$data_name" ] && [ -d "$data_path" ]; then
  itself=$(cd "$data_path" >/dev/null && pwd) # data_path may be a dot
  [ "${itself##*/}" != "$data_name" ] || data_path=$(dirname "$itself")
fi
if [ ! -d "$data_path/$data_name" ]; then
  echo "error: $data_path/$data_name: no such data folder; DATA_PATH must be the folder that holds" \
    "$data_name/, or $data_name/ itself" >&2
  exit 1
fi
