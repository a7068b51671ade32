"""What compression with one block in memory holds, in bytes of tensors, however many blocks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecod_megatron.compression import parts
from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.models.loading import stream_model
from tests.unit.compression.models import SIZES, VOCAB_SIZE, sequences

WIDTH, INNER = 64, 256
MATRIX = 4 * WIDTH * INNER
"""Bytes of the largest matrix."""
OUTSIDE = 4 * (2 * VOCAB_SIZE * WIDTH + WIDTH)
"""Embeddings, head and final norm."""
BLOCK = 4 * (2 * WIDTH * (WIDTH + WIDTH // 2) + 3 * WIDTH * INNER + 2 * WIDTH)
PRODUCTS = 4 * (3 * WIDTH**2 + INNER**2)
"""Σ x·xᵀ of a block's four inputs."""
FACTOR = 4 * INNER**2
WORK = {
    "magnitude": (("per=row", "output_error=false"), 0, 1.5),
    "wanda": ((), PRODUCTS, 1.1),
    "wanda+dsnot": ((), PRODUCTS, 2.2),
    "sparsegpt": ((), PRODUCTS + FACTOR, 2.6),
    "wanda+cg": ((), PRODUCTS + FACTOR, 2.2),
}
"""Settings, bytes of [in, in] matrices, and matrices of the largest's size beside them, of each rule.

Products of the other inputs are gone when the largest matrix is pruned, which makes up for three quarters of one.
"""


class Held(TorchDispatchMode):
    """Bytes of all storages that some operation took or made and that are still there, looked at after each one."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._seen.values()))
        return result


def peak(folder: Path, method: str, settings: tuple[str, ...]) -> int:
    """Most bytes of tensors that are held at a time while the model is compressed."""
    where = stream_model(folder, dtype="float32", device="cpu", scratch=folder)
    rule, work = find_method(method, settings), folder / method
    with Held() as held:
        compress(where.model, rule, sequences(6, 2), batch_size=1, work=work, residency=where)
    return held.most


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    made = {}
    for layers in (2, 3):
        made[layers] = tmp_path_factory.mktemp(f"blocks{layers}")
        sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers}
        LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).save_pretrained(made[layers])
    return made


@pytest.mark.parametrize("method", WORK)
def test_it_holds_one_block_its_products_and_the_work_on_one_matrix(
    method: str, folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks there are."""
    monkeypatch.setattr(parts, "MAX_ELEMENTS", 4 * INNER)
    monkeypatch.setattr(parts, "MIN_ROWS", 4)
    settings, products, matrices = WORK[method]
    few, many = (peak(folder, method, settings) for folder in folders.values())
    needed = OUTSIDE + BLOCK + products
    assert needed < many <= needed + matrices * MATRIX
    assert many == few
