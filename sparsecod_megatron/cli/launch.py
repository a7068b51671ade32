"""Starts N ranks of a command on this machine with torchrun's own agent, and passes their first error on."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from sparsecod_megatron.errors import SparsecodError


class RanksFailed(Exception):
    """A rank ended with a status that is no user's mistake; its own output tells why."""

    def __init__(self, exitcode: int) -> None:
        super().__init__(f"a rank exited with status {exitcode}")
        self.exitcode = exitcode


def launch(arguments: Sequence[str], *, nproc: int) -> None:
    """Run `sparsecod ARGUMENTS` as `nproc` ranks and wait for them.

    Args:
        arguments: the command and its arguments.
        nproc: number of ranks.

    Raises:
        SparsecodError: a rank found a user's mistake; the text is that rank's.
        RanksFailed: a rank failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # As many threads as cores in all; torch would start that many in every rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sparsecod_megatron", *arguments)
    except SignalException:
        return  # passed on to the ranks, which have saved and stopped
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == 2:
            raise SparsecodError(_text(failure.message)) from None
        raise RanksFailed(failure.exitcode) from None


def _text(message: Any) -> str:
    """What the rank's exception said; the agent passes it as a dict, behind the exception's name."""
    text = str(message["message"] if isinstance(message, dict) else message)
    return text.partition(": ")[2] or text


def report_to_launcher(error: SparsecodError) -> bool:
    """Hand a rank's error to the agent that started it, instead of printing it once a rank.

    Returns:
        Whether there is such an agent.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True
