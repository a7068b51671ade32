"""SparseGPT by ModelOpt's search for the mask and the update that ModelOpt leaves out. Imports ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modelopt.torch import sparsity
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry
from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher
from torch import Tensor, nn

from sparsecod_megatron.compression.experts import separate_experts
from sparsecod_megatron.compression.reconstruct import reconstruct


def prune_by_sparsegpt(model: nn.Module, feed: Callable[[nn.Module], None]) -> list[str]:
    """Keep the two of every four weights that outputs need most, in place, and let them make up for the others.

    ModelOpt takes matrices with a multiple of 4 rows and of 4 columns.

    Args:
        model: to prune.
        feed: runs a model over the calibration sequences.

    Returns:
        Names of the linear layers that no calibration token reached, pruned by magnitude.
    """
    with separate_experts(model):
        searcher = _ReconstructingSearcher()
        apply_mode(model, "sparsegpt", registry=SparsityModeRegistry)
        searcher.search(model, {}, (), {"forward_loop": feed})
        sparsity.export(model)
    return searcher.unreached


class _ReconstructingSearcher(SparseGPTSearcher):
    """ModelOpt's search for the mask, with the weights updated too.

    ModelOpt 0.47 computes SparseGPT's update on a copy of the weights, reads the mask off it and drops it. It would
    also zero whole columns whose input never fires in the calibration data, and so whole experts.
    """

    def before_search(self) -> None:
        super().before_search()
        self.unreached = [name for name, module in self._named_sparsifiable_modules() if not module.samples]

    def _compute_mask(self, module: Any) -> Tensor:
        _fill_silent_inputs(module.hessian)
        hessian = module.hessian.clone()  # ModelOpt adds its damping in place
        mask: Tensor = super()._compute_mask(module)
        weight = dict(module.named_parameters(recurse=False))["weight"]
        weight.copy_(reconstruct(weight, mask, hessian, damping=self.config["hessian_damp"]))
        return mask


def _fill_silent_inputs(hessian: Tensor) -> None:
    """Give inputs that never fired a share too small to matter beside the damping, so that magnitude decides there."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal.masked_fill_(diagonal == 0, 1.0 if mean == 0 else 1e-6 * float(mean))
