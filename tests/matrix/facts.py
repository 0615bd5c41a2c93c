"""A plugin of pytest's, which writes into its JUnit file on what the tests ran."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest

from hitless.kernel.libbpf import lib


@pytest.fixture(scope="session", autouse=True)
def _facts(record_testsuite_property: Callable[[str, object], None]) -> None:
    record_testsuite_property("kernel", platform.release())
    record_testsuite_property("python", platform.python_version())
    record_testsuite_property("libbpf", f"{lib().libbpf_major_version()}.{lib().libbpf_minor_version()}")


class Tracebacks:
    """Tells at once why a test failed: a guest that dies later has no end at which to tell it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tracebacks(config))
