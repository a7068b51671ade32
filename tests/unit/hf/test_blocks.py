"""The layer finder on every family, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import find_layers, swapped
from tests.unit.analysis.scores.families import ALL_FAMILIES, NUM_LAYERS, tiny


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_finds_blocks_norm_and_head(family: str) -> None:
    model = tiny(family)
    layers = find_layers(model)
    assert layers.name == ALL_FAMILIES[family][3]
    assert layers.blocks is model.get_submodule(layers.name)
    assert (len(layers), layers.hidden_size) == (NUM_LAYERS, 16)
    assert layers.embed is model.get_input_embeddings() and layers.head is model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    assert layers.final_norm is not None
    assert names[layers.final_norm].split(".")[-1] in ("norm", "ln_f", "final_layer_norm")


def test_a_longer_list_of_experts_is_not_taken_for_blocks() -> None:
    model = tiny("llama")
    block = model.model.layers[1]
    block.mlp.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(NUM_LAYERS + 2))
    whole = block.mlp.forward
    block.mlp.forward = lambda x: whole(x) + sum(expert(x) for expert in block.mlp.experts)
    assert find_layers(model).name == "model.layers"


def test_a_model_of_one_block_is_a_stack() -> None:
    assert len(find_layers(tiny("llama", num_hidden_layers=1))) == 1


class _NoBlocks(nn.Module):
    """A causal LM whose layers lie in no list."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=9)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)
        self.device = torch.device("cpu")
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(sum(branch(hidden) for branch in self.branches)))


def test_refuses_branches_side_by_side() -> None:
    with pytest.raises(ConversionError, match=r"_NoBlocks: no list of blocks .* branches \(3\)"):
        find_layers(_NoBlocks())  # type: ignore[arg-type]


def test_refuses_an_encoder_decoder() -> None:
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConversionError, match="T5ForConditionalGeneration: is an encoder-decoder"):
        find_layers(T5ForConditionalGeneration(T5Config(**sizes)))


def test_swapped_restores_the_blocks_after_an_error() -> None:
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    before = list(blocks)
    with pytest.raises(RuntimeError, match="inside"), swapped(blocks, {1: nn.Identity()}):
        assert isinstance(blocks[1], nn.Identity)
        raise RuntimeError("inside")
    assert list(blocks) == before
