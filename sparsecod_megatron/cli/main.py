"""The `sparsecod` command: finds the sub-command, runs it, and turns a user's mistake into one line and exit status 2.

Every sub-command is a module of this folder with `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`. Only the
chosen one is imported, so `sparsecod --help` and `sparsecod data` never wait for Megatron.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import keyword
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from sparsecod_megatron.cli.launch import RanksFailed, Stopped, report_to_launcher
from sparsecod_megatron.errors import SparsecodError

COMMANDS = {
    "data": "tokenise text into Megatron's IndexedDataset",
    "audit": "show on a small model that every layout trains the same",
    "plan": "parameters, memory, communication and step time of a run on N GPUs",
    "train": "pretrain a model from a YAML file, on one process or many",
    "export": "write a training checkpoint as a HuggingFace model directory",
    "import": "make a run directory at step 0 from a HuggingFace model directory",
    "merge": "the weighted mean of a run's checkpoints, in place of a decay of its learning rate",
    "grow": "a deeper run whose new layers are copies of a checkpoint's, to continue",
    "eval": "perplexity and lm-eval tasks of one model or several side by side",
    "compress": "prune, round or factorise a trained model, and score it before and after",
    "analyze": "how a trained model uses its depth; --compare of two models",
    "study": "run a grid of configurations and make one table of their scores",
    "atlas": "every mechanism of many studies in one table, against its own control",
    "fit": "fit a scaling law to a table, with intervals",
    "doctor": "whether a checkpoint is what its run trained; --repair where it is not",
    "report": "an HTML page, or a figure, of what runs and analyses measured",
}

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system says when there is no room left, which a traceback would not make clearer."""


def _load(command: str) -> ModuleType:
    name = f"{command}_" if keyword.iskeyword(command) else command
    return importlib.import_module(f"sparsecod_megatron.cli.{name}")


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsecod",
        description="Pretrain deep language models on Megatron-Core and measure how well they use their depth.",
        epilog="`sparsecod COMMAND --help` shows each command's arguments and an example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: arguments without the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0 done (also if asked to stop and saved), 1 a rank failed or the disk is full, 2 a user's mistake,
        128 + N if signal N ended ranks that had not saved. Anything else raises (status 1 with its traceback).
    """
    # Megatron-Core says at every import what a CPU machine lacks, and deprecates its own defaults.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not sys.stderr.isatty():
        # Libraries below draw bars into log files otherwise.
        os.environ.setdefault("TQDM_DISABLE", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name need not be text
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _overview().parse_args(arguments[:1]).command
    module = _load(command)
    parser = argparse.ArgumentParser(
        prog=f"sparsecod {command}",
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments[1:])  # overrides may follow options
    if "nproc" in args:
        args.command_line = arguments  # which every process of a launch is given again
    try:
        module.run(args)
    except SparsecodError as error:
        if not report_to_launcher(error):
            print(f"sparsecod {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RanksFailed as error:
        print(f"{error.traceback}sparsecod {command}: {error}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(f"sparsecod {command}: {error}", file=sys.stderr)
        return 128 + error.signal
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"sparsecod {command}: {error}; free some space and run the same command again", file=sys.stderr)
        return 1
    return 0
