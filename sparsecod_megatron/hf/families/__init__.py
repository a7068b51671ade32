"""HuggingFace model families, one file each, and the choice among them."""

from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.choose import FAMILIES, choose_family, exported_modules, name_table

__all__ = ["FAMILIES", "Family", "choose_family", "exported_modules", "name_table"]
