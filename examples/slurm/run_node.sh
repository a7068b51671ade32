#!/usr/bin/env bash
# One node's share of a run: torchrun with one rank a GPU, meeting the other nodes at MASTER_ADDR:MASTER_PORT. train.sbatch
# starts it on every node; alone (examples/ngc) it is the only one.
#     bash examples/slurm/run_node.sh CONFIG.yaml [a.b=c ...]
#
# torchrun starts its ranks in sessions of their own, which a signal to the job step does not reach, dies of SIGUSR1 itself,
# and kills ranks 30 seconds after SIGTERM, saved or not. So it ignores these signals, and this shell hands them to the ranks,
# which save a checkpoint and end.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Every rank has a connection to every other one in each gloo group, and the first rank's store one to each: more than the
# usual 1,024 open files.
files="$(ulimit -Hn)"
if [ "$files" = unlimited ] || [ "$files" -gt 65536 ]; then
    files=65536
fi
ulimit -Sn "$files"

(
    trap '' USR1 TERM INT
    exec bash tools/run_in_venv.sh torchrun \
        --nnodes "${SLURM_NNODES:-1}" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-3}" \
        --signals-to-handle SIGHUP,SIGQUIT \
        --rdzv-id "${SLURM_JOB_ID:-alone}.${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d \
        --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-0}" \
        -m sparsecod_megatron train "$@"
) &
torchrun=$!
trap 'interrupted=yes; pkill -USR1 -P "$torchrun" || true' USR1 TERM INT

# A trapped signal ends `wait` early, with the signal's status: only after a `wait` that none ended it is torchrun's, which
# bash remembers where torchrun is gone by then.
interrupted=yes
while [ -n "$interrupted" ]; do
    interrupted="" status=0
    wait "$torchrun" || status=$?
done
exit "$status"
