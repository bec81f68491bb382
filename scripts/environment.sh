# Sourced by the other scripts: sets PYTHON to a Python with requirements.txt (and the packages in
# $extras) installed. If $PYTHON is set, it is used as it is; otherwise the script makes .venv in
# the project's folder.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  if ! [ -x "$project/.venv/bin/python" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      { echo "error: python3 must be Python 3.11 or newer" >&2; exit 1; }
    echo "making a virtual environment in $project/.venv"
    python3 -m venv "$project/.venv" ||
      { echo "error: python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
  fi
  PYTHON=$project/.venv/bin/python
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$project/requirements.txt" \
    ${extras:-} ||
    { echo "error: pip could not install requirements.txt ${extras:-}" >&2; exit 1; }
fi
