"""What the contract test sets of each mechanism in a small model, and which of them run together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A mechanism in the small model of `tests/helpers/megatron.py`.

    Attributes:
        settings: overrides that switch it on, with an effect in every layer.
        neutral: overrides that switch it on without an effect; empty where none can.
        beside: matrices that it has in a run with others of its sort, which all take any.
        experts: whether it has an effect of its own in a mixture of experts.
        like: another, through whose code its weights start and are exported.
        holds_zeros: whether the weights that it counts as dead are zeros after a step of these settings.
        dense: whether it has an effect in a model without experts.
        finished: overrides with which a run is over after one step, where only then it can be exported.
        example: overrides with which its example trains on a small model.
        wrong: tensor of its export, of layer 1, that the parity gate must find where it is wrong; empty: its second.
        named: what that gate says of it, if not the tensor.
    """

    settings: tuple[str, ...]
    neutral: tuple[str, ...] = ()
    beside: str = ""
    experts: bool = False
    like: str = ""
    holds_zeros: bool = True
    dense: bool = True
    finished: tuple[str, ...] = ()
    example: tuple[str, ...] = ()
    wrong: str = ""
    named: str = ""


def _join(tensor: str, branch: str = "attention") -> dict[str, str]:
    """`wrong` and `named` of a residual path whose joins have such a tensor."""
    at = f"{branch}_residual.write"
    return {
        "wrong": f"model.layers.1.{at}.{tensor}",
        "named": f"how {branch} joins the residual state: a tensor of {at}",
    }


def _set(name: str, *settings: str) -> tuple[str, ...]:
    return tuple(f"mechanisms.{name}.{setting}" for setting in settings)


CASES: dict[str, Case] = {
    # The published gate has a jump at a score of zero and no bound on its slope beside it: hashes with no score near.
    "engram": Case(_set("engram", "layers=[1,2]", "heads=2", "width=12", "table_size=40", "rate=2", "seed=2")),
    "distillation": Case(
        ('mechanisms.distillation={teacher: ":fresh:", squarehead: 1, kl: 0.5, temperature: 2}',),
        example=('mechanisms.distillation.teacher=":fresh:"',),
    ),
    # Without `prune` it holds what is zero, which nothing is of fresh weights.
    "frozen_masks": Case(
        _set("frozen_masks", "prune=1:4"),
        neutral=_set("frozen_masks", "kinds=[qkv]"),
        example=("optimizer.lr=3e-3",),
    ),
    "headwise_gate": Case(("mechanisms.headwise_gate={}",)),
    "monarch": Case(("mechanisms.monarch.blocks=2",), beside="mlp_input", experts=True),
    "sltrain": Case(
        ("mechanisms.sltrain={rank: 4, alpha: 8, density: 0.25}",),
        beside="qkv, attention_output",
        experts=True,
    ),
    "row_scaling": Case(("mechanisms.row_scaling.groups=2",), experts=True),
    "sparse_ift": Case(("mechanisms.sparse_ift.sparsity=0.5",), beside="mlp_output", experts=True),
    "sparse_weights": Case(
        ("mechanisms.sparse_weights.density=0.4", "mechanisms.sparse_weights.distribution=erk"),
        neutral=("mechanisms.sparse_weights.density=1",),
        experts=True,
    ),
    "rigl": Case(_set("rigl", "density=0.4", "interval=2", "stop=1"), experts=True, like="sparse_weights"),
    "set": Case(_set("set", "density=0.4", "interval=2", "stop=1", "distribution=uniform"), like="sparse_weights"),
    "journey": Case(
        _set("journey", "density=0.4", "start=0", "end=0", "scope=global", "interval=1"),
        neutral=_set("journey", "density=1"),
        experts=True,
        like="iss",
    ),
    "iss": Case(
        _set("iss", "density=0.4", "interval=1", "freeze=1"),
        neutral=_set("iss", "factor=1"),
        holds_zeros=False,
    ),
    "spdf": Case(_set("spdf", "density=0.4", "dense_after=0.99"), holds_zeros=False, like="sparse_weights"),
    "cast": Case(
        _set("cast", "decay=10", "rise=0.001"), neutral=_set("cast", "decay=0"), holds_zeros=False, like="iss"
    ),
    "maskllm": Case(
        (*_set("maskllm", "rate=0.1"), "optimizer.weight_decay=0"),
        finished=("train.train_steps=1",),
        holds_zeros=False,
        example=("optimizer.lr=3e-2", "optimizer.weight_decay=0"),
    ),
    "ste": Case(_set("ste", "pattern=1:4"), holds_zeros=False),
    "srste": Case(_set("srste", "decay=0.1"), experts=True, holds_zeros=False, like="ste"),
    "mask_sparsity": Case(
        _set("mask_sparsity", "strength=1", "start=0", "freeze=1"),
        neutral=_set("mask_sparsity", "strength=0"),
        holds_zeros=False,
        like="iss",
    ),
    "wgsef": Case(_set("wgsef", "pattern=head", "freeze=1"), experts=False, holds_zeros=False, like="iss"),
    "efficient_llm": Case(
        _set("efficient_llm", "start=0", "end=0", "scope=matrix"),
        neutral=_set("efficient_llm", "density=1"),
        experts=True,
        like="iss",
    ),
    "random_groups": Case(
        _set("random_groups", "density=0.5", "pattern=head"),
        neutral=_set("random_groups", "density=1"),
        dense=False,  # in a run of experts, whose attention is like any other's
        experts=True,
        like="sparse_weights",
    ),
    "pgf": Case(
        _set("pgf", "dense_until=0", "fade=exponential"),
        neutral=_set("pgf", "dense_until=0.5"),
        holds_zeros=False,
        like="ste",
    ),
    "moe_router_topk_schedule": Case(
        (
            "mechanisms.moe_router_topk_schedule={at: 1, topk_per_layer: [1, 1, 2, 1]}",
            "model.num_moe_experts=4",
            "model.moe_ffn_hidden_size=24",
            "model.moe_router_pre_softmax=true",
        ),
        experts=True,
        dense=False,
    ),
    "moe_x": Case(
        (
            "mechanisms.moe_x={}",
            "model.activation=relu",
            "model.num_moe_experts=4",
            "model.moe_ffn_hidden_size=24",
            "model.moe_aux_loss_coeff=0.1",
        ),
        experts=True,
        dense=False,
    ),
    "comet": Case(
        (
            *_set("comet", "gamma=2", "entropy_coeff=0.1"),
            "model.num_moe_experts=4",
            "model.moe_ffn_hidden_size=24",
            "model.moe_aux_loss_coeff=0.1",
        ),
        experts=True,
        dense=False,
    ),
    "monet": Case(
        (*_set("monet", "experts=8", "heads=2", "k=3", "momentum=0.5"), "model.activation=relu2"),
    ),
    "stem": Case(_set("stem", "layers=[1,3]")),
    "attention_residuals": Case(
        _set("attention_residuals", "block_layers=1"),
        experts=True,
        wrong="model.layers.1.attention_residual.read.query",
        named="how attention reads the residual state: a tensor of attention_residual.read",
    ),
    "complete_p": Case(
        (*_set("complete_p", "base_num_layers=2", "alpha=0.5"), "model.mup_base_hidden_size=16"),
        neutral=_set("complete_p", "base_num_layers=4"),
        experts=True,
        example=_set("complete_p", "base_num_layers=1"),
    ),
    "delta": Case(_set("delta", "beta=0.5"), example=("optimizer.lr=3e-3",), **_join("gate_bias")),
    "dense_average": Case(_set("dense_average", "dilation=2"), **_join("weights", "mlp")),
    "hyper_connections": Case(
        _set("hyper_connections", "streams=3", "scale=1"), experts=True, **_join("static_mixing")
    ),
    "layer_drop": Case(_set("layer_drop", "rate=0.5", "by_depth=constant"), neutral=_set("layer_drop", "rate=0")),
    "early_exit": Case(_set("early_exit", "scale=0.5", "rotation=2"), neutral=_set("early_exit", "scale=0")),
    "loop": Case(
        _set("loop", "first=2", "last=2"),
        neutral=_set("loop", "times=1"),
        experts=True,
        example=_set("loop", "first=0", "last=0"),
    ),
    "keel": Case(("mechanisms.keel={}",), experts=True, **_join("weight")),
    "manifold_hyper_connections": Case(
        _set("manifold_hyper_connections", "streams=3", "mixing=permutations", "scale=1"), **_join("weight")
    ),
    "multi_gate": Case(_set("multi_gate", "streams=3"), **_join("bias")),
    "scaled": Case(
        _set("scaled", "branch=0.5", "learn=channel", "skip=0.9"),
        neutral=("mechanisms.scaled={}",),
        **_join("factor"),
    ),
    "siamese_norm": Case(("mechanisms.siamese_norm={}",), **_join("weight")),
    "s2_attention": Case(
        _set("s2_attention", "block_size=2", "local_blocks=1", "stride=2"),
        neutral=_set("s2_attention", "stride=1"),
    ),
    "value_residual": Case(
        _set("value_residual", "own=0.75", "first=0.5", "learn=true"),
        neutral=_set("value_residual", "own=1", "first=0"),
        wrong="model.layers.1.self_attn.value_mix.weight",
    ),
    "topk_activation": Case(
        ("mechanisms.topk_activation.k_per_layer=[4,10,20,4]", "model.activation=relu"),
        neutral=("mechanisms.topk_activation.k=48",),
        experts=True,
    ),
}
TOGETHER: dict[str, tuple[str, ...]] = {
    "gate-masks-topk": ("headwise_gate", "sparse_weights", "s2_attention", "topk_activation", "row_scaling"),
    "factors": ("monarch", "sltrain", "sparse_ift"),
    "marks": ("rigl", "journey", "iss", "cast"),
    "windows": ("ste", "srste", "pgf", "set"),
    "tokens": ("engram", "stem"),
    "groups": ("spdf", "mask_sparsity", "wgsef", "efficient_llm"),
    "learned": ("maskllm",),
    "teachers": ("distillation", "frozen_masks"),
    "routers": ("random_groups", "moe_router_topk_schedule", "moe_x"),
    "trees": ("comet",),
    "product-keys": ("monet",),
    "depth-attention": ("attention_residuals",),
    "dense-averages": ("dense_average",),
    "deltas": ("delta",),
    "drops": ("layer_drop",),
    "highways": ("keel",),
    "loops": ("loop",),
    "manifolds": ("manifold_hyper_connections",),
    "scales": ("scaled",),
    "depths": ("complete_p",),
    "stream-gates": ("multi_gate",),
    "streams": ("hyper_connections",),
    "twins": ("siamese_norm",),
    "one-stage": ("value_residual", "early_exit"),
}
"""Mechanisms that do not touch each other, by name of the run: one training for all."""
ONE_STAGE = ("one-stage",)
"""Runs whose mechanisms no pipeline can have."""
UNDIVIDED = ("loops",)
"""Runs that stages of one layer cannot have."""
APART = ("marks", "windows", "groups")
"""Runs whose mechanisms each have a layer of their own."""


def settings(group: str) -> tuple[str, ...]:
    """Overrides of the run with these mechanisms."""
    found: list[str] = []
    for layer, name in enumerate(TOGETHER[group]):
        found += CASES[name].settings
        if CASES[name].beside:
            found.append(f"mechanisms.{name}.kinds=[{CASES[name].beside}]")
        if group in APART:
            others = [other for other in range(len(TOGETHER[group])) if other != layer]
            found.append(f"mechanisms.{name}.skip_layers={others}")
    return tuple(found)
