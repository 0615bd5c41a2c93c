"""What every test of the house shares: labs, no skipping in CI, and a look at what was left in the kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from hitless.errors import UnsupportedError
from hitless.kernel import features as kernel_features
from hitless.kernel.features import features, is_known
from meshd.demo.lab import Lab, leftovers, sweep
from tests.patience import SLOWNESS

if SLOWNESS > 1:  # examples that come slowly are no fault there
    settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("slow")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

_before = pytest.StashKey[frozenset[str]]()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of the test's own."""
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    """A lab that the tests of one module share."""
    with Lab() as made:
        yield made


@pytest.fixture
def take_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let hitless find all features of this kernel but one of that name, as on a kernel that has not got it."""
    found = kernel_features.absence

    def take(name: str) -> None:
        monkeypatch.setattr(kernel_features, "absence", lambda asked: "taken away" if asked == name else found(asked))

    return take


def pytest_runtest_setup(item: pytest.Item) -> None:
    there = features()
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if name not in there:
                pytest.skip(f"needs {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo and isinstance(call.excinfo.value, UnsupportedError):
        # An error that names a feature that this kernel has not says what a skip says.
        name = str(call.excinfo.value.facts["feature"])
        if is_known(name) and name not in features():
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: needs {name}")
    if report.skipped and _every_test_must_run() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI=true, where every test must run: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and _every_test_must_run():
        report.outcome = "failed"
        report.longrepr = f"skipped under CI=true, where every test must run: {report.longrepr}"
    return report


def _every_test_must_run() -> bool:
    return os.environ.get("CI") == "true"


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.geteuid() == 0:
        sweep()
    session.config.stash[_before] = frozenset(leftovers())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session for a netns, mount, cgroup or directory that this session's labs left."""
    alive_elsewhere = {path for path in leftovers() if _owner(path) != os.getpid() and _is_alive(_owner(path))}
    before = session.config.stash[_before]
    left = set(leftovers()) - before - alive_elsewhere
    if left:
        print("\nleft behind by this session:\n  " + "\n  ".join(sorted(left)))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _owner(path: str) -> int:
    return int(path.partition("hitless-lab-")[2].split("-")[0])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
