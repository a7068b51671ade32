# The CUDA environment: NGC's PyTorch (torch 2.10, CUDA 13.1, NCCL, Transformer Engine 2.x and apex, built for Hopper) with this
# package beside them. Everything is pinned: the base by its tag, all that is put beside it by tools/lock/ngc.txt.
#     bash examples/ngc/build_image.sh
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# The base image's own Python is the environment: nothing of its torch or Transformer Engine is replaced. What a cluster needs
# besides is in examples/slurm/environment.sh and not here, where it would win over what a job sets.
ENV SPARSECOD_PYTHON=python3 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /workspace/sparsecod_megatron
COPY . .
RUN bash tools/run_in_venv.sh sparsecod --help >/dev/null \
    && python3 examples/ngc/check_image.py \
    && chmod -R a+rX .

# Runs as any user (docker run --user): caches go where everybody may write.
ENV HOME=/home/sparsecod
RUN mkdir -p "$HOME" && chmod 1777 "$HOME"
CMD ["sparsecod", "--help"]
