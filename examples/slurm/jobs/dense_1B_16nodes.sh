#!/usr/bin/env bash
# dense-1B in bf16 on 16 nodes: data parallel 128, one micro-batch of 8 a step.
#     bash examples/slurm/jobs/dense_1B_16nodes.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=dense_1B_16nodes exec bash examples/slurm/submit.sh 16 examples/configs/dense_1B.yaml "$@"
