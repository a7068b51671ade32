"""Ranks of jobs that no machine here has: what they hold and send is what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.cli import script


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rank is simulated on the CPU")
def test_ranks_of_64_hold_and_send_what_is_planned(repo_root: Path) -> None:
    """Tensor, pipeline, expert and data parallel; only what an uneven load of the experts explains may be off."""
    done = script(repo_root / "tools" / "simulated_ranks.py", "--ranks", "64")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[2] for row in rows] == ["TP4 PP2 DP8", "TP4 PP2 DP8", "TP2 EP8 DP32"]
    for row in rows:
        off = row[-1].removesuffix(" |").split()
        assert off == ["none"] or off[0] == "expert" or abs(float(off[1])) <= 0.2, row
