"""Numbers on the command line: refused in one line before work begins, whichever command they are given to."""

from __future__ import annotations

import argparse
import math

from sparsecod_megatron.errors import ConfigError


def check_at_least(args: argparse.Namespace, **minimums: int) -> None:
    """Check options that hold numbers; those that are None were not given.

    Args:
        args: of the command.
        **minimums: smallest value by option, `seq_length` for `--seq-length`.

    Raises:
        ConfigError: one line about the first that is below, or no number.
    """
    for name, minimum in minimums.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ConfigError(f"{_option(name)} {value}: must be at least {minimum}")


def check_above_zero(args: argparse.Namespace, name: str) -> None:
    """Check an option that holds a size.

    Raises:
        ConfigError: it is not above 0, or not finite.
    """
    value = getattr(args, name)
    if not 0 < value < math.inf:
        raise ConfigError(f"{_option(name)} {value}: must be above 0 and finite")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
