"""``python -m tests.kmesh``: a node of Kmesh's kind, started by its own loader, adopted and upgraded under traffic."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import hitless
from meshd.demo.lab import Lab
from tests.kmesh.bundles import write_bundle
from tests.kmesh.node import KmeshNode, build
from tests.kmesh.test_adopt import ids_of_links, ids_of_maps, lost

SECONDS = 3.0  # of traffic before the upgrade and after it


def main() -> int:
    """Print what was there, what was done and what was lost; 1 if anything was."""
    with TemporaryDirectory() as scratch, Lab() as lab:
        built = build(Path(scratch))
        node = KmeshNode(lab, built)
        old, new = (
            write_bundle(Path(scratch) / f"bundle{one}", one, built.stripped[one], built.headers[one]) for one in (1, 2)
        )
        places = node.variables_of_bundles()
        return _run(node, hitless.Bundle.load(old, places), hitless.Bundle.load(new, places))


def _run(node: KmeshNode, old: hitless.Bundle, new: hitless.Bundle) -> int:
    daemon = node.start(1)
    node.fill()
    own = hitless.Node(node.root)
    with node.traffic() as traffic:
        traffic.go()
        time.sleep(SECONDS)
        traffic.pause()
        before, links = node.dump(1), ids_of_links(node)
        traffic.go()
        adopted = hitless.adopt(own, old)
        result = hitless.apply(own, new)
        time.sleep(SECONDS)
        traffic.pause()
        wrong, after = node.wrong(2, traffic), node.dump(2)
        gone = lost(before, after)
        maps = ids_of_maps(node, 2)
        daemon.stop()
        traffic.go()
        started = node.start(2).started
        time.sleep(SECONDS)
        traffic.pause()
        wrong += node.wrong(2, traffic) + lost(after, node.dump(2))
        reused = sum(one.reused and maps.get(name) == one.id for name, one in started.pinned.items())
        entries = sum(len(table.rows()) for table in before.values())
        actions = [entry.action for entry in result.maps]
        kinds = ", ".join(f"{actions.count(kind)} {kind}" for kind in dict.fromkeys(actions))
        slowest = max(one.gap for one in traffic.now.values()) * 1000
        for name, text in (
            ("Node", f"{len(old.objects)} objects, {len(adopted.maps)} maps with {entries:,} entries, "
                     f"{len(adopted.hooks)} hooks, started by its own loader"),
            ("Upgrade", f"adopted as it ran, then {old.version} -> {new.version}: {kinds}"),
            ("Connections", f"{sum(traffic.connects().values()):,} made, {sum(traffic.failed().values())} failed"),
            ("Messages", f"{sum(traffic.messages().values()):,} numbered ones came back in order"),
            ("Denied", f"{sum(traffic.now['denied'].denied.values()):,} attempts, all denied"),
            ("Slowest", f"{slowest:.0f} ms for one step of any client"),
            ("Entries", f"{entries:,} compared field by field, {len(gone)} not as before"),
            ("Counters", "those of the kernel are those of its clients" if not wrong else "; ".join(wrong)),
            ("Links", f"{len(links)}, {'the same' if ids_of_links(node) == links else 'not the same'} as before"),
            ("Own loader", f"starts as {started.start} and uses {reused} of {len(started.pinned)} maps"),
        ):
            print(f"{name + ':':<14}{text}")
    lossless = not wrong and not gone and reused == len(started.pinned) and started.start == "Restart"
    print("\nNothing was lost." if lossless else "\nSomething was lost.")
    return 0 if lossless else 1


if __name__ == "__main__":
    sys.exit(main())
