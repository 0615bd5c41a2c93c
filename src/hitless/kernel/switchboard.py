"""Each connection sees one release: a dispatcher on every hook, and the epoch of a connection kept in its socket.

A *board* is a directory of pins: one word that says which epoch is present, socket storage that says which epoch a
connection belongs to, and for each hook a program array of two slots. The dispatcher on the hook looks up the epoch of
the socket that it is called for and goes on to the program in that epoch's slot. One store makes the next epoch the
present one, on all hooks at once; connections that had begun stay in theirs.

At rest both slots of every hook hold the running release. An upgrade puts the new one into the slots of the next epoch
(:meth:`Switchboard.put`), makes it present (``flip``), waits until no connection of the old one is ``left``, or no
longer, and ends that one (``settle``): what is left moves over, each connection at one stroke on all hooks.

When a connection begins: with connect(), when a passive one is established, or with the first datagram. What is called
for a socket before that (creation, bind, options, packets of a handshake, which are the listener's) is of the present
release and binds to nothing. A socket without storage is older than the board, since creation and establishment give
every other one its storage: that takes the hooks :data:`WITNESSES` on each cgroup, even where a release has no program
for them. All those older sockets are of one epoch, the *elder*, until it ends.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.bpffs import make_directory, unpin
from hitless.kernel.codegen import (
    AND_IMM,
    ATOMIC,
    CMPXCHG,
    EXIT,
    JA,
    JEQ,
    JEQ_IMM,
    JNE_IMM,
    LOAD,
    MOV,
    MOV_IMM,
    OR,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R9,
    RSH_IMM,
    STORE,
    Assembler,
)  # fmt: skip
from hitless.kernel.elders import bind_elders
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import options
from hitless.kernel.maps import Map, create, create_as
from hitless.kernel.per_entry import Scratch, count
from hitless.kernel.programs import Program, load_code
from hitless.kernel.vmlinux import offsets
from hitless.layout.model import Int, MapSpec

__all__ = ["KINDS", "PARTS", "WITNESSES", "Kind", "Left", "Switchboard"]

_TAIL_CALL, _FULLSOCK, _STORAGE_GET = 12, 95, 107  # bpf_tail_call, bpf_sk_fullsock, bpf_sk_storage_get
_F_CREATE = 1  # BPF_SK_STORAGE_GET_F_CREATE
_ARRAY, _PROG_ARRAY = 2, 3  # BPF_MAP_TYPE_*
_NO_PREALLOC, _MMAPABLE = 1, 1 << 10  # BPF_F_*
_CLOSED, _LISTENING = 7, 10  # BPF_TCP_*, and a socket of datagrams that is not connected is closed
_STREAM = 1  # SOCK_STREAM
_CONNECT_CB, _PASSIVE_CB = 3, 5  # BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
_SOCKET_STATE = 72  # in struct bpf_sock
_SOCKET_TYPE = 32  # in struct bpf_sock_addr

# The word of a socket: its epoch, 0 before its connection begins. The top bit is set between connect() and the first
# thing that TCP does for it, so that what is called meanwhile is of the same connection, and connect() later is not.
_CONNECTING = 31
# The words of a board: the present epoch, that of sockets older than the board, and the last one that is alone.
_PRESENT, _ELDER, _SETTLED = 0, 4, 8
PARTS = ("dispatchers", "slots", "passing")
"""The directories of a board, each with a pin for every hook."""

_HERE, _BEFORE, _LOOSE = 0, 8, 16  # counters of a pass


class Kind(msgspec.Struct, frozen=True):
    """Hooks of one attach type: numbers of the program type and the attach type, and how their socket is found.

    ``socket`` is the offset of the socket in the context; -1 if the context is one, None if there is none that a
    program of this type could ask for storage: such a hook is always of the present epoch. ``begins`` says what a call
    means for a connection: ``create`` (there is none yet), ``connect`` (a new one), ``use`` (it begins here if it has
    not), ``packet`` (the same, but for a listener), ``look`` (begins nothing), ``ops`` (it depends). ``passed`` is
    returned where a release has no program.
    """

    program: int
    attach: int
    socket: int | None
    begins: str = "look"
    passed: int = 1


_SCHED_CLS, _SKB, _SOCK, _ADDR, _SOCKOPT = 3, 8, 9, 18, 25  # BPF_PROG_TYPE_*
_BY_SOCKET = {
    "cgroup_inet_ingress": Kind(_SKB, 0, 168, "packet"),
    "cgroup_inet_egress": Kind(_SKB, 1, 168, "packet"),
    "cgroup_inet_sock_create": Kind(_SOCK, 2, -1, "create"),
    "cgroup_sock_ops": Kind(13, 3, 184, "ops"),
    "sk_msg_verdict": Kind(16, 7, 72, "use"),
    "cgroup_inet4_bind": Kind(_ADDR, 8, 64),
    "cgroup_inet6_bind": Kind(_ADDR, 9, 64),
    "cgroup_inet4_connect": Kind(_ADDR, 10, 64, "connect"),
    "cgroup_inet6_connect": Kind(_ADDR, 11, 64, "connect"),
    "cgroup_inet4_post_bind": Kind(_SOCK, 12, -1),
    "cgroup_inet6_post_bind": Kind(_SOCK, 13, -1),
    "cgroup_udp4_sendmsg": Kind(_ADDR, 14, 64, "use"),
    "cgroup_udp6_sendmsg": Kind(_ADDR, 15, 64, "use"),
    "cgroup_udp4_recvmsg": Kind(_ADDR, 19, 64, "use"),
    "cgroup_udp6_recvmsg": Kind(_ADDR, 20, 64, "use"),
    "cgroup_getsockopt": Kind(_SOCKOPT, 21, 0),
    "cgroup_setsockopt": Kind(_SOCKOPT, 22, 0),
    "cgroup_inet4_getpeername": Kind(_ADDR, 29, 64, "use"),
    "cgroup_inet6_getpeername": Kind(_ADDR, 30, 64, "use"),
    "cgroup_inet4_getsockname": Kind(_ADDR, 31, 64),
    "cgroup_inet6_getsockname": Kind(_ADDR, 32, 64),
    "cgroup_inet_sock_release": Kind(_SOCK, 34, -1),
    "tcx_ingress": Kind(_SCHED_CLS, 46, 168, "packet", -1),
    "tcx_egress": Kind(_SCHED_CLS, 47, 168, "packet", -1),
}
_BY_EPOCH = {
    "sk_skb_stream_parser": Kind(14, 4, None),
    "sk_skb_stream_verdict": Kind(14, 5, None),
    "sk_skb_verdict": Kind(14, 38, None),
    "cgroup_device": Kind(15, 6, None),
    "flow_dissector": Kind(22, 17, None, passed=129),
    "cgroup_sysctl": Kind(23, 18, None),
    "sk_lookup": Kind(30, 36, None),
    "xdp": Kind(6, 37, None, passed=2),
}
KINDS = _BY_SOCKET | _BY_EPOCH
"""Hooks that a dispatcher can stand on, by the name that libbpf gives their attach type."""

WITNESSES = ("cgroup_inet_sock_create", "cgroup_sock_ops")
"""Hooks that every cgroup of a board has a dispatcher on: they see sockets made and connections established."""


class Left(msgspec.Struct, frozen=True):
    """How many connections are in the present epoch, and in ones before it (``before``).

    ``loose`` are sockets that belong to an epoch before and have no connection that could end: those of datagrams to
    anybody, and those whose peer refused or reset. ``elders`` is whether sockets older than the board are in an
    epoch before: nobody knows how many there are.
    """

    present: int
    before: int
    loose: int
    elders: bool


class Switchboard:
    """Dispatchers with what they share, pinned in a directory of their own; one process changes them at a time.

    A program array whose last pin or descriptor goes is emptied by the kernel, and its hook lets everything
    pass: take dispatchers off their hooks before the directory is removed.
    """

    def __init__(self, directory: Path) -> None:
        """The board that is pinned in ``directory``. Raises NodeError, KernelError."""
        self._directory = directory
        self._word = Map.open(directory / "epoch")
        self._storage = Map.open(directory / "storage")
        self._epochs = np.frombuffer(mmap.mmap(self._word.fd, mmap.PAGESIZE), np.uint32)

    @classmethod
    def create(cls, directory: Path) -> Switchboard:
        """Make a board without hooks, or complete one whose making was cut short. Raises KernelError."""
        make_directory(directory, exist_ok=True)
        for name in PARTS:
            make_directory(directory / name, exist_ok=True)
        if not (directory / "storage").exists():
            with _create_storage() as storage:
                storage.pin(directory / "storage")
        if not (directory / "epoch").exists():
            opts = options("bpf_map_create_opts", map_flags=_MMAPABLE)
            with create(_ARRAY, "board_epoch", 4, 12, 1, opts) as word:
                word.update(bytes(4), np.ones(3, np.uint32).tobytes())
                word.pin(directory / "epoch")
        return cls(directory)

    @property
    def epoch(self) -> int:
        """The present epoch: 1, 2, 3 and so on."""
        return int(self._epochs[_PRESENT])

    @property
    def settled(self) -> int:
        """The epoch that was present when :meth:`settle` came to its end last."""
        return int(self._epochs[_SETTLED // 4])

    @property
    def is_settled(self) -> bool:
        """Whether everything is of the present epoch: no :meth:`flip` that was not followed by :meth:`settle`."""
        return self.settled == self.epoch

    def hooks(self) -> list[str]:
        """The names under which hooks were added."""
        return sorted(path.name for path in (self._directory / "dispatchers").iterdir())

    def add(self, name: str, attach_type: str, running: Program | None, expected: int | None = None) -> Program:
        """The dispatcher for hook ``name``, to be attached by the caller; ``running`` is in both slots, or nothing.

        ``expected`` is the number of the attach type that the hook's programs were loaded for, where it is not the
        hook's own (``SEC("tc")`` and ``SEC("cgroup/skb")`` say none, 0). A dispatcher that is there is returned as it
        is. Raises UnsupportedError if no dispatcher can stand on that hook or lead to that program, KernelError.
        """
        kind = KINDS.get(attach_type)
        if kind is None:
            raise UnsupportedError(
                f"hook {name}: no dispatcher can stand on {attach_type}, so that no connection can keep to its release "
                'there; leave out consistency = "connection"',
                feature=f"dispatcher on {attach_type}",
            )
        pin = self._directory / "dispatchers" / name
        if pin.exists():
            return Program.open(pin)
        self.remove(name)  # what is left of an addition that was cut short: nothing leads there yet
        opts = {"expected_attach_type": kind.attach if expected is None else expected}
        with create(_PROG_ARRAY, f"board_{name}", 4, 4, 2) as slots:
            code = _dispatcher(kind, self._storage, self._word, slots)
            made = load_code(kind.program, f"to_{name}", code, f"the dispatcher of hook {name}", **opts)
            slots.pin(self._directory / "slots" / name)
        with load_code(kind.program, f"pass_{name}", _passing(kind), f"what lets hook {name} pass", **opts) as passing:
            passing.pin(self._directory / "passing" / name)
        for epoch in (self.epoch - 1, self.epoch):
            self.put(name, running, epoch)
        made.pin(pin)
        return made

    def remove(self, name: str) -> None:
        """Forget hook ``name``, whose dispatcher is attached no more; nothing happens if it is not known."""
        for part in PARTS:
            pin = self._directory / part / name
            if pin.exists():
                unpin(pin)

    def bind_elders(self, cgroups: Iterable[Path]) -> int:
        """Bind connections that are older than the board, in these cgroups and all below, so that they are counted.

        To be called when all dispatchers are attached, before the first :meth:`flip`; returns how many were bound. Some
        may stay unseen (:mod:`hitless.kernel.elders`). Raises UnsupportedError, KernelError.
        """
        if not self.is_settled:
            raise NodeError(
                f"{self._directory}: with two epochs there is no telling which a connection is of; settle it",
                path=str(self._directory),
            )
        inside = {path.stat().st_ino for top in cgroups for path in (top, *top.rglob("*/"))}
        return bind_elders(self._storage, self.epoch, inside)

    def put(self, name: str, program: Program | None, epoch: int) -> None:
        """Let hook ``name`` run ``program`` for connections of ``epoch``; None lets all pass, as if there was no hook.

        The next epoch's slots are those of the one that ended last, so there must be nothing :meth:`left` of it. Raises
        NodeError if there may be, UnsupportedError if the kernel lets no dispatcher lead to ``program``, KernelError.
        """
        if epoch > self.epoch and not self.is_settled:
            raise NodeError(
                f"{self._directory}: connections may be left of the epoch before {self.epoch}, and its programs with "
                "them: settle the board before the next release comes",
                path=str(self._directory),
                epoch=self.epoch,
            )
        with Map.open(self._directory / "slots" / name) as slots:
            if program is None:
                with Program.open(self._directory / "passing" / name) as passing:
                    slots.update(_number(epoch & 1), _number(passing.fd))
                return
            try:
                slots.update(_number(epoch & 1), _number(program.fd))
            except KernelError as error:
                if error.facts["errno"] != errno.EINVAL:
                    raise
                raise UnsupportedError(
                    f"hook {name}: the kernel lets no dispatcher lead to program {program.info.name}: it was loaded "
                    "for another attach type than the hook's programs before it (see its SEC), or uses storage of its "
                    "cgroup (BPF_MAP_TYPE_CGROUP_STORAGE)",
                    feature=f"dispatcher to {program.info.name}",
                    hook=name,
                ) from error

    def runs(self, name: str) -> int:
        """The id of the program that hook ``name`` runs for connections of the present epoch. Raises KernelError."""
        with Map.open(self._directory / "slots" / name) as slots:
            return int(np.frombuffer(slots.lookup(_number(self.epoch & 1)) or bytes(4), np.uint32)[0])

    def flip(self) -> int:
        """Make the next epoch the present one, by one store; returns it. Connections that had begun stay as they are.

        On return none can be added to the epoch before. May be repeated until ``settle``. Raises KernelError.
        """
        return self._turn(1)

    def flip_back(self) -> int:
        """Undo :meth:`flip`: the old release's slots are those of one epoch further, too; settle the board then.

        May be repeated. Raises KernelError.
        """
        return self._turn(2)

    def left(self) -> Left:
        """Count connections. Those that begin or end meanwhile may count or not. Raises KernelError."""
        present, before, loose = self._pass(moving=False)
        return Left(present, before, loose, int(self._epochs[_ELDER // 4]) != self.epoch)

    def settle(self) -> int:
        """End all epochs before the present one: what is left in them moves over. Returns how many connections.

        Each moves at one stroke, for all hooks; sockets older than the board all at once, uncounted. On return no
        program of an epoch before runs or will. May be repeated after a kill. Raises KernelError.
        """
        moved, found = 0, -1
        while found:  # a pass over very many sockets has breaks, and can miss one that changes its place meanwhile
            _, before, loose = self._pass(moving=True)
            moved, found = moved + before, before + loose
        self._epochs[_ELDER // 4] = self.epoch
        wait_for_running_programs()
        for name in self.hooks():
            with Map.open(self._directory / "slots" / name) as slots:
                number = np.frombuffer(slots.lookup(_number(self.epoch & 1)) or bytes(4), np.uint32)[0]
                with Program.by_id(int(number)) as program:
                    slots.update(_number(~self.epoch & 1), _number(program.fd))
        self._epochs[_SETTLED // 4] = self.epoch
        return moved

    def close(self) -> None:
        """Give the descriptors back; the board stays where it is pinned."""
        self._word.close()
        self._storage.close()

    def _turn(self, steps: int) -> int:
        self._pass(moving=False)  # if connections cannot be counted, that is to be known before it matters
        self._epochs[_PRESENT] = self._epochs[_SETTLED // 4] + np.uint32(steps)
        wait_for_running_programs()
        return self.epoch

    def _pass(self, moving: bool) -> tuple[int, int, int]:
        """Sockets by where they belong, counted; those not of the present epoch move to it if they shall."""
        scratch = Scratch("board_count")
        iterator = Iterator.load("bpf_sk_storage_map", _counting(self._word, scratch, moving), "board_count")
        try:
            iterator.run(self._storage)  # puts out nothing, so it is one pass without a break, that misses nothing
        finally:
            iterator.close()
            scratch.map.close()
        return scratch[_HERE], scratch[_BEFORE], scratch[_LOOSE]


def _create_storage() -> Map:
    """Connections by their switch. No BPF_F_CLONE: a listener is older than the connections it takes."""
    word = Int("int", 4, True)  # the kernel wants types of every storage map
    return create_as(MapSpec("board_storage", "sk_storage", 4, 4, 0, _NO_PREALLOC, key=word, value=word))


def _number(number: int) -> bytes:
    return np.uint32(number).tobytes()


def _passing(kind: Kind) -> bytes:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=kind.passed)
    asm.emit(EXIT)
    return asm.code()


# Registers: R6 the context, R7 the socket's word, R9 the epoch to go on in; R8 the socket.
def _dispatcher(kind: Kind, storage: Map, word: Map, slots: Map) -> bytes:
    asm = Assembler()
    asm.emit(MOV, R6, R1)
    if kind.socket is not None:
        _find_socket(asm, kind)
        _BEGINNINGS[kind.begins](asm, storage, word)
        asm.label("elder")
        _load_epoch(asm, word, _ELDER)
        asm.emit(JA, off="go")
    asm.label("present")
    _load_epoch(asm, word, _PRESENT)
    asm.label("go")
    asm.emit(AND_IMM, R9, imm=1)
    asm.emit(JNE_IMM, R9, off="odd", imm=0)
    # Constant slots are patched into direct jumps. The other slot is for one that is empty, which none is at any time.
    for slot in (0, 1):
        _go_on(asm, slots, slot)
    asm.emit(MOV_IMM, R0, imm=kind.passed)
    asm.emit(EXIT)
    asm.label("odd")
    for slot in (1, 0):
        _go_on(asm, slots, slot)
    asm.emit(MOV_IMM, R0, imm=kind.passed)
    asm.emit(EXIT)
    return asm.code()


def _find_socket(asm: Assembler, kind: Kind) -> None:
    """The socket in R8; what has none, or none that lives on as one, is of the present epoch."""
    if kind.socket == -1:
        asm.emit(MOV, R8, R6)
        return
    asm.emit(LOAD[8], R8, R6, kind.socket or 0)
    asm.emit(JEQ_IMM, R8, off="present", imm=0)
    if kind.program == _SCHED_CLS:  # sees sockets of a handshake and of TIME_WAIT
        asm.emit(MOV, R1, R8)
        asm.call(_FULLSOCK)
        asm.emit(JEQ_IMM, R0, off="present", imm=0)
        asm.emit(MOV, R8, R0)


def _create(asm: Assembler, storage: Map, _: Map) -> None:
    _get(asm, storage, _F_CREATE)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)  # no memory: nothing will make it storage later either
    asm.emit(JA, off="present")


def _connect(asm: Assembler, storage: Map, word: Map) -> None:
    _get(asm, storage, _F_CREATE)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)
    asm.emit(LOAD[4], R1, R6, _SOCKET_TYPE)
    asm.emit(JNE_IMM, R1, off="anew", imm=_STREAM)
    # A second dispatcher of the same connect().
    asm.emit(LOAD[4], R9, R7, 0)
    asm.emit(MOV, R1, R9)
    asm.emit(RSH_IMM, R1, imm=_CONNECTING)
    asm.emit(JNE_IMM, R1, off="go", imm=0)
    asm.label("anew")
    _load_epoch(asm, word, _PRESENT)
    asm.emit(MOV, R1, R9)
    asm.emit(MOV_IMM, R2, imm=-1 << _CONNECTING)
    asm.emit(OR, R1, R2)
    asm.emit(STORE[4], R7, R1, 0)
    asm.emit(JA, off="go")


def _use(asm: Assembler, storage: Map, word: Map, listens: bool = False) -> None:
    _get(asm, storage)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)
    asm.emit(LOAD[4], R9, R7, 0)
    asm.emit(JNE_IMM, R9, off="go", imm=0)
    if listens:
        asm.emit(LOAD[4], R1, R8, _SOCKET_STATE)
        asm.emit(JEQ_IMM, R1, off="present", imm=_LISTENING)
    _begin(asm, word)


def _use_packet(asm: Assembler, storage: Map, word: Map) -> None:
    _use(asm, storage, word, listens=True)


def _look(asm: Assembler, storage: Map, _: Map) -> None:
    _get(asm, storage)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)
    asm.emit(LOAD[4], R9, R7, 0)
    asm.emit(JNE_IMM, R9, off="go", imm=0)
    asm.emit(JA, off="present")


def _ops(asm: Assembler, storage: Map, word: Map) -> None:
    asm.emit(LOAD[4], R9, R6, 0)  # op
    asm.emit(JEQ_IMM, R9, off="connect", imm=_CONNECT_CB)
    asm.emit(JEQ_IMM, R9, off="passive", imm=_PASSIVE_CB)
    _look(asm, storage, word)
    asm.label("connect")
    _get(asm, storage, _F_CREATE)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)
    asm.emit(LOAD[4], R9, R7, 0)
    asm.emit(MOV, R1, R9)
    asm.emit(RSH_IMM, R1, imm=_CONNECTING)
    asm.emit(JNE_IMM, R1, off="begun", imm=0)
    _load_epoch(asm, word, _PRESENT)  # no dispatcher stood on connect() for this socket
    asm.label("begun")
    asm.emit(AND_IMM, R9, imm=(1 << _CONNECTING) - 1)
    asm.emit(STORE[4], R7, R9, 0)
    asm.emit(JA, off="go")
    asm.label("passive")
    _get(asm, storage, _F_CREATE)
    asm.emit(JEQ_IMM, R7, off="elder", imm=0)
    asm.emit(LOAD[4], R9, R7, 0)
    asm.emit(JNE_IMM, R9, off="go", imm=0)
    _begin(asm, word)


def _get(asm: Assembler, storage: Map, flags: int = 0) -> None:
    """The word of the socket in R7, or nothing."""
    asm.map(R1, storage.fd)
    asm.emit(MOV, R2, R8)
    asm.emit(MOV_IMM, R3, imm=0)
    asm.emit(MOV_IMM, R4, imm=flags)
    asm.call(_STORAGE_GET)
    asm.emit(MOV, R7, R0)


def _begin(asm: Assembler, word: Map) -> None:
    """Bind a socket that is bound to nothing; of two hooks that do so at once on two CPUs, one has the say."""
    _load_epoch(asm, word, _PRESENT)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(ATOMIC[4], R7, R9, 0, CMPXCHG)
    asm.emit(JEQ_IMM, R0, off="go", imm=0)
    asm.emit(MOV, R9, R0)
    asm.emit(JA, off="go")


def _load_epoch(asm: Assembler, word: Map, which: int) -> None:
    asm.value(R1, word.fd, which)
    asm.emit(LOAD[4], R9, R1, 0)


def _go_on(asm: Assembler, slots: Map, slot: int) -> None:
    asm.emit(MOV, R1, R6)
    asm.map(R2, slots.fd)
    asm.emit(MOV_IMM, R3, imm=slot)
    asm.call(_TAIL_CALL)


def _counting(word: Map, scratch: Scratch, moving: bool) -> bytes:
    """Over struct bpf_iter__bpf_sk_storage_map: meta, map, socket, value."""
    state = "sock_common.skc_state"
    place = offsets("a socket", "old connections cannot be counted", state)[state]
    asm = Assembler()
    asm.emit(LOAD[8], R6, R1, 16)
    asm.emit(JEQ_IMM, R6, off="exit", imm=0)
    asm.emit(LOAD[8], R7, R1, 24)
    asm.emit(JEQ_IMM, R7, off="exit", imm=0)  # the last call, after all sockets, has none
    asm.emit(LOAD[4], R8, R7, 0)
    asm.emit(MOV, R2, R8)
    asm.emit(RSH_IMM, R2, imm=_CONNECTING)
    asm.emit(AND_IMM, R8, imm=(1 << _CONNECTING) - 1)
    asm.emit(JEQ_IMM, R8, off="exit", imm=0)
    _load_epoch(asm, word, _PRESENT)
    asm.emit(JEQ, R8, R9, "here")
    if moving:
        asm.emit(STORE[4], R7, R9, 0)  # a connect() at the same time writes the same
    asm.emit(JNE_IMM, R2, off="before", imm=0)  # amid connect(), where TCP has not opened it yet
    asm.emit(LOAD[1], R1, R6, place)
    asm.emit(JEQ_IMM, R1, off="loose", imm=_CLOSED)
    asm.label("before")
    count(asm, scratch, _BEFORE)
    asm.emit(JA, off="exit")
    asm.label("loose")
    count(asm, scratch, _LOOSE)
    asm.emit(JA, off="exit")
    asm.label("here")
    count(asm, scratch, _HERE)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    return asm.code()


_BEGINNINGS = {
    "create": _create, "connect": _connect, "use": _use, "packet": _use_packet, "look": _look, "ops": _ops,
}  # fmt: skip
