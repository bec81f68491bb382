# Sourced by the scripts of the two published ports; they set name and port.
set -euo pipefail
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "use: bash scripts/$name.sh CHECKPOINT [more flags of serve.py]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
locks="core server"
source "$root/scripts/environment.sh"
exec "$PYTHON" "$root/serve.py" --port "$port" "$@"
