from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families import choose_family
from sparsecod_megatron.hf.table import Entry, NameTable
from sparsecod_megatron.hf.transforms import same
from tests.helpers.reference_gpt import random_tensors
from tests.unit.hf.models import MODELS

MODEL = MODELS["moe shared"]
PROJECTION = "decoder.layers.1.self_attention.linear_proj.weight"


class CountedReads(Mapping[str, Tensor]):
    """A lazy source, as a checkpoint reader is, that counts how often each tensor is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_every_tensor_is_read_once_and_only_when_it_is_needed() -> None:
    table = choose_family(MODEL).table(MODEL)
    source = CountedReads(random_tensors(MODEL))
    converted = table.to_hf(source)
    next(converted)
    assert source.reads == ["embedding.word_embeddings.weight"]
    list(converted)
    assert source.reads == list(table.megatron_shapes)
    assert sorted(source.reads) == sorted(source.tensors)


def test_a_missing_tensor_is_named_with_its_layer_before_anything_is_read() -> None:
    tensors = random_tensors(MODEL)
    del tensors[PROJECTION]
    source = CountedReads(tensors)
    with pytest.raises(ConversionError, match=f"lacks layer 1: {PROJECTION}, which Qwen2MoeForCausalLM needs"):
        list(choose_family(MODEL).table(MODEL).to_hf(source))
    assert not source.reads


def test_an_unknown_tensor_is_named_with_its_layer() -> None:
    tensors = random_tensors(MODEL) | {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(8)}
    with pytest.raises(
        ConversionError, match=r"has layer 0: decoder\.layers\.0\.self_attention\.q_layernorm\.weight, which"
    ):
        list(choose_family(MODEL).table(MODEL).to_hf(tensors))


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    tensors = random_tensors(MODEL)
    tensors[PROJECTION] = tensors[PROJECTION][:, :-1]
    with pytest.raises(ConversionError, match=rf"layer 1: {PROJECTION}: shape \[32, 31\].*\[32, 32\]"):
        list(choose_family(MODEL).table(MODEL).to_hf(tensors))


def test_a_missing_huggingface_tensor_is_named() -> None:
    table = choose_family(MODEL).table(MODEL)
    theirs = dict(table.to_hf(random_tensors(MODEL)))
    del theirs["model.layers.0.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ConversionError, match=r"lacks layer 0: model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight"):
        list(table.to_megatron(theirs))


@pytest.mark.parametrize(("ours", "theirs"), [("a", "x"), ("b", "x"), ("a", "y")])
def test_a_name_in_two_entries_is_refused(ours: str, theirs: str) -> None:
    entries = (Entry(("a",), ("x",), same((1,))), Entry((ours,), (theirs,), same((1,))))
    with pytest.raises(ConversionError, match="in several entries"):
        NameTable("Any", entries)
