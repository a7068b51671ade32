"""Residual paths against closed forms by depth and plain models; one token's formulas: test_residual_formulas.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.residual import HIDDEN, drawn, path_of, random_module
from tests.helpers.training import small_trainer, trainer_batches

select_backend()

PATHS = [name for name in MECHANISMS.names if issubclass(MECHANISMS.settings_class(name), ResidualMechanism)]
PATHS.remove("complete_p")  # has that of `scaled`
TOKENS = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(3))


def streams_by_depth(path: Any, hidden: int, branches: int) -> tuple[Tensor, list[Tensor]]:
    """The last state's view and every read, where branches are independent of all else and of unit variance."""
    state = drawn((64, 1, hidden), 0)
    expansion = path.expansion()
    state, reads = state if expansion is None else expansion(state), []
    with torch.no_grad():
        for branch in range(branches):
            read = path.read(branch)
            reads.append(state if read is None else read(state))
            state = path.join(branch)(drawn((64, 1, hidden), branch + 1), state)
        last = path.read(branches)
        reads.append(state if last is None else last(state))
    return path.view(state), reads


@pytest.mark.parametrize(
    ("name", "settings", "view", "read"),
    [
        ("scaled", {}, 49.0, 49.0),
        ("scaled", {"branch": 48**-0.5}, 2.0, 2.0),
        ("attention_residuals", {"block_layers": 0}, 49.0, 1 / 49),
        ("attention_residuals", {"block_layers": 3}, 49.0, 49 / 9**2),
        ("keel", {}, 1.0, 1.0),
        ("manifold_hyper_connections", {}, 49.0, 49.0),
        ("manifold_hyper_connections", {"mix_init": "mean"}, 49.0, 49.0),
        ("hyper_connections", {}, 49.0, 49.0),
        ("siamese_norm", {}, 49.0, None),
    ],
)
def test_variance_by_depth(name: str, settings: dict[str, Any], view: float, read: float | None) -> None:
    """A mixing matrix does not keep the mean stream from growing; depth attention divides what is read alone."""
    path = path_of(name, hidden=256, layers=24, **settings)
    last, reads = streams_by_depth(path, 256, 48)
    assert float(last.var(-1).mean()) == pytest.approx(view, rel=0.04)
    if read is not None:
        assert float(reads[-1].var(-1).mean()) == pytest.approx(read, rel=0.04)


def test_a_gated_stream_is_a_running_mean_of_its_branches() -> None:
    """One stream and gates of a half: s_l = Σ_i 2^-(l - i) f_i; none is larger than the largest branch."""
    path = path_of("multi_gate", hidden=32, streams=1, gate_bias=0.0)
    last, _ = streams_by_depth(path, 32, 8)
    closed = drawn((64, 1, 32), 0) / 2**8 + sum(drawn((64, 1, 32), i + 1) / 2 ** (8 - i) for i in range(8))
    torch.testing.assert_close(last, closed)


def test_streams_with_equal_biases_stay_equal() -> None:
    for spread, differs in ((0.0, False), (2.0, True)):
        path = path_of("multi_gate", hidden=32, streams=3, spread=spread)
        state = path.expansion()(drawn((8, 1, 32), 0))
        for branch in range(4):
            state = path.join(branch)(drawn((8, 1, 32), branch + 1), state)
        first, *others = state.split(32, dim=-1)
        assert any(not torch.equal(first, other) for other in others) == differs


def test_shut_gates_leave_the_embedding() -> None:
    path = path_of("multi_gate", hidden=32, gate_bias=-200.0, spread=0.0)
    last, _ = streams_by_depth(path, 32, 8)
    assert torch.equal(last, drawn((64, 1, 32), 0))


def test_a_long_stream_in_bf16_forgets_what_keel_adds() -> None:
    """A direction that 1,024 branches repeat: the stream takes it up in fp32, and rounds it away in bf16."""
    path = path_of("keel", hidden=256, alpha=1024.0)
    direction, found = drawn((1, 1, 256), 1), {}
    for dtype in (torch.float32, torch.bfloat16):
        state, join = drawn((1, 1, 256), 0).to(dtype), path.join(0)
        with torch.no_grad():
            for _ in range(1024):
                state = join(direction.to(torch.bfloat16), state)
        found[dtype] = float(torch.cosine_similarity(state.float(), direction, dim=-1))
    assert found[torch.float32] > 0.7 and found[torch.bfloat16] < 0.3


def test_doubly_stochastic() -> None:
    """Columns of Sinkhorn's matrix are exact, its rows nearly; a mean of permutations is exact in both."""
    for mixing, rows in (("sinkhorn", 0.1), ("permutations", 1e-6)):
        join = path_of("manifold_hyper_connections", streams=4, mixing=mixing).join(0)
        matrix = join.matrix(2 * drawn((50, join.mixing_bias.numel()), 3))
        torch.testing.assert_close(matrix.sum(-2), torch.ones(50, 4), rtol=0, atol=1e-6)
        assert float((matrix.sum(-1) - 1).abs().max()) < rows


@contextlib.contextmanager
def fresh_model(*overrides: str) -> Iterator[Any]:
    """A GPTModel with the values that it begins at."""
    from sparsecod_megatron.model import unwrap

    with small_trainer(*overrides) as trainer:
        yield unwrap(trainer.models[0]).eval()


def losses(*overrides: str, steps: int = 1) -> list[float]:
    from sparsecod_megatron.train.step import train_step

    with small_trainer("model.num_layers=4", "model.init_method_std=0.2", *overrides) as trainer:
        data = trainer_batches(trainer)
        return [train_step(trainer, data).loss for _ in range(steps)]


NORMS = ("RMSNorm", "LayerNorm")


@pytest.mark.parametrize("setting", ["hyper_connections={streams: 4}", "dense_average={}"])
@pytest.mark.parametrize("norm", NORMS)
def test_begins_as_the_plain_model_bit_for_bit(setting: str, norm: str) -> None:
    kind = f"model.normalization={norm}"
    plain, own = losses(kind, steps=2), losses(kind, f"mechanisms.{setting}", steps=2)
    assert own[0].hex() == plain[0].hex() and own[1] != plain[1]


NEARLY_PLAIN = [
    "attention_residuals={block_layers: 0}",
    "attention_residuals={block_layers: 4}",
    "manifold_hyper_connections={scale: 0}",
]


@pytest.mark.parametrize("setting", NEARLY_PLAIN)
def test_begins_as_the_plain_model_up_to_the_epsilon_of_norms(setting: str) -> None:
    """A mean in place of a sum, and two gates of a half, vanish in the norm behind them."""
    eps = "model.layernorm_epsilon=1e-12"
    assert losses(f"mechanisms.{setting}", eps) == pytest.approx(losses(eps), rel=1e-6)


def test_a_siamese_model_without_its_post_norm_stream_is_plain() -> None:
    """Post-norm gains of 0 leave the pre-norm stream, whose first norm the second one repeats."""
    with fresh_model("model.layernorm_epsilon=1e-12", "mechanisms.siamese_norm={}") as model, torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_bda.write" in name or "expansion" in name:
                parameter.zero_()
        siamese = run_forward(model, TOKENS)
    with fresh_model("model.layernorm_epsilon=1e-12") as model, torch.no_grad():
        torch.testing.assert_close(siamese, run_forward(model, TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hyper_connections", "manifold_hyper_connections", "multi_gate"])
def test_streams_part(name: str) -> None:
    """What begins as one stream n times over does not stay so."""
    from tests.helpers.training import recorded_steps

    settings = (f"mechanisms.{name}={{streams: 3}}", "statistics.mechanisms.interval=1", "optimizer.lr=1e-2")
    with small_trainer("model.num_layers=4", *settings) as trainer:
        steps = recorded_steps(trainer, trainer_batches(trainer), range(1, 5))["layers"]
    cosines = [[layer["stream_cosine"] for layer in layers] for layers in steps]
    assert min(cosines[-1]) < 1 - 1e-6 and min(cosines[-1]) < min(cosines[0])


def test_depth_weights_are_those_of_the_reads() -> None:
    """Half and half at first, and all of the source that a large query points at."""
    from sparsecod_megatron.mechanisms.residual.reports import depth_reports

    path = path_of("attention_residuals", block_layers=1)
    read, found = path.read(2), []
    read.observe = lambda weights: found.append(depth_reports(weights))
    state = drawn((4, 2, path.columns * HIDDEN), 1)
    read(state)
    read.query.data = 50 * state[0, 0, HIDDEN : 2 * HIDDEN]
    read(state[:1, :1])
    assert float(found[0]["depth_weight_1"].mean()) == 0.5 and float(found[0]["depth_entropy"].mean()) == 1
    assert float(found[1]["depth_weight_1"]) > 0.99 and float(found[1]["depth_entropy"]) < 0.1


def test_singular_values_of_mixing_matrices_by_hand() -> None:
    """A turn keeps all, equal streams nothing but their mean, and a stretched one is a gain."""
    from sparsecod_megatron.mechanisms.residual.reports import mixing_reports

    turn, mean = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.full((2, 2), 0.5)
    mixing = torch.stack([turn, mean, torch.diag(torch.tensor([0.25, 3.0]))])
    found = mixing_reports(mixing, torch.ones(3, 2), drawn((3, 2, HIDDEN), 1))
    torch.testing.assert_close(found["mix_gain"], torch.tensor([1.0, 1.0, 3.0]))
    torch.testing.assert_close(found["mix_second"], torch.tensor([1.0, 0.0, 0.25]))


def test_an_unwritten_slot_is_no_source() -> None:
    """The state's later slots may hold anything when an earlier branch reads."""
    path = path_of("attention_residuals", block_layers=1)
    read, _ = random_module(path.read(3))
    state = drawn((4, 2, path.columns * HIDDEN), 1)
    other = state.clone()
    other[..., 3 * HIDDEN :] = 100.0
    assert torch.equal(read(state), read(other))


@pytest.mark.parametrize("name", PATHS)
def test_statistics_see_one_stream(name: str) -> None:
    """Never the packed state; what is read, what a branch hands on, and the path's view of what a layer leaves."""
    from sparsecod_megatron.metrics.hooks import observing

    seen: dict[tuple[int, str], Tensor] = {}
    settings = "{scale: 0}" if name == "manifold_hyper_connections" else "{}"
    with fresh_model(f"mechanisms.{name}={settings}", "model.num_layers=3") as model, torch.no_grad():
        with observing([model], lambda layer, place, x: seen.__setitem__((layer, place), x)):
            run_forward(model, TOKENS)
        assert all(x.shape[-1] == 32 for x in seen.values()) and len(seen) == 15
        if name in ("attention_residuals", "hyper_connections", "manifold_hyper_connections"):
            added = sum(seen[layer, place] for layer in range(3) for place in ("attn", "mlp"))
            torch.testing.assert_close(seen[2, "out"] - seen[0, "attn_in"] * _read_factor(name), added)


def _read_factor(name: str) -> float:
    """The embedding over what the first branch reads: two of four gates open."""
    return 0.5 if name == "manifold_hyper_connections" else 1.0


@pytest.mark.parametrize("name", PATHS)
def test_parameters_never_decay_and_are_marked(name: str) -> None:
    """What no rank shares is summed under sequence parallelism, and no matrix is orthogonalised."""
    overrides = (*SMALL, f"mechanisms.{name}={{}}")
    table = ParameterTable.of(load_config(None, overrides, mechanisms=MECHANISMS))
    from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS

    with megatron_model(*overrides) as model:
        kinds = {name: table.find(name) for name, _ in model.named_parameters()}
        own = {name: value for name, value in model.named_parameters() if ".read." in name or ".write." in name}
        for parameter_name, parameter in own.items():
            kind = kinds[parameter_name]
            assert kind.group in (NEVER_DECAYS, "norms") and not kind.is_orthogonalised or kind.group == "norms"
            assert hasattr(parameter, "sequence_parallel") and parameter.is_embedding_or_output_parameter
        assert own or name in ("scaled", "layer_drop")


def test_muon_leaves_mixing_matrices_to_adamw() -> None:
    assert all(map(math.isfinite, losses("mechanisms.manifold_hyper_connections={}", "optimizer.optimizer=muon")))


def test_dropped_layers_are_those_of_the_step() -> None:
    """A layer that a step leaves out hands its stream on; over many steps as often as it should; and none outside."""
    from sparsecod_megatron.mechanisms.residual.layer_drop import LayerDrop
    from sparsecod_megatron.seams.plugin import StepContext

    drop = LayerDrop(rate=0.4)
    with small_trainer("model.num_layers=3", "mechanisms.layer_drop.rate=0.4") as trainer:
        model, (plugin,) = trainer.config.model, trainer.plugins
        factors = [[drop.factor(model, layer, step) for layer in range(3)] for step in range(1, 2001)]
        shares = [sum(found[layer] == 0 for found in factors) / 2000 for layer in range(3)]
        assert shares == pytest.approx([0, 0.2, 0.4], abs=0.04)
        means = [sum(found[layer] for found in factors) / 2000 for layer in range(3)]
        assert means == pytest.approx([1, 1, 1], abs=0.06)
        step = next(step for step in range(1, 99) if drop.factor(model, 2, step) == 0)
        layer = trainer.models[0].module.decoder.layers[2]
        branch, x = drawn((4, 2, 32), 1), drawn((4, 2, 32), 2)
        with plugin.extra_loss(StepContext(step, 99), 1):
            assert torch.equal(layer.mlp_bda(True, False)((branch, None), x, 0.0), x)
        assert torch.equal(layer.mlp_bda(True, False)((branch, None), x, 0.0), x + branch)


def test_deepnorm_is_a_scaled_post_norm() -> None:
    """N(α x + f): the factor is the stream's, inside the norm."""
    deep = ("model.norm_placement=post", "mechanisms.scaled.skip=2")
    with fresh_model(*deep) as model, torch.no_grad():
        layer = model.decoder.layers[0]
        branch, x = drawn((4, 2, 32), 1), drawn((4, 2, 32), 2)
        joined = layer.self_attn_bda(False, False)((branch, None), x, 0.0)
        expected = (2 * x + branch) * torch.rsqrt((2 * x + branch).square().mean(-1, keepdim=True) + 1e-5)
        torch.testing.assert_close(joined, expected)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["mechanisms.keel={}", "mechanisms.delta={}"],
            "delta: the residual path is mechanisms.keel's; keep",
        ),
        (
            ["mechanisms.keel={}", "model.norm_placement=post"],
            "norm_placement: post, but mechanisms.keel takes pre",
        ),
        (
            ["mechanisms.keel={}", "model.layernorm_scaling=true"],
            "true, but mechanisms.keel has norms",
        ),
        (
            ["mechanisms.keel={}", "model.normalization=LayerNorm"],
            "normalization: LayerNorm, but mechanisms.keel has RMSNorms",
        ),
        (
            ["mechanisms.delta={}", "model.norm_placement=parallel"],
            "norm_placement: parallel, but mechanisms.delta takes pre",
        ),
        (
            ["mechanisms.siamese_norm={}", "model.layernorm_scaling=true"],
            "siamese_norm has norms of its own",
        ),
        (
            ["mechanisms.keel={}", "model.num_layers=128", "precision.dtype=bf16"],
            "mechanisms.keel.state_dtype: params is bf16, in which a branch of 1/256 of the stream is rounded away",
        ),
        (["mechanisms.attention_residuals.block_layers=0", "model.num_layers=25"], "block_layers: 0 keeps 50 sources"),
        (
            ["mechanisms.dense_average={}", "model.num_layers=16", "parallel.pipeline_model_parallel_size=2"],
            "mechanisms.dense_average: 17 vectors per token are too many for pipeline messages",
        ),
        (
            ["mechanisms.manifold_hyper_connections={streams: 5, mixing: permutations}"],
            "streams: 5 have 120 permutations; give at most 4, or mixing=sinkhorn",
        ),
        (["mechanisms.scaled.branch=0.5", "model.init=scaled"], "model.init: scaled makes branches small at depth"),
        (["mechanisms.keel={}", "megatron.fp32_residual_connection=true"], "megatron.fp32_residual_connection"),
        (["mechanisms.keel={}", "megatron.mtp_num_layers=1"], "megatron.mtp_num_layers"),
        (
            ["mechanisms.keel={}", "megatron.fine_grained_activation_offloading=true"],
            "fine_grained_activation_offloading",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert words in str(refused.value) and "\n" not in str(refused.value)
