"""HuggingFace models: which stock class expresses ours, the two-way name tables, export, and the logit-parity gate."""

from sparsecod_megatron.hf.export import export_model
from sparsecod_megatron.hf.families import Family, choose_family
from sparsecod_megatron.hf.parity import ParityReport, compare_logits
from sparsecod_megatron.hf.table import Entry, NameTable

__all__ = ["Entry", "Family", "NameTable", "ParityReport", "choose_family", "compare_logits", "export_model"]
