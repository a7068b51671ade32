#!/usr/bin/env bash
# dense-1B in FP8 (blocks of 128) on one node of 8 H100s.
#     bash examples/slurm/jobs/dense_1B_fp8_1node.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=dense_1B_fp8_1node exec bash examples/slurm/submit.sh 1 examples/configs/dense_1B_fp8.yaml "$@"
