"""Run with CUDA hidden: writes a model's weights, a batch and its statistics, for the GPU to compare with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.gpu.runs import fresh_model, statistics_of  # noqa: E402


def main() -> None:
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    with fresh_model(transformer_engine=False) as model:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # the norms' weights too, which start as ones
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.save({"weights": weights, "tokens": tokens, "layers": statistics_of(model, tokens)}, sys.argv[1])


if __name__ == "__main__":
    main()
