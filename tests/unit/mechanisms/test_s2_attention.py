"""The pattern against the rule written out, gathered blocks against a mask, and an export that decodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.attention import s2_attention
from sparsecod_megatron.mechanisms.attention.s2_attention import S2Attention, SeesBlocks
from sparsecod_megatron.seams.mechanism import RankShape, mixed
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.memory import kept_for_backward

HEADS, GROUPS, WIDTH = 8, 4, 8


def naive_mask(pattern: S2Attention, length: int) -> np.ndarray:
    """The rule, entry by entry: [heads, length, length]."""
    seen = np.zeros((HEADS, length, length), dtype=bool)
    for head in range(HEADS):
        for query in range(length):
            for key in range(query + 1):
                block, group = key // pattern.block_size, head // (HEADS // GROUPS)
                is_local = query // pattern.block_size - block < pattern.local_blocks
                seen[head, query, key] = is_local or (block + group) % pattern.stride == 0
    return seen


def attention(pattern: S2Attention, *, size: int = 1, rank: int = 0) -> Any:
    """The core attention of one of `size` tensor-parallel ranks, on its own."""
    select_backend()
    from megatron.core.transformer.enums import AttnMaskType

    from sparsecod_megatron.model.attention import SDPAttention

    def group(size: int, rank: int) -> Any:
        return SimpleNamespace(size=lambda: size, rank=lambda: rank)

    config: Any = SimpleNamespace(
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        softmax_type="vanilla",
        window_size=None,
        window_attn_skip_freq=None,
    )
    groups = SimpleNamespace(tp=group(size, rank), cp=group(1, 0))
    built = mixed(SeesBlocks, SDPAttention)
    return built(config, 1, AttnMaskType.causal, "self", pattern=pattern, pg_collection=groups)


def inputs(length: int, batch: int = 2) -> list[Tensor]:
    """query, key, value [S, B, heads or groups, D]."""
    generator = torch.Generator().manual_seed(0)
    counts = (HEADS, GROUPS, GROUPS)
    return [torch.randn(length, batch, n, WIDTH, generator=generator).requires_grad_() for n in counts]


def naive_output(pattern: S2Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over what the rule lets through."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    hidden = ~torch.from_numpy(naive_mask(pattern, len(query)))
    weights = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("gathered", [False, True], ids=["mask", "gathered"])
def test_output_and_gradients_are_those_of_the_rule(gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s2_attention, "GATHERED_FROM", 32 if gathered else 1 << 30)
    pattern, tensors = S2Attention(block_size=4, local_blocks=2, stride=4), inputs(48)
    output = attention(pattern)(*tensors, None)
    expected = naive_output(pattern, *tensors)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output * weights).sum(), tensors)
    for gradient, other in zip(found, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_a_rank_has_the_patterns_of_its_own_heads() -> None:
    """With local numbers every rank would repeat the first one's pattern. Eight ranks share four key groups."""
    pattern, positions = S2Attention(block_size=4, local_blocks=1, stride=4), torch.arange(40)
    whole = torch.from_numpy(naive_mask(pattern, 40))
    for size in (2, 8):
        ranks = [attention(pattern, size=size, rank=rank).allowed(positions, positions) for rank in range(size)]
        assert torch.equal(torch.cat(ranks), whole)


def test_heads_together_see_every_earlier_key_and_not_a_later_one() -> None:
    for stride in (2, 4):
        pattern = S2Attention(block_size=4, local_blocks=1, stride=stride)
        mask = attention(pattern).allowed(torch.arange(41), torch.arange(41))
        assert torch.equal(mask.any(0), torch.ones(41, 41, dtype=torch.bool).tril())
        shares = mask.sum((1, 2)) / mask.any(0).sum()
        assert shares.max() < 1 / stride + 0.2 and torch.equal(mask.any(-1), torch.ones(HEADS, 41) > 0)


@pytest.mark.parametrize("gathered", [False, True], ids=["mask", "gathered"])
def test_planned_bytes_are_what_autograd_keeps(gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s2_attention, "GATHERED_FROM", 32 if gathered else 1 << 30)
    pattern, tensors = S2Attention(block_size=8, local_blocks=2, stride=4), inputs(128)
    core = attention(pattern)
    with kept_for_backward([], *tensors) as kept:
        output = core(*tensors, None)
        found = kept.bytes()
    model: Any = SimpleNamespace(num_attention_heads=HEADS, query_groups=GROUPS, head_dim=WIDTH)
    rank = RankShape(256, 256, 0, 1, 1, context=1, seq_length=128, value_bytes=4, norm_bytes=0)
    (planned,) = pattern.saved_bytes(model, 0, rank).values()
    plain = output.nbytes + 256 * HEADS * 4  # attention's own output and log-sum-exp, which are counted elsewhere
    assert planned == pytest.approx(found - plain + (output.nbytes if gathered else 0), rel=0.05)


def test_export_decodes_with_a_cache_and_padding_as_it_was_trained(tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from tests.helpers.training import small_trainer

    settings = ("mechanisms.s2_attention={block_size: 3, local_blocks: 1, stride: 2, dense_layers: [1]}",)
    with small_trainer(*settings, "model.init_method_std=0.3") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
    export_checkpoint(saved, tmp_path / "hf")
    tokens = torch.randint(3, 60, (1, 16), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        cache, steps = None, []
        for token in tokens.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
        padded = torch.nn.functional.pad(tokens, (4, 0))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (4, 0))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            logits = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(logits[:, 4:], whole, rtol=1e-4, atol=1e-5)
        changed = tokens.clone()
        changed[:, 9:] = 60 - tokens[:, 9:]
        assert torch.equal(model(input_ids=changed).logits[:, :9], model(input_ids=tokens).logits[:, :9])
        model.config._attn_implementation_internal = "flash_attention_2"  # its package is not here to be asked for
        with pytest.raises(ValueError, match="needs a mask of each head; use sdpa or eager"):
            model(input_ids=tokens, use_cache=False)


def test_later_tokens_change_no_earlier_logits() -> None:
    with megatron_model("mechanisms.s2_attention={block_size: 2, local_blocks: 1, stride: 2}") as model:
        tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 9:] = (tokens[:, 9:] + 5) % 64
        before, after = run_forward(model, tokens), run_forward(model, changed)
        assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.s2_attention={}"], "stride: 4 does not divide model.num_query_groups=2"),
        (["mechanisms.s2_attention={stride: 2, dense_layers: [3]}"], "dense_layers: 3 is not below"),
        (["mechanisms.s2_attention.stride=2", "model.sliding_window=4"], "model.sliding_window: 4 beside"),
        (
            ["mechanisms.s2_attention.stride=2", "data.reset_attention_mask=true", "data.reset_position_ids=true"],
            "data.reset_attention_mask: true, but mechanisms.s2_attention counts blocks",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert words in str(refused.value) and "\n" not in str(refused.value)
