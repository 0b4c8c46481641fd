#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: requirements/venv.sh FOLDER PINS [PYTHON]
# Makes the virtual environment FOLDER with exactly what PINS lists. Where one is there already, it is made anew only if
# its Python is gone; packages are brought to the pinned versions. Debian keeps `ensurepip` in a package of its own, which
# is installed here where we may, and named where we may not.
set -euo pipefail
folder=$1 pins=$2 python=${3:-python3.11}

fail() {
    echo "setup: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python was not found; install it, or name another with make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than Python 3.11"

if ! "$folder/bin/python" -c 'import pip' 2>/dev/null; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "setup: $python comes without ensurepip: installing $package"
            said=$(export DEBIAN_FRONTEND=noninteractive; { apt-get update && apt-get install -y "$package"; } </dev/null 2>&1) \
                || fail "apt-get could not install $package; install it and run make again"$'\n'"$said"
        else
            fail "$python comes without ensurepip: install the package $package (apt-get install $package) and run make again"
        fi
    fi
    rm -rf "$folder"
    "$python" -m venv "$folder"
fi

pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --no-deps --require-hashes -r "$pins"
