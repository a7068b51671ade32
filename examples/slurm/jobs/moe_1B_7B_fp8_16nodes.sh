#!/usr/bin/env bash
# moe-1B-7B in FP8 on 16 nodes: expert parallel 8 inside a node, routers in fp32.
#     bash examples/slurm/jobs/moe_1B_7B_fp8_16nodes.sh data.prefix=PREFIX [a.b=c ...]
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit
JOB_NAME=moe_1B_7B_fp8_16nodes exec bash examples/slurm/submit.sh 16 examples/configs/moe_1B_7B.yaml \
    precision.fp8_recipe=blockwise precision.fp8_format=e4m3 \
    precision.num_layers_at_start_in_bf16=1 precision.num_layers_at_end_in_bf16=1 \
    "$@"
