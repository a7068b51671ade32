"""What directories of GPT-NeoX and Pythia have that no other family's do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import export_model
from sparsecod_megatron.hf.source import open_source
from tests.unit.hf.test_source import CONFIGS, NEOX, rewrite, save, theirs_and_ours


def test_an_old_pythia_directory(tmp_path: Path) -> None:
    """Older names in the configuration; masks and frequencies among the weights, seen to be the usual ones."""
    folder = save(CONFIGS["neox"], tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rotary_emb_base": 500, "rotary_pct": 0.5}))
    at = "gpt_neox.layers.0.attention"
    held = {
        f"{at}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
        f"{at}.masked_bias": torch.tensor(-1e9),
        f"{at}.rotary_emb.inv_freq": (500.0 ** -(torch.arange(2) / 2)).half(),
    }
    rewrite(lambda tensors: tensors.update(held))(folder)
    model = open_source(folder).model
    assert (model.rotary_base, model.rotary_percent) == (500, 0.5)
    expected, found = theirs_and_ours(folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for name, wrong in ((f"{at}.bias", torch.ones(1, 1, 64, 64)), (f"{at}.masked_bias", torch.tensor(0.5))):
        rewrite(lambda tensors, held=held | {name: wrong}: tensors.update(held))(folder)
        with pytest.raises(ConversionError, match=f"{name} holds something else than GPTNeoXForCausalLM computes"):
            open_source(folder)


def test_a_neox_that_rotates_as_if_its_heads_were_wider_is_refused(tmp_path: Path) -> None:
    GPTNeoXConfig(**NEOX, head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="kv_channels=16, not hidden_size / num_attention_heads"):
        open_source(tmp_path)


def test_a_neox_export_is_read_by_older_names(tmp_path: Path) -> None:
    source = open_source(save(CONFIGS["neox"], tmp_path / "theirs"))
    options = {"seq_length": 16, "dtype": torch.float32, "tokenizer_dir": None}
    folder = export_model(source.model, dict(source.tensors()), tmp_path / "ours", **options)
    config = json.loads((folder / "config.json").read_text())
    assert (config["rotary_pct"], config["rotary_emb_base"], config["layer_norm_eps"]) == (0.25, 10000, 1e-5)
    assert not {"rms_norm_eps", "num_key_value_heads", "head_dim", "rope_theta"} & config.keys()
