"""Maps of the running kernel: their facts, their entries one by one and in batches."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.errors import KernelError, NodeError
from hitless.kernel.libbpf import ENOTSUPP, Object, check, ffi, lib, options, pinned_kind
from hitless.kernel.names import in_kernel
from hitless.layout.btf import Btf
from hitless.layout.btf_writer import Written, write_btf
from hitless.layout.elf import MAP_TYPES
from hitless.layout.model import MapSpec

__all__ = [
    "ANY", "EXIST", "F_LOCK", "NOEXIST", "Entries", "Map", "MapInfo", "Rows", "btf_bytes", "create", "create_as",
    "is_alive", "possible_cpus",
]  # fmt: skip

ANY, NOEXIST, EXIST = 0, 1, 2

Rows = npt.NDArray[np.uint8]
"""Records of one size: shape (entries, bytes of a record), dtype uint8."""

_BATCH = 4096
F_LOCK = 4  # BPF_F_LOCK
_RDONLY = 8  # BPF_F_RDONLY
_TYPES_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP)
_HASH_ENTRY = 48  # struct htab_elem, without key and value


class MapInfo(msgspec.Struct, frozen=True):
    """What the kernel says of a map (``struct bpf_map_info``); sizes in bytes."""

    id: int
    type: str
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf_id: int
    key_type_id: int
    value_type_id: int

    @property
    def label(self) -> str:
        """What errors call it: libbpf makes maps without a name where it failed to find out that they may have one."""
        return self.name or f"map {self.id}"

    @property
    def per_cpu(self) -> bool:
        """Whether each entry has a value for every possible CPU."""
        return "percpu" in self.type

    @property
    def entry_size(self) -> int:
        """Bytes of an entry's value as user space sees it: those of all possible CPUs, each rounded up to 8."""
        return (self.value_size + 7) // 8 * 8 * possible_cpus() if self.per_cpu else self.value_size


class Entries(Protocol):
    """What a merge reads: a map, or what looks like one. The methods are as those of :class:`Map`."""

    @property
    def info(self) -> MapInfo:
        """Sizes and type."""

    def lookup(self, key: bytes) -> bytes | None:
        """The value at ``key``, or None."""

    def batches(self) -> Iterator[tuple[Rows, Rows]]:
        """Keys and values of all entries, some thousand at a time."""

    def entries(self) -> tuple[Rows, Rows]:
        """All keys and values at once."""

    def most_entries(self) -> int:
        """No fewer than there are now."""


class Map(Object):
    """One map, held by a descriptor."""

    def __init__(self, fd: int, what: object = None) -> None:
        """Take over ``fd``, which errors call ``what``."""
        super().__init__(fd)
        raw = ffi.new("struct bpf_map_info *")
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_map_info"))
        check(lib().bpf_obj_get_info_by_fd(fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", what or f"map descriptor {fd}")
        #: BPF_F_LOCK where the values hold a bpf_spin_lock that guards them, to be passed when they are read or set.
        self.lock_flag = 0
        self.info = MapInfo(
            id=raw.id,
            type=MAP_TYPES[raw.type] if raw.type < len(MAP_TYPES) else f"type{raw.type}",
            name=ffi.string(raw.name).decode(),
            key_size=raw.key_size,
            value_size=raw.value_size,
            max_entries=raw.max_entries,
            flags=raw.map_flags,
            btf_id=raw.btf_id,
            key_type_id=raw.btf_key_type_id,
            value_type_id=raw.btf_value_type_id,
        )

    @classmethod
    def open(cls, path: Path) -> Map:
        """Open the map pinned at ``path``. Raises NodeError if something else is pinned there, KernelError."""
        fd, kind = pinned_kind(path)
        if kind != "map":
            os.close(fd)
            raise NodeError(f"{path} is a pinned {kind}, not a map; it is not from hitless", path=str(path), kind=kind)
        return cls(fd, path)

    @classmethod
    def by_id(cls, map_id: int) -> Map:
        """Open the map with the kernel's ``map_id``. Raises KernelError (ENOENT if it is gone)."""
        return cls(check(lib().bpf_map_get_fd_by_id(map_id), "BPF_MAP_GET_FD_BY_ID", f"map {map_id}"))

    @property
    def is_read_only(self) -> bool:
        """Whether the kernel refuses that user space writes it: frozen, or made so."""
        facts = Path(f"/proc/self/fdinfo/{self.fd}").read_text()
        return bool(self.info.flags & _RDONLY) or "frozen:\t1" in facts

    def spec(self, name: str) -> MapSpec:
        """This map as a MapSpec under ``name``; key and value are None where the kernel holds no BTF for them."""
        info = self.info
        types = Btf.parse(btf_bytes(info.btf_id)) if info.btf_id else None
        return MapSpec(
            name=name,
            type=info.type,
            key_size=info.key_size,
            value_size=info.value_size,
            max_entries=info.max_entries,
            flags=info.flags,
            order=sys.byteorder,
            key=types.layout(info.key_type_id) if types and info.key_type_id else None,
            value=types.layout(info.value_type_id) if types and info.value_type_id else None,
        )

    def lookup(self, key: bytes) -> bytes | None:
        """The value at ``key``, ``entry_size`` bytes, or None. Of an LPM trie, that of the longest matching prefix."""
        value = bytearray(self.info.entry_size)
        result = lib().bpf_map_lookup_elem_flags(
            self.fd, ffi.from_buffer(key), ffi.from_buffer(value), self.lock_flag
        )
        if result < 0 and ffi.errno == errno.ENOENT:
            return None
        check(result, "BPF_MAP_LOOKUP_ELEM", self.info.label)
        return bytes(value)

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Set ``key`` to ``value``, ``entry_size`` bytes. Raises KernelError (E2BIG when the map is full)."""
        flags |= self.lock_flag
        result = lib().bpf_map_update_elem(self.fd, ffi.from_buffer(key), ffi.from_buffer(value), flags)
        check(result, "BPF_MAP_UPDATE_ELEM", self.info.label)

    def delete(self, key: bytes) -> bool:
        """Delete ``key``; False if it was not there."""
        result = lib().bpf_map_delete_elem(self.fd, ffi.from_buffer(key))
        if result < 0 and ffi.errno == errno.ENOENT:
            return False
        check(result, "BPF_MAP_DELETE_ELEM", self.info.label)
        return True

    def pop(self) -> bytes | None:
        """Take the next element out of a queue or stack; None if it is empty."""
        value = bytearray(self.info.value_size)
        result = lib().bpf_map_lookup_and_delete_elem(self.fd, ffi.NULL, ffi.from_buffer(value))
        if result < 0 and ffi.errno == errno.ENOENT:
            return None
        check(result, "BPF_MAP_LOOKUP_AND_DELETE_ELEM", self.info.label)
        return bytes(value)

    def all_keys(self) -> set[bytes]:
        """All keys, one by one with BPF_MAP_GET_NEXT_KEY: for maps that know no batches. Those of an array are all."""
        found: set[bytes] = set()
        position: object = ffi.NULL
        while True:
            key = bytearray(self.info.key_size)
            result = lib().bpf_map_get_next_key(self.fd, position, ffi.from_buffer(key))
            if result < 0 and ffi.errno == errno.ENOENT:
                return found
            check(result, "BPF_MAP_GET_NEXT_KEY", self.info.label)
            found.add(bytes(key))
            position = ffi.from_buffer(key)

    def batches(self) -> Iterator[tuple[Rows, Rows]]:
        """Keys and values of all entries, some thousand at a time, by BPF_MAP_LOOKUP_BATCH.

        On a hash that is being written this misses no key that was there all the time (shared measurements in
        the protocol document); with no writer it is exact. Values have ``entry_size`` bytes. What is yielded is
        overwritten by the next step.
        """
        info = self.info
        size = _BATCH
        opts = options("bpf_map_batch_opts", elem_flags=self.lock_flag)
        keys, values = _buffers(info, size)
        tokens = [ffi.new("char[]", max(info.key_size, 8)) for _ in range(2)]
        position = ffi.NULL
        count = ffi.new("__u32 *")
        while True:
            count[0] = size
            after = tokens[0] if position is not tokens[0] else tokens[1]
            result = lib().bpf_map_lookup_batch(
                self.fd, position, after, ffi.from_buffer(keys), ffi.from_buffer(values), count, opts
            )
            if result < 0 and ffi.errno == errno.ENOSPC:
                size *= 2  # one bucket holds more entries than the buffer: nothing was returned, so ask for more
                keys, values = _buffers(info, size)
                continue
            last = result < 0 and ffi.errno == errno.ENOENT  # the end, with a valid last count
            if not last:
                check(result, "BPF_MAP_LOOKUP_BATCH", info.label)
            if count[0]:
                yield keys[: count[0]], values[: count[0]]
            if last:
                return
            position = after

    def most_entries(self) -> int:
        """No fewer than there are now: ``max_entries``, or less where the kernel tells how much memory is used."""
        least = _HASH_ENTRY + self.info.key_size + self.info.value_size
        return min(self.info.max_entries, self.memory // least) if self.info.type == "hash" else self.info.max_entries

    def entries(self) -> tuple[Rows, Rows]:
        """All keys and values at once, as two arrays of rows."""
        parts = [(keys.copy(), values.copy()) for keys, values in self.batches()]
        if not parts:
            return _buffers(self.info, 0)
        return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])

    def write(self, keys: Rows, values: Rows) -> None:
        """Set many entries by BPF_MAP_UPDATE_BATCH. Raises KernelError with ``written``, how many went in before."""
        if not len(keys):
            return
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        count = ffi.new("__u32 *", len(keys))
        opts = options("bpf_map_batch_opts", elem_flags=self.lock_flag)
        result = lib().bpf_map_update_batch(self.fd, ffi.from_buffer(keys), ffi.from_buffer(values), count, opts)
        try:
            check(result, "BPF_MAP_UPDATE_BATCH", self.info.label)
        except KernelError as error:
            # A refusal of the call as a whole leaves the count as it was given.
            error.facts["written"] = count[0] if count[0] < len(keys) else 0
            raise

    def remove(self, keys: Rows) -> int:
        """Delete many keys by BPF_MAP_DELETE_BATCH, and return how many were there.

        Raises KernelError with ``done``, how many of the first keys are dealt with.
        """
        keys = np.ascontiguousarray(keys)
        count = ffi.new("__u32 *")
        opts = options("bpf_map_batch_opts")
        done = there = 0
        while done < len(keys):
            count[0] = rest = len(keys) - done
            result = lib().bpf_map_delete_batch(self.fd, ffi.from_buffer(keys[done:]), count, opts)
            if result < 0 and ffi.errno == errno.ENOENT:  # it stops at a key that is not there
                there += count[0]
                done += count[0] + 1
                continue
            try:
                check(result, "BPF_MAP_DELETE_BATCH", self.info.label)
            except KernelError as error:
                error.facts["done"] = done + (count[0] if count[0] < rest else 0)
                raise
            there += count[0]
            done += count[0]
        return there


def is_alive(map_id: int) -> bool:
    """Whether the kernel still has the map with this id: something holds it."""
    fd = lib().bpf_map_get_fd_by_id(map_id)
    if fd < 0 and ffi.errno == errno.ENOENT:
        return False
    os.close(check(fd, "BPF_MAP_GET_FD_BY_ID", f"map {map_id}"))
    return True


def create(kind: int, name: str, key_size: int, value_size: int, max_entries: int, opts: object = ffi.NULL) -> Map:
    """A new map of the kernel's numeric type ``kind``; ``name`` is made one that the kernel takes."""
    fd = lib().bpf_map_create(kind, in_kernel(name), key_size, value_size, max_entries, opts)
    return Map(check(fd, "BPF_MAP_CREATE", name))


def create_as(spec: MapSpec) -> Map:
    """A new empty map as ``spec`` says, with the types of its key and value if BTF can tell them.

    It has none where the kernel refuses those, as what libbpf makes has none then: an array wants a number as its key,
    a trie a struct, a devmap nothing. Raises KernelError.
    """
    opts = options("bpf_map_create_opts", map_flags=spec.flags, map_extra=spec.extra)
    written = write_btf(spec.key, spec.value) if spec.key is not None and spec.value is not None else None
    if written is not None:
        try:
            return _create_typed(spec, opts, written)
        except KernelError as error:
            if error.facts["errno"] not in _TYPES_REFUSED:
                raise
        opts.btf_fd = opts.btf_key_type_id = opts.btf_value_type_id = 0
    return _create_from(spec, opts)


def _create_typed(spec: MapSpec, opts: Any, written: Written) -> Map:
    what = f"the types of {spec.name}"
    types = check(lib().bpf_btf_load(written.data, len(written.data), ffi.NULL), "BPF_BTF_LOAD", what)
    try:
        opts.btf_fd, (opts.btf_key_type_id, opts.btf_value_type_id) = types, written.ids
        return _create_from(spec, opts)
    finally:
        os.close(types)


def _create_from(spec: MapSpec, opts: object) -> Map:
    kind = MAP_TYPES.index(spec.type)
    return create(kind, spec.name, spec.key_size, spec.value_size, spec.max_entries, opts)


@functools.cache
def possible_cpus() -> int:
    """How many CPUs this kernel could ever have: per-CPU maps hold a value for each."""
    return check(lib().libbpf_num_possible_cpus(), "reading the possible CPUs", "/sys/devices/system/cpu/possible")


def _buffers(info: MapInfo, count: int) -> tuple[Rows, Rows]:
    return np.empty((count, info.key_size), np.uint8), np.empty((count, info.entry_size), np.uint8)


def btf_bytes(btf_id: int) -> bytes:
    """The BTF that the kernel has under this id. Raises KernelError."""
    fd = check(lib().bpf_btf_get_fd_by_id(btf_id), "BPF_BTF_GET_FD_BY_ID", f"BTF {btf_id}")
    try:
        info = ffi.new("struct bpf_btf_info *")
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_btf_info"))
        check(lib().bpf_obj_get_info_by_fd(fd, info, length), "BPF_OBJ_GET_INFO_BY_FD", f"BTF {btf_id}")
        data = bytearray(info.btf_size)
        again = ffi.new("struct bpf_btf_info *")
        buffer = ffi.from_buffer(data)
        again.btf, again.btf_size = int(ffi.cast("uintptr_t", buffer)), len(data)
        length[0] = ffi.sizeof("struct bpf_btf_info")
        check(lib().bpf_obj_get_info_by_fd(fd, again, length), "BPF_OBJ_GET_INFO_BY_FD", f"BTF {btf_id}")
        return bytes(data)
    finally:
        os.close(fd)
