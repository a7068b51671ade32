"""Engram against Python integers, a loop over tokens and planted n-grams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.tokens.canonical import canonical_ids
from sparsecod_megatron.mechanisms.tokens.engram_sparsecod import halo_of, multipliers, table_rows, table_sizes
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.training import collected_steps, small_trainer

select_backend()

ENGRAM = ("mechanisms.engram={layers: [1], heads: 2, width: 8, table_size: 50}", "model.num_layers=2")
TOKENS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(40).repeat(2, 1)
POSITIONS[1, 17:] -= 17  # a second document
HIDDEN = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(1))


def context_of(tokens: Tensor, positions: Tensor = POSITIONS) -> Tensor:
    from sparsecod_megatron.model.tokens import token_context

    return token_context(tokens, positions, halo_of(3) + 2)


def rows_by_hand(sample: int, place: int, factors: list[int], sizes: list[list[int]]) -> list[int | None]:
    """Of one token, in Python's integers of any length; None where the n-gram is not whole."""
    found: list[int | None] = []
    offset = 0
    for length, primes in enumerate(sizes, start=2):
        whole = int(POSITIONS[sample, place]) >= length - 1
        mixed = 0
        for lag in range(length if whole else 0):
            mixed ^= int(TOKENS[sample, place - lag]) * factors[lag]
        for prime in primes:
            found.append(mixed % prime + offset if whole else None)
            offset += prime
    return found


def test_rows_are_those_of_python_integers() -> None:
    factors, sizes = multipliers(5, 3, 3, 64), table_sizes(1000, 2, 4)
    rows, whole = table_rows(context_of(TOKENS)[:, halo_of(3) :], torch.arange(64), factors, sizes)
    for place in range(40):
        for sample in range(2):
            row, valid = rows[0, place, sample].tolist(), whole[0, place, sample].tolist()
            ours = [number if is_whole else None for number, is_whole in zip(row, valid, strict=True)]
            assert ours == rows_by_hand(sample, place, factors, sizes)
    assert len(set(rows[whole].tolist())) > 100


def test_padding_is_in_no_ngram() -> None:
    context = context_of(TOKENS)
    context[0, halo_of(3) + 2 + 10, 0, 0] = -1
    _, whole = table_rows(context[:, halo_of(3) :], torch.arange(64), multipliers(5, 3, 3, 64), table_sizes(100, 2, 1))
    # Of bigrams (0) and trigrams (1): those at the beginning, and those with the token at 10.
    broken = [[0, 0], [0, 1], [1, 1], [10, 0], [10, 1], [11, 0], [11, 1], [12, 1]]
    assert (~whole[0, :, 0]).nonzero().tolist() == broken


def test_no_product_overflows_and_no_head_shares_a_prime() -> None:
    for vocab_size in (64, 151_936):
        factors = multipliers(0, 7, 3, vocab_size)
        assert all(factor % 2 for factor in factors) and max(factors) * vocab_size < 2**62 and len(set(factors)) == 3
    assert multipliers(0, 7, 3, 64) != multipliers(0, 8, 3, 64) != multipliers(1, 8, 3, 64)
    primes = [prime for heads in table_sizes(90, 4, 3) for prime in heads]
    assert primes == [97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151]


def memory_by_hand(memory: Any, hidden: Tensor) -> Tensor:
    """Token by token."""

    def norm(x: Tensor, of: Any) -> Tensor:
        return x / torch.sqrt(x.square().mean() + 1e-5) * of.weight

    def stored(sample: int, place: int) -> Tensor:
        rows = rows_by_hand(sample, place, memory.factors, memory.sizes)
        heads = [torch.zeros(4).double() if row is None else memory.table.weight[row] for row in rows]
        return torch.stack([head[column] for column in range(4) for head in heads])

    taps, output = memory.taps.view(4, 32), torch.zeros_like(hidden)
    for sample in range(2):
        for place in range(40):
            e = stored(sample, place)
            key, value = memory.key.weight @ e, memory.value.weight @ e
            score = torch.dot(norm(hidden[place, sample], memory.query_norm), norm(key, memory.key_norm)) / 32**0.5
            gate = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
            total = torch.zeros(32).double()
            for tap in range(4):
                if int(POSITIONS[sample, place]) >= 3 * tap:
                    earlier = memory.value.weight @ stored(sample, place - 3 * tap)
                    total = total + taps[tap] * norm(earlier, memory.value_norm)
            output[place, sample] = gate * value + F.silu(total)
    return output


def test_equals_a_loop_over_tokens_with_its_gradients() -> None:
    weights = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(2))
    hidden = HIDDEN.double().requires_grad_()
    with megatron_model(*ENGRAM) as model:
        memory, found = model.decoder.layers[1].memory.double(), []
        parameters = [hidden, *memory.parameters()]
        for output in (memory(hidden, context_of(TOKENS)), memory_by_hand(memory, hidden)):
            found.append([output.detach(), *torch.autograd.grad((output * weights).sum(), parameters)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_memory_without_values_is_the_dense_model_bit_for_bit() -> None:
    with megatron_model(*ENGRAM) as model, torch.no_grad():
        memory = model.decoder.layers[1].memory
        assert not torch.equal(memory(HIDDEN, context_of(TOKENS)), torch.zeros_like(HIDDEN))
        memory.value.weight.zero_()
        ours = run_forward(model, TOKENS)
        shared = {name: weight for name, weight in model.named_parameters() if ".memory." not in name}
    with megatron_model("model.num_layers=2") as model, torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(shared[name])
        assert torch.equal(run_forward(model, TOKENS), ours)


def test_another_token_changes_as_many_places_as_ngrams_and_taps_reach() -> None:
    """20 … 20 + (N - 1) + 9, and none before; of the model's logits none before either."""
    other = TOKENS.clone()
    other[0, 20] = (other[0, 20] + 1) % 64
    with megatron_model(*ENGRAM) as model, torch.no_grad():
        memory = model.decoder.layers[1].memory
        pairs = [memory(HIDDEN, context_of(tokens)) for tokens in (TOKENS, other)]
        changed = (pairs[0] != pairs[1]).any(-1).nonzero().tolist()
        assert changed == [[place, 0] for place in range(20, 32)]
        before, after = run_forward(model, TOKENS), run_forward(model, other)
        assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[0, 20], after[0, 20])


def test_bigrams_are_learned_by_the_memory_alone() -> None:
    """What follows is decided by the last two tokens together; nothing else trains."""
    wanted = torch.randint(64, (64, 64), generator=torch.Generator().manual_seed(5))
    labels = wanted[TOKENS[:, :-1], TOKENS[:, 1:]]
    with megatron_model(*ENGRAM, "mechanisms.engram.table_size=2000") as model:
        memory = model.decoder.layers[1].memory
        with torch.no_grad():
            model.output_layer.weight.mul_(8)  # so that the norm in front of it leaves room for certainty
        optimizer = torch.optim.Adam([memory.table.weight, memory.value.weight], lr=0.1)
        losses = []
        for _ in range(25):
            loss = F.cross_entropy(run_forward(model, TOKENS)[:, 1:].flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 3 and losses[-1] < 0.3


def test_what_the_memory_is_to_the_run() -> None:
    """Tables cost no FLOPs and are embeddings that learn at their own rate; the two projections multiply."""
    config = load_config(None, [*SMALL, *ENGRAM], mechanisms=MECHANISMS)
    table, plain = ParameterTable.of(config), ParameterTable(config.model)
    rows = {row.name: row for row in table.layer(1)}
    assert rows["engram_table"].shape == (53 + 59 + 61 + 67, 4)
    assert rows["engram_table"].group == "embeddings" and not rows["engram_table"].is_orthogonalised
    assert flops_per_token(table, 16) - flops_per_token(plain, 16) == 6 * (2 * 32 * 16 + 4 * 32)
    assert table.count().active - plain.count().active == 4 * 4 + 2 * 32 * 16 + 3 * 32 + 4 * 32
    with small_trainer(*ENGRAM, "optimizer.lr=1e-2", "mechanisms.engram.rate=3") as trainer:
        groups = trainer.optimizer.param_groups
        assert sorted({group["max_lr"] for group in groups}) == pytest.approx([1e-2, 3e-2])
        fast = [
            weight for group in trainer.optimizer.param_groups if group["max_lr"] > 2e-2 for weight in group["params"]
        ]
        assert sum(weight.numel() for weight in fast) == 240 * 4


def test_the_mean_gate() -> None:
    """A key of zero says neither yes nor no."""
    with small_trainer(*ENGRAM) as trainer:
        memory = trainer.models[0].module.decoder.layers[1].memory
        with torch.no_grad():
            memory.key.weight.zero_()
        trainer.optimizer.reload_model_params()
        group = trainer.config.mechanisms["engram"].statistics([trainer.models[0].module], None)
        layers = collected_steps(trainer, [group], steps=1)[0]
    assert layers == [{}, {"memory_gate": 0.5}]


WORDS = ["Apple", " apple", "APPLE", "café", "cafe", " ", "\n ", "x", "ﬁ", "fi", "<end>", "\ufffd", "é"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def test_tokens_that_are_written_alike_are_one(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = canonical_ids(tokenizer, 16).tolist()
    assert ids == [0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]


def test_checkpoint_and_export_hold_the_tokenizers_table(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """In integers, whatever the weights are stored in; an import takes it from there."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
    from sparsecod_megatron.checkpoint.whole import write_weights
    from sparsecod_megatron.cli.import_ import run_config
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.models.loading import load_model

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = canonical_ids(tokenizer, 64)
    big = (*ENGRAM, "model.vocab_size=64")
    with small_trainer(*big, f"data.tokenizer={tmp_path / 'tokenizer'}") as trainer:
        saved = save_checkpoint(tmp_path / "run", trainer, state=TrainState(step=1))
    with small_trainer(*big) as trainer:
        memory = trainer.models[0].module.decoder.layers[1].memory
        assert torch.equal(memory.canonical, torch.arange(64, dtype=torch.int32))
        load_checkpoint(saved, trainer)
        assert torch.equal(memory.canonical, expected)
    export_checkpoint(saved, tmp_path / "hf", dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "hf", dtype="bfloat16", device="cpu").model.layers[1].memory.canonical
    assert loaded.dtype == torch.int32 and torch.equal(loaded, expected)
    source = open_source(tmp_path / "hf")
    config = run_config(source, None)
    tensors = source.tensors([*config.mechanisms.values()])
    imported = write_weights(tensors, config, tmp_path / "imported", select_backend())
    with streamed_checkpoint(imported) as stored:
        assert torch.equal(stored.tensors["decoder.layers.1.memory.canonical"], expected)


def test_integers_elsewhere_are_quantised_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from sparsecod_megatron.hf.source import SafetensorsFiles

    save_file({"a": torch.arange(3, dtype=torch.int32)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    with pytest.raises(ConversionError, match="a is of type torch.int32; dequantise"):
        files["a"]
