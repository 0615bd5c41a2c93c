"""hitless: zero-disruption upgrades of running eBPF daemons.

    bundle = hitless.Bundle.load("release-2", {"cgroup": "/sys/fs/cgroup/mesh"})
    node = hitless.Node("/sys/fs/bpf/mesh")
    print(hitless.plan(node, bundle))
    result = hitless.apply(node, bundle)
    node.map("service")[{"addr": ..., "port": 80}] = {...}

All errors are subclasses of :class:`HitlessError`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hitless.errors import (
    BundleError,
    BusyError,
    ConverterError,
    GoneError,
    HitlessError,
    InterruptedUpgradeError,
    KernelError,
    LayoutError,
    LossNotAllowedError,
    NodeError,
    PlanError,
    UnsupportedError,
    VerifyError,
)

if TYPE_CHECKING:
    from hitless.bundle import Bundle
    from hitless.upgrade.adopt import Adopted, adopt, adopt_for, recognise_running
    from hitless.upgrade.gc import Garbage, gc
    from hitless.upgrade.handle import MapHandle, RingReader
    from hitless.upgrade.model import NodeState, Plan, Progress, Result
    from hitless.upgrade.node import Node
    from hitless.upgrade.pace import Pace
    from hitless.upgrade.saved import load_plan, save_plan
    from hitless.upgrade.transaction import apply, plan, plan_rollback, recover, rollback, unload
    from hitless.upgrade.verify import Verification, verify

__all__ = [
    "Adopted",
    "Bundle",
    "BundleError",
    "BusyError",
    "ConverterError",
    "Garbage",
    "GoneError",
    "HitlessError",
    "InterruptedUpgradeError",
    "KernelError",
    "LayoutError",
    "LossNotAllowedError",
    "MapHandle",
    "Node",
    "NodeError",
    "NodeState",
    "Pace",
    "Plan",
    "PlanError",
    "Progress",
    "Result",
    "RingReader",
    "UnsupportedError",
    "Verification",
    "VerifyError",
    "adopt",
    "adopt_for",
    "apply",
    "gc",
    "include_dir",
    "load_plan",
    "plan",
    "plan_rollback",
    "recognise_running",
    "recover",
    "rollback",
    "save_plan",
    "unload",
    "verify",
]

# Layouts can be read and compared where there is no libbpf, so the rest is imported when it is asked for.
_ROOMS = {
    "Adopted": "upgrade.adopt",
    "Bundle": "bundle",
    "Garbage": "upgrade.gc",
    "MapHandle": "upgrade.handle",
    "Node": "upgrade.node",
    "NodeState": "upgrade.model",
    "Pace": "upgrade.pace",
    "Plan": "upgrade.model",
    "Progress": "upgrade.model",
    "Result": "upgrade.model",
    "RingReader": "upgrade.handle",
    "Verification": "upgrade.verify",
    "adopt": "upgrade.adopt",
    "adopt_for": "upgrade.adopt",
    "apply": "upgrade.transaction",
    "gc": "upgrade.gc",
    "load_plan": "upgrade.saved",
    "plan": "upgrade.transaction",
    "plan_rollback": "upgrade.transaction",
    "recognise_running": "upgrade.adopt",
    "recover": "upgrade.transaction",
    "rollback": "upgrade.transaction",
    "save_plan": "upgrade.saved",
    "unload": "upgrade.transaction",
    "verify": "upgrade.verify",
}


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hitless.{_ROOMS[name]}"), name)


def include_dir() -> str:
    """The directory of ``hitless.h``, for a compiler's ``-I``."""
    return str(Path(__file__).parent / "include")
