"""BPF iterators: a program of ours that the kernel runs once for each object of a kind, as we read.

What the program writes with ``bpf_seq_write`` is what a read returns. The kernel runs the program until its buffer
(32 KB) or ours is full, so that small reads keep short the time in which nothing else runs on this CPU.
"""

from __future__ import annotations

import os
from functools import cache

from hitless.errors import UnsupportedError
from hitless.kernel.libbpf import check, ffi, lib, options, system_call
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_code

__all__ = ["Iterator"]

_PROG_TYPE_TRACING = 26
_TRACE_ITER = 28  # BPF_TRACE_ITER
_OF_NO_MAP = ("task", "task_file", "cgroup")
_PARENTS_FIRST = 2  # BPF_CGROUP_ITER_DESCENDANTS_PRE


class Iterator:
    """A loaded iterator program; one pass at a time over the objects of one map."""

    def __init__(self, target: str, program: Program) -> None:
        self._target = target
        self._program = program
        self._pass = -1
        self._what = ""

    @classmethod
    def load(cls, target: str, code: bytes, name: str) -> Iterator:
        """Load ``code`` to run once for each object of ``target``, such as ``bpf_map_elem``, ``sockmap``.

        Raises UnsupportedError if this kernel has no such iterator, KernelError with the verifier's log.
        """
        function = _function(target)
        if function < 0:
            raise UnsupportedError(
                f"this kernel tells of no iterator over {target}: it has none, or no BTF of its own "
                "(/sys/kernel/btf/vmlinux)",
                feature=f"iter/{target}",
            )
        what = f"the program {name}, an iterator over {target}"
        opts = {"expected_attach_type": _TRACE_ITER, "attach_btf_id": function}
        return cls(target, load_code(_PROG_TYPE_TRACING, name, code, what, **opts))

    def open(self, over: Map) -> None:
        """Begin a pass over ``over``; one that had begun ends here. Raises KernelError (EINVAL: not a map for it).

        A target that is no part of a map (``task``, ``task_file``, ``cgroup``) is passed over wholly, whatever ``over``
        is.
        """
        self._end()
        info = ffi.new("union bpf_iter_link_info *")
        if self._target not in _OF_NO_MAP:
            info.map.map_fd = over.fd
        elif self._target == "cgroup":
            info.cgroup.order = _PARENTS_FIRST  # from the root, since no cgroup is named
        opts = options("bpf_link_create_opts", iter_info=info, iter_info_len=ffi.sizeof("union bpf_iter_link_info"))
        what = self._what = f"an iterator over {self._target} of map {over.info.name}"
        link = check(lib().bpf_link_create(self._program.fd, 0, _TRACE_ITER, opts), "BPF_LINK_CREATE", what)
        try:
            self._pass = check(lib().bpf_iter_create(link), "BPF_ITER_CREATE", what)
        finally:
            os.close(link)  # the pass holds what it needs

    def read(self, size: int) -> bytes:
        """Let the program run until it has written ``size`` bytes or less; nothing is the end of the pass.

        Raises KernelError: E2BIG if one run writes more than the kernel's buffer holds, EOPNOTSUPP for more than one
        read of a pass over cgroups.
        """
        with system_call("reading", self._what):
            while True:
                try:
                    return os.read(self._pass, size)
                except BlockingIOError:  # a million objects without a byte written: the kernel takes a breath
                    continue

    def run(self, over: Map) -> bytes:
        """A whole pass; returns all that the program wrote."""
        self.open(over)
        parts = []
        while part := self.read(1 << 15):
            parts.append(part)
        self._end()
        return b"".join(parts)

    def close(self) -> None:
        """End the pass and give the program back."""
        self._end()
        self._program.close()

    def __del__(self) -> None:
        self.close()

    def _end(self) -> None:
        if self._pass >= 0:
            os.close(self._pass)
            self._pass = -1


@cache  # libbpf reads all of the kernel's BTF at every call, and that stays the same as long as the kernel runs
def _function(target: str) -> int:
    return int(lib().libbpf_find_vmlinux_btf_id(target.encode(), _TRACE_ITER))
