"""Which groups of layer statistics a run collects, and when."""

from __future__ import annotations

from megatron.core.optimizer.optimizer import ChainedOptimizer

from sparsecod_megatron.metrics import StatisticsCollector, StatisticsGroup, VarianceGroup
from sparsecod_megatron.metrics.gradient_spikes import GradientSpikesGroup
from sparsecod_megatron.metrics.moments import MomentsGroup
from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
from sparsecod_megatron.metrics.reference import ReferenceGroup
from sparsecod_megatron.metrics.router import RouterGroup
from sparsecod_megatron.model import unwrap
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
    if intervals["reference"]:
        groups["reference"] = ReferenceGroup(models)
    plugins = {plugin.name: plugin for plugin in trainer.plugins}
    for mechanism in configured(trainer.config) if section.mechanisms.interval else ():
        if (group := mechanism.statistics(models, plugins.get(mechanism.name))) is not None:
            groups[mechanism.name], intervals[mechanism.name] = group, section.mechanisms.interval
    return StatisticsCollector(
        groups, intervals, num_layers=trainer.config.model.num_layers, device=trainer.backend.device
    )
