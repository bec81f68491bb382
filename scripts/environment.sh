# Sourced by the other scripts: sets PYTHON to a Python that has the tested versions of torch and of the
# packages in $locks (requirements/*.lock). If $PYTHON is set, it is used as it is; otherwise the script makes
# .venv in the project's folder. Each file that pip installs must have the hash that its lock names.
# Without --no-compile, pip compiles all files, which takes longer than to install them; Python compiles those
# that it imports.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

pip_install() {
  local lock
  for lock in "$@"; do
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile \
      -r "$project/requirements/$lock.lock" || return 1
  done
}

if [ -z "${PYTHON:-}" ]; then
  if ! [ -x "$project/.venv/bin/python" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      { echo "error: python3 must be Python 3.11 or newer" >&2; exit 1; }
    echo "making a virtual environment in $project/.venv"
    python3 -m venv "$project/.venv" ||
      { echo "error: python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
  fi
  PYTHON=$project/.venv/bin/python
  # Without a GPU, the small build of torch is enough, if pip is told where to find it.
  { ! command -v nvidia-smi && pip_install torch-cpu; } > /dev/null 2>&1 || pip_install torch ||
    { echo "error: pip could not install requirements/torch.lock" >&2; exit 1; }
  pip_install ${locks:-core} ||
    { echo "error: pip could not install what requirements/ locks: ${locks:-core}" >&2; exit 1; }
fi
