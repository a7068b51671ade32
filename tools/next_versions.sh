#!/usr/bin/env bash
# Says what the newest megatron-core, torch and transformers would break: the contract, then the suite, in an environment of
# its own (build/next) that holds the locked versions but for those named.
#     bash tools/next_versions.sh                                             the newest of the three
#     bash tools/next_versions.sh megatron-core==0.17.0                       another choice
#     bash tools/next_versions.sh megatron-core==0.17.0 -- tests/unit/model   part of the suite; arguments go to pytest
# PYTHON names the interpreter (megatron-core 0.17 asks for 3.12 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=()
while [ "$#" -gt 0 ] && [ "$1" != "--" ]; do
    packages+=("$1")
    shift
done
[ "$#" -eq 0 ] || shift
[ "${#packages[@]}" -gt 0 ] || packages=(megatron-core torch transformers)
[ "$#" -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder

"${PYTHON:-python3}" -m venv --clear build/next
python="$PWD/build/next/bin/python"
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip_install --no-deps --require-hashes --requirement tools/lock/venv.txt
pip_install --requirement tools/lock/torch.txt
pip_install --no-deps --no-build-isolation --editable .
pip_install --upgrade "${packages[@]}"
export PATH="$PWD/build/next/bin:$PATH" VIRTUAL_ENV="$PWD/build/next" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(megatron-core|torch|transformers|nvidia-modelopt) '

status=0
echo "== what the package takes from them"
"$python" tools/upstream_contract.py || status=1
echo "== the suite"
"$python" -m pytest -q "$@" || status=1
exit "$status"
