#!/usr/bin/env bash
# Makes the virtual environment $1 with the versions of constraints.txt: `base` as $2 installs what
# `make demo` needs, `all` everything. FFCV is built from source, which needs Debian packages. They
# are installed if the script runs as root or can use sudo without a password. Otherwise FFCV is left
# out, and the reason is printed.
set -euo pipefail
venv=$1
apt_packages="libopencv-dev libturbojpeg0-dev pkg-config"

# pip compiles every Python file with one process before it ends. compile_all uses all cores.
install() { "$venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e "$1"; }
compile_all() { "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null || true; }
have_headers() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
install_headers() { as_root apt-get update -qq && as_root apt-get install -y -qq $apt_packages; }

if [ "$2" = base ]; then
    python=${PYTHON:-python3.11}
    if ! command -v "$python" >/dev/null; then
        echo "setup: no $python found: install Python 3.11, or give its path:"
        echo "  make PYTHON=/path/to/python3.11 setup"
        exit 1
    fi
    "$python" -m venv "$venv"
    install '.'
    compile_all
    exit
fi

if ! have_headers && command -v apt-get >/dev/null; then
    install_headers >"$venv/apt.log" 2>&1 &
fi
install '.[dali-cu12,detection,embed,export,tensorboard,dev,docs]'
compile_all
wait || true # for the Debian packages
if have_headers && command -v g++ >/dev/null; then
    install '.[ffcv]' || echo "setup: FFCV did not build and is left out; the rest works without it"
else
    echo "setup: FFCV is left out: it needs $apt_packages and g++. To add it:"
    echo "  sudo apt-get install -y $apt_packages g++ && $venv/bin/pip install -c constraints.txt -e '.[ffcv]'"
fi
