"""What CUDA runs build, from the real Transformer Engine, as the table that the tests compare the CPU's layers with.

    bash tools/te_on_cpu.sh             # in an environment that has the package: compares with the recorded table
    bash tools/te_on_cpu.sh --record    # writes it, after a change of the package or of the layers

Needs no GPU: modules are built on the meta device, and three questions about the device are answered here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "tests" / "unit" / "model" / "transformer_engine.json"
SIGNATURES = (
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "optimizers.FusedAdam",
)
"""Classes of transformer_engine.pytorch that Megatron-Core builds here."""


def as_on_hopper() -> None:
    """Answer what Transformer Engine and this package ask of the device while modules are built."""
    cuda = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1  # type: ignore[assignment]
    cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    cuda.set_device = lambda device: None  # type: ignore[assignment]
    cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]
    cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    cuda.Stream = cuda.Event = lambda *args, **kwargs: None  # type: ignore[assignment, misc]
    cuda.manual_seed = lambda seed: None  # type: ignore[assignment]
    state = torch.zeros(16, dtype=torch.uint8)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: state  # type: ignore[assignment]
    cuda.set_rng_state = lambda new_state, device=None: None  # type: ignore[assignment]
    cuda.default_generators = (torch.Generator(),)  # type: ignore[attr-defined]


class OnMeta(TorchFunctionMode):
    """What modules make on "cuda" by name, as attention's sinks, is on the meta device as everything else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def measured() -> dict[str, Any]:
    """Version, signatures, and tensors of every variant."""
    from sparsecod_megatron.backend import select_backend

    backend = select_backend("cuda")
    assert backend.transformer_engine, "Transformer Engine cannot be imported; the warning above says why"
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.parallel import running_processes
    from tests.helpers.megatron import SMALL
    from tests.helpers.tensor_table import VARIANTS, tensors

    config = load_config(None, [*SMALL])
    with OnMeta(), running_processes(config, communication="gloo", device=torch.device("cpu")) as groups:
        states = {name: tensors(overrides, groups, transformer_engine=True) for name, overrides in VARIANTS.items()}
    return {"version": metadata.version("transformer-engine"), "signatures": signatures(), "tensors": states}


def signatures() -> dict[str, list[str]]:
    """Arguments of each class in SIGNATURES."""
    import transformer_engine.pytorch as engine
    import transformer_engine.pytorch.optimizers  # noqa: F401

    found = {}
    for name in SIGNATURES:
        owner: Any = engine
        for part in name.split("."):
            owner = getattr(owner, part)
        found[name] = sorted(set(inspect.signature(owner.__init__).parameters) - {"self"})
    return found


def differences(recorded: Any, found: Any, path: str = "") -> list[str]:
    """One line for each entry that differs."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = sorted(recorded.keys() | found.keys())
        return [line for key in keys for line in differences(recorded.get(key), found.get(key), f"{path}/{key}")]
    return [] if recorded == found else [f"{path}: recorded {recorded}, found {found}"]


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    as_on_hopper()
    found = measured()
    if arguments.record:
        TABLE.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{TABLE.relative_to(ROOT)}: {len(found['tensors'])} variants of {found['version']}")
        return 0
    wrong = differences(json.loads(TABLE.read_text(encoding="utf-8")), found)
    print("\n".join(wrong) or f"Transformer Engine {found['version']}: {len(found['tensors'])} variants as recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
