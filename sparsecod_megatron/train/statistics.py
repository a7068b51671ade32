"""Which groups of layer statistics a run collects, and when."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.enums import AttnMaskType

from sparsecod_megatron.metrics import StatisticsCollector, StatisticsGroup, VarianceGroup
from sparsecod_megatron.metrics.activation import ActivationGroup
from sparsecod_megatron.metrics.gradient_spikes import GradientSpikesGroup
from sparsecod_megatron.metrics.moments import MomentsGroup
from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
from sparsecod_megatron.metrics.reference import ReferenceGroup
from sparsecod_megatron.metrics.router import RouterGroup
from sparsecod_megatron.model import unwrap
from sparsecod_megatron.model.attention import SDPAttention
from sparsecod_megatron.model.specs import spec_provider
from sparsecod_megatron.seams.mechanism import configured
from sparsecod_megatron.train.setup import Trainer


def statistics_collector(trainer: Trainer) -> StatisticsCollector:
    """The collector of this run's `statistics` section. Local."""
    section = trainer.config.statistics
    models = [unwrap(model) for model in trainer.models]
    intervals = {
        "variance": section.variance.interval,
        "moments": section.moments.interval,
        "norms": section.norms.interval,
        "spikes": section.spikes.interval,
        "router": section.router.interval if trainer.config.model.is_moe else 0,
        "activation": section.activation.interval,
        "reference": section.variance.interval if section.compat == "reference" else 0,
    }
    assert isinstance(trainer.optimizer, ChainedOptimizer)
    groups: dict[str, StatisticsGroup] = {}
    if intervals["variance"]:
        groups["variance"] = VarianceGroup(models)
    if intervals["moments"]:
        groups["moments"] = MomentsGroup(models)
    if intervals["norms"]:
        groups["norms"] = ParameterNormsGroup(models, trainer.optimizer)
    if intervals["spikes"]:
        groups["spikes"] = GradientSpikesGroup(models, trainer.optimizer)
    if intervals["router"]:
        groups["router"] = RouterGroup(models)
    if intervals["activation"]:
        groups["activation"] = _activation_group(trainer, models)
    if intervals["reference"]:
        groups["reference"] = ReferenceGroup(models)
    plugins = {plugin.name: plugin for plugin in trainer.plugins}
    for mechanism in configured(trainer.config) if section.mechanisms.interval else ():
        if (group := mechanism.statistics(models, plugins.get(mechanism.name))) is not None:
            groups[mechanism.name], intervals[mechanism.name] = group, section.mechanisms.interval
    return StatisticsCollector(
        groups, intervals, num_layers=trainer.config.model.num_layers, device=trainer.backend.device
    )


SAMPLED_QUERIES = 8
"""Those of each sequence whose attention to the first token is looked at."""


def _activation_group(trainer: Trainer, models: Sequence[GPTModel]) -> ActivationGroup:
    """The group, with what each attention's queries see: of Transformer Engine's, as the one without it says."""
    config = trainer.config
    plain = spec_provider(config.data, config.parallel, transformer_engine=False).core_attention()
    attentions = {}
    for layer in (layer for model in models for layer in model.decoder.layers):
        core = layer.self_attention.core_attention
        if not isinstance(core, SDPAttention):
            core = plain(
                layer.config,
                layer.layer_number,
                AttnMaskType.causal,
                "self",
                softmax_scale=getattr(layer.self_attention, "softmax_scale", layer.config.softmax_scale),
                pg_collection=trainer.groups,
            )
        attentions[layer.layer_number - 1] = core
    return ActivationGroup(models, attentions, sampling=max(1, config.data.seq_length // SAMPLED_QUERIES))
