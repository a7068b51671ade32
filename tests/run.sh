#!/usr/bin/env bash
# Checks the tree as CI does: ruff, mypy, then pytest. Arguments go to pytest:
#     bash tests/run.sh                                everything this machine can run (GPU tests join in where CUDA is present)
#     bash tests/run.sh tests/unit -k layering         a part of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Several processes share the cores in the distributed tests; one thread each is the fastest choice on small machines.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

in_venv() { bash tools/run_in_venv.sh python3 -m "$@"; }

in_venv ruff check --quiet . || { echo "tests/run.sh: ruff found the problems above; pytest was not started" >&2; exit 1; }
in_venv mypy --no-error-summary || { echo "tests/run.sh: mypy found the problems above; pytest was not started" >&2; exit 1; }
# Whole files go to each of two processes, so that what a file sets up is set up once; the long ones (dist, e2e) come first.
[ "$#" -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
in_venv pytest -q "$@"
