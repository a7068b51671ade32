"""INT8: weights in 255 even steps with one scale per row, inputs of layers with one fixed scale."""

from __future__ import annotations

from sparsecod_megatron.compression.quantization import Quantization


class INT8(Quantization):
    """See the module."""

    name = "int8"
