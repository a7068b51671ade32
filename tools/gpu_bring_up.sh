#!/usr/bin/env bash
# What one GPU proves, in one command of at most nine minutes; without a card the same steps are rehearsed in small.
#     bash tools/run_in_venv.sh bash tools/gpu_bring_up.sh --pack build/gpu [--archive TE.tar.gz]    # where there is a network
#     bash tools/gpu_bring_up.sh build/gpu OUTPUT                              # where there is a card
#     bash tools/gpu_bring_up.sh --publish OUTPUT                              # its table into docs/GPU.md
#
# Runs with the python3 on PATH, or the one that SPARSECOD_PYTHON names, which has torch and transformers; the rest comes
# out of the packed folder. No step ends the others. Exits with 1 if a check failed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${SPARSECOD_PYTHON:-python3}" -m tools.gpu_bring_up "$@"
