"""Python leaves garbage alone until the step in which every rank collects it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest


class Cycle:
    """Garbage that reference counts do not find."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """As in a command; tests/conftest.py has frozen what tests import."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def test_collected_in_step() -> None:
    from sparsecod_megatron.train.garbage import collected_in_step

    before = Cycle()
    kept = weakref.ref(before)
    with collected_in_step(10) as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        del before
        late = weakref.ref(Cycle())
        collect(9)
        assert late() is not None
        collect(10)
        assert late() is None
        assert kept() is not None, "what was there before the first step is not looked through"
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None


def test_python_has_it_back_after_a_failure_and_where_not_asked() -> None:
    from sparsecod_megatron.train.garbage import collected_in_step

    with pytest.raises(ArithmeticError), collected_in_step(1):
        raise ArithmeticError
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with collected_in_step(0) as collect:
        assert gc.isenabled() and gc.get_freeze_count() == 0
        collect(1)


def test_what_another_has_frozen_stays_so() -> None:
    from sparsecod_megatron.train.garbage import collected_in_step

    gc.freeze()
    frozen = gc.get_freeze_count()
    with collected_in_step(1):
        assert not gc.isenabled()
    # What is frozen still dies with its last reference.
    assert 0.9 * frozen < gc.get_freeze_count() <= frozen
