"""Directories that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsecod_megatron.errors import ConversionError


@contextmanager
def directory_in_the_making(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A sibling directory that is renamed to `output` when the block ends well and removed when it does not.

    Args:
        output: directory to make; may exist if it is empty.
        overwrite: replace an exported model that is there.

    Raises:
        ConversionError: `output` is in use.
    """
    output = output.resolve()
    _check_output(output, overwrite=overwrite)
    making, replaced = (output.with_name(f".{output.name}.{suffix}") for suffix in ("making", "replaced"))
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        # Libraries write weights that their owner alone can read, whatever the umask.
        mode = making.stat().st_mode & 0o666
        for path in making.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        making.rename(output)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ConversionError(f"{output}: is a file; give a directory to make")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"{output}: is not empty; give a new directory, or ask to overwrite it")
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output}: holds no config.json, so it is no model directory to overwrite; give another one"
        )
