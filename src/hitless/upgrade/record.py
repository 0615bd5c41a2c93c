"""The record of a generation: what it is, where its maps are and how far its upgrade came, pinned beside all that.

It is a small BPF map inside the generation's directory, so it commits with the generation, vanishes with it at a
reboot, and can never describe pins that are not there.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from shlex import quote

import msgspec

from hitless.carry import is_global
from hitless.errors import NodeError
from hitless.kernel.maps import Map, create
from hitless.upgrade.model import SCHEMA, Record

__all__ = ["advice", "create_record", "map_pin", "pin_name", "read_record", "write_record"]

_MAGIC = b"hitless\x01"
_HEADER = struct.Struct("<8sI")
_KEY = b"\0\0\0\0"
_MAP_TYPE_ARRAY = 2


def map_pin(generation: Path, name: str) -> Path:
    """Where the map ``name`` of the generation in directory ``generation`` is pinned."""
    return generation / ("data" if is_global(name) else "maps") / pin_name(name)


def pin_name(name: str) -> str:
    """The name of a map as bpffs takes it, which refuses a dot: ``mesh:bss`` for ``mesh.bss``; no two are the same."""
    for character, instead in (("%", "%25"), (":", "%3A"), ("/", "%2F"), (".", ":")):
        name = name.replace(character, instead)
    return name


def create_record(path: Path, record: Record) -> None:
    """Pin a new record map at ``path``. Raises KernelError."""
    data = _pack(record)
    # Room for what a later phase adds: ids of maps and programs, which compress badly, but to less than their layouts.
    room = (2 * len(data) // 4096 + 2) * 4096
    with create(_MAP_TYPE_ARRAY, "record", 4, room, 1) as pinned:
        pinned.update(_KEY, data.ljust(room, b"\0"))
        pinned.pin(path)


def write_record(path: Path, record: Record) -> None:
    """Replace the record at ``path`` in one step. Raises KernelError, NodeError if it has no room for this one."""
    data = _pack(record)
    with Map.open(path) as pinned:
        if len(data) > pinned.info.value_size:
            raise NodeError(
                f"the record of generation {record.generation} ({len(data)} bytes) does not fit into {path} "
                f"({pinned.info.value_size} bytes); this is a fault of hitless: please report it",
                path=str(path),
            )
        pinned.update(_KEY, data.ljust(pinned.info.value_size, b"\0"))


def read_record(path: Path) -> Record:
    """The record pinned at ``path``. Raises NodeError if it is none of ours, damaged, or of a newer hitless."""
    with Map.open(path) as pinned:
        data = _content(pinned)
        while True:
            try:
                return _unpack(path, data)
            except NodeError:
                # The kernel copies an entry without a lock: it may have been half of one phase and half of the next.
                before, data = data, _content(pinned)
                if data == before:
                    raise


def _content(pinned: Map) -> bytes | None:
    return pinned.lookup(_KEY) if pinned.info.type == "array" and pinned.info.key_size == 4 else None


def _unpack(path: Path, data: bytes | None) -> Record:
    if data is None or len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise NodeError(
            f"{path} is not a record of hitless: another program pinned or overwrote it; {advice(path.parent)}",
            path=str(path),
        )
    _, length = _HEADER.unpack_from(data)
    try:
        if length > len(data) - _HEADER.size:
            raise ValueError(f"it says that it has {length} bytes, and its map has {len(data)}")
        text = zlib.decompress(data[_HEADER.size : _HEADER.size + length])
        schema = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get("schema")
        if schema is not None and int(bytes(schema)) > SCHEMA:
            raise NodeError(
                f"{path} was written by a newer hitless (record schema {bytes(schema).decode()}, this one knows "
                f"{SCHEMA}); use that version",
                path=str(path),
            )
        return msgspec.json.decode(text, type=Record)
    except (zlib.error, msgspec.DecodeError, ValueError) as error:
        raise NodeError(f"record {path} is damaged: {error}; {advice(path.parent)}", path=str(path)) from None


def advice(generation: Path) -> str:
    """What to do about the generation in directory ``generation`` when its record cannot be read."""
    if generation.name == "previous":
        gone = f"rm -r {quote(str(generation))}"
        return f"only going back needs {generation}: look at what is in it, then remove it ({gone})"
    root = quote(str(generation.parent))
    return (
        "its hooks go on as they are, but nobody can tell any more what its maps mean: save what you need of them "
        f"(bpftool map dump), then hitless unload --root {root}, and apply a release"
    )


def _pack(record: Record) -> bytes:
    packed = zlib.compress(msgspec.json.encode(record))
    return _HEADER.pack(_MAGIC, len(packed)) + packed
