"""Which of NVIDIA's packages a run takes: none on the CPU, on CUDA those that work, and what stands in for others."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.backend.packages import hidden_package, hide, why_no_transformer_engine
from sparsecod_megatron.errors import ConfigError
from tests.helpers.training import small_trainer, trainer_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
select_backend()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.utils import local_multi_tensor_l2_norm  # noqa: E402

from sparsecod_megatron.backend import adamw, orthogonalized, stand_ins  # noqa: E402
from sparsecod_megatron.backend.cpu import kernels  # noqa: E402

EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")
RECOMPUTE = ("megatron.recompute_granularity=selective", "megatron.recompute_modules=[layernorm]")


def run(code: str, *folders: Path) -> str:
    """What a fresh interpreter prints, with packages of these folders."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def package(folder: Path, **files: str) -> None:
    """Files by module, `a__b` being a/b.py or, if others lie below it, a/b/__init__.py."""
    for name, content in files.items():
        parts = name.split("__")
        below = any(other.startswith(f"{name}__") for other in files)
        file = folder.joinpath(*parts, "__init__.py") if below else folder.joinpath(*parts).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_the_cpu_takes_nothing_of_an_image_with_its_gpu_hidden(tmp_path: Path) -> None:
    """Transformer Engine that cannot be loaded ends Megatron-Core's import; apex loads, and computes on CUDA alone."""
    package(
        tmp_path,
        transformer_engine="raise RuntimeError('Found empty `transformer-engine` meta package installed')",
        apex="",
        apex__optimizers="FusedAdam = FusedSGD = 'of apex'",
        apex__multi_tensor_apply="multi_tensor_applier = 'of apex'",
        amp_C="multi_tensor_l2norm = multi_tensor_scale = 'of apex'",
        fused_weight_gradient_mlp_cuda="",
    )
    printed = run(
        """
        from sparsecod_megatron.backend import select_backend
        print(select_backend().transformer_engine)
        from megatron.core.optimizer import clip_grads, distrib_optimizer
        from megatron.core.tensor_parallel import layers
        print(distrib_optimizer.Adam.__module__)
        print(clip_grads.multi_tensor_applier.__module__, clip_grads.l2_norm_impl.__module__)
        print(layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32.__module__)
        import sys, sparsecod_megatron.train.loop
        print("wandb" in sys.modules)
        """,
        tmp_path,
    )
    ours = "sparsecod_megatron.backend"
    assert printed.split() == [
        "False",
        f"{ours}.adamw",
        "megatron.core.utils",
        f"{ours}.stand_ins",
        f"{ours}.cpu.speed",
        "False",
    ]


def test_what_megatron_has_taken_already_cannot_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "for_cuda_alone", types.ModuleType("for_cuda_alone"))
    with pytest.raises(ConfigError, match=r"has taken for_cuda_alone, .* call select_backend\(\) before importing"):
        hide(["for_cuda_alone"])


CUDA = """
    import logging, sys, torch
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability, torch.version.cuda = lambda device: (9, 0), "13.0"
    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.config import PrecisionConfig, load_config
    from sparsecod_megatron.errors import ConfigError
    try:
        select_backend("cuda", precision=PrecisionConfig(fp8_recipe="blockwise"))
    except ConfigError as error:
        print(error)
    backend = select_backend("auto")
    print(backend.name, backend.transformer_engine, select_backend("auto") == backend)
    from megatron.core.optimizer import distrib_optimizer, muon
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    print(moe_utils.te_general_gemm, random.FP8GlobalStateManager.is_fp8_enabled(), muon.HAVE_EMERGING_OPTIMIZERS)
    print(distrib_optimizer.Adam.__module__, muon.newton_schulz_tp.__module__)
    from sparsecod_megatron.model import transformer_config
    from tests.helpers.megatron import SMALL
    from tests.helpers.variants import MOE_SHAPE
    megatron = transformer_config(load_config(None, [*SMALL, *MOE_SHAPE]), transformer_engine=False)
    print(megatron.apply_rope_fusion, megatron.moe_grouped_gemm)
    print([name for name in sys.modules if name.startswith("sparsecod_megatron.backend.cpu")])
"""


def test_an_engine_that_is_not_there() -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    assert why_no_transformer_engine() == "it is not installed"


def test_cuda_without_the_engine_has_all_that_megatron_uses(tmp_path: Path) -> None:
    """One line says so, FP8 alone is refused, and nothing of the CPU's is imported."""
    content = "raise ImportError('undefined symbol: _ZN3')"
    package(tmp_path, transformer_engine="", transformer_engine__pytorch=content)
    reason = "it cannot be imported (ImportError: undefined symbol: _ZN3)"
    refused, warned, *said = run(CUDA, tmp_path).splitlines()
    assert refused.startswith(f"precision.fp8_recipe: FP8 needs Transformer Engine, but {reason}; use an NGC")
    assert warned.startswith(f"training without Transformer Engine ({reason}): the same model")
    assert said == [
        "cuda False True",
        "None False True",
        "sparsecod_megatron.backend.adamw sparsecod_megatron.backend.orthogonalized",
        "False False",
        "[]",
    ]


def first_losses(*overrides: str) -> list[float]:
    with small_trainer(*EXPERTS, *overrides) as trainer:
        from sparsecod_megatron.train.step import train_step

        data = trainer_batches(trainer)
        return [train_step(trainer, data).loss for _ in range(3)]


@pytest.fixture
def only_megatrons_functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Experts, products and rotation as on CUDA without Transformer Engine: none that the CPU adds."""
    select_backend(cpu_kernels="plain")
    monkeypatch.setattr(kernels, "redirections", lambda name: [])
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    yield
    monkeypatch.undo()
    select_backend(cpu_kernels="fast")


@pytest.fixture(scope="module")
def losses_here() -> list[float]:
    return first_losses()


def test_without_the_engine_megatron_trains_as_here(losses_here: list[float], only_megatrons_functions: None) -> None:
    found = first_losses(*RECOMPUTE, "megatron.gradient_accumulation_fusion=false")
    assert found == pytest.approx(losses_here, abs=2e-5)


def test_nothing_stands_in_for_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Megatron-Core found Transformer Engine and Emerging-Optimizers."""
    monkeypatch.setattr(stand_ins.megatron_random, "HAVE_TE", True)
    monkeypatch.setattr(adamw.distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(orthogonalized.muon, "HAVE_EMERGING_OPTIMIZERS", True)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", "of Transformer Engine")
    assert stand_ins.redirections() == []


def test_the_norm_of_gradients_is_megatrons() -> None:
    tensors = [torch.linspace(-1, 2, size).view(shape) for size, shape in ((6, (2, 3)), (5, (5,)), (1, ()))]
    expected, _ = local_multi_tensor_l2_norm(0, None, [tensors], False)
    found, _ = stand_ins.l2_norm(0, torch.zeros(1), [tensors], False)
    torch.testing.assert_close(found, expected)


def test_an_unseen_package_is_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, tracker_of_experiments="")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden_package("tracker_of_experiments"), pytest.raises(ImportError):
        importlib.import_module("tracker_of_experiments")
    loaded = importlib.import_module("tracker_of_experiments")
    with hidden_package("tracker_of_experiments"):  # taken by somebody already: hiding it would gain nothing
        assert importlib.import_module("tracker_of_experiments") is loaded
    monkeypatch.delitem(sys.modules, "tracker_of_experiments")
