"""Checkpoints read tensor by tensor: the same numbers as the model's, in little memory, damage told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import CheckpointError
from tests.helpers.megatron import SMALL
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

BACKEND = select_backend()

from sparsecod_megatron.checkpoint.saver import save_checkpoint  # noqa: E402
from sparsecod_megatron.checkpoint.state import TrainState  # noqa: E402
from sparsecod_megatron.checkpoint.stream import streamed_checkpoint  # noqa: E402
from sparsecod_megatron.model import unwrap  # noqa: E402
from sparsecod_megatron.parallel import running_processes  # noqa: E402
from sparsecod_megatron.train.setup import build_trainer  # noqa: E402

VARIANTS = {
    "everything": DENSE["everything"],
    "mix": DENSE["mix"],
    "experts": MOE_SHAPE,
    "deepseek": (*MOE_SHAPE, *MOE["deepseek"]),
    "shared gate": (*MOE_SHAPE, *MOE["shared-gate"]),
}


def write(folder: Path, *overrides: str, state: TrainState | None = None) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a fresh model, at step 0 where no progress is given, and its weights."""
    config = load_config(None, [*SMALL, *overrides])
    with running_processes(config, communication=BACKEND.communication, device=BACKEND.device) as groups:
        trainer = build_trainer(config, BACKEND, groups)
        model = unwrap(trainer.models[0])
        step = save_checkpoint(folder, trainer, state=state or TrainState())
        weights = dict(model.named_parameters()) | {
            name: tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias")
        }
        return step, {name: tensor.detach().clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_the_models(name: str, tmp_path: Path) -> None:
    step, weights = write(tmp_path, *VARIANTS[name])
    with streamed_checkpoint(tmp_path) as source:
        assert source.step_dir == step
        assert set(source.tensors) == weights.keys()
        assert len(source.tensors) == len(weights)
        for key, tensor in weights.items():
            assert torch.equal(source.tensors[key], tensor), key


def test_a_damaged_checkpoint_is_told_before_anything_is_read(tmp_path: Path) -> None:
    step, _ = write(tmp_path)
    shard = next(step.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} is not what was written"), streamed_checkpoint(step):
        pass
    shard.write_bytes(content[:100])
    shortened = pytest.raises(CheckpointError, match=f"{shard.name} has 100 bytes")
    with shortened, streamed_checkpoint(step, digests=False):
        pass


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"), streamed_checkpoint(tmp_path):
        pass


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from sparsecod_megatron.backend import select_backend
select_backend()
from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
from sparsecod_megatron.hf import export_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.zeros(1).to(torch.bfloat16)
before = peak()
with streamed_checkpoint(Path(sys.argv[1])) as source:
    export_model(source.config.model, source.tensors, Path(sys.argv[2]), seq_length=16, dtype=torch.float32,
                 tokenizer_dir=None, max_shard_bytes=int(sys.argv[3]))
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_export_holds_no_more_than_a_shard_and_a_layer(tmp_path: Path) -> None:
    """A model of 110 MB in shards of 20 MB, in a process of its own."""
    shape = ("model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_layers=8", "model.vocab_size=4096")
    step, weights = write(tmp_path / "run", *shape)
    total = sum(tensor.nbytes for tensor in weights.values())
    layer = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith("decoder.layers.3."))
    assert total > 100e6
    command = [sys.executable, "-c", MEASURE, str(step), str(tmp_path / "hf"), str(20_000_000)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    shards = [path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")]
    assert len(shards) >= 6
    assert sum(shards) >= total
    assert json.loads(result.stdout.splitlines()[-1]) <= 1.5 * max(shards) + layer
