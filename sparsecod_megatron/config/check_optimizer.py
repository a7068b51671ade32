"""Settings that Muon cannot be run with."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.schema import RunConfig

_MUON_COEFFICIENTS = 5
"""Length of the cycle of Newton-Schulz coefficients that Megatron-Core's Muon goes through."""


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """One line for each setting that Muon cannot be run with."""
    section = config.optimizer
    if section.optimizer != "muon":
        return
    if section.muon_num_ns_steps % _MUON_COEFFICIENTS:
        key = "optimizer.muon_num_ns_steps"
        yield f"{key}: {section.muon_num_ns_steps} is not a multiple of {_MUON_COEFFICIENTS}; use that or a multiple"
    if config.model.mup_base_hidden_size is not None:
        key = f"model.mup_base_hidden_size: {config.model.mup_base_hidden_size}"
        yield f"{key}, but its learning rates are AdamW's; remove it or set optimizer.optimizer=adam"
