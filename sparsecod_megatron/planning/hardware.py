"""The GPUs that a plan can be made for, and how close to their limits real kernels come.

Numbers are the vendor's, for operations on dense matrices. Source: NVIDIA H100 and H200 data sheets (SXM).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight.

    Attributes:
        name: shown to users.
        bf16_flops: operations per second.
        fp8_flops: operations per second.
        memory_bytes: bytes of device memory.
        memory_bandwidth: bytes per second.
        nvlink_bandwidth: bytes per second that it sends within its node.
        network_bandwidth: bytes per second that it sends to other nodes.
        per_node: GPUs of a node.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    per_node: int = 8


@dataclass(frozen=True)
class Range:
    """A number between what good and poor kernels reach."""

    best: float
    worst: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of the hardware's limits that a plan expects; every one is an assumption.

    Attributes:
        matmul: share of the peak, in dense matrix products in bf16.
        grouped_matmul: in those of experts, whose groups are uneven.
        fp8: factor on both in FP8, whose operands are cast and scaled first.
        attention: share of the bf16 peak, forward and backward of flash attention.
        memory: share of the memory's bandwidth.
        link: share of NVLink's and the network's bandwidth.
        exposed: share of each group's communication that computation does not hide.
    """

    matmul: Range = Range(0.70, 0.45)
    grouped_matmul: Range = Range(0.60, 0.30)
    fp8: Range = Range(0.80, 0.65)
    attention: Range = Range(0.60, 0.30)
    memory: Range = Range(0.85, 0.60)
    link: Range = Range(0.85, 0.60)

    def exposed(self, group: str) -> Range:
        """Megatron-Core overlaps the data-parallel groups with the backward pass, and ring attention in part."""
        return {
            "data": Range(0.1, 1.0),
            "expert data": Range(0.1, 1.0),
            "context": Range(0.2, 1.0),
        }.get(group, Range(1.0, 1.0))


GPUS = {
    "h100": Gpu("H100 SXM", 989e12, 1979e12, 80e9, 3.35e12),
    "h200": Gpu("H200 SXM", 989e12, 1979e12, 141e9, 4.8e12),
}
