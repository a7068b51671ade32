"""FP8: weights in E4M3 with one scale per matrix, inputs of layers in E4M3 with one fixed scale."""

from __future__ import annotations

from sparsecod_megatron.compression.quantization import Quantization


class FP8(Quantization):
    """See the module."""

    name = "fp8"
