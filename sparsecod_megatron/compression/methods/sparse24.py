"""2:4 sparsity by magnitude, by ModelOpt: the two largest of every four neighbouring weights of a row stay."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sparsecod_megatron.compression.experts import separate_experts
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.modelopt import put_sparse, quiet_modelopt, why_passed_over


class Sparse24(Method):
    """See the module."""

    name = "sparse24"
    needs = Needs(modelopt=True)

    def compress(self, material: Material) -> Outcome:
        """Prune a copy, and take its weights."""
        converted = copy.deepcopy(material.model)
        with quiet_modelopt(), separate_experts(converted):
            from modelopt.torch import sparsity

            sparsity.sparsify(converted, "sparse_magnitude")
            sparsity.export(converted)
        put_sparse(material.changes, converted)
        return Outcome()

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """ModelOpt takes matrices with a multiple of 8 rows and of 16 columns."""
        return why_passed_over(module, weight, rows=8, columns=16)
