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
