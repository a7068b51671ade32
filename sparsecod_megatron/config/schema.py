"""Every key a run's YAML may hold, with its type, default and unit.

Names are Megatron-Core's own where it has one (TransformerConfig, OptimizerConfig, training arguments), so a Megatron
user reads them without a glossary. Bounds and choices sit in each field's metadata; what involves several keys is in
`check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsecod_megatron.config.fields import above, at_least, between, choice, choices_of, from_to_below, text_or_list
from sparsecod_megatron.config.model_schema import ModelConfig


@dataclass
class ParallelConfig:
    """How the model is spread over processes; the rest of the world size is data parallel."""

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
    fp8_recipe: str = choice("none", "delayed", "tensorwise", "blockwise", "mxfp8")
    """How Transformer Engine scales FP8 operands; `none` multiplies in `dtype`. mxfp8 needs Blackwell."""
    fp8_format: str = choice("hybrid", "e4m3")
    """`hybrid`: e4m3 forward, e5m2 for gradients."""
    fp8_amax_history_len: int = at_least(1, 1024)
    """Steps whose largest values set the scale, `delayed` only."""
    fp8_amax_compute_algo: str = choice("max", "most_recent")
    fp8_param_gather: bool = False
    """Keep and all-gather the compute copy of the weights in FP8."""
    num_layers_at_start_in_bf16: int = at_least(0, 0)
    num_layers_at_end_in_bf16: int = at_least(0, 0)

    @property
    def fp8(self) -> bool:
        """Whether matrix products run in FP8."""
        return self.fp8_recipe != "none"


@dataclass
class DataConfig:
    """Token files made by `sparsecod data`, or a synthetic task."""

    synthetic: dict[str, Any] = field(default_factory=dict)
    """A task in place of token files: `task` and its settings (docs/SYNTHETIC.md)."""
    prefix: str | None = None
    """PREFIX given to `sparsecod data --output`: stands for PREFIX_train, PREFIX_val and PREFIX_tokenizer."""
    train: Any = text_or_list()
    """Token files without suffix, or a list of them to blend: prefixes alone (sampled in proportion to their tokens) or
    weights and prefixes alternating, `[0.3, A_train, 0.7, B_train]`."""
    validation: Any = text_or_list()
    """The same for validation; each of several has its own loss, and their weighted mean is `validation_loss`."""
    tokenizer: str | None = None
    seq_length: int = at_least(1, 1024)
    cache_dir: str | None = None
    """Where Megatron's sample indices are kept; None is `index_cache` beside the token files."""
    num_workers: int = at_least(0, 0)
    allow_changed: bool = False
    """Resume even if token files, weights, `seq_length` or seed differ from those the checkpoint was trained with."""
    reset_attention_mask: bool = False
    """No attention across the documents of a sample."""
    reset_position_ids: bool = False
    """Positions start at 0 in every document; goes with `reset_attention_mask`."""


@dataclass
class OptimizerConfig:
    """AdamW on Megatron's distributed optimizer, or Muon; both with decoupled weight decay."""

    optimizer: str = choice("adam", "muon")
    """`muon`: momentum orthogonalised by Newton-Schulz for matrices, AdamW for embeddings, output layer and vectors."""
    lr: float = at_least(0, 4e-4)
    weight_decay: float = at_least(0, 0.1)
    adam_beta1: float = from_to_below(0, 1, 0.9)
    adam_beta2: float = from_to_below(0, 1, 0.95)
    adam_eps: float = above(0, 1e-8)
    clip_grad: float = at_least(0, 1.0)
    """Largest global gradient norm; 0 does not clip."""
    no_weight_decay: list[str] = choices_of(
        "norms", "biases", among=("norms", "biases", "embeddings", "output", "router")
    )
    """Parameters that do not decay: `norms` (QK-norms too), `biases`, `embeddings`, `output` (layer), `router`."""
    muon_momentum: float = from_to_below(0, 1, 0.95)
    muon_use_nesterov: bool = True
    muon_num_ns_steps: int = at_least(1, 5)
    muon_scale_mode: str = choice("spectral", "unit_rms_norm", "shape_scaling")
    """Factor on an orthogonalised [out, in] update: max(out, in)^½, (out/in)^½, or max(1, out/in)^½."""
    muon_extra_scale_factor: float = at_least(0, 0.2)
    """Another factor; 0.2 with `spectral` gives the update the RMS of an AdamW step, so that lr carries over."""
    muon_tp_mode: str = choice("duplicated", "blockwise", "distributed")
    """Orthogonalise whole matrices (gathered, or by distributed products) or each tensor-parallel shard by itself."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up from 0, then decay to `min_lr_ratio · lr`."""

    lr_decay_style: str = choice("cosine", "linear", "WSD", "inverse-square-root", "constant")
    lr_warmup_steps: int = at_least(0, 0)
    lr_decay_steps: int | None = at_least(1, None)
    """Step at which the minimum is reached; None is `train.train_steps`."""
    min_lr_ratio: float = between(0, 1, 0.1)
    lr_wsd_decay_steps: int | None = at_least(1, None)
    """WSD: last steps of `lr_decay_steps`, in which the rate falls; constant before."""
    lr_wsd_decay_style: str = choice("linear", "cosine", "exponential", "minus_sqrt")


@dataclass
class TrainConfig:
    """Length of the run, batch sizes, validation, and what happens when a step goes wrong."""

    train_steps: int = at_least(1, 1000)
    global_batch_size: int = at_least(1, 8)
    """Sequences per optimizer step, over all data-parallel ranks."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: the global batch grows from start to `global_batch_size` over that many samples."""
    micro_batch_size: int = at_least(1, 1)
    """Sequences per forward pass of one rank."""
    exit_step: int | None = at_least(1, None)
    """Save and stop after this step; the schedule remains that of `train_steps`."""
    seed: int = between(0, 2**31, 1234)
    eval_interval: int = at_least(0, 100)
    """Steps between validations; 0 never validates; otherwise the last step always does."""
    eval_steps: int = at_least(1, 10)
    """Global batches of one validation."""
    step_timeout_s: float = at_least(0, 1800.0)
    """Longest time for a phase of a step (or a save, or a validation) before the process gives up; 0: no limit."""
    manual_gc_interval: int = at_least(0, 100)
    """Steps between garbage collections, which all ranks do in the same step; 0 leaves them to Python."""
    on_divergence: str = choice("stop", "skip", "rollback")
    """If loss or gradient is non-finite: stop, skip the update, or go back to the last checkpoint's weights."""
    max_divergences: int = at_least(1, 10)
    """Stop after this many skipped steps in a row, or rollbacks to the same checkpoint."""
    spike_window: int = at_least(0, 128)
    """Steps whose median and MAD define a spike of loss or gradient norm; 0 turns spike detection off."""
    spike_threshold: float = at_least(1, 8.0)
    """A value is a spike from this many standard deviations (1.4826 MAD) above the median."""
    spike_skip: bool = False
    """Leave out the update of a spike, at most `max_divergences` in a row."""


@dataclass
class IntervalConfig:
    """Steps between collections of a group of statistics; 0 is never."""

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
    """Load, probabilities and losses of every router; none for dense layers."""
    spikes: IntervalConfig = field(default_factory=IntervalConfig)
    """Gradient elements far above what Adam's second moment expects of them."""
    activation: IntervalConfig = field(default_factory=IntervalConfig)
    """Zero, small, dead and always-on units of MLPs, gates of attention, attention on the first token."""
    mechanisms: IntervalConfig = field(default_factory=lambda: IntervalConfig(interval=10))
    """What the configured mechanisms say of themselves; nothing without any."""
    compat: str = choice("none", "reference")
    """`reference` adds the published code's own numbers as `ref_*`, whenever the variance is collected."""


@dataclass
class CheckpointConfig:
    """What is saved, how many checkpoints are kept, and what a run starts from."""

    save_interval: int = at_least(0, 1000)
    """Steps between checkpoints; 0 saves only the last step."""
    save_steps: list[int] = field(default_factory=list)
    """Further steps that are saved, and kept whatever `keep_last` says."""
    async_save: bool = False
    """Write in processes beside the training; a checkpoint counts once every rank's part is there."""
    save_timeout_s: float = at_least(0, 1800.0)
    """A save that takes longer is abandoned: an asynchronous run continues, a synchronous one stops. 0: no limit."""
    keep_last: int = at_least(0, 0)
    """Newest checkpoints to keep when another is saved; 0 keeps all."""
    keep_every: int = at_least(0, 0)
    """Checkpoints of steps that this divides are kept whatever `keep_last` says; 0: `keep_last` alone decides."""
    verify: bool = True
    """Compare every file's SHA-256 with the manifest before loading; false compares sizes only."""
    resume: bool = True
    """Resume from RUN/checkpoints/latest if there is one, or from the one before it if that is damaged."""
    init_from: str | None = None
    """A step directory whose weights (not optimizer, schedule or data position) a fresh run starts from. What a
    mechanism keeps there, masks for one, stays in force where this run has the same mechanism."""
    branch_from: str | None = None
    """`RUN`, `RUN@STEP` or a step directory that a fresh run continues with all it holds (weights, optimizer, step,
    random states, position in the data) under its own schedule; its parents go into RUN/lineage.json."""
    densify: bool = False
    """`init_from`: leave behind what mechanisms keep there, so that weights which masks held at zero train again."""


@dataclass
class EvaluationConfig:
    """lm-eval tasks on the running model, as `sparsecod eval` scores a checkpoint; see docs/EVALUATION.md."""

    interval: int = at_least(0, 0)
    """Steps between evaluations; each saves a checkpoint and evaluates that. 0 never evaluates."""
    tasks: list[str] = field(default_factory=list)
    """Names of tasks, groups or tags; `paper` stands for the paper's tasks."""
    include_path: str | None = None
    """Folder with more task YAML files."""
    limit: int | None = at_least(1, None)
    """Questions per task; None asks all."""
    batch_size: int = at_least(1, 8)
    """Requests per forward pass."""
    timeout_s: float = at_least(0, 0.0)
    """Longest time that an evaluation may take, in place of `train.step_timeout_s`; 0: no limit."""


@dataclass
class WandbConfig:
    """Weights & Biases; `mode: offline` writes locally and needs no account."""

    mode: str = choice("disabled", "online", "offline")
    project: str = "sparsecod"
    name: str | None = None


@dataclass
class LoggingConfig:
    """Where the run writes, and how often."""

    run_dir: str = "runs/default"
    log_interval: int = at_least(1, 1)
    """Steps between lines of metrics.jsonl; the first, the last and every validated step also have one."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Also write TensorBoard event files, in RUN/tensorboard."""


@dataclass
class ProfileConfig:
    """What a few steps spend their time and memory on, written to RUN/profile; see docs/how-to/profile-a-run.md."""

    steps: list[int] = field(default_factory=list)
    """[first, last] of the steps to trace; empty traces none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Processes that trace."""
    memory: bool = False
    """Allocations in the trace too, and on CUDA a snapshot of the allocator."""
    layers: bool = False
    """Ranges with the names of layers and their parts, in the trace and (NVTX) for Nsight Systems."""


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mechanisms: dict[str, Any] = field(default_factory=dict)
    """What the model or its training has beside the above, by name: objects of `seams.mechanism.Mechanism` once the
    file is read. null switches one off."""
    backend: str = choice("auto", "cpu", "cuda")
    cpu_kernels: str = choice("fast", "plain", "compiled")
    """On CPU: the fastest eager functions, torch's and Megatron-Core's own, or `fast` with compiled formulas."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any other field of TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, by its own name."""

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate reaches its minimum; follows `train.train_steps` unless set."""
        return self.schedule.lr_decay_steps or self.train.train_steps
