#!/usr/bin/env bash
# Runs the fast suite with another Python and torch, in a new environment that is removed afterwards:
#   bash tools/try_versions.sh /path/to/python3.13 2.15.0
#   bash tools/try_versions.sh python3.10 2.7.0 tests/rsa_fast/test_engine.py
# `newest` stands for the newest torch. Further arguments go to pytest. All other packages are the
# newest that fit. PIP_INDEX_URL and the other variables of pip apply.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash tools/try_versions.sh PYTHON TORCH|newest [pytest arguments]" >&2
    exit 2
fi
python=$1 torch=$2
shift 2
[ "$torch" = newest ] && wanted=torch || wanted="torch==$torch"
cd "$(dirname "$0")/.."
venv=$(mktemp -d "${TMPDIR:-/tmp}/rsa-fast-versions-XXXXXX")
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "$wanted" -e . pytest pytest-xdist hypothesis scipy
"$venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
