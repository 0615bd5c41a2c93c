"""Types from a C header, for objects whose maps carry none."""

from __future__ import annotations

from pathlib import Path

import pytest

import hitless
from tests.cli.test_commands import as_json
from tests.releases import compile_object

HEADER = """
#include <linux/types.h>
struct service_key {{ __u32 addr; __u32 port; }};
struct service_value {{ {fields} }};
typedef struct {{ __u32 a; }} lone;
"""
OBJECT = """
struct {{
    __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __uint(key_size, 8); __uint(value_size, {size});
}} km_service SEC(".maps");
SEC("xdp") int early(struct xdp_md *ctx) {{ return XDP_PASS; }}
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture
def header(tmp_path: Path) -> Path:
    """It tells what the 12 bytes of the map's values are."""
    path = tmp_path / "types.h"
    path.write_text(HEADER.format(fields="__u32 hits; __u32 last[2];"))
    return path


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    """An object whose map says how long its values are, and no more."""
    return compile_object(OBJECT.format(size=12), tmp_path / "blind.bpf.o")


def test_inspect_and_diff_take_the_type_that_fits_alone(blind: Path, header: Path) -> None:
    assert as_json("inspect", blind)["maps"]["km_service"]["value"] is None
    found = as_json("inspect", blind, "--types-from", header)["maps"]["km_service"]
    assert (found["key"]["name"], found["value"]["name"]) == ("service_key", "service_value")
    assert as_json("diff", blind, blind, code=1)["verdict"] == "unknown"
    assert as_json("diff", blind, blind, "--types-from", header)["verdict"] == "identical"
    assert as_json("check", blind, blind, "--types-from", header)["survives"]


def test_a_bundle_carries_the_types_and_its_manifest_binds_them(blind: Path, header: Path, tmp_path: Path) -> None:
    from hitless.headers import compile_header

    (tmp_path / "types.bpf.o").write_bytes(compile_header(header))
    manifest = '[bundle]\nname = "a"\nversion = "1"\n[[object]]\nfile = "blind.bpf.o"\n[types]\nfile = "types.bpf.o"\n'
    (tmp_path / "bundle.toml").write_text(manifest)
    plain = hitless.Bundle.load(tmp_path, {})
    assert plain.maps["km_service"].value is None  # what fits is a proposal until somebody says so
    (tmp_path / "bundle.toml").write_text(manifest + '[map.km_service]\nkey = "service_key"\nvalue = "service_value"\n')
    bound = hitless.Bundle.load(tmp_path, {}).maps["km_service"]
    assert [made.name for made in (bound.key, bound.value) if made] == ["service_key", "service_value"]
    (tmp_path / "types.bpf.o").write_bytes(b"")
    with pytest.raises(hitless.HitlessError, match=r"types.bpf.o"):
        hitless.Bundle.load(tmp_path, {})


def test_a_header_that_cannot_be_compiled_is_trouble_in_words(
    blind: Path, header: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.h"
    bad.write_text("struct a { __u32 x; };\n")
    message = as_json("check", blind, blind, "--types-from", bad, code=2)["error"]["message"]
    assert "does not compile by itself" in message and "unknown type name '__u32'" in message
    gone = as_json("check", blind, blind, "--types-from", tmp_path / "gone.h", code=2)["error"]
    assert "is not there" in gone["message"]
    monkeypatch.setenv("CLANG", "/nowhere/clang")
    error = as_json("check", blind, blind, "--types-from", header, code=2)["error"]
    assert error["code"] == "unsupported" and "$CLANG is '/nowhere/clang'" in error["message"]
