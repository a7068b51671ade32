"""Exported models that read token ids: what a cache, padding or beams must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from sparsecod_megatron.backend import select_backend
from tests.helpers.mechanisms import CASES
from tests.helpers.training import small_trainer

select_backend()

LENGTH = 30
PROMPTS = torch.randint(64, (3, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=["stem", "engram"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model as a user loads it, all its weights away from their initial symmetry."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.models.loading import load_model

    folder: Path = tmp_path_factory.mktemp(request.param)
    settings = (*CASES[request.param].settings, "model.num_layers=4", "model.init_method_std=0.2")
    with small_trainer(*settings, "data.seq_length=64") as trainer:
        saved = save_checkpoint(folder, trainer, state=TrainState(step=1))
    export_checkpoint(saved, folder / "hf", verify=False)
    model = load_model(folder / "hf", dtype="float32", device="cpu").eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "memory" in name:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    with torch.no_grad():
        yield model


@pytest.mark.parametrize("sizes", [(7, *[1] * 23), (1, 12, 17), (29, 1)])
def test_a_cache_gives_what_the_whole_sequence_gives(exported: Any, sizes: tuple[int, ...]) -> None:
    whole, cache, parts = exported(PROMPTS, use_cache=False).logits, None, []
    for part in PROMPTS.split(sizes, dim=1):
        output = exported(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values if "past_key_values" in output else output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_does_not_depend_on_the_cache(exported: Any, options: dict[str, Any]) -> None:
    """Beams are reordered in the cache, and the ids with them."""
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    short = PROMPTS[:, :8]
    mask = torch.ones_like(short)
    ours, theirs = (
        exported.generate(short, attention_mask=mask, use_cache=use_cache, **arguments) for use_cache in (True, False)
    )
    assert torch.equal(ours, theirs) and ours.shape[1] == 20
    if not options:
        logits = exported(ours, use_cache=False).logits
        assert torch.equal(logits[:, 7:-1].argmax(-1), ours[:, 8:])


def test_padding_on_the_left_is_no_token(exported: Any) -> None:
    padded = torch.cat((torch.full((3, 5), 9), PROMPTS), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = exported(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(ours, exported(PROMPTS).logits, rtol=1e-4, atol=1e-4)


def test_what_has_no_ids_is_refused(exported: Any) -> None:
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        exported(inputs_embeds=torch.zeros(1, 4, 32))
    if max(layer.token_halo or 0 for layer in exported.model.layers):
        cache = StaticCache(config=exported.config, max_cache_len=32)
        with pytest.raises(ValueError, match="which StaticCache cannot hold"):
            exported(PROMPTS, past_key_values=cache)
