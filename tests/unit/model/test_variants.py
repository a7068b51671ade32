"""Every variant of the family against the plain reference: logits, residual streams and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.reference_gpt import forward
from tests.helpers.reference_mlp import router_losses
from tests.helpers.training import fresh_router_losses
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

select_backend()

from sparsecod_megatron.train.forward import pack_documents  # noqa: E402

LENGTH = 16


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(overrides: tuple[str, ...], *, seed: int = 0) -> None:
    """Loss, logits and gradients of one micro-batch."""
    config = load_config(None, [*SMALL, *overrides]).model
    torch.manual_seed(seed)
    # Gradients in `.grad`, which the fused accumulation keeps in the data-parallel wrapper's buffer.
    plain = "megatron.gradient_accumulation_fusion=false"
    with fresh_router_losses(), megatron_model(*overrides, plain) as built:
        tokens = torch.randint(0, 64, (2, LENGTH))
        bias = {
            name: tensor.uniform_(-0.5, 0.5) for name, tensor in built.named_buffers() if name.endswith("expert_bias")
        }
        weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in built.named_parameters()}
        logits, blocks = forward(config, weights | bias, tokens)
        streams: list[torch.Tensor] = []
        for layer in built.decoder.layers:
            layer.register_forward_hook(lambda module, args, result: streams.append(result[0].transpose(0, 1)))
        ours = run_forward(built, tokens)
        for stream, block in zip(streams, blocks, strict=True):
            assert relative_error(stream, block) < 1e-5
        assert relative_error(ours, logits) < 1e-5

        labels = torch.randint(0, 64, tokens.shape)
        F.cross_entropy(ours.flatten(0, 1), labels.flatten()).backward()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        compare_gradients(built, weights)


def compare_gradients(built: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Every gradient to 1e-5 of the matrix's largest; an expert that no token chose has none."""
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert any(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        expected = weights[name].grad
        ours = torch.zeros_like(weights[name]) if gradient is None else gradient
        theirs = torch.zeros_like(weights[name]) if expected is None else expected
        if bool(theirs.any()):
            assert relative_error(ours, theirs) < 1e-5, name
        else:
            assert not bool(ours.any()), name


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str) -> None:
    compare(DENSE[name])


NO_LOSSES = ("model.moe_aux_loss_coeff=0", "model.moe_z_loss_coeff=0")


@pytest.mark.parametrize("name", MOE)
def test_mixture(name: str) -> None:
    compare((*MOE_SHAPE, *NO_LOSSES, *MOE[name]))


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_losses_reach_the_gradients(kind: str, score: str) -> None:
    """With one micro-batch the global loss is the micro-batch's; coefficients far above those of practice."""
    overrides = (
        *MOE_SHAPE,
        f"model.moe_router_load_balancing_type={kind}",
        f"model.moe_router_score_function={score}",
        "model.moe_aux_loss_coeff=1",
        "model.moe_z_loss_coeff=0.1",
        "megatron.gradient_accumulation_fusion=false",
    )
    config = load_config(None, [*SMALL, *overrides]).model
    with fresh_router_losses(), megatron_model(*overrides) as built:
        tokens = torch.randint(0, 64, (3, LENGTH))
        weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in built.named_parameters()}
        inputs: dict[int, torch.Tensor] = {}
        logits, _ = forward(config, weights, tokens, router_inputs=inputs)
        labels = torch.randint(0, 64, tokens.shape)
        (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + router_losses(config, weights, inputs)).backward()
        F.cross_entropy(run_forward(built, tokens).flatten(0, 1), labels.flatten()).backward()
        compare_gradients(built, weights)


def test_documents_do_not_see_each_other() -> None:
    """A packed micro-batch equals a block-diagonal mask over each sample, and rotation is relative."""
    masked = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
    for kind in (("model.qk_norm=true",), ("model.qk_norm=true", "model.sliding_window=4"), DENSE["latents"]):
        config = load_config(None, [*SMALL, *masked, *kind]).model
        with megatron_model(*masked, *kind) as built:
            tokens = torch.randint(0, 64, (2, LENGTH))
            positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in ((5, 1, 10), (16,))])
            documents = (positions == 0).cumsum(1)
            weights = {name: tensor.detach() for name, tensor in built.named_parameters()}
            expected, _ = forward(config, weights, tokens, document_ids=documents)
            packed, packing = pack_documents({"tokens": tokens, "position_ids": positions})
            ours = built(packed["tokens"], packed["position_ids"], None, packed_seq_params=packing)
            assert relative_error(ours.view_as(expected), expected) < 1e-5
