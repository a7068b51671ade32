"""The comparisons of the GPU tests, run on the CPU: they pass what is alike and catch what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.gpu.runs import Training, assert_alike, train

SMALLER = ("model.hidden_size=64", "model.ffn_hidden_size=128", "model.vocab_size=128", "data.seq_length=32")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests themselves run here")


@pytest.fixture(scope="module")
def bf16() -> Training:
    return train("precision.dtype=bf16", *SMALLER, steps=4)


def test_bf16_is_alike_fp32_without_being_it(bf16: Training) -> None:
    fp32 = train("precision.dtype=fp32", *SMALLER, steps=4)
    assert fp32.losses != bf16.losses
    assert fp32.losses[-1] < fp32.losses[0]
    assert_alike(bf16, fp32, loss=0.02, variance=0.05)


def test_differences_are_caught(bf16: Training) -> None:
    worse = dataclasses.replace(bf16, losses=[*bf16.losses[:-1], bf16.losses[-1] * 1.03])
    with pytest.raises(AssertionError):
        assert_alike(worse, bf16, loss=0.02, variance=0.05)
    layers = [dict(layer) for layer in bf16.layers]
    layers[2]["out_var"] *= 0.9
    with pytest.raises(AssertionError):
        assert_alike(dataclasses.replace(bf16, layers=layers), bf16, loss=0.02, variance=0.05)
