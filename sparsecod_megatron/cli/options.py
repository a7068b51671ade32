"""Options that several commands have: those of a model, names in a list, and numbers, refused before work begins."""

from __future__ import annotations

import argparse
import math

from sparsecod_megatron.errors import ConfigError


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype, --device and --no-verify."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="number format of weights and computation (default float32)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="for a training run: do not compare the exported model's logits with Megatron's",
    )


def names(text: str | None) -> list[str]:
    """What stands between the commas."""
    return [name for name in map(str.strip, (text or "").split(",")) if name]


def check_at_least(args: argparse.Namespace, **minimums: int) -> None:
    """Check options that hold numbers; those that are None were not given.

    Args:
        args: the command's arguments.
        **minimums: smallest value by option, `seq_length` for `--seq-length`.

    Raises:
        ConfigError: one line about the first that is below its minimum or is NaN.
    """
    for name, minimum in minimums.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ConfigError(f"{_option(name)} {value}: must be at least {minimum}")


def check_above_zero(args: argparse.Namespace, name: str) -> None:
    """Check an option that holds a size.

    Raises:
        ConfigError: it is not above 0, or non-finite.
    """
    value = getattr(args, name)
    if not 0 < value < math.inf:
        raise ConfigError(f"{_option(name)} {value}: must be above 0 and finite")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
