"""In CI a test that is skipped is a failure, unless its reason is on the list below: what could run there
must run."""

from __future__ import annotations

import os

#: Reason -> why it is expected.
EXPECTED = {
    "no CUDA GPU": "CI has none",
    "runs in the process that test_interpreter starts": "Triton's kernels: each test runs in one of two processes",
    "this is that process": "the same",
    "the interpreter compiles nothing": "the same",
    "transformers runs this family with eager attention alone": "there is no other attention to test",
    "vLLM's environment is not set up (make setup-vllm)": "CI does not install vLLM: minutes and gigabytes",
}


def unexpected(reports) -> list[str]:
    """`TEST: reason` of the skipped tests (and test files) whose reason is not expected."""
    found = []
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason not in EXPECTED:
            found.append(f"{report.nodeid}: {reason}")
    return found


def _skipped(config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if (
        os.environ.get("CI") != "true" or reporter is None or hasattr(config, "workerinput")
    ):  # xdist's workers report to one
        return []
    return unexpected(reporter.stats.get("skipped", []))


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _skipped(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if skipped := _skipped(config):
        terminalreporter.section("skipped, though CI could run it (tests/ci_skips.py)", red=True)
        for line in skipped:
            terminalreporter.line(line)
