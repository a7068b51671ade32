"""Numbers that no command can use are one line, before any work begins."""

from __future__ import annotations

import pytest

from tests.helpers.cli import sparsecod

TRAIN = ("train", "examples/configs/nano_dense.yaml")
ANALYZE = ("analyze", "nothing", "--data", "nothing", "--output", "nothing")
EVAL = ("eval", "--model", "nothing", "--perplexity", "nothing", "--output", "nothing")
COMPRESS = ("compress", "--model", "nothing", "--method", "wanda", "--data", "nothing", "--output", "nothing")
EXPORT = ("export", "--checkpoint", "nothing", "--output", "nothing")


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        (TRAIN, "--nproc=0", "--nproc 0: must be at least 1"),
        (TRAIN, "--nproc=-1", "--nproc -1: must be at least 1"),
        (TRAIN, "--max-restarts=-5", "--max-restarts -5: must be at least 0"),
        (ANALYZE, "--samples=0", "--samples 0: must be at least 1"),
        (ANALYZE, "--seed=-1", "--seed -1: must be at least 0"),
        (ANALYZE, "--memory-gib=nan", "--memory-gib nan: must be above 0 and finite"),
        (EVAL, "--seed=-1", "--seed -1: must be at least 0"),
        (EVAL, "--stride=0", "--stride 0: must be at least 1"),
        (COMPRESS, "--held-out=0", "--held-out 0: must be at least 1"),
        (EXPORT, "--max-shard-gb=inf", "--max-shard-gb inf: must be above 0 and finite"),
        (EXPORT, "--seed=-1", "--seed -1: must be at least 0"),
    ],
)
def test_refused(command: tuple[str, ...], option: str, said: str) -> None:
    result = sparsecod(*command, option, check=False)
    assert (result.returncode, result.stderr) == (2, f"sparsecod {command[0]}: {said}\n")
