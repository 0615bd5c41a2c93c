"""Compiling small C for BPF, once per session and source."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hitless.layout.diff import MapDiff, diff_map
from hitless.layout.elf import read_object
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.rules import MapRules
from tests.compilers import compiled

PREAMBLE = """
typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef unsigned long long __u64;
typedef signed char __s8; typedef short __s16; typedef int __s32; typedef long long __s64;
typedef __u16 __be16; typedef __u32 __be32;
#define SEC(name) __attribute__((section(name), used))
#define TAG(text) __attribute__((btf_decl_tag(text)))
#define TYPE_TAG(text) __attribute__((btf_type_tag(text)))
#define __uint(name, val) int (*name)[val]
#define __type(name, val) __typeof__(val) *name
#define __array(name, val) __typeof__(val) *name[]
"""


@pytest.fixture(scope="session")
def preamble() -> str:
    """What every source begins with: the kernel's names of integers, and libbpf's macros."""
    return PREAMBLE


@pytest.fixture(scope="session")
def compile_bpf() -> Callable[..., bytes]:
    """C source -> the bytes of the object that clang makes of it."""

    def build(source: str, *flags: str) -> bytes:
        command = ["clang-19", "-target", "bpf", "-g", "-O2", "-x", "c", "-c", "-o", "-", *flags, "-"]
        return compiled(command, PREAMBLE + source)

    return build


@pytest.fixture(scope="session")
def read(compile_bpf: Callable[..., bytes]) -> Callable[..., ObjectSpec]:
    """C source -> what we read from its object."""
    return lambda source, *flags: read_object(compile_bpf(source, *flags), "test.o")


@pytest.fixture(scope="session")
def a_map(read: Callable[..., ObjectSpec]) -> Callable[..., MapSpec]:
    """C declarations that include ``struct value`` (and ``struct key`` if wanted) -> a hash map of it."""

    def make(source: str, key: str = "__u32", kind: int = 1, entries: int = 64, more: str = "") -> MapSpec:
        definition = (
            f"struct {{ __uint(type, {kind}); __uint(max_entries, {entries}); {more}"
            f'__type(key, {key}); __type(value, struct value); }} m SEC(".maps");'
        )
        return read(source + definition).maps[0]

    return make


@pytest.fixture(scope="session")
def compare(a_map: Callable[..., MapSpec]) -> Callable[..., MapDiff]:
    """Fields of ``struct value``, old and new -> how a map of them differs."""

    def run(old: str, new: str, rules: MapRules = MapRules()) -> MapDiff:  # noqa: B008 - frozen
        before, after = (
            a_map(text if "struct value" in text else f"struct value {{ {text} }};") for text in (old, new)
        )
        return diff_map(before, after, rules)

    return run
