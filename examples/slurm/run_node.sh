#!/usr/bin/env bash
# One node's share of train.sbatch: torchrun with one rank a GPU, meeting the other nodes at MASTER_ADDR:MASTER_PORT.
#
# torchrun starts its ranks in sessions of their own, which a signal to the job step does not reach, and dies of SIGUSR1
# itself. So it is started with that signal ignored, and this shell hands the signal to the ranks.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1 # keeps communication ahead of the matrix multiplications it overlaps with
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # every restart meets at a store of its own, without the dead ranks' addresses

(
    trap '' USR1
    exec bash tools/run_in_venv.sh torchrun \
        --nnodes "$SLURM_NNODES" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-3}" \
        --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        -m sparsecod_megatron train "$@"
) &
torchrun=$!
trap 'pkill -USR1 -P "$torchrun" || true' USR1

status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait "$torchrun" || status=$?
done
exit "$status"
