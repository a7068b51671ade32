"""Learning rate and weight decay by step, Megatron-Core's."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sparsecod_megatron.config import RunConfig


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The schedule of a run at step 0. Local.

    With step s (from 1), warm-up w, decay d, peak p and minimum m, p · s / w up to w; then, with r = (s − w) / (d − w),

        cosine               m + (p − m) · (1 + cos πr) / 2
        linear               m + (p − m) · (1 − r)
        inverse-square-root  max(m, p · √(w / s)), w at least 1
        WSD                  p up to d − n, then m + (p − m) · f(t), t = (s − d + n) / n, n = lr_wsd_decay_steps, f(t)
                             one of linear 1 − t, cosine (1 + cos πt) / 2, exponential 2^(1 − t) − 1, minus_sqrt 1 − √t

    and m after d; `constant` stays at p. A step counts once, whatever the size of its batch. Parameter groups with
    `max_lr` and `min_lr` of their own follow the same curve between those.

    Args:
        config: a checked run.
        optimizer: whose parameter groups are steered.

    Source: Megatron-Core optimizer_param_scheduler.py; Hu et al., MiniCPM (arXiv 2404.06395) for WSD.
    """
    schedule, section = config.schedule, config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * schedule.min_lr_ratio,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=config.decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        wsd_decay_steps=schedule.lr_wsd_decay_steps,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=config.train.train_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def nominal_lr(scheduler: OptimizerParamScheduler) -> float:
    """The current rate of parameters whose group has none of its own."""
    return float(scheduler.get_lr({}))
