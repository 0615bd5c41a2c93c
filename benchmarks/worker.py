"""One way of copying in a process of its own: ``python -m benchmarks.worker WAY ...``.

Says ``ready`` when everything is imported and open, and waits for a line before each step; each step's outcome is
one line of JSON: ``entries``, ``seconds``, those of ``cpu`` time, ``user``, the bytes by which this process grew at
most meanwhile, and ``mapped``, those of BPF maps that are mapped into it, which are not among them.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hitless
from hitless.kernel.libbpf import check, lib, options
from hitless.kernel.maps import Map
from hitless.kernel.programs import load_object
from hitless.layout.diff import diff_map
from hitless.layout.rules import MapRules
from hitless.upgrade.carrier import Carrier, Passage
from hitless.upgrade.carriers import CARRIERS
from hitless.upgrade.transaction import apply

__all__ = ["main"]

Outcome = dict[str, Any]

np.zeros(1)  # numpy takes memory at its first use


def _steps(*each: Callable[[], int | Outcome]) -> None:
    """Each step between a line that comes in and one that goes out; growth is since before the first."""
    print("ready", flush=True)
    before = None
    for do in each:
        if not sys.stdin.readline():
            raise SystemExit(1)
        if before is None:
            before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at VmRSS
        started, worked = time.perf_counter(), time.process_time()
        done = do()
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        facts = done if isinstance(done, dict) else {"entries": done}
        mapped = _mapped_maps()
        user = max(0, _status("VmHWM") - before - mapped)
        print(json.dumps({"seconds": seconds, "cpu": cpu, "user": user, "mapped": mapped, **facts}), flush=True)


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _mapped_maps() -> int:
    """Bytes of maps that are mapped here: they are the kernel's."""
    found = re.findall(r"bpf-map\]?\n(?:.*\n)*?Rss:\s+(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, found)) * 1024


def carrier(kind: str, releases: str, source: str, target: str, pin: str) -> None:
    """Hitless' own way: the copy, then all that follows until the new map is exact.

    ``seconds`` end with the pass over all entries, as those of other ways do; ``tail`` are those of the rounds after.
    """
    one, two = (hitless.Bundle.load(Path(releases) / number, {"cgroup": "/"}) for number in "12")
    rules = two.rules.get("flow", MapRules())
    old, new = one.maps["flow"], two.maps["flow"]
    passage = Passage(
        name="flow",
        source=Map.open(Path(source)),
        target=Map.open(Path(target)),
        old=old,
        new=new,
        diff=diff_map(old, new, rules),
        rules=rules,
        pin=Path(pin),
        fresh=True,
        lossy_allowed=False,
        writing=threading.RLock(),
    )
    made: list[Carrier] = []

    def copy() -> Outcome:
        started, worked = time.perf_counter(), time.process_time()
        made.append(CARRIERS[kind](passage))
        prepared = passed = time.perf_counter()
        cpu, most = 0.0, 0

        def progress(done: int) -> None:
            nonlocal passed, cpu, most
            if done > most:  # later rounds copy no more entries
                passed, cpu, most = time.perf_counter(), time.process_time() - worked, done

        made[0].copy(progress)
        return {
            "entries": made[0].tally.copied,
            "seconds": passed - started,
            "cpu": cpu,
            "prepared": prepared - started,
            "tail": time.perf_counter() - passed,
        }

    def rest() -> int:
        made[0].verify()
        made[0].catch_up()
        made[0].catch_up(last=True)
        return made[0].tally.entries

    _steps(copy, rest)


def batch(releases: str, source: str, target: str) -> None:
    """Hitless' fallback, batch calls converted by numpy, and nothing else."""
    one, two = (hitless.Bundle.load(Path(releases) / number, {"cgroup": "/"}) for number in "12")
    conversion = diff_map(one.maps["flow"], two.maps["flow"], MapRules()).value
    assert conversion is not None
    reader, writer = Map.open(Path(source)), Map.open(Path(target))

    def copy() -> int:
        done = 0
        for keys, values in reader.batches():
            writer.write(keys, conversion.apply(values).records)
            done += len(keys)
        return done

    _steps(copy)


def one_pass(program: str, source: str, target: str) -> None:
    """A pass in the kernel without a bound."""
    maps = {"source": Map.open(Path(source)), "target": Map.open(Path(target))}
    loaded = load_object(Path(program).read_bytes(), "pass", maps, {})
    opts = options("bpf_test_run_opts")

    def copy() -> int:
        check(lib().bpf_prog_test_run_opts(loaded.programs["pass"].fd, opts), "BPF_PROG_RUN", "the pass")
        return int(opts.retval)

    _steps(copy)


def naive(source: str, target: str) -> None:
    """What one writes at first: ctypes and struct, entry by entry."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    old, new = (libbpf.bpf_obj_get(path.encode()) for path in (source, target))
    assert old >= 0
    assert new >= 0
    before, after = struct.Struct("=II3Q8I"), struct.Struct("=QII3Q8I")

    def copy() -> int:
        key, following, value = (ctypes.create_string_buffer(size) for size in (16, 16, before.size))
        position = None
        done = 0
        while libbpf.bpf_map_get_next_key(old, position, following) == 0:
            key.raw = following.raw
            position = key
            if libbpf.bpf_map_lookup_elem(old, key, value):
                continue
            hits, state, first, last, count, *path = before.unpack(value.raw)
            converted = after.pack(hits, state, 0, first, last, count, *path)
            if libbpf.bpf_map_update_elem(new, key, converted, 0):
                raise OSError(ctypes.get_errno(), "bpf_map_update_elem")
            done += 1
        return done

    _steps(copy)


def upgrade(root: str, release: str, cgroup: str) -> None:
    """A whole upgrade as a user runs it."""
    node, bundle = hitless.Node(root), hitless.Bundle.load(Path(release), {"cgroup": cgroup})

    def run() -> Outcome:
        started = time.monotonic_ns()
        result = apply(node, bundle)
        ended = time.monotonic_ns()
        return {"entries": result.maps[0].entries, "steps": dict(result.steps), "from": started, "to": ended}

    _steps(run)


def create(release: str) -> None:
    """The new release's map and nothing in it: what any loader asks of the kernel in one call."""
    data = hitless.Bundle.load(release, {"cgroup": "/"}).objects[0].data

    def load() -> int:
        load_object(data, "flow", {}, {})
        return 0

    _steps(load)


def spin(seconds: str) -> None:
    """No copy at all, but a CPU in use by user space: what the scheduler alone makes others wait."""

    def loop() -> int:
        until = time.perf_counter() + float(seconds)
        while time.perf_counter() < until:
            pass
        return 0

    _steps(loop)


def main() -> None:
    """Run one way."""
    ways: dict[str, Callable[..., None]] = {
        "carrier": carrier, "batch": batch, "pass": one_pass, "naive": naive, "upgrade": upgrade, "create": create,
        "spin": spin,
    }  # fmt: skip
    way, *args = sys.argv[1:]
    ways[way](*args)


if __name__ == "__main__":
    main()
