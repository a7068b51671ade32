#!/usr/bin/env bash
# Queues a run on N nodes of 8 H100s, after checking that it can start there and fits their memory.
#     bash examples/slurm/submit.sh NODES CONFIG.yaml [a.b=c ...]
# jobs/*.sh call it for the models of the paper. Variables: those of train.sbatch and environment.sh; JOB_NAME (the
# configuration's name); GPU (h100, or h200) for the check. The queue writes to runs/slurm/JOB_NAME-JOBID.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$#" -lt 2 ]; then
    echo "usage: bash examples/slurm/submit.sh NODES CONFIG.yaml [a.b=c ...]" >&2
    exit 2
fi
nodes="$1"
shift
config="$(basename "$1")"
bash tools/run_in_venv.sh sparsecod plan "$@" --gpus "$((nodes * 8))" --gpu "${GPU:-h100}"
mkdir -p runs/slurm # Slurm makes no folders
exec sbatch --nodes "$nodes" --job-name "${JOB_NAME:-${config%.yaml}}" --output "runs/slurm/%x-%j.log" \
    examples/slurm/train.sbatch "$@"
