#!/usr/bin/env bash
# Builds the container that train_single_node.sh and the Slurm example run in.
#     bash examples/ngc/build_image.sh [docker build arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec docker build --tag "${IMAGE:-sparsecod_megatron}" "$@" .
