"""HuggingFace models: which class expresses ours, the two-way name tables, export, import, and the logit-parity gate.

Importing this package makes transformers know the `sparsecod` architecture.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sparsecod_megatron.hf.configuration_sparsecod import SparsecodConfig
from sparsecod_megatron.hf.export import export_model
from sparsecod_megatron.hf.families import Family, choose_family
from sparsecod_megatron.hf.modeling_sparsecod import SparsecodForCausalLM, SparsecodModel
from sparsecod_megatron.hf.parity import ParityReport, compare_logits
from sparsecod_megatron.hf.table import Entry, NameTable

AutoConfig.register(SparsecodConfig.model_type, SparsecodConfig, exist_ok=True)
AutoModel.register(SparsecodConfig, SparsecodModel, exist_ok=True)
AutoModelForCausalLM.register(SparsecodConfig, SparsecodForCausalLM, exist_ok=True)

__all__ = [
    "Entry",
    "Family",
    "NameTable",
    "ParityReport",
    "SparsecodConfig",
    "SparsecodForCausalLM",
    "choose_family",
    "compare_logits",
    "export_model",
]
