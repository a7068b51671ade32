"""Layer statistics: hooks observe, an accumulator carries sums, one reduction makes them exact, writers keep them."""

from sparsecod_megatron.metrics.collector import StatisticsCollector
from sparsecod_megatron.metrics.group import Statistics, StatisticsGroup
from sparsecod_megatron.metrics.variance import VarianceGroup
from sparsecod_megatron.metrics.writers import JsonlWriter, Writer

__all__ = ["JsonlWriter", "Statistics", "StatisticsCollector", "StatisticsGroup", "VarianceGroup", "Writer"]
