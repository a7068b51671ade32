"""The same gate with the real thing: a Megatron-Core GPTModel against its export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import DataConfig, PrecisionConfig, RunConfig
from sparsecod_megatron.hf import compare_logits, export_model
from tests.unit.hf.models import MODELS


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference modules are the CPU backend's")
@pytest.mark.parametrize("name", ["gqa", "tied", "wide heads", "moe", "moe shared", "moe pre-softmax"])
def test_a_megatron_model_and_its_export_agree(name: str, tmp_path: Path) -> None:
    backend = select_backend("cpu")
    from sparsecod_megatron.model.build import build_model, unwrap
    from sparsecod_megatron.model.transformer_config import transformer_config
    from sparsecod_megatron.parallel.groups import running_processes

    config = RunConfig(model=MODELS[name], precision=PrecisionConfig(dtype="fp32"), data=DataConfig(seq_length=16))
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=backend.transformer_engine)
        engine, device = backend.transformer_engine, backend.device
        model = unwrap(build_model(config, megatron, groups, device=device, transformer_engine=engine)[0]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
        blocks: list[Tensor] = []
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda _module, _inputs, output: blocks.append(output[0].transpose(0, 1)))

        def logits(tokens: Tensor) -> Tensor:
            blocks.clear()
            return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

        folder = export_model(
            config.model,
            dict(model.named_parameters()),
            tmp_path / "m",
            seq_length=16,
            dtype=torch.float32,
            tokenizer_dir=None,
        )
        tokens = torch.randint(0, 61, (2, 13))
        report = compare_logits(logits, folder, tokens=tokens, reference_hidden_states=blocks)
    report.require()
    assert (report.argmax_agreement, report.first_differing_layer, len(blocks)) == (1.0, None, 2)
