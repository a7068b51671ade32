"""Every key an atlas's YAML may hold: which places of which studies are compared with which control, and their names.

A study's results say what was measured at each place of its grid, not which place is the plain model, nor what the
others are called in plain words. That is written down once, so that one command makes an atlas whenever results change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsecod_megatron.config.fields import choice

NO_SPARSITY, WEIGHTS, ACTIVATIONS, PARAMETERS, UNMEASURED = "none", "weights", "activations", "parameters", "unmeasured"
"""What the sparsity of a place is a share of: nothing, for it is not sparse; weights that are zero; units of the MLP
that are off; parameters that a token does not meet; or something of which studies measure no share."""


@dataclass
class PlaceConfig:
    """One place of a study's grid; what is left out is taken from its comparison."""

    mechanism: str = ""
    setting: str | None = None
    """Which form of the mechanism; None takes the labels of the place."""
    kind: str = ""
    sparsity: str | None = field(
        default=None, metadata={"choices": (NO_SPARSITY, WEIGHTS, ACTIVATIONS, PARAMETERS, UNMEASURED)}
    )


@dataclass
class ComparisonConfig:
    """Places of one study that are compared with one control."""

    study: str = "???"
    control: str | None = None
    """Place of the plain model: its labels in the order of the grid, `/` between them; None where there is none."""
    match: str = choice("tokens", "compute", "effective_compute")
    """`budget.match` of the study."""
    kind: str = "???"
    """Kind of sparsity, or of remedy, that rows are grouped by."""
    mechanism: str = ""
    """Name of places that have none of their own."""
    sparsity: str = choice(NO_SPARSITY, WEIGHTS, ACTIVATIONS, PARAMETERS, UNMEASURED)
    places: dict[str, PlaceConfig] = field(default_factory=dict)
    """Places to show, in this order; empty shows all that no other comparison of the study names."""
    note: str = ""
    """What a reader must know of these rows."""


@dataclass
class AtlasConfig:
    """One atlas."""

    title: str = "???"
    remedies: list[str] = field(default_factory=list)
    """Kinds that are not sparsity."""
    comparisons: list[ComparisonConfig] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Study, or STUDY/PLACE, and why it is not in the atlas."""
