#!/usr/bin/env bash
# What every rank on a Hopper cluster finds in its environment, and why. run_node.sh sources it on each node, under Slurm and
# under examples/ngc alike. A variable that is already set keeps its value: `NCCL_DEBUG=INFO sbatch ...`.

# One queue from the host to the GPU, so that kernels run in the order of their launches: Megatron-Core launches communication
# before the matrix product that hides it, and relies on that. Set 8 or 32 on Blackwell. (github.com/NVIDIA/Megatron-LM,
# issues 533 and 2180)
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"

# Transformer Engine's norm kernels take all 132 multiprocessors for as long as they run. Gradients are reduced and weights
# gathered meanwhile, and NCCL's kernels need some too. (Megatron-Bridge sets the same for its Hopper recipes.)
: "${NVTE_FWD_LAYERNORM_SM_MARGIN:=16}"
: "${NVTE_BWD_LAYERNORM_SM_MARGIN:=16}"

# Experts get another number of tokens at every step, and blocks of fixed segments then leave gaps; expandable ones do not.
# By its older name, which torch 2.13 still reads first and Megatron-Core 0.16 alone.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"

# Otherwise torchrun sets 1. Threads of a rank: data, checkpoints and SHA-256 are work of the CPU; 8 ranks times 8 leave room
# on a node of 96 cores.
: "${OMP_NUM_THREADS:=8}"

# NCCL's warnings name link and peer when something fails; without them there is only a time-out. INFO for more.
: "${NCCL_DEBUG:=WARN}"

# Agents of several nodes: every restart of the ranks meets at a store of its own, where the dead ranks' addresses are not.
# (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py)
: "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:=1}"

# Kernels are compiled when first used. In a home directory on NFS the nodes overwrite each other's files ("Stale file
# handle", github.com/pytorch/pytorch/issues/173679); /tmp belongs to the node.
: "${TRITON_CACHE_DIR:=/tmp/triton-$(id -u)}"

# Everything that training reads is on disk. Ranks that ask the hub all the same wait for it where a node has no way out, and
# are turned away where 128 ask at once. 0 where evaluation.tasks still have to be downloaded.
: "${HF_HUB_OFFLINE:=1}"

export CUDA_DEVICE_MAX_CONNECTIONS NVTE_FWD_LAYERNORM_SM_MARGIN NVTE_BWD_LAYERNORM_SM_MARGIN PYTORCH_CUDA_ALLOC_CONF \
    OMP_NUM_THREADS NCCL_DEBUG TORCH_DISABLE_SHARE_RDZV_TCP_STORE TRITON_CACHE_DIR HF_HUB_OFFLINE

# Where a collective hangs, torch writes the last 2,000 of every rank. Its default place, /tmp, goes with the container.
if [ -n "${RUN_DIR:-}" ]; then
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$RUN_DIR/nccl_trace_rank_}"
fi

# NCCL and gloo choose an interface each, and may choose one that other nodes do not see (docker0, a management network).
# SOCKET_IFNAME=eth0 names it for both. Only connections are made over it: data goes over InfiniBand.
if [ -n "${SOCKET_IFNAME:-}" ]; then
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$SOCKET_IFNAME}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$SOCKET_IFNAME}"
fi

# Left as they are: NCCL's adapters, algorithms and buffers (NCCL_IB_HCA and others), which belong to the site's
# /etc/nccl.conf; NCCL_NVLS_ENABLE, 0 of which frees memory and costs speed; TORCH_NCCL_ASYNC_ERROR_HANDLING, whose default
# ends a rank after a time-out, so that it is started again; TORCH_NCCL_AVOID_RECORD_STREAMS, which torch now ignores and which
# gave wrong losses with virtual stages where it did not (github.com/NVIDIA/Megatron-LM/issues/1586).
