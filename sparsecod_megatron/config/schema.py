"""Every key a run's YAML may hold, with its type, default and unit.

Names are Megatron-Core's own where it has one (TransformerConfig, OptimizerConfig, training arguments), so a Megatron
user reads them without a glossary. Bounds and choices sit in each field's metadata; what involves several keys is in
`check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def choice(default: str, *others: str) -> Any:
    """A string field with a closed set of values, the default first."""
    return field(default=default, metadata={"choices": (default, *others)})


def at_least(minimum: float, default: Any) -> Any:
    """A number field (or an optional one) that is refused below `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


def between(minimum: float, maximum: float, default: Any) -> Any:
    """A number field refused outside [minimum, maximum]."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass
class ModelConfig:
    """Shape and initialisation of the transformer.

    Defaults that are None are derived when the file is read: `num_query_groups` = `num_attention_heads` (MHA),
    `kv_channels` = `hidden_size / num_attention_heads`, `moe_ffn_hidden_size` = `ffn_hidden_size`. `vocab_size` comes
    from the tokenizer, rounded up to `make_vocab_size_divisible_by` whatever the layout, so that every layout trains
    and exports the same tensors.
    """

    num_layers: int = at_least(1, 12)
    hidden_size: int = at_least(1, 768)
    ffn_hidden_size: int = at_least(1, 2048)
    num_attention_heads: int = at_least(1, 12)
    num_query_groups: int | None = at_least(1, None)
    kv_channels: int | None = at_least(2, None)
    vocab_size: int | None = at_least(1, None)
    make_vocab_size_divisible_by: int = at_least(1, 128)
    untie_embeddings_and_output_weights: bool = True
    activation: str = choice("swiglu")
    normalization: str = choice("RMSNorm")
    layernorm_epsilon: float = at_least(0, 1e-5)
    rotary_base: int = at_least(1, 10000)
    hidden_dropout: float = between(0, 1, 0.0)
    attention_dropout: float = between(0, 1, 0.0)
    init: str = choice("normal", "scaled")
    """`normal`: every matrix N(0, init_method_std). `scaled`: output projections over sqrt(2 · num_layers)."""
    init_method_std: float = at_least(0, 0.02)

    num_moe_experts: int | None = at_least(1, None)
    """None is a dense model; the keys below then have no effect."""
    moe_router_topk: int = at_least(1, 2)
    moe_ffn_hidden_size: int | None = at_least(1, None)
    moe_shared_expert_intermediate_size: int | None = at_least(1, None)
    """Summed width of the shared experts, added ungated to the routed output; None has none."""
    moe_router_load_balancing_type: str = choice("aux_loss", "seq_aux_loss", "none")
    moe_aux_loss_coeff: float = at_least(0, 1e-2)
    moe_z_loss_coeff: float = at_least(0, 1e-3)
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k, not renormalised. False: top-k, then softmax over the chosen."""

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return self.num_moe_experts is not None


@dataclass
class ParallelConfig:
    """How the model is spread over processes; what is left of the world size is data parallel."""

    tensor_model_parallel_size: int = at_least(1, 1)
    pipeline_model_parallel_size: int = at_least(1, 1)
    virtual_pipeline_model_parallel_size: int | None = at_least(2, None)
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: int = at_least(1, 1)
    expert_model_parallel_size: int = at_least(1, 1)
    expert_tensor_parallel_size: int | None = at_least(1, None)
    """Tensor parallelism inside an expert; None follows `tensor_model_parallel_size`."""
    sequence_parallel: bool = False

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel size of the experts."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Processes that together hold one replica and one batch element."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class PrecisionConfig:
    """Number formats of weights and activations; the optimizer's master weights and moments are always fp32."""

    dtype: str = choice("bf16", "fp32")


@dataclass
class DataConfig:
    """Token files made by `sparsecod data`."""

    prefix: str | None = None
    """PREFIX given to `sparsecod data --output`: stands for PREFIX_train, PREFIX_val and PREFIX_tokenizer."""
    train: str | None = None
    validation: str | None = None
    tokenizer: str | None = None
    seq_length: int = at_least(1, 1024)
    cache_dir: str | None = None
    """Where Megatron's sample indices are kept; None is `index_cache` beside the token files."""
    num_workers: int = at_least(0, 0)


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (none on norms and biases), on Megatron's distributed optimizer."""

    lr: float = at_least(0, 4e-4)
    weight_decay: float = at_least(0, 0.1)
    adam_beta1: float = between(0, 1, 0.9)
    adam_beta2: float = between(0, 1, 0.95)
    adam_eps: float = at_least(0, 1e-8)
    clip_grad: float = at_least(0, 1.0)
    """Largest global gradient norm; 0 does not clip."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up from 0, then decay to `min_lr_ratio · lr`."""

    lr_decay_style: str = choice("cosine", "linear", "constant")
    lr_warmup_steps: int = at_least(0, 0)
    lr_decay_steps: int | None = at_least(1, None)
    """Step at which the minimum is reached; None is `train.train_steps`."""
    min_lr_ratio: float = between(0, 1, 0.1)


@dataclass
class TrainConfig:
    """How long and in what portions."""

    train_steps: int = at_least(1, 1000)
    global_batch_size: int = at_least(1, 8)
    """Sequences per optimizer step, over all data-parallel ranks."""
    micro_batch_size: int = at_least(1, 1)
    """Sequences per forward pass of one rank."""
    exit_step: int | None = at_least(1, None)
    """Save and stop after this step, leaving the schedule that of `train_steps`."""
    seed: int = at_least(0, 1234)
    eval_interval: int = at_least(0, 100)
    """Steps between validations; 0 never validates. The last step always does otherwise."""
    eval_steps: int = at_least(1, 10)
    """Global batches of one validation."""


@dataclass
class IntervalConfig:
    """Every how many steps a group of statistics is collected; 0 is never."""

    interval: int = at_least(0, 0)


@dataclass
class StatisticsConfig:
    """Layer statistics, by group, each with its own interval (definitions: docs/STATISTICS.md)."""

    variance: IntervalConfig = field(default_factory=lambda: IntervalConfig(interval=10))
    """Variance, RMS and ratio of the residual stream and the branches."""
    moments: IntervalConfig = field(default_factory=IntervalConfig)
    """Cosine, skewness, kurtosis, outliers, top mass, massive activations."""
    norms: IntervalConfig = field(default_factory=IntervalConfig)
    """Gradient and parameter norms, and the ratio of the real update to the weights."""
    router: IntervalConfig = field(default_factory=IntervalConfig)
    """Load, probabilities and losses of every router; nothing for dense layers."""
    compat: str = choice("none", "reference")
    """`reference` adds the published code's own numbers as `ref_*`, whenever the variance is collected."""


@dataclass
class CheckpointConfig:
    """What is kept and what a run starts from."""

    save_interval: int = at_least(0, 1000)
    """Steps between checkpoints; 0 saves only the last step."""
    resume: bool = True
    """Go on from RUN/checkpoints/latest if there is one."""
    init_from: str | None = None
    """A step directory whose weights (not optimizer, schedule or data position) a fresh run starts from."""


@dataclass
class WandbConfig:
    """Weights & Biases; `mode: offline` writes locally and needs no account."""

    mode: str = choice("disabled", "online", "offline")
    project: str = "sparsecod"
    name: str | None = None


@dataclass
class LoggingConfig:
    """Where and how often."""

    run_dir: str = "runs/default"
    log_interval: int = at_least(1, 1)
    """Steps between lines of metrics.jsonl; the first, the last and every validated step have one too."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Also write TensorBoard event files, in RUN/tensorboard."""


@dataclass
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    backend: str = choice("auto", "cpu", "cuda")
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any other field of TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, by its own name."""
