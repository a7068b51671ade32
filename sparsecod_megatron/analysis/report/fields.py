"""What the page says about a field: its group, its meaning, whether its natural axis is logarithmic.

A field that is not listed is shown all the same, under its own name.
"""

from __future__ import annotations

import re
from typing import Any

# (name, group, logarithmic axis, meaning), where {part} stands for attention or MLP; the first that matches counts.
_FIELDS = [
    (r"out_var", "Variance", True, "variance over channels of the residual stream after the layer"),
    (r"(attn|mlp)_var", "Variance", True, "variance over channels of what the {part} branch adds"),
    (r"out_rms", "Root mean square", True, "root mean square of the residual stream after the layer"),
    (r"(attn|mlp)_rms", "Root mean square", True, "root mean square of what the {part} branch adds"),
    (r"(attn|mlp)_ratio", "Distance from the identity", True, "variance of the {part} branch ÷ that of its stream"),
    (r"cos", "Distance from the identity", False, "cosine between the layer's input and output"),
    (r"\w+_skew", "Channel moments", False, "skewness over channels, mean over tokens"),
    (r"\w+_kurt", "Channel moments", True, "kurtosis over channels, mean over tokens (3 is normal)"),
    (r"\w+_(skew|kurt)_std", "Channel moments", False, "standard deviation over tokens of the moment"),
    (r"\w+_outlier_frac", "Channel moments", False, "share of elements over 3 standard deviations from the mean"),
    (r"\w+_top_mass", "Channel moments", False, "share of a token's L2 norm in its 10 largest channels"),
    (r"(\w+_)?massive", "Channel moments", True, "largest absolute activation"),
    (r"grad_norm", "Parameters", True, "L2 norm of the layer's gradients before clipping"),
    (r"param_norm", "Parameters", False, "L2 norm of the layer's parameters"),
    (r"update_ratio", "Parameters", True, "size of the optimizer step ÷ size of the weights"),
    (r"load_entropy", "Router", False, "entropy of the expert load ÷ log(experts): 1 is a uniform load"),
    (r"load_max_over_mean", "Router", False, "load of the busiest expert ÷ mean load"),
    (r"dropped_frac", "Router", False, "share of routed slots dropped for capacity"),
    (r"aux_loss", "Router", False, "load-balancing loss"),
    (r"z_loss", "Router", False, "z-loss of the router's logits"),
    (r"mean_topk_prob", "Router", False, "mean probability of the chosen experts"),
    (r"tokens_per_expert", "Router", False, "tokens routed to each expert"),
    (r"act_nonzero", "Activations", False, "share of an MLP's activations that are not zero"),
    (r"act_small", "Activations", False, "share of activations within 0.01 root mean squares of their token's zero"),
    (r"dead_units", "Activations", False, "units of the MLP that were on for no token"),
    (r"always_on_units", "Activations", False, "units of the MLP that were on for every token"),
    (r"gate_mean", "Attention", False, "mean gate of the attention output"),
    (r"gate_small", "Attention", False, "share of gates below 0.05"),
    (r"first_token_mass", "Attention", False, "attention weight on the first token"),
]
_GROUP_OTHER = "Other"
_REFERENCE, _REFERENCE_PREFIX = "Reference definitions", "ref_"

_METRICS = {
    "loss": ("Training loss", "nats per token"),
    "validation_loss": ("Validation loss", "nats per token"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "L2 over all parameters, before clipping"),
    "tokens_per_s": ("Throughput", "tokens per second"),
    "tflops": ("Model TFLOP/s", "per process"),
    "step_time_s": ("Step time", "seconds"),
}
_METRIC_LOG = {"grad_norm"}


def describe_layer_field(name: str) -> dict[str, Any]:
    """Group, meaning and default axis of a layer statistic, known or not."""
    if name.startswith(_REFERENCE_PREFIX):
        ours = describe_layer_field(name.removeprefix(_REFERENCE_PREFIX))
        return {**ours, "group": _REFERENCE, "meaning": "as the published code computes it, to compare with its curves"}
    for pattern, group, logarithmic, meaning in _FIELDS:
        found = re.fullmatch(pattern, name)
        if found:
            part = {"attn": "attention", "mlp": "MLP"}.get(name.partition("_")[0], "")
            return {"group": group, "log": logarithmic, "meaning": meaning.format(part=part)}
    return {"group": _GROUP_OTHER, "log": False, "meaning": ""}


def describe_metric(name: str) -> dict[str, Any]:
    """Title, unit and default axis of a metric, known or not."""
    title, unit = _METRICS.get(name, (name, ""))
    return {"title": title, "meaning": unit, "log": name in _METRIC_LOG}


def ordered_layer_fields(names: set[str]) -> list[str]:
    """Names in the order of the table above, then unknown ones, then the reference's; never in a file's own order."""

    def place(name: str) -> tuple[bool, int, str]:
        is_reference = name.startswith(_REFERENCE_PREFIX)
        ours = name.removeprefix(_REFERENCE_PREFIX)
        matches = [index for index, entry in enumerate(_FIELDS) if re.fullmatch(entry[0], ours)]
        return (is_reference, matches[0] if matches else len(_FIELDS), name)

    return sorted(names, key=place)


def ordered_metrics(names: set[str]) -> list[str]:
    """Names in the order of the table above, unknown ones last."""
    known = list(_METRICS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
