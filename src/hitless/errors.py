"""Every exception that hitless raises, as one tree.

Catch :class:`HitlessError` for all of them, a branch for a kind of trouble. Each error carries its facts in
``facts`` (plain values, ready for JSON) and a stable ``code``; its message says what went wrong, where, why,
and what to do next.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BundleError",
    "BusyError",
    "ConverterError",
    "GoneError",
    "HitlessError",
    "InterruptedUpgradeError",
    "KernelError",
    "LayoutError",
    "LossNotAllowedError",
    "NodeError",
    "PlanError",
    "UnsupportedError",
    "VerifyError",
]


class HitlessError(Exception):
    """Base of all errors of hitless.

    ``code`` is a stable lower-case word for tools; ``facts`` holds what the message was made of.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **facts: object) -> None:
        # It may quote what a stranger's file says, which must not reach a terminal as anything but text.
        if not message.isprintable():
            message = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
        super().__init__(message)
        self.message = message
        self.facts = facts


class LayoutError(HitlessError):
    """An object, BTF blob, snapshot or value cannot be read or has no meaning: bad bytes, not bad luck."""

    code = "layout"


class BundleError(HitlessError):
    """The manifest or the files of a bundle are wrong; says the file and, where known, the line."""

    code = "bundle"


class NodeError(HitlessError):
    """What is live under the pin root is not what hitless can work on: foreign pins, no bpffs, a missing hook."""

    code = "node"


class BusyError(NodeError):
    """Another process holds the lock of the pin root; ``facts["pid"]`` is the holder where it could be found."""

    code = "busy"


class GoneError(NodeError):
    """A network namespace, an interface or a program on it that was there is not there any more."""

    code = "gone"


class InterruptedUpgradeError(NodeError):
    """An earlier upgrade was killed after it began to switch hooks, and cannot be finished from here."""

    code = "interrupted"


class PlanError(HitlessError):
    """A saved plan is damaged, for another pin root, or none; or cannot be read or written where it was asked for."""

    code = "plan"


class LossNotAllowedError(HitlessError):
    """The plan would lose state that nobody allowed to be lost; ``facts["maps"]`` names each map."""

    code = "loss"


class UnsupportedError(HitlessError):
    """A feature that this hitless or this kernel does not have; ``facts["feature"]`` names it."""

    code = "unsupported"


class ConverterError(HitlessError):
    """A function of the user's that converts entries failed, or returned what is no record of the new layout.

    ``facts`` has ``map``, ``function``, ``returned`` (in words, or None) and ``traceback`` (text, or None).
    """

    code = "converter"


class KernelError(HitlessError):
    """A system call failed; ``facts`` has ``call``, ``errno`` and the object it was about."""

    code = "kernel"


class VerifyError(HitlessError):
    """The new generation is not what it must be, found before commit; the old one was put back."""

    code = "verify"
