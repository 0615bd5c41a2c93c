"""Other programs that open a daemon's pins by their paths, while it is adopted, upgraded and starts again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map
from hitless.upgrade import finish as finishing
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import MANIFEST, NEW, OLD, Loader, pinned
from tests.adopt.test_adopt import identity
from tests.patience import patient
from tests.releases import write_release

UPGRADES = int(os.environ.get("HITLESS_UPGRADES", "8"))
HOUSE = Path(__file__).parents[2]
NAMES = ("tally", "second", "third")


def _more(text: str) -> str:
    """Two maps more that are converted as tally is."""
    maps = "".join(f"BARE({name}, HASH, 64, __u32, struct tally);\n" for name in NAMES[1:])
    used = "".join(f"    bpf_map_lookup_elem(&{name}, &port);\n" for name in NAMES[1:])
    first = "    bpf_map_lookup_elem(&idle"
    return text.replace("BARE(idle", f"{maps}BARE(idle").replace(first, used + first)


def test_no_path_is_ever_missing_and_a_round_over_all_of_them_sees_one_release_or_one_commit_between_two(
    lab: Lab, tmp_path: Path
) -> None:
    manifest = MANIFEST + "".join(f'[map.{name}]\nkey = "__u32"\nvalue = "tally"\n' for name in NAMES[1:])
    paths = [write_release(tmp_path / n, n, _more(text), manifest) for n, text in (("1.0", OLD), ("2.0", NEW))]
    old, new = (hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))}) for path in paths)
    loader = Loader(lab.bpffs / "daemon", lab.cgroup_of("clients"))
    loader.start(old.objects[0].data, "1.0")
    watched = [str(loader.root / "map" / name) for name in NAMES] + [str(loader.root / loader.link)]
    command, pipe = [sys.executable, "-m", "tests.adopt.reader", *watched], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=HOUSE) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            node = hitless.Node(loader.root)
            hitless.adopt(node, old)
            for number in range(UPGRADES):
                if number % 2:
                    hitless.rollback(node, NAMES)
                else:
                    hitless.apply(node, new)
                if number % 3 == 0:
                    loader.start((old if number % 2 else new).objects[0].data, "1.0" if number % 2 else "2.0")
            seen = json.loads(reader.communicate(timeout=patient(30))[0])
        finally:
            reader.kill()
    assert seen["missing"] == []
    rounds = [tuple(found) for found, _ in seen["rounds"]]
    (link,) = {found[-1] for found in rounds}
    whole = [("8", "8", "8", link), ("24", "24", "24", link)]
    mixed = [found for found in rounds if found not in whole]
    print(f"{sum(count for _, count in seen['rounds']):,} rounds, {len(mixed)} of them with a commit in between")
    clean = [found for found in rounds if found in whole]
    assert clean == [whole[n % 2] for n in range(len(clean))]
    assert len(clean) >= UPGRADES  # the last may have come when the reader was told to end
    for found in mixed:
        assert sum(one != other for one, other in pairwise(found[:3])) == 1
    assert len(mixed) <= UPGRADES


def test_a_path_stays_where_its_map_and_its_link_are_called_otherwise(
    lab: Lab, loader: Loader, node: hitless.Node, release: Callable[[int], hitless.Bundle], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hitless.adopt(node, release(1))
    source = NEW.replace("BARE(tally,", "BARE(tallies,").replace("&tally,", "&tallies,")
    manifest = MANIFEST.replace("[map.tally]", '[map.tallies]\nwas = "tally"\npin = "map/tally"')
    manifest = manifest.replace('link = "connect4"', 'link = "conn"\nwas = "connect4"')
    path = write_release(tmp_path / "2", "2.0", source, manifest)
    before = identity(loader.root / loader.link)
    sizes = []

    def look() -> None:
        assert identity(loader.root / loader.link) == before
        with Map(pinned(loader.root / "map" / "tally")) as held:
            sizes.append(held.info.value_size)

    def looking(real: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            look()
            return real(*args)

        return run

    for name in ("_let_go", "come_along", "publish"):  # before, between and behind what gives new names
        real = getattr(finishing, name)
        monkeypatch.setattr(finishing, name, looking(real))
    hitless.apply(node, hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))}))
    assert sizes == [24, 24, 24]
    assert (loader.root / loader.link).readlink() == Path("../hitless/links/conn")
    hitless.rollback(node, ("tally", "tallies"))
    assert sizes == [24, 24, 24, 8, 8, 8]
    assert status(node).problems == ()
