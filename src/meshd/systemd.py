"""What systemd is told (sd_notify) and asked: whether the unit that runs this process is still installed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["Notifier", "own_unit", "unit_file"]

_PATIENCE = 1.0  # s

_UNIT_PATH = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)


class Notifier:
    """Tells the service manager at ``NOTIFY_SOCKET`` how it goes; without one it does nothing."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        meant = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(env.get("WATCHDOG_USEC", "0")) / 1e6 if meant else 0.0

    def tell(self, *words: str) -> None:
        """Send words as ``READY=1``; a manager that does not listen for long misses them."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as there:
            there.settimeout(_PATIENCE)  # its queue is short
            try:
                there.sendto("\n".join(words).encode(), self._address)
            except OSError:
                return

    def watch(self, is_alive: Callable[[], bool], stop: threading.Event) -> None:
        """Say ``WATCHDOG=1`` from a thread until ``stop``, twice in the time allowed, for as long as that is true."""

        def run() -> None:
            while not stop.wait(self._watchdog / 2):
                if is_alive():
                    self.tell("WATCHDOG=1")

        if self._watchdog:
            threading.Thread(target=run, name="watchdog", daemon=True).start()


def own_unit(env: Mapping[str, str] = os.environ, cgroups: str | None = None) -> str | None:
    """The name of the service that this process is of, None if no systemd started it."""
    if "INVOCATION_ID" not in env:
        return None
    text = Path("/proc/self/cgroup").read_text() if cgroups is None else cgroups
    parts = [part for line in text.splitlines() for part in line.partition("::")[2].split("/")]
    return next((part for part in reversed(parts) if part.endswith(".service")), None)


def unit_file(unit: str, env: Mapping[str, str] = os.environ) -> Path | None:
    """Where the unit's file is now, in systemd's order (``SYSTEMD_UNIT_PATH`` if set); None if it is gone."""
    places = env["SYSTEMD_UNIT_PATH"].split(":") if env.get("SYSTEMD_UNIT_PATH") else list(_UNIT_PATH)
    template = unit.partition("@")[0] + "@.service" if "@" in unit else unit
    paths = (Path(place) / name for place in places if place for name in (unit, template))
    return next((path for path in paths if path.is_symlink() or path.exists()), None)
