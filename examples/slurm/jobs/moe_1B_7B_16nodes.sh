#!/usr/bin/env bash
# moe-1B-7B in bf16 on 16 nodes: expert parallel 8 inside a node, 16 replicas of the experts.
#     bash examples/slurm/jobs/moe_1B_7B_16nodes.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=moe_1B_7B_16nodes exec bash examples/slurm/submit.sh 16 examples/configs/moe_1B_7B.yaml "$@"
