"""Statistics of activations, gates and attention on the first token, against numpy on what the modules were given."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.megatron import megatron_model
from tests.helpers.training import recorded_steps, small_trainer, trainer_batches
from tests.helpers.variants import LATENTS

ACTIVATION = "statistics.activation.interval=1"
QUIET = ("statistics.variance.interval=0", "statistics.mechanisms.interval=0")
EXPERTS = (
    "model.activation=relu",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_shared_expert_intermediate_size=16",
    "mechanisms.headwise_gate={}",
)
RECOMPUTED = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)
RUNS: dict[str, tuple[str, ...]] = {
    "swiglu": ("model.attention_output_gate=elementwise", "model.sliding_window=6", "data.seq_length=32"),
    "experts": EXPERTS,
    "experts-recomputed": (*EXPERTS, *RECOMPUTED),
    "documents": ("data.reset_attention_mask=true", "data.reset_position_ids=true", "data.seq_length=32"),
    "latents": LATENTS,
}


class Seen:
    """What a step's forward pass gives to the projections, gates and attentions of each layer, in fp64."""

    def __init__(self, model: Any) -> None:
        self.units: dict[int, dict[Any, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        self.gates: dict[int, list[np.ndarray]] = defaultdict(list)
        self.queries_keys: dict[int, list[tuple[np.ndarray, ...]]] = defaultdict(list)
        for index, layer in enumerate(model.decoder.layers):
            mlps = [getattr(layer.mlp, "shared_experts", None), *getattr(layer.mlp, "experts", layer).modules()]
            for mlp in mlps if hasattr(layer.mlp, "router") else [layer.mlp]:
                if hasattr(mlp, "linear_fc2"):
                    kept = self.units[index][mlp]
                    mlp.linear_fc2.register_forward_pre_hook(lambda m, args, kept=kept: self._keep(kept, args[0]))
            attention = layer.self_attention
            if hasattr(attention, "linear_gate"):
                attention.linear_gate.register_forward_hook(
                    lambda m, args, result, kept=self.gates[index]: self._keep(kept, result[0])
                )
            attention.core_attention.register_forward_pre_hook(
                lambda m, args, kept=self.queries_keys[index]: self._keep(kept, *args[:2])
            )

    @staticmethod
    def _keep(kept: list[Any], *tensors: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:
            arrays = tuple(tensor.detach().double().numpy() for tensor in tensors)
            kept.append(arrays if len(arrays) > 1 else arrays[0])

    def unit_statistics(self, layer: int) -> dict[str, float]:
        """By the definitions, one token and one unit after the other."""
        zero = small = elements = dead = always = 0
        for batches in self.units[layer].values():
            rows = np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in batches])
            on = np.array([abs(row) > 0.01 * np.sqrt((row**2).mean()) for row in rows]).reshape(rows.shape)
            zero, small, elements = zero + (rows == 0).sum(), small + (~on).sum(), elements + rows.size
            dead += sum(not column.any() for column in on.T)
            always += sum(bool(len(column)) and column.all() for column in on.T)
        return {
            "act_nonzero": 1 - zero / elements,
            "act_small": small / elements,
            "dead_units": dead,
            "always_on_units": always,
        }

    def first_token_mass(self, layer: int, *, every: int, window: int | None = None) -> float:
        """Softmax rows of the sampled queries, one head after the other."""
        found = []
        for queries, keys in self.queries_keys[layer]:
            length, batch, heads, width = queries.shape
            for position in range(every - 1, length, every):
                first = 0 if window is None else max(0, position - window + 1)
                for sequence in range(batch):
                    for head in range(heads):
                        seen = keys[first : position + 1, sequence, head * keys.shape[2] // heads]
                        scores = np.exp(seen @ queries[position, sequence, head] / np.sqrt(width))
                        found.append(scores[0] / scores.sum() if first == 0 else 0.0)
        return float(np.mean(found))


def collected(*overrides: str) -> tuple[list[dict[str, Any]], Seen]:
    """Statistics by layer of a step of two micro-batches, and what they are of."""
    with small_trainer(*overrides, *QUIET, ACTIVATION, "model.init_method_std=0.3", "optimizer.lr=0") as trainer:
        model = trainer.models[0].module
        with torch.no_grad():  # units 0 to 2 of every MLP answer to nothing
            for name, weight in model.named_parameters():
                if "linear_fc1.weight" in name:
                    weight[:3] = 0
        trainer.optimizer.reload_model_params()
        attention = model.decoder.layers[0].self_attention
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        seen = Seen(model)
        (layers,) = recorded_steps(trainer, trainer_batches(trainer), [1])["layers"]
        assert "_apply_output_gate" not in vars(attention)
        left = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        assert sum(map(sum, left)) - sum(map(sum, hooks)) == sum(
            len(seen.units[index]) + 1 + hasattr(layer.self_attention, "linear_gate")
            for index, layer in enumerate(model.decoder.layers)
        )
    return layers, seen


@pytest.mark.parametrize("name", ["swiglu", "experts", "experts-recomputed", "latents"])
def test_equals_numpy(name: str) -> None:
    layers, seen = collected(*RUNS[name])
    for index, layer in enumerate(layers):
        expected = seen.unit_statistics(index)
        assert expected["dead_units"] >= 3 * len(seen.units[index])
        if seen.gates[index]:
            gates = 1 / (1 + np.exp(-np.concatenate([gate.ravel() for gate in seen.gates[index]])))
            expected |= {"gate_mean": gates.mean(), "gate_small": (gates < 0.05).mean()}
        every, window = (4, 6) if name == "swiglu" else (2, None)
        expected["first_token_mass"] = seen.first_token_mass(index, every=every, window=window)
        ours = {field: layer[field] for field in expected}
        assert ours == pytest.approx(expected, rel=1e-5), name
        assert set(layer) - set(expected) == ({"gate_mean", "gate_small"} if name == "swiglu" else set())


class Alone:
    """A group of one rank."""

    size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_two_experts_by_pieces(dtype: torch.dtype) -> None:
    """Without a zero; then with some, with values whose squares are none, and with rows that are padding."""
    from sparsecod_megatron.metrics import activation

    units = activation.Units(0, torch.nn.Identity(), 2, Alone(), Alone(), is_expert=True)  # type: ignore[arg-type]
    generator, counts, scratch = torch.Generator().manual_seed(0), {}, activation._Scratch()
    expected = np.zeros((2, 26))
    for step, sizes in enumerate(([600, 5], [3, 530], [0, 8])):
        values = torch.randn(sum(sizes), 24, generator=generator) * torch.rand(24, generator=generator) ** 8
        if step == 1:
            values[:2, 3], values[7:9], values[20, 4] = 0, 0, 1e-30
        values = values.to(dtype)
        assert bool((values != 0).all()) is (step != 1)
        activation._count_units(units, counts, 0, scratch, values, sizes)
        for expert, part in enumerate(np.split(values.double().numpy(), [sizes[0]])):
            on = np.square(part) > 1e-4 * np.square(part).mean(1, keepdims=True)
            expected[expert] += [*on.sum(0), (part != 0).sum(), part.any(1).sum()]
    assert counts[0].numbers.tolist() == expected.tolist()


@pytest.mark.parametrize("gate", ["model.attention_output_gate=elementwise", "mechanisms.headwise_gate={}"])
def test_a_gate_without_weights_is_half_open(gate: str) -> None:
    with small_trainer(*QUIET, ACTIVATION, gate, "optimizer.lr=0") as trainer:
        with torch.no_grad():
            for name, weight in trainer.models[0].module.named_parameters():
                if "linear_gate" in name or "linear_qkv.weight" in name:
                    weight.zero_()
        trainer.optimizer.reload_model_params()
        (layers,) = recorded_steps(trainer, trainer_batches(trainer), [1])["layers"]
    assert [(layer["gate_mean"], layer["gate_small"]) for layer in layers] == [(0.5, 0.0)] * 3


def test_packed_documents_look_at_their_own_first_token() -> None:
    """The same weights as an attention over each document alone."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from sparsecod_megatron.metrics.first_token import first_token_weights

    with megatron_model(*RUNS["documents"]) as model:
        attention = model.decoder.layers[0].self_attention.core_attention
        lengths = [5, 8, 1, 10]
        query, key = torch.randn(24, 4, 8), torch.randn(24, 2, 8)
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        packing = PackedSeqParams(cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        options: dict[str, Any] = {"sampling": 1, "context": model.pg_collection.cp}
        ours = first_token_weights(attention, query, key, packing=packing, **options)
        parts = zip(query.split(lengths), key.split(lengths), strict=True)
        alone = [first_token_weights(attention, q[:, None], k[:, None], packing=None, **options) for q, k in parts]
        torch.testing.assert_close(ours, torch.cat(alone, dim=-1))
        assert bool((ours[..., [0, 5, 13, 14]] == 1).all())


def test_a_sink_takes_its_share_of_the_first_tokens_weight() -> None:
    from sparsecod_megatron.metrics.first_token import first_token_weights

    with megatron_model("model.softmax_type=learnable") as model:
        attention = model.decoder.layers[0].self_attention.core_attention
        query, key, sinks = torch.randn(6, 1, 4, 8), torch.randn(6, 1, 2, 8), torch.tensor([0.5, -1.0, 2.0, 0.0])
        context = model.pg_collection.cp
        ours = first_token_weights(attention, query, key, packing=None, sampling=1, context=context, sinks=sinks)
        for head, place in itertools.product(range(4), range(6)):
            scores = (key[: place + 1, 0, head // 2] @ query[place, 0, head] / 8**0.5).exp()
            expected = scores[0] / (scores.sum() + sinks[head].exp())
            torch.testing.assert_close(ours[0, head // 2, head % 2, place], expected)


@pytest.mark.parametrize(("sequence", "size"), [(64, 2), (24, 2), (40, 4)])
def test_every_layout_samples_the_same_queries(sequence: int, size: int) -> None:
    from sparsecod_megatron.metrics.first_token import sampled
    from sparsecod_megatron.model.attention import zigzag_positions

    positions = zigzag_positions(sequence, size, device=torch.device("cpu"))
    for sampling in (1, 3, sequence // 8 or 1):
        spread = [positions[rank, sampled(sequence // size, sampling, rank, size)].tolist() for rank in range(size)]
        assert sorted(sum(spread, [])) == sampled(sequence, sampling, 0, 1)
