#!/usr/bin/env bash
# Trains on all GPUs of one machine inside the container that build_image.sh made.
#     bash examples/ngc/train_single_node.sh examples/configs/CONFIG.yaml [a.b=c ...]
# Variables: IMAGE, GPUS (8), RUN_DIR (runs/ngc here). The repository is mounted over the image's copy, so paths in CONFIG that
# lie inside it are the same on both sides; data elsewhere comes in through DATA_DIR, mounted where it lies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$#" -eq 0 ]; then
    echo "usage: bash examples/ngc/train_single_node.sh CONFIG.yaml [a.b=c ...]" >&2
    exit 2
fi
RUN_DIR="${RUN_DIR:-$PWD/runs/ngc}"
mkdir -p "$RUN_DIR"
RUN_DIR="$(cd "$RUN_DIR" && pwd)"
mounts=(--volume "$PWD:/workspace/sparsecod_megatron" --volume "$RUN_DIR:$RUN_DIR")
if [ -n "${DATA_DIR:-}" ]; then
    mounts+=(--volume "$DATA_DIR:$DATA_DIR:ro")
fi

# --ipc host: NCCL and the data workers share memory. --user: the run directory belongs to you, not to root.
exec docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" --env WANDB_API_KEY "${mounts[@]}" "${IMAGE:-sparsecod_megatron}" \
    torchrun --standalone --nproc-per-node "${GPUS:-8}" -m sparsecod_megatron train "$@" "logging.run_dir=$RUN_DIR"
