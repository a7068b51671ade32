"""Layer statistics: probes observe, an accumulator carries sums, one reduction makes them exact, writers keep them."""

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.variance import VarianceProbe
from sparsecod_megatron.metrics.writers import JsonlWriter, Writer

__all__ = ["JsonlWriter", "LayerAccumulator", "VarianceProbe", "Writer"]
