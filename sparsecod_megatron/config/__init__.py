"""What a run is: typed sections, read from YAML and `a.b=c` overrides, refused in one line where they cannot run."""

from sparsecod_megatron.config.check import check_config, data_parallel_size
from sparsecod_megatron.config.load import load_config, save_config
from sparsecod_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    IntervalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    StatisticsConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "IntervalConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "StatisticsConfig",
    "TrainConfig",
    "WandbConfig",
    "check_config",
    "data_parallel_size",
    "load_config",
    "save_config",
]
