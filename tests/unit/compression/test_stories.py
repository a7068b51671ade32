"""A real tiny model: perplexities of a prototype of the engine, and of ModelOpt's SparseGPT with the update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.models.loading import load_model, load_tokenizer


def test_perplexities_of_the_prototype_are_found_again(shared_data: Path) -> None:
    """Wanda loses to SparseGPT at 2:4, and conjugate gradients from its result are better still."""
    folder = shared_data / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} in the shared data")
    tokenizer = load_tokenizer(folder)
    valid, test = (
        torch.tensor(tokenizer((shared_data / "text" / f"wikitext2_{part}.txt").read_text()[:60_000])["input_ids"])
        for part in ("valid", "test")
    )
    found = {}
    for rule, settings in (("wanda", []), ("sparsegpt", ["inputs=dense", "damping=0.1"]), ("sparsegpt+cg", [])):
        model = load_model(folder, dtype="float32", device="cpu")
        method = find_method(rule, ["pattern=2:4", "output_error=false", *settings])
        compress(model, method, valid[: 64 * 256].view(64, 256), batch_size=16)
        with torch.no_grad():
            windows = test[: 48 * 256].view(48, 256)
            logits = model(input_ids=windows).logits[:, :-1]
        found[rule] = float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())
    assert found == pytest.approx(EXPECTED, rel=0.05)


EXPECTED = {"wanda": 429.6, "sparsegpt": 246.89, "sparsegpt+cg": 227.5}
