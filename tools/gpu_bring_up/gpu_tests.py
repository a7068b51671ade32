"""Runs the tests of `tests/gpu` that belong to a step, each a check of the table."""

from __future__ import annotations

import pytest

from tools.gpu_bring_up.bench import FAIL, PASS, SKIP, Bench, Check, totals
from tools.gpu_bring_up.process import ROOT

FILES = {
    "statistics": "tests/gpu/test_statistics.py",
    "fp8": "tests/gpu/test_fp8.py",
    "compression": "tests/gpu/test_compress.py",
}


class _Reporter:
    """A pytest plugin that reports each test as soon as it has ended, because a time-out may end the session."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.failed_to_collect: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is its call, unless its set-up skipped or failed, or its teardown failed."""
        if report.when != "call" and report.passed:
            return
        state = {"passed": PASS, "failed": FAIL, "skipped": SKIP}[report.outcome]
        figure = f"{report.duration:.1f} s" if report.passed else _reason(report)
        name = report.nodeid.partition("::")[2] + ("" if report.when == "call" else f" ({report.when})")
        self.bench.report(Check(self.bench.step, name, state, figure, round(report.duration, 2)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has no tests to fail."""
        if report.failed:
            self.failed_to_collect.append(_reason(report))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The skip's words, or the last line of the failure."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return " ".join((lines[0] if lines else str(report.longrepr)).removeprefix("E ").split())[:300]


def run(bench: Bench) -> None:
    """Those marked `gpu`; without a card each says why it is skipped."""
    reporter = _Reporter(bench)
    options = ["-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += [f"--confcutdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    with bench.check(FILES[bench.step]) as found:
        status = pytest.main([*options, str(ROOT / FILES[bench.step])], plugins=[reporter])
        tests = bench.checks()
        found.figure = totals(tests)
        assert not reporter.failed_to_collect, reporter.failed_to_collect[0]
        assert tests, f"no test was run (pytest's status {int(status)})"
