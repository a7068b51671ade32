#!/usr/bin/env bash
# dense-1B in bf16 on one node of 8 H100s: data parallel 8, 16 micro-batches of 8 a step.
#     bash examples/slurm/jobs/dense_1B_1node.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=dense_1B_1node exec bash examples/slurm/submit.sh 1 examples/configs/dense_1B.yaml "$@"
