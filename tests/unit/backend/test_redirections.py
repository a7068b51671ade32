"""The list of redirections: applied once, each with its reason, and each equal to what it stands for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.backend.cpu import apply_redirections
from sparsecod_megatron.backend.redirection import Redirection
from sparsecod_megatron.errors import ConfigError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")


def test_applied_once_and_documented() -> None:
    select_backend()
    first = apply_redirections()
    assert first == apply_redirections() and len(first) > 30
    for redirection in first:
        assert redirection.reason and ".py" in redirection.upstream
    # By owner and name, because the kernels replace what an earlier redirection put there.
    for redirection in {(id(each.owner), each.name): each for each in first}.values():
        assert vars(redirection.owner)[redirection.name] is redirection.replacement, redirection.name


def test_a_name_that_upstream_dropped_is_an_error_unless_it_only_gained_speed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError, match="no not_there"):
        Redirection(torch, "not_there", None, "x.py:1", "none").apply()
    assert not Redirection(torch, "not_there", None, "x.py:1", "a copy less", speed_only=True).apply()
    assert not hasattr(torch, "not_there")
    assert "continuing without what it gained (a copy less)" in caplog.text


def test_the_optimizer_names_what_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    select_backend()
    from sparsecod_megatron.backend.adamw import FusedAdam

    FusedAdam([torch.nn.Parameter(torch.ones(2))], capturable=False, master_weights=True)
    assert "asks of it: {'master_weights': True}; left out" in caplog.text


def test_cuda_is_refused_without_cuda() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        select_backend("cuda")


def test_cuda_literals_and_streams() -> None:
    select_backend()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], dtype=torch.float, device="cuda").tolist() == [1.0]
    assert torch.empty_like(torch.ones(3), device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.current_stream() == torch.cuda.Stream()
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
    assert event.query()


def test_meta_device_context_survives() -> None:
    """transformers builds models under `with torch.device("meta")`; the wrapped factories must obey it."""
    select_backend()
    with torch.device("meta"):
        made = torch.tensor([]), torch.zeros(2), torch.empty(2)
    assert [tensor.device.type for tensor in made] == ["meta"] * 3


def test_nothing_of_megatron_compiles_even_if_it_was_imported_first() -> None:
    """A notebook or a study may import Megatron-Core before the backend is chosen, and have no C++ compiler."""
    code = """
        import sys, sparsecod_megatron.metrics, sparsecod_megatron.model, torch
        from sparsecod_megatron.backend.cpu.eager import compiled_functions
        print(len(list(compiled_functions())) > 20)
        from sparsecod_megatron.backend import select_backend
        select_backend()
        from megatron.core import activations
        from megatron.core.transformer.attention import Attention
        ours = sys.modules["sparsecod_megatron.model.transformer_config"]
        print(list(compiled_functions()), ours.squared_relu is activations.squared_relu)
        print(activations.squared_relu(torch.tensor([-1.0, 3.0])).tolist())
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    assert result.stdout.splitlines() == ["True", "[] True", "[0.0, 9.0]"]


def test_random_state_fork_is_repeatable_and_leaves_the_outer_state() -> None:
    select_backend()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    torch.manual_seed(5)
    expected_outer = torch.rand(3)
    torch.manual_seed(5)
    with tracker.fork("one"):
        first = torch.rand(3)
        with tracker.fork("two"):
            torch.rand(1)
        second = torch.rand(3)
    assert torch.equal(torch.rand(3), expected_outer)
    torch.manual_seed(1)
    assert torch.equal(torch.cat((first, second)), torch.rand(6))
