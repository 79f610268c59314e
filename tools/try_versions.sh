#!/usr/bin/env bash
# This script runs the fast suite with another Python and torch. It makes a new environment and
# removes it at the end:
#   bash tools/try_versions.sh /path/to/python3.13 2.15.0
#   bash tools/try_versions.sh python3.10 2.8.0 tests/rsa_fast/test_engine.py
# `newest` means the newest torch. Further arguments are passed to pytest. All other packages are
# the newest compatible ones. pip also uses PIP_INDEX_URL and its other environment variables.
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
"$venv/bin/pip" install --quiet --disable-pip-version-check "$wanted" \
    -e ".[detection,embed,export,timm]" pytest pytest-xdist hypothesis scipy onnxruntime setuptools
"$venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
