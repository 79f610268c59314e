#!/usr/bin/env bash
# Makes the virtual environment $1 with the versions of constraints.txt.
# FFCV is built from source, which needs Debian packages. They are installed if this script may do
# so as root or by sudo without a password. Otherwise FFCV is left out, and the reason is printed.
set -euo pipefail
venv=$1
apt_packages="libopencv-dev libturbojpeg0-dev pkg-config"

python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null; then
    echo "setup: no $python found; install Python 3.11 or name it:"
    echo "  make PYTHON=/path/to/python3.11 setup"
    exit 1
fi
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[dali-cu12,detection,embed,export,tensorboard,dev,docs]'

have_headers() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
if ! have_headers && command -v apt-get >/dev/null; then
    { as_root apt-get update -qq && as_root apt-get install -y -qq $apt_packages; } >"$venv/apt.log" 2>&1 || true
fi
if have_headers && command -v g++ >/dev/null; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[ffcv]' ||
        echo "setup: FFCV did not build and is left out; the rest works without it"
else
    echo "setup: FFCV is left out: it needs $apt_packages and g++. To add it:"
    echo "  sudo apt-get install -y $apt_packages g++ && $venv/bin/pip install -c constraints.txt -e '.[ffcv]'"
fi
