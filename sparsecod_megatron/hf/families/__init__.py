"""HuggingFace model families, one file each, and the choice among them."""

from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.choose import (
    FAMILIES,
    choose_family,
    exported_modules,
    family_of,
    name_table,
    names_in,
)

__all__ = ["FAMILIES", "Family", "choose_family", "exported_modules", "family_of", "name_table", "names_in"]
