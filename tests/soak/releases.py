"""meshd's first three releases, of one form, each with one object more: the meter, which counts bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from meshd.releases import RELEASES
from tests.releases import compile_object

__all__ = ["VERSIONS", "write_releases"]

_METER = Path(__file__).parent / "meter.bpf.c"
_ATTACH = """
[[object]]
file = "meter.bpf.o"

[[attach]]
program = "meter"
hook = "cgroup"
target = "${cgroup}"
link = "meter"
"""
_FLAT = """
[map.sent]
was = "traffic"

[map.sent.field.messages]
was = "volume.messages"

[map.sent.field.bytes]
was = "volume.octets"
"""
_NESTED = """
[map.traffic]
was = "sent"

[map.traffic.field."volume.messages"]
was = "messages"

[map.traffic.field."volume.octets"]
was = "bytes"
"""
_RULES = {1: "", 2: _FLAT, 3: _NESTED}

VERSIONS = {number: release.version for number, release in RELEASES.items() if number in _RULES}


def write_releases(directory: Path) -> dict[int, Path]:
    """Make a bundle of each release below ``directory``, from meshd's compiled objects; returns their directories."""
    bundles = {}
    for number in VERSIONS:
        release = RELEASES[number]
        bundle = bundles[number] = directory / f"v{number}"
        bundle.mkdir(parents=True)
        for part in release.bundle.glob("*.bpf.o"):
            shutil.copy(part, bundle)
        compile_object(f"#define RELEASE {number}\n{_METER.read_text()}", bundle / "meter.bpf.o")
        (bundle / "bundle.toml").write_text((release.bundle / "bundle.toml").read_text() + _ATTACH + _RULES[number])
    return bundles
