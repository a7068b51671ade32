"""Sweeps: the paper's tables and figures, run from one YAML file each."""

from sparsecod_megatron.studies.grid import Cell, Study, load_study

__all__ = ["Cell", "Study", "load_study"]
