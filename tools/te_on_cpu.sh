#!/usr/bin/env bash
# Checks what CUDA runs build against the real Transformer Engine, on a machine without a GPU, in an environment of its own.
#     bash tools/te_on_cpu.sh [--archive FILE.tar.gz] [--record]
# Needs Python 3.12, 12 GB of disk and, without --archive, a C++ compiler and the CUDA toolkit's headers: Transformer Engine
# ships the part that it builds against PyTorch as source (about 20 minutes on two cores). --archive names a built one, to be
# unpacked. --record writes tests/unit/model/transformer_engine.json instead of comparing with it. TE_ENV is the folder of the
# environment (build/te_on_cpu). Not part of CI, which compares the CPU's layers with that table.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
TE_ENV="${TE_ENV:-$ROOT/build/te_on_cpu}"
ENGINE="2.11.0"
TORCH="2.11.0"
archive="" record=()

fail() { printf 'te_on_cpu.sh: %s\n' "$*" >&2; exit 1; }

while [ "$#" -gt 0 ]; do
    case "$1" in
        --archive) archive="${2:?--archive needs a file}"; shift 2 ;;
        --record) record=(--record); shift ;;
        *) fail "no such argument: '$1'; usage: bash tools/te_on_cpu.sh [--archive FILE.tar.gz] [--record]" ;;
    esac
done
[ -z "$archive" ] || [ -f "$archive" ] || fail "--archive: no file '$archive'"

python_3_12() {
    local name
    for name in python3.12 python3 "$HOME"/.pyenv/versions/3.12*/bin/python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
            printf '%s' "$name"
            return
        fi
    done
    fail "needs Python 3.12, which no python3.12, python3 or pyenv version is"
}

# The versions of the lock, but the torch that Transformer Engine is built against, which wants an older setuptools: pip
# would otherwise silently replace it with a newer one.
constraints() {
    printf 'torch==%s\n' "$TORCH"
    awk '/^[a-z0-9]/ && !/^setuptools==/ { sub(/ *\\$/, ""); print }' "$ROOT/tools/lock/venv.txt"
}

install() {
    local python
    python="$(python_3_12)"
    mkdir -p "$TE_ENV"
    [ -x "$TE_ENV/venv/bin/pip" ] || "$python" -m venv --clear "$TE_ENV/venv"
    constraints >"$TE_ENV/constraints.txt"
    local pip=("$TE_ENV/venv/bin/python" -m pip install --disable-pip-version-check --constraint "$TE_ENV/constraints.txt")
    "${pip[@]}" "torch==$TORCH" setuptools wheel ninja pybind11
    # Transformer Engine's own requirements, and what the layers of this package import.
    "${pip[@]}" megatron-core omegaconf pyyaml numpy einops onnx onnxscript pydantic importlib-metadata nvdlfw-inspect \
        packaging psutil safetensors transformers tqdm hypothesis pytest
    if [ -n "$archive" ]; then
        mkdir -p "$TE_ENV/engine"
        tar -xzf "$archive" -C "$TE_ENV/engine"
    else
        NVTE_FRAMEWORK=pytorch "${pip[@]}" --no-build-isolation "transformer-engine[core_cu13,pytorch]==$ENGINE"
    fi
    touch "$TE_ENV/installed"
}

[ -e "$TE_ENV/installed" ] || install
export PYTHONPATH="$ROOT:$TE_ENV/engine"
# The libraries that torch brings, which Transformer Engine looks for in a toolkit first.
exec "$TE_ENV/venv/bin/python" -W ignore "$ROOT/tools/te_contract.py" ${record[@]+"${record[@]}"}
