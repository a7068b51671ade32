#!/usr/bin/env bash
# moe-1B-7B in FP8 on one node of 8 H100s: expert parallel 8, routers in fp32.
#     bash examples/slurm/jobs/moe_1B_7B_fp8_1node.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=moe_1B_7B_fp8_1node exec bash examples/slurm/submit.sh 1 examples/configs/moe_1B_7B.yaml \
    precision.fp8_recipe=blockwise precision.fp8_format=e4m3 \
    precision.num_layers_at_start_in_bf16=1 precision.num_layers_at_end_in_bf16=1 \
    "$@"
