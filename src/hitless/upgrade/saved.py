"""A plan in a file: written at once and whole, for its owner alone, and read back with its faults told by name."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from hitless.errors import PlanError, UnsupportedError
from hitless.upgrade.model import Plan

__all__ = ["SCHEMA", "load_plan", "save_plan"]

SCHEMA = 1
"""Version of the file's format; a hitless that knows less refuses what is newer."""

_KIND = "hitless plan"
_BYTES = 1 << 26  # more than any plan has, less than what would fill the memory


class _Head(msgspec.Struct):
    kind: str
    schema: int


class _File(msgspec.Struct):
    kind: str
    schema: int
    sha256: str
    plan: msgspec.Raw


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write ``plan`` to ``path``, mode 0600, replacing what is there; no one ever finds half of it.

    Raises PlanError if it cannot be written there.
    """
    path = Path(path)
    body = msgspec.json.encode(plan)
    data = msgspec.json.encode(_File(_KIND, SCHEMA, hashlib.sha256(body).hexdigest(), msgspec.Raw(body)))
    beside = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = " (the command gives up root's right to write into directories of other users)"
        raise PlanError(
            f"the plan cannot be written to {path}: {error.strerror}{hint}; choose a file in a directory of yours",
            file=str(path),
            errno=error.errno,
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink()  # is there only if it did not take its place


def load_plan(path: Path | str) -> Plan:
    """The plan in the file ``path``.

    Raises PlanError if it cannot be read, is none, is damaged, or can be written by others; UnsupportedError if a newer
    hitless wrote it.
    """
    path = Path(path)
    data = _read(path)
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"is no saved plan, or damaged: {error}") from None
    if head.kind != _KIND:
        raise _damaged(path, f"is no saved plan: its kind is {head.kind!r}")
    if head.schema > SCHEMA:
        raise UnsupportedError(
            f"{path} was written by a newer hitless (plan schema {head.schema}, this one knows {SCHEMA}); use that "
            "version, or plan again with this one",
            feature=f"plan schema {head.schema}",
            file=str(path),
        )
    try:
        file = msgspec.json.decode(data, type=_File)
        body = bytes(file.plan)
        if hashlib.sha256(body).hexdigest() != file.sha256:
            raise _damaged(path, "is damaged or was edited: its plan is not the one that its checksum was made of")
        return msgspec.json.decode(body, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"is damaged: {error}") from None


def _read(path: Path) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            _require_trusted(path, os.fstat(file.fileno()))
            data = file.read(_BYTES + 1)
    except OSError as error:
        raise PlanError(
            f"plan {path} cannot be read: {error.strerror}; hitless plan --out writes one",
            file=str(path),
            errno=error.errno,
        ) from None
    if len(data) > _BYTES:
        raise _damaged(path, f"is no saved plan: it has more than {_BYTES} bytes")
    return data


def _require_trusted(path: Path, seen: os.stat_result) -> None:
    mode = stat.S_IMODE(seen.st_mode)
    if not stat.S_ISREG(seen.st_mode):
        raise _damaged(path, "is no regular file")
    if seen.st_uid not in (0, os.geteuid()) or mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError(
            f"plan {path} (user {seen.st_uid}, mode {mode:04o}) can be changed by others than root and you, and it "
            "says which state may be lost: plan again, into a file of yours",
            file=str(path),
            owner=seen.st_uid,
            mode=f"{mode:04o}",
        )


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(f"{path} {what}; nothing was changed: plan again (hitless plan --out)", file=str(path))
