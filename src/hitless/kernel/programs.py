"""Programs: objects loaded through libbpf, and what the kernel says of a program."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.libbpf import Object, check, ffi, lib, messages, options, pinned_kind
from hitless.kernel.maps import Map, btf_bytes, create
from hitless.kernel.names import attach_number, in_kernel, program_name, program_number
from hitless.layout.btf import Btf
from hitless.layout.elf import for_old_libbpf
from hitless.layout.model import MapSpec, ProgramSpec
from hitless.layout.sections import program_type

__all__ = ["Loaded", "Program", "ProgramInfo", "all_programs", "is_loaded", "load_code", "load_object"]

_LOG_BYTES = 1 << 20
_STRUCT_OPS = 26  # BPF_MAP_TYPE_STRUCT_OPS
_F_LINK = 1 << 13  # BPF_F_LINK
_ARRAY, _ARENA = 2, 33  # BPF_MAP_TYPE_*


class ProgramInfo(msgspec.Struct, frozen=True):
    """What the kernel says of a program; ``tag`` is its hash of the instructions, in hex."""

    id: int
    type: str
    name: str
    tag: str


class Program(Object):
    """One loaded program, held by a descriptor."""

    def __init__(self, fd: int, what: object = None) -> None:
        """Take over ``fd``, which errors call ``what``."""
        super().__init__(fd)
        raw = ffi.new("struct bpf_prog_info *")
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_prog_info"))
        what = what or f"program descriptor {fd}"
        check(lib().bpf_obj_get_info_by_fd(fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", what)
        self.info = ProgramInfo(
            id=raw.id,
            type=program_name(raw.type),
            name=ffi.string(raw.name).decode(),
            tag=bytes(raw.tag).hex(),
        )

    @property
    def map_ids(self) -> frozenset[int]:
        """The kernel's ids of the maps that the program uses."""
        raw = ffi.new("struct bpf_prog_info *")
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_prog_info"))
        check(lib().bpf_obj_get_info_by_fd(self.fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", self.info.name)
        ids = ffi.new("__u32[]", raw.nr_map_ids)
        again = ffi.new("struct bpf_prog_info *")
        again.nr_map_ids, again.map_ids = len(ids), int(ffi.cast("uintptr_t", ids))
        check(lib().bpf_obj_get_info_by_fd(self.fd, again, length), "BPF_OBJ_GET_INFO_BY_FD", self.info.name)
        return frozenset(ids)

    @property
    def function(self) -> str:
        """The whole name of the C function that it was, if it came with BTF; else what the kernel calls it."""
        raw, length = ffi.new("struct bpf_prog_info *"), ffi.new("__u32 *", ffi.sizeof("struct bpf_prog_info"))
        check(lib().bpf_obj_get_info_by_fd(self.fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", self.info.name)
        if not raw.btf_id or not raw.nr_func_info:
            return self.info.name
        size = int(raw.func_info_rec_size)
        first = ffi.new("__u32[]", size // 4)  # an offset, and the function's type
        again = ffi.new("struct bpf_prog_info *")
        again.nr_func_info, again.func_info_rec_size = 1, size
        again.func_info = int(ffi.cast("uintptr_t", first))
        check(lib().bpf_obj_get_info_by_fd(self.fd, again, length), "BPF_OBJ_GET_INFO_BY_FD", self.info.name)
        return Btf.parse(btf_bytes(raw.btf_id)).name_of(first[1])

    @classmethod
    def open(cls, path: Path) -> Program:
        """Open the program pinned at ``path``. Raises NodeError if something else is pinned there, KernelError."""
        fd, kind = pinned_kind(path)
        if kind != "prog":
            os.close(fd)
            raise NodeError(f"{path} is a pinned {kind}, not a program; it is not from hitless", path=str(path))
        return cls(fd, path)

    @classmethod
    def by_id(cls, program_id: int) -> Program:
        """Open the loaded program with the kernel's ``program_id``. Raises KernelError (ENOENT if it is gone)."""
        return cls(check(lib().bpf_prog_get_fd_by_id(program_id), "BPF_PROG_GET_FD_BY_ID", f"program {program_id}"))


def is_loaded(program_id: int) -> bool:
    """Whether the kernel still has the program with this id: something holds it."""
    fd = lib().bpf_prog_get_fd_by_id(program_id)
    if fd < 0 and ffi.errno == errno.ENOENT:
        return False
    os.close(check(fd, "BPF_PROG_GET_FD_BY_ID", f"program {program_id}"))
    return True


def all_programs() -> Iterator[Program]:
    """Every program that the kernel has now, whoever loaded it. Raises KernelError (EPERM without CAP_SYS_ADMIN)."""
    number = ffi.new("__u32 *")
    while True:
        result = lib().bpf_prog_get_next_id(number[0], number)
        if result < 0 and ffi.errno == errno.ENOENT:
            return
        check(result, "BPF_PROG_GET_NEXT_ID", "programs")
        fd = lib().bpf_prog_get_fd_by_id(number[0])
        if fd < 0 and ffi.errno == errno.ENOENT:
            continue  # gone meanwhile
        with Program(check(fd, "BPF_PROG_GET_FD_BY_ID", f"program {number[0]}")) as program:
            yield program


def load_code(kind: int, name: str, code: bytes, what: str, **fields: int) -> Program:
    """Load instructions made here as a program of the kernel's numeric type ``kind``.

    ``name`` is made one that the kernel takes; ``what`` names the program in errors; ``fields`` are of
    ``struct bpf_prog_load_opts``. Raises KernelError whose message ends in the verifier's last words and whose fact
    ``log`` is all of them.
    """
    log = ffi.new("char[]", _LOG_BYTES)
    opts = options("bpf_prog_load_opts", **fields)
    label = in_kernel(name)
    fd = lib().bpf_prog_load(kind, label, b"Dual BSD/GPL", code, len(code) // 8, opts)
    if fd < 0:  # again, for the log: keeping one slows every load
        opts.log_level, opts.log_buf, opts.log_size = 1, log, _LOG_BYTES
        fd = lib().bpf_prog_load(kind, label, b"Dual BSD/GPL", code, len(code) // 8, opts)
    try:
        return Program(check(fd, "BPF_PROG_LOAD", what))
    except KernelError as error:
        text = ffi.string(log).decode(errors="replace")
        tail = "\n  ".join(text.splitlines()[-12:])
        raise KernelError(f"{error.message}:\n  {tail}", **error.facts, log=text) from None


class Loaded(msgspec.Struct):
    """An object's maps and programs after the verifier accepted them, by name."""

    maps: dict[str, Map]
    programs: dict[str, Program]


def load_object(
    data: bytes,
    name: str,
    reuse: Mapping[str, Map],
    sections: Mapping[str, MapSpec],
    programs: Iterable[ProgramSpec] = (),
) -> Loaded:
    """Load the ELF object ``data`` called ``name``; maps named in ``reuse`` are used, the others created.

    ``sections`` are the maps of its global data in the order of the object, under their names as in ``reuse``.
    ``programs`` are those whose types are known, and which of them to leave out; of others libbpf decides both.
    Nothing is pinned or attached; struct_ops maps are ready to be. Raises KernelError whose message ends in the
    verifier's last words and whose fact ``log`` is all that libbpf and the verifier printed, UnsupportedError for
    sections that only libbpf knows.
    """
    label = ffi.new("char[]", name.encode())
    data = for_old_libbpf(data)
    with messages() as heard:
        buffer = ffi.from_buffer(data)
        handle = lib().bpf_object__open_mem(buffer, len(data), options("bpf_object_open_opts", object_name=label))
        if not handle:
            _fail(-ffi.errno, "opening", name, heard)
        try:
            maps = {}
            ops = []
            data_maps = iter(sections.items())
            entry = lib().bpf_object__next_map(handle, ffi.NULL)
            while entry:
                title = ffi.string(lib().bpf_map__name(entry)).decode()
                if lib().bpf_map__is_internal(entry):  # libbpf's name for it is cut to what the kernel takes
                    title, spec = _section(title, lib().bpf_map__value_size(entry), data_maps, name)
                    check(lib().bpf_map__set_map_flags(entry, spec.flags), "bpf_map__set_map_flags", title)
                maps[title] = entry
                check(lib().bpf_map__set_pin_path(entry, ffi.NULL), "bpf_map__set_pin_path", title)
                if lib().bpf_map__type(entry) == _STRUCT_OPS:
                    check(lib().bpf_map__set_map_flags(entry, _F_LINK), "bpf_map__set_map_flags", title)
                    ops.append(entry)
                if title in reuse:
                    check(lib().bpf_map__reuse_fd(entry, reuse[title].fd), "bpf_map__reuse_fd", title)
                elif lib().bpf_map__type(entry) == _ARENA:
                    _make_arena(entry, title)
                entry = lib().bpf_object__next_map(handle, entry)
            settled = {program.name: program for program in programs}
            program = lib().bpf_object__next_program(handle, ffi.NULL)
            while program:
                _settle(program, settled.get(ffi.string(lib().bpf_program__name(program)).decode()))
                program = lib().bpf_object__next_program(handle, program)
            result = lib().bpf_object__load(handle)
            if result < 0:
                _fail(result, "loading", name, heard)
            for entry in ops:
                _make_ready(entry, name, heard)
            loaded = {}
            program = lib().bpf_object__next_program(handle, ffi.NULL)
            while program:
                title = ffi.string(lib().bpf_program__name(program)).decode()
                fd = lib().bpf_program__fd(program)
                if fd >= 0:  # a section that begins with "?" is not loaded unless asked for
                    loaded[title] = Program(os.dup(fd))
                program = lib().bpf_object__next_program(handle, program)
            return Loaded({title: Map(os.dup(lib().bpf_map__fd(entry))) for title, entry in maps.items()}, loaded)
        finally:
            lib().bpf_object__close(handle)


def _make_arena(entry: Any, title: str) -> None:
    """Make an arena here, since libbpf maps its own into memory, and nobody can map it at another address after that.

    One that holds variables is libbpf's to make and to fill.
    """
    if lib().bpf_map__initial_value(entry, ffi.new("size_t *")):
        return
    opts = options(
        "bpf_map_create_opts",
        map_flags=lib().bpf_map__map_flags(entry),
        map_extra=lib().bpf_map__map_extra(entry),
        numa_node=lib().bpf_map__numa_node(entry),
    )
    with create(_ARENA, title, 0, 0, lib().bpf_map__max_entries(entry), opts) as made:
        check(lib().bpf_map__reuse_fd(entry, made.fd), "bpf_map__reuse_fd", title)


def _make_ready(entry: Any, name: str, heard: list[str]) -> None:
    """Fill a struct_ops map with its programs, by which the kernel checks it.

    What belongs into it only libbpf knows, and what it has for that attaches the map as well since 1.2, while the old
    release still runs. So it gets an array in the map's place, which takes the value and cannot be attached.
    """
    title = ffi.string(lib().bpf_map__name(entry)).decode()
    place, key = lib().bpf_map__fd(entry), bytes(4)
    with Map(os.dup(place), title) as ops, create(_ARRAY, title, 4, ops.info.value_size, 1) as array:
        os.dup2(array.fd, place, inheritable=False)
        try:
            link = lib().bpf_map__attach_struct_ops(entry)
        finally:
            os.dup2(ops.fd, place, inheritable=False)
        if link:  # of libbpf 1.1, where this is no more than a place to remember the map
            lib().bpf_link__disconnect(link)
            lib().bpf_link__destroy(link)
        value = array.lookup(key) or b""
        if not any(value):
            raise UnsupportedError(
                f"object {name}: this libbpf ({lib().libbpf_major_version()}.{lib().libbpf_minor_version()}) does not "
                f"give what belongs into struct_ops map {title}: use libbpf 1.1 to 1.7",
                feature="struct_ops with this libbpf",
                object=name,
            )
        result = lib().bpf_map_update_elem(ops.fd, key, value, 0)
    if result < 0:
        _fail(result, f"filling struct_ops map {title} of", name, heard)


def _settle(program: Any, spec: ProgramSpec | None) -> None:
    """Tell libbpf what a program is where it does not know by its section, or the release's manifest says otherwise."""
    section = ffi.string(lib().bpf_program__section_name(program)).decode()
    known = program_type(section.removeprefix("?"))
    kind, attach = (spec.type, spec.attach_type) if spec else known
    if spec is not None:
        check(lib().bpf_program__set_autoload(program, spec.autoload), "bpf_program__set_autoload", spec.name)
    if lib().bpf_program__type(program) and (kind, attach) == known:
        return
    if kind:
        check(lib().bpf_program__set_type(program, program_number(kind)), "bpf_program__set_type", kind)
    if attach:
        result = lib().bpf_program__set_expected_attach_type(program, attach_number(attach))
        check(result, "bpf_program__set_expected_attach_type", attach)


def _section(title: str, size: int, sections: Iterator[tuple[str, MapSpec]], name: str) -> tuple[str, MapSpec]:
    found = next(sections, None)
    if found is None or size != found[1].value_size:
        raise UnsupportedError(
            f"object {name}: libbpf makes a map {title} of {size} bytes where {found[0] if found else 'none'} was "
            "expected: a section that this version does not know",
            feature=f"section {title}",
            object=name,
        )
    return found


def _fail(result: int, doing: str, name: str, heard: list[str]) -> None:
    """Raise what ``check`` would, with the last lines of libbpf's output, which say why the verifier refused."""
    lines = [line for text in heard for line in text.splitlines() if line.strip()]
    try:
        check(result, f"{doing} the object", name)
    except KernelError as error:
        refused = error.facts["errno"] in (errno.EACCES, errno.EINVAL)
        why = "the verifier refused a program" if refused else "libbpf says"
        tail = "\n  ".join(lines[-12:])
        raise KernelError(f"{error.message}: {why}:\n  {tail}", **error.facts, log="\n".join(lines)) from None
