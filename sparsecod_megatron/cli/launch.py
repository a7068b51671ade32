"""Commands on several processes: started here by torchrun's own agent, or by others; their first error is passed on."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from sparsecod_megatron.cli.options import check_at_least
from sparsecod_megatron.errors import SparsecodError

if TYPE_CHECKING:
    from sparsecod_megatron.parallel.processes import Processes

_REPORT = "TORCHELASTIC_ERROR_FILE"
"""Names, in a rank's environment, the file that the agent reads its error from."""
_STATUSES_OF_BYSTANDERS = (-signal.SIGTERM, -signal.SIGABRT)
"""Exit statuses of a rank that ended because another did: told to by the agent, or by the communication library."""


class RanksFailed(Exception):
    """A rank ended with an error that is not a user's mistake.

    Attributes:
        traceback: that rank's, or nothing if it left none.
    """

    def __init__(self, text: str, *, traceback: str = "") -> None:
        super().__init__(text)
        self.traceback = traceback


class Stopped(Exception):
    """A signal ended the command before its work was done.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, state: str = "before the ranks had saved and stopped") -> None:
        super().__init__(f"ended by {signal.Signals(number).name} {state}")
        self.signal = number


def launch(arguments: Sequence[str], *, nproc: int, max_restarts: int = 0) -> None:
    """Run `sparsecod ARGUMENTS` as `nproc` ranks and wait for them.

    Args:
        arguments: the command and its arguments.
        nproc: number of ranks.
        max_restarts: how often all ranks start again after one failed; never after a user's mistake.

    Raises:
        SparsecodError: a rank found a user's mistake; the text is that rank's.
        RanksFailed: a rank failed otherwise.
        Stopped: a stop signal ended the ranks before they had saved.
    """
    # As many threads as cores in all; torch would start that many in every rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with _passing_signals_on() as received:
        for attempt in range(1, max_restarts + 2):
            try:
                return _run(arguments, nproc)
            except RanksFailed as failure:
                if received:
                    raise Stopped(received[0]) from None
                if attempt > max_restarts:
                    raise
                print(f"sparsecod: {failure}; restart {attempt} of {max_restarts}", file=sys.stderr)


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """While the block runs, stop signals go to the ranks, which save and end; yields those received.

    torch's agent would kill the ranks after 30 seconds, whether or not their checkpoint is complete.
    """
    from sparsecod_megatron.config.stop_signals import handling_stop_signals

    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    with handling_stop_signals(pass_on):
        yield received


def _run(arguments: Sequence[str], nproc: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="sparsecod-") as reports:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=reports),
            signals_to_handle="SIGHUP,SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-m", "sparsecod_megatron", *arguments)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda item: _order(item[1]))
            if failure.exitcode == 2:
                raise SparsecodError(_report(failure)[0].partition(": ")[2]) from None
            raise _described(rank, failure) from None
        finally:
            _end_orphans(reports)


def _end_orphans(reports: str) -> None:
    """Kill what killed ranks have left behind: writers of a checkpoint, loaders, Megatron-Core's queue of results.

    They would wait for their rank forever, with the terminal or log file open.

    Args:
        reports: folder of this attempt, which its processes, and no others, have in their environment.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_REPORT, "").startswith(reports):
                process.kill()


def _order(failure: Any) -> tuple[int, int]:
    """Sorts ranks by how likely their end is the cause; the agent's own time stamps are whole seconds.

    A rank that a signal killed left no report, and the others' reports are about the connection it took with it.
    """
    report = Path(failure.error_file)
    if report.is_file():
        return 1, report.stat().st_mtime_ns
    return (2 if failure.exitcode in _STATUSES_OF_BYSTANDERS else 0), 0


def _described(rank: int, failure: Any) -> RanksFailed:
    if failure.exitcode < 0:
        return RanksFailed(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}")
    text, traceback = _report(failure)
    if not traceback:
        return RanksFailed(f"rank {rank} exited with status {failure.exitcode}; see its output above")
    return RanksFailed(f"rank {rank} failed: {' '.join(text.split())}", traceback=traceback)


def _report(failure: Any) -> tuple[str, str]:
    """("Exception: text", traceback) that the rank recorded; the agent's own words and none if it did not."""
    message = failure.message
    if isinstance(message, dict):
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    return str(message), ""


def report_to_launcher(error: BaseException) -> bool:
    """Hand a rank's error to the agent that started it, instead of printing it once per rank.

    Returns:
        Whether there is such an agent.
    """
    if _REPORT not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def launch_for_answer(args: argparse.Namespace, *, nproc: int) -> Any:
    """Start the command on processes of its own, and take what their first one found.

    Args:
        args: with the `command_line` that `main` was given; `add_answer_argument` has declared `--found`.
        nproc: processes.

    Returns:
        What `answer` was given there.

    Raises:
        BaseException: what `launch` raises.
    """
    with tempfile.TemporaryDirectory(prefix="sparsecod-") as folder:
        found = Path(folder, "found.json")
        launch([*args.command_line, f"--nproc={nproc}", f"--found={found}"], nproc=nproc)
        return json.loads(found.read_text())


def add_answer_argument(parser: argparse.ArgumentParser) -> None:
    """Declare what lies between the command and the processes that `launch_for_answer` starts: a file."""
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)


def answer(args: argparse.Namespace, found: Any) -> None:
    """Hand plain data to the command that started this process; the first process's counts."""
    if is_first():
        args.found.write_text(json.dumps(found))


def is_rank() -> bool:
    """Whether torchrun or `launch` started this process as one of several."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process, alone or the first of several, writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def share_work(args: argparse.Namespace, work: Callable[[Processes], None]) -> None:
    """Start the command on --nproc processes, or, where this is one of them or alone, do its work.

    Args:
        args: with `nproc`, and the `command_line` that `main` was given.
        work: what each process does, connected with the others.

    Raises:
        ConfigError: --nproc is below 1.
        BaseException: what `launch` and `work` raise.
    """
    check_at_least(args, nproc=1)
    if args.nproc > 1 and not is_rank():
        launch(args.command_line, nproc=args.nproc)
        return
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries, which are imported later; once is enough

    def connected() -> None:
        from sparsecod_megatron.parallel.processes import connected_processes

        with connected_processes() as processes:
            work(processes)

    run_rank(connected)


def run_rank(action: Callable[[], None]) -> None:
    """Do this process's work, as a rank or alone; a rank that fails ends at once, its error in the agent's hands.

    Raises:
        BaseException: what `action` raises, where no agent started this process.
    """
    try:
        action()
    except BaseException as error:
        if isinstance(error, SystemExit) or not report_to_launcher(error):
            raise
        # At once: the end of an ordinary exit may wait for peers that wait for this rank.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, SparsecodError) else 1)
