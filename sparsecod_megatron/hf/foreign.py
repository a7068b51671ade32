"""Running a model's own code in a way its authors did not foresee: a failure is one line, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsecod_megatron.errors import ConversionError, SparsecodError


@contextmanager
def running(model: nn.Module, doing: str, advice: str) -> Iterator[None]:
    """Turn whatever the model's code raises into a refusal.

    Only a call of the model belongs into the `with` block: an error of our own would be blamed on the model.

    Args:
        model: whose code runs.
        doing: what it is run for, as the subject of a sentence.
        advice: what to do instead.

    Raises:
        ConversionError: it failed.
    """
    try:
        yield
    except (SparsecodError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        cause = f"{type(error).__name__}: {reason}"
        raise ConversionError(
            f"{type(model).__name__}: {doing} fails in the model's own code ({cause}); {advice}"
        ) from error
