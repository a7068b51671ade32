#!/usr/bin/env bash
# moe-1B-7B in bf16 on one node of 8 H100s: expert parallel 8, so that each GPU holds 8 of 64 experts.
#     bash examples/slurm/jobs/moe_1B_7B_1node.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=moe_1B_7B_1node exec bash examples/slurm/submit.sh 1 examples/configs/moe_1B_7B.yaml "$@"
