#!/usr/bin/env bash
# Installs what is missing for `build`, `demo`, `bench`, `wheel`, `test` or `check`: Debian packages as root or through sudo, uPlot
# into node_modules, for the tests TensorBoard and safetensors into .venv-test, and torch into .venv unless a LibTorch is
# named. Without the rights to install, it lists what to install and stops. Repeated calls do nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.13.0
wheel_builder=scikit-build-core==1.1.2  # as in pyproject.toml
readers=(tensorboard==2.21.0 safetensors==0.8.0)
build_packages=(cmake ninja-build ccache g++ python3-venv libcli11-dev libtomlplusplus-dev nlohmann-json3-dev zlib1g-dev)
data_packages=(fortunes dataset-fashion-mnist)
bench_packages=(libbenchmark-dev "${data_packages[@]}")
test_packages=(libgtest-dev python3-dev clang-format python3-pytest chromium "${data_packages[@]}")
check_packages=("${test_packages[@]}" clang clang-tidy libclang-rt-14-dev)
# An npm from elsewhere is as good.
has_uplot() { [ -n "${MICROBATCH_UPLOT:-}" ] || [ -e node_modules/uplot/dist/uPlot.iife.min.js ]; }
has_uplot || command -v npm > /dev/null || build_packages+=(npm)

case "${1:-}" in
    build) packages=("${build_packages[@]}") ;;
    demo) packages=("${build_packages[@]}" python3-dev "${data_packages[@]}") ;;
    wheel) packages=("${build_packages[@]}" python3-dev) ;;
    bench) packages=("${build_packages[@]}" "${bench_packages[@]}") ;;
    test) packages=("${build_packages[@]}" "${test_packages[@]}") ;;
    check) packages=("${build_packages[@]}" "${check_packages[@]}") ;;
    *) echo "usage: scripts/setup.sh build|demo|bench|wheel|test|check" >&2; exit 2 ;;
esac

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
    local missing=() package
    for package in "${packages[@]}"; do is_installed "$package" || missing+=("$package"); done
    [ ${#missing[@]} -eq 0 ] && return
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "These Debian packages are missing. Install them and run the same command again:" >&2
            echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo -n)
    fi
    echo "installing ${missing[*]}"
    local log; log=$(mktemp)
    if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
           apt-get install -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "the Debian packages could not be installed; see the log $log" >&2
        exit 1
    fi
    rm -f "$log"
}

# True if CMAKE_PREFIX_PATH leads to a LibTorch; it may be there for other reasons.
prefix_path_has_torch() {
    local folders folder
    IFS=':;' read -ra folders <<< "${CMAKE_PREFIX_PATH:-}"
    for folder in "${folders[@]}"; do
        [ -e "$folder/share/cmake/Torch/TorchConfig.cmake" ] || [ -e "$folder/Torch/TorchConfig.cmake" ] && return 0
    done
    return 1
}

# A Python environment with these packages; their bytecode is made when it is used, which little of it is.
make_environment() {
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "${@:2}" 2> "$1/pip.log" && return
    cat "$1/pip.log" >&2
    return 1
}

install_torch() {
    if [ -n "${MICROBATCH_TORCH:-}" ] || prefix_path_has_torch; then return; fi
    # Written last, so that an interrupted installation is begun again.
    local marker=.venv/torch-$torch_version
    [ -e "$marker" ] && return
    echo "installing torch $torch_version into .venv"
    if ! make_environment .venv "torch==$torch_version"; then
        echo "torch could not be installed; name an existing LibTorch with MICROBATCH_TORCH=/path/to/libtorch" >&2
        exit 1
    fi
    touch "$marker"
}

# What the tests of the Python package need, beside torch.
install_python_tests() {
    if [ -n "${MICROBATCH_TORCH:-}" ] || prefix_path_has_torch; then return; fi
    local marker; marker=.venv/tests-$(cksum < python/tests/requirements.txt | cut -d ' ' -f 1)
    [ -e "$marker" ] && return
    echo "installing transformers and others into .venv, for the tests of the Python package"
    # torch is named again, so that no package replaces it.
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "torch==$torch_version" \
         -r python/tests/requirements.txt 2> .venv/pip.log; then
        cat .venv/pip.log >&2
        echo "they could not be installed: the tests of the Python package will fail" >&2
        return
    fi
    touch "$marker"
}

# What `make wheel` builds the wheel with.
install_wheel_builder() {
    if [ ! -x .venv/bin/python ]; then
        echo "a wheel is built with the torch of .venv; unset MICROBATCH_TORCH and CMAKE_PREFIX_PATH" >&2
        exit 1
    fi
    .venv/bin/python -c "import scikit_build_core" 2> /dev/null ||
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==$torch_version" "$wheel_builder"
}

# uPlot, which report.html is drawn with: the version that package-lock.json names.
install_uplot() {
    if has_uplot; then return; fi
    echo "installing uPlot into node_modules"
    local log; log=$(mktemp)
    if ! npm ci --ignore-scripts --no-audit --no-fund > "$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "uPlot could not be installed; name the folder of its dist files with MICROBATCH_UPLOT" >&2
        exit 1
    fi
    rm -f "$log"
}

# Only what reads our files back in tests; apart from torch's own Python, which may be somebody else's.
install_readers() {
    local marker=.venv-test/$(IFS=,; echo "${readers[*]}")
    if [ -e "$marker" ]; then return; fi
    echo "installing ${readers[*]} into .venv-test"
    if ! make_environment .venv-test "${readers[@]}"; then
        echo "they could not be installed: the tests that read event files and checkpoints with them will fail" >&2
        return
    fi
    touch "$marker"
}

if command -v dpkg-query > /dev/null; then
    install_packages
else
    echo "not a Debian system: the equivalents of these packages must be installed already: ${packages[*]}" >&2
fi
install_torch
install_uplot
if [ "$1" = wheel ]; then install_wheel_builder; fi
if [[ $1 = test || $1 = check ]]; then
    install_readers
    install_python_tests
fi
