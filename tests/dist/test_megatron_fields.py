"""Fields that pass under `megatron:` do what they say on a CPU: something reads each, none changes what it must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config.megatron_fields import FIELDS_PASSED, MUON_FIELDS, TRANSFORMER_ENGINE_FIELDS
from tests.dist.megatron_fields_worker import EXCHANGES, EXPERTS, OTHER, SAME, series
from tests.helpers.cli import script_ranks
from tests.helpers.training import fresh_router_losses

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Any:
    output = tmp_path_factory.mktemp("fields") / "fields.json"
    script_ranks(repo_root / "tests/dist/megatron_fields_worker.py", output, nproc=2)
    return json.loads(output.read_text())


def single_process(*overrides: str) -> list[float]:
    """Loss by step of one process."""
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.parallel import running_processes
    from tests.dist.megatron_fields_worker import RUN

    backend, config = select_backend(), load_config(None, [*RUN, *overrides])
    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        return series(backend, groups, overrides)


def test_something_reads_every_field(trained: Any) -> None:
    """Those of CUDA and Muon are looked for in the code, in `tests/unit/config/test_megatron_fields.py`."""
    elsewhere = TRANSFORMER_ENGINE_FIELDS | MUON_FIELDS.keys() | {"batch_p2p_sync"}
    assert trained["read"].keys() >= FIELDS_PASSED.keys() - elsewhere


def test_layouts_memory_kernels_and_communication_change_nothing(trained: Any) -> None:
    for overrides, cases in (((), SAME), (EXPERTS, EXCHANGES)):
        expected = single_process(*overrides)
        for name in cases:
            np.testing.assert_allclose(trained["losses"][name], expected, rtol=1e-5, err_msg=name)


def test_fields_that_change_the_function_do(trained: Any) -> None:
    losses = trained["losses"]
    for name, overrides in OTHER.items():
        plain = losses["allgather" if EXPERTS[0] in overrides else "kernels"]
        assert not np.allclose(losses[f"other-{name}"], plain, rtol=1e-6), name
