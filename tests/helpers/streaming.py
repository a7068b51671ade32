"""Compression with one block in memory against that of the whole model, for a tiny model of any family."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConversionError, SparsecodError
from sparsecod_megatron.evaluation.perplexity import score_windows
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.models.loading import load_model, stream_model
from tests.helpers.decoders import VOCAB_SIZE, tiny_decoder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a directory's safetensors."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_zeros(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Share of weights that are zero in both or in neither."""
    same = sum(int(((first[name] == 0) == (second[name] == 0)).sum()) for name in first)
    return same / sum(weight.numel() for weight in first.values())


def streaming_outcome(family: str, folder: Path) -> str | None:
    """What is said of streaming a tiny model.

    Args:
        family: of `decoders.FAMILIES`.
        folder: empty, for directories.

    Returns:
        Nothing where files and losses are those of the whole model; the line that refuses it; None where the whole
        model cannot be made tiny, or pruned.

    Raises:
        AssertionError: files or losses differ.
    """
    model = tiny_decoder(family)
    if model is None:
        return None
    model.save_pretrained(folder / "model")
    try:
        whole = Residency(load_model(folder / "model", dtype="float32", device="cpu"))
        expected = _pruned(whole, folder / "whole", None)
    except SparsecodError:
        return None
    try:
        streamed = stream_model(folder / "model", dtype="float32", device="cpu", scratch=folder)
    except ConversionError as error:
        return str(error)
    found = _pruned(streamed, folder / "streamed", folder / "work")
    assert found == expected, f"{family}: other losses"
    ours, theirs = tensors(folder / "streamed"), tensors(folder / "whole")
    assert ours.keys() == theirs.keys(), f"{family}: other tensors"
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items()), f"{family}: other values"
    return ""


def _pruned(residency: Residency, folder: Path, work: Path | None) -> list[float]:
    """Prune by Wanda, write, and score."""
    tokens = torch.randint(VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    method = find_method("wanda", ["output_error=false"])
    compress(residency.model, method, tokens, batch_size=2, work=work, residency=residency)
    folder.mkdir()
    residency.save(folder)
    scored = score_windows(residency.model, tokens.flatten(), seq_length=16, batch_size=2, residency=residency)
    return list(scored.sums.tolist())
