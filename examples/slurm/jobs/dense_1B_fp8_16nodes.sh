#!/usr/bin/env bash
# dense-1B in FP8 (blocks of 128) on 16 nodes.
#     bash examples/slurm/jobs/dense_1B_fp8_16nodes.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=dense_1B_fp8_16nodes exec bash examples/slurm/submit.sh 16 examples/configs/dense_1B_fp8.yaml "$@"
