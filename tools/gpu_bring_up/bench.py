"""What a step is given, and how it says what it found: a line a check, on disk as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
CARD_ABSENT = "no CUDA device"


class Skipped(Exception):
    """A check that cannot be made here; the text says why."""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        step: that made it.
        name: what was checked.
        state: PASS, FAIL or SKIP.
        figure: what was measured, or why not.
        seconds: that it took.
        values: numbers behind the figure, for machines.
    """

    step: str
    name: str
    state: str
    figure: str
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finding:
    """What the body of a check fills in."""

    figure: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What every step is given.

    Attributes:
        folder: what was packed.
        work: scratch, gone at the end.
        output: what is kept; few files.
        step: name of the step.
        cuda: whether there is a card; without one sizes are small and a check that passes is called rehearsed.
        transformer_engine: whether its kernels can be counted on.
        pace: factor on every time-out; a busy machine needs more than an idle one with a card.
    """

    folder: Path
    work: Path
    output: Path
    step: str = ""
    cuda: bool = False
    transformer_engine: bool = False
    pace: float = 1.0

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.cuda else "cpu"

    def of(self, step: str) -> Bench:
        """The same for another step."""
        return replace(self, step=step)

    @contextlib.contextmanager
    def check(self, name: str, *, anywhere: bool = False) -> Iterator[Finding]:
        """One check: its body raises where it fails, and the next one follows all the same.

        Args:
            name: of the line.
            anywhere: what it proves does not depend on a card; others are SKIP without one, and FAIL if their
                rehearsal fails.
        """
        began, found = time.monotonic(), Finding()
        try:
            yield found
            state, figure = PASS, found.figure
            if not self.cuda and not anywhere:
                state, figure = SKIP, f"{CARD_ABSENT}; rehearsed: {found.figure}"
        except Skipped as reason:
            state, figure = SKIP, str(reason)
        except Exception as error:
            traceback.print_exc()
            state, figure = FAIL, _one_line(error)
        self.report(Check(self.step, name, state, figure, round(time.monotonic() - began, 2), found.values))

    def report(self, check: Check) -> None:
        """Keep and show a line."""
        print(f"{check.state}  {check.step}: {check.name}: {check.figure}", flush=True)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(check)) + "\n")

    def checks(self) -> list[Check]:
        """Those of this step so far, whatever became of its process."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [Check(**json.loads(line)) for line in lines if line.endswith("\n")]

    def require_transformer_engine(self) -> None:
        """Skip the check where the kernels are not to be had; a rehearsal runs what stands in for them."""
        if self.cuda and not self.transformer_engine:
            raise Skipped("Transformer Engine cannot be used here")

    @property
    def _file(self) -> Path:
        return self.work / f"{self.step}.jsonl"

    def to_json(self) -> str:
        """For the process of a step."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Bench:
        """As `to_json` wrote it."""
        values = json.loads(text)
        return cls(**values | {name: Path(values[name]) for name in ("folder", "work", "output")})


def totals(checks: Iterable[Check]) -> str:
    """How many of each state."""
    states = [check.state for check in checks]
    return ", ".join(f"{states.count(state)} {state}" for state in (PASS, FAIL, SKIP))


def _one_line(error: BaseException) -> str:
    """Type and text; assertions of pytest and torch go over many lines."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__
