"""``hitless.h``: what it says in C arrives in the layout, and no compiler stumbles over it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.layout.elf import read_object
from hitless.layout.model import Record
from hitless.layout.rules import Tags, parse_tags

SOURCE = """
#include <hitless.h>
#define max(a, b) ((a) > (b) ? (a) : (b))
#define LIMIT 100
struct value {
    __u64 opened HITLESS_MERGE(sum);
    __u32 highest HITLESS_MERGE(max) HITLESS_WAS(top) HITLESS_WAS(peak);
    __u32 limit HITLESS_DEFAULT(LIMIT);
};
"""
MAP = """
struct { __uint(type, 1); __uint(max_entries, 8); __type(key, __u32); __type(value, struct value); }
    service_counter SEC(".maps") HITLESS_WAS(counter) HITLESS_GROUP(auth) HITLESS_PROGRAMS_READ;
"""


def test_its_macros_become_tags_of_fields_and_maps(compile_bpf: Callable[..., bytes]) -> None:
    data = compile_bpf(SOURCE + MAP, f"-I{hitless.include_dir()}", "-Wall", "-Werror")
    (spec,) = read_object(data, "test").maps
    assert parse_tags(spec.tags, "") == Tags(("counter",), group="auth", programs="read")
    assert isinstance(spec.value, Record)
    assert [parse_tags(field.tags, "") for field in spec.value.fields] == [
        Tags(merge="sum"), Tags(("top", "peak"), merge="max"), Tags(default="100"),
    ]  # fmt: skip


@pytest.mark.parametrize("compiler", [["clang-19"], ["gcc"], ["gcc", "-std=c99", "-pedantic"]])
def test_it_compiles_without_a_warning_also_where_there_are_no_tags(
    compiler: list[str], preamble: str, tmp_path: Path
) -> None:
    file = tmp_path / "native.c"
    file.write_text(preamble + SOURCE + "int main(void) { struct value v = {0}; return (int)v.limit; }\n")
    command = [*compiler, "-Wall", "-Wextra", "-Werror", f"-I{hitless.include_dir()}", str(file), "-o"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "out"], timeout=10, check=False).returncode == 0


def test_a_policy_that_does_not_exist_does_not_compile(preamble: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.c"
    file.write_text(preamble + "#include <hitless.h>\nstruct v { int x HITLESS_MERGE(add); };\n")
    command = ["clang-19", "-target", "bpf", f"-I{hitless.include_dir()}", "-c", str(file), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "HITLESS_MERGE(add)" in done.stderr
