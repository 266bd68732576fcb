#!/usr/bin/env bash
# Installs what bench/speed compares with, each into a virtual environment of its own below build/bench-venvs; the plain
# loop uses .venv. Does nothing twice. What cannot be installed is named and left out: the bench goes on without it.
set -euo pipefail
cd "$(dirname "$0")/.."

# The torch that the library is built against, always named: otherwise pip would choose one of its own.
torch_version=2.13.0
venvs=build/bench-venvs

install_peer() {
    local name=$1; shift
    local venv=$venvs/$name log=$venvs/$name.log packages=("$@" "torch==$torch_version")
    # Written last, so that an interrupted installation is begun again; another list of packages is another marker.
    local marker=$venv/installed wanted="${packages[*]}"
    [ -e "$marker" ] && [ "$(cat "$marker")" = "$wanted" ] && return
    echo "installing $wanted into $venv"
    rm -rf "$venv"
    if ! { python3 -m venv "$venv" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
               "${packages[@]}"; } > "$log" 2>&1; then
        echo "$name could not be installed and is left out: $(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log")" >&2
        return
    fi
    echo "$wanted" > "$marker"
}

mkdir -p "$venvs"
install_peer accelerate accelerate==1.15.0
install_peer lightning lightning==2.6.6
install_peer transformers transformers==5.24.0 accelerate==1.15.0
