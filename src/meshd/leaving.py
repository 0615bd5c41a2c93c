"""What the end of the daemon is: somebody starts it again (leave the data path), or it is uninstalled (remove it).

In doubt the data path stays: one too many can be removed (``hitless unload``), one too few has cut connections.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from meshd.systemd import unit_file

if TYPE_CHECKING:
    from meshd.kube import Pod

__all__ = ["ExitType", "Leaving", "leaving"]

ExitType = Literal["restart", "normal"]


class Leaving(msgspec.Struct, frozen=True):
    """``restart`` leaves the data path in place, ``normal`` detaches and removes it; ``why`` is for people."""

    exit_type: ExitType
    why: str


def leaving(
    *,
    superseded: bool = False,
    given: ExitType | None = None,
    pod: Pod | None = None,
    unit: str | None = None,
    services: Path | None = None,
) -> Leaving:
    """What to do at the end; the first that is known decides, in the order of the parameters. Raises nothing.

    ``unit`` is the systemd service that runs the daemon, ``services`` the services file.
    """
    if superseded:
        return Leaving("restart", "what is live is no longer this daemon's")
    if given is not None:
        return Leaving(given, "as --exit-type says")
    if pod is not None:
        return pod.leaving()
    if unit is not None:
        found = unit_file(unit)
        if found is None:
            return Leaving("normal", f"systemd has no file of {unit} any more")
        return Leaving("restart", f"{found} exists")
    if services is not None and not services.exists():
        return Leaving("normal", f"{services} exists no more")
    return Leaving("restart", f"{services} exists" if services is not None else "nothing says that it is uninstalled")
