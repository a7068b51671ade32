from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sparsecod_megatron.hf.shards import plan_shards, write_shards


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12), st.integers(1, 200))
def test_a_plan_keeps_order_and_size_and_wastes_no_file(sizes: list[tuple[int, int]], limit: int) -> None:
    shapes = {f"t{i}": shape for i, shape in enumerate(sizes)}
    shards = plan_shards(shapes, dtype=torch.bfloat16, max_shard_bytes=limit)
    assert [name for shard in shards for name in shard] == list(shapes)
    filled = [sum(2 * shapes[name][0] * shapes[name][1] for name in shard) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(filled, shards, strict=True))
    for size, following in zip(filled, shards[1:], strict=False):
        rows, columns = next(iter(following.values()))
        assert size + 2 * rows * columns > limit


def test_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(4, 4) for i in range(5)}
    shards = plan_shards(dict.fromkeys(tensors, (4, 4)), dtype=torch.float32, max_shard_bytes=128)
    write_shards(iter(tensors.items()), shards, dtype=torch.float32, folder=tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, filename in index["weight_map"].items():
        with safe_open(tmp_path / filename, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor(name), tensors[name])
