"""2:4 sparsity by SparseGPT: the two of every four weights that outputs need most stay, and make up for the others.

Source: arXiv 2301.00774.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.modelopt import put_sparse, quiet_modelopt, warnings_about, why_passed_over


class SparseGPT24(Method):
    """See the module."""

    name = "sparsegpt24"
    needs = Needs(calibration=True, modelopt=True)

    def compress(self, material: Material) -> Outcome:
        """Prune a copy, and take its weights."""
        converted = copy.deepcopy(material.model)
        with quiet_modelopt():
            from sparsecod_megatron.compression.sparsegpt import prune_by_sparsegpt

            unreached = prune_by_sparsegpt(converted, material.feed)
        put_sparse(material.changes, converted)
        return Outcome(warnings=warnings_about(unreached))

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """ModelOpt takes matrices with a multiple of 4 rows and of 4 columns."""
        return why_passed_over(module, weight, rows=4, columns=4)
