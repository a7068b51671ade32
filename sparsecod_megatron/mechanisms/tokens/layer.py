"""A transformer layer that reads token ids: for a table inside its MLP, or for a memory before its attention.

The ids come as `context` (`model/tokens.py`). The layer hands them to modules that Megatron-Core calls without them,
and takes them back when its forward pass ends: a module that is computed again outside of its layer finds none, and
raises, where it could have read another micro-batch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsecod_megatron.seams.mechanism import mixed

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def token_layer(spec: ModuleSpec, **params: Any) -> ModuleSpec:
    """The spec of a layer, in place, as one that reads token ids.

    Args:
        spec: of a TransformerLayer, which may read them already.
        **params: `TokenLayer`'s.
    """
    if not issubclass(spec.module, TokenLayer):
        spec.module = mixed(TokenLayer, spec.module)
    spec.params = {**(spec.params or {}), **params}
    return spec


class TokenLayer:
    """Mixed into a transformer layer.

    Args:
        *arguments: the layer's.
        memory: spec of a module that is built with `config`, `layer_number` and `tp_group` and is added to the layer's
            input: called with the input, [S_local, B, H], and the ids, it gives the same shape.
        **options: the layer's others.
    """

    def __init__(self, *arguments: Any, memory: ModuleSpec | None = None, **options: Any) -> None:
        from megatron.core.transformer.spec_utils import build_module

        super().__init__(*arguments, **options)
        layer: Any = self
        if memory is not None:
            layer.memory = build_module(
                memory, config=layer.config, layer_number=layer.layer_number, tp_group=layer.pg_collection.tp
            )

    def forward(self, hidden_states: Tensor, *arguments: Any, context: Tensor | None = None, **options: Any) -> Any:
        """The layer's, on [S_local, B, H], with `context` as `model.tokens.token_context` makes it."""
        assert context is not None, "this layer reads token ids, and whoever called the model gave none"
        layer: Any = self
        if (memory := getattr(layer, "memory", None)) is not None:
            hidden_states = hidden_states + memory(hidden_states, context)
        parent: Any = super()
        with self._told(context):
            return parent.forward(hidden_states, *arguments, context=context, **options)

    @contextlib.contextmanager
    def _told(self, context: Tensor) -> Iterator[None]:
        """The ids with the modules that read them."""
        module: Any = self
        readers = [reader for reader in module.modules() if isinstance(reader, ReadsTokens)]
        for reader in readers:
            reader.context = context
        try:
            yield
        finally:
            for reader in readers:
                reader.context = None


class ReadsTokens:
    """A module inside a `TokenLayer` that is called without ids.

    Attributes:
        context: of the layer's forward pass; None outside of one.
    """

    context: Tensor | None = None

    def own_ids(self, length: int) -> Tensor:
        """Ids of the tokens that this context-parallel rank computes, [S_local, B].

        Args:
            length: S_local, without sequence parallelism.
        """
        assert self.context is not None, "token ids are there while their layer's forward pass runs, and it does not"
        return own_tokens(self.context, length, halo=0)[..., 0].flatten(0, 1)


def own_tokens(context: Tensor, length: int, *, halo: int) -> Tensor:
    """The part of `context` that holds each chunk and the `halo` tokens before it: [chunks, halo + S_chunk, B, 2].

    Args:
        context: with the largest halo that some layer needs.
        length: tokens of all chunks, S_local.
        halo: tokens before them.
    """
    return context[:, context.shape[1] - length // context.shape[0] - halo :]
