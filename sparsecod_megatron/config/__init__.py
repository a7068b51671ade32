"""What a run is: typed sections, read from YAML and `a.b=c` overrides, refused in one line where they cannot run."""

from sparsecod_megatron.config.check import check_config, data_parallel_size, with_vocab_size
from sparsecod_megatron.config.check_batch import batch_sizes
from sparsecod_megatron.config.load import load_config, save_config
from sparsecod_megatron.config.model_schema import ACTIVATIONS_WITH_GATE, InitStdConfig, ModelConfig
from sparsecod_megatron.config.presets import preset_names
from sparsecod_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    IntervalConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    StatisticsConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "ACTIVATIONS_WITH_GATE",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "InitStdConfig",
    "IntervalConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleConfig",
    "StatisticsConfig",
    "TrainConfig",
    "WandbConfig",
    "batch_sizes",
    "check_config",
    "data_parallel_size",
    "load_config",
    "preset_names",
    "save_config",
    "with_vocab_size",
]
