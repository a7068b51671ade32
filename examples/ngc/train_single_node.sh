#!/usr/bin/env bash
# Trains on all GPUs of one machine inside the container that build_image.sh made.
#     bash examples/ngc/train_single_node.sh examples/configs/CONFIG.yaml [a.b=c ...]
# Variables: IMAGE, GPUS (8), RUN_DIR (runs/ngc here), those of examples/slurm/environment.sh. The repository is mounted over
# the image's copy, so paths in CONFIG that lie inside it are the same on both sides; data elsewhere comes in through
# DATA_DIR, mounted where it lies. Ctrl-C and `docker stop --time 300` save a checkpoint; the same command resumes from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$#" -eq 0 ]; then
    echo "usage: bash examples/ngc/train_single_node.sh CONFIG.yaml [a.b=c ...]" >&2
    exit 2
fi
RUN_DIR="${RUN_DIR:-$PWD/runs/ngc}"
mkdir -p "$RUN_DIR"
RUN_DIR="$(cd "$RUN_DIR" && pwd)"
options=(--volume "$PWD:/workspace/sparsecod_megatron" --volume "$RUN_DIR:$RUN_DIR" --env "RUN_DIR=$RUN_DIR"
    --env "GPUS_PER_NODE=${GPUS:-8}")
if [ -n "${DATA_DIR:-}" ]; then
    options+=(--volume "$DATA_DIR:$DATA_DIR:ro")
fi
while read -r name; do # what the caller has set, environment.sh leaves alone
    options+=(--env "$name")
done < <(compgen -e | grep -E '^(NCCL|TORCH|GLOO|NVTE|PYTORCH|CUDA_DEVICE|OMP|WANDB|SOCKET)_|^HF_(HUB_OFFLINE|TOKEN)$' || true)

# --ipc host: NCCL and the data workers share memory. --user: the run directory belongs to you, not to root.
exec docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" "${options[@]}" "${IMAGE:-sparsecod_megatron}" \
    bash examples/slurm/run_node.sh "$@" "logging.run_dir=$RUN_DIR"
