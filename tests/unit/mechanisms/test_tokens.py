"""The ids that layers receive: against loops over tokens, and where they would silently be another micro-batch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from tests.dist.layouts import FULL_RECOMPUTE
from tests.helpers.mechanisms import CASES
from tests.helpers.megatron import megatron_model

select_backend()

READERS = ("stem", "engram")
LENGTH, HALO = 24, 5


@dataclass(frozen=True)
class Rank:
    """Stands for one rank of a group, which building the ids does not talk to."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def documents(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and positions [2, LENGTH]; the second sequence has a second document."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1, 9:] -= 9
    return ids, positions


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_chunk_has_the_ids_before_it(size: int) -> None:
    """Whatever rank holds it; before a sample there are none, and documents can be told by positions."""
    from sparsecod_megatron.model.attention import zigzag_positions
    from sparsecod_megatron.model.tokens import NO_TOKEN, token_context
    from sparsecod_megatron.train.forward import shard_sequence

    ids, positions = documents()
    for rank in range(size):
        group: Any = Rank(rank, size)
        context = token_context(ids, positions, HALO, group)
        chunks = 1 if size == 1 else 2
        assert context.shape == (chunks, HALO + LENGTH // (size * chunks), 2, 2)
        own = context[:, HALO:].flatten(0, 1)
        batch = shard_sequence({"tokens": ids, "positions": positions}, group)
        assert torch.equal(own[..., 0].T, batch["tokens"]) and torch.equal(own[..., 1].T, batch["positions"])
        where = zigzag_positions(LENGTH, size, device=ids.device)[rank].view(chunks, -1)
        for chunk, places in enumerate(where.tolist()):
            for offset, place in enumerate(range(places[0] - HALO, places[-1] + 1)):
                for sample in range(2):
                    expected = [NO_TOKEN, 0] if place < 0 else [int(ids[sample, place]), int(positions[sample, place])]
                    assert context[chunk, offset, sample].tolist() == expected


def test_packed_documents_are_one_sequence() -> None:
    from sparsecod_megatron.model.tokens import token_context
    from sparsecod_megatron.train.forward import pack_documents

    ids, positions = documents()
    packed, _ = pack_documents({"tokens": ids, "position_ids": positions})
    context = token_context(packed["tokens"], packed["position_ids"], HALO)[0, :, 0]
    assert torch.equal(context[HALO:, 0], ids.flatten())
    # The token k before one at position p is of its document where k <= p.
    assert context[HALO:, 1].tolist() == [*range(LENGTH), *range(9), *range(LENGTH - 9)]


def gradients(model: Any, batches: list[Tensor], *, in_turn: bool) -> list[Tensor]:
    """Of the sum of losses; backward passes in turn with the forward passes, or after them as in a pipeline."""
    from sparsecod_megatron.model.tokens import token_context

    model.zero_grad()
    losses = []
    for tokens in batches:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        extra = {"context": token_context(tokens, positions, model.token_halo)}
        loss = model(tokens, positions, None, labels=tokens, extra_block_kwargs=extra).sum()
        loss.backward() if in_turn else losses.append(loss)
    for loss in losses:
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", READERS)
def test_recompute_finds_the_ids_of_its_own_micro_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ids in an attribute of the model, which is the obvious way, would not be: a right loss, a wrong gradient."""
    from sparsecod_megatron.mechanisms.tokens.layer import TokenLayer

    batches = [torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with megatron_model(*CASES[name].settings, "model.num_layers=4", *FULL_RECOMPUTE) as model:
        model.train()
        expected = gradients(model, batches, in_turn=True)
        for ours, theirs in zip(gradients(model, batches, in_turn=False), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        latest: list[Tensor] = []
        model.decoder.register_forward_pre_hook(
            lambda _module, _inputs, options: latest.append(options["context"]), with_kwargs=True
        )
        forward = TokenLayer.forward

        def by_attribute(layer: Any, hidden_states: Tensor, *args: Any, context: Tensor, **options: Any) -> Any:
            output, _ = forward(layer, hidden_states, *args, context=latest[-1], **options)
            return output, context

        monkeypatch.setattr(TokenLayer, "forward", by_attribute)
        pairs = zip(gradients(model, batches, in_turn=False), expected, strict=True)
        assert not all(torch.allclose(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", READERS)
def test_without_ids_nothing_is_computed(name: str) -> None:
    tokens = torch.arange(8)[None]
    refused = pytest.raises(AssertionError, match="reads token ids, and whoever called the model gave none")
    with megatron_model(*CASES[name].settings, "model.num_layers=4") as model, refused:
        model(tokens, tokens, None)


def test_a_table_outside_of_its_layer_has_no_ids() -> None:
    from sparsecod_megatron.model.tokens import all_logits

    with megatron_model("mechanisms.stem={}", "model.num_layers=2") as model:
        all_logits(model, torch.arange(8)[None])
        with pytest.raises(AssertionError, match="while their layer's forward pass runs"):
            model.decoder.layers[1].mlp(torch.zeros(8, 1, 32))
