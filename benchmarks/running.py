"""Running one way in a process of its own, with what it and the kernel take for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hitless
from benchmarks.build import TOOLS
from hitless.errors import HitlessError
from hitless.kernel.bpffs import remove_tree
from hitless.kernel.maps import Map
from hitless.kernel.programs import load_object
from meshd.demo.lab import Lab

__all__ = [
    "Background",
    "Bench",
    "BenchError",
    "Outcome",
    "Way",
    "digest",
    "fill",
    "made_map",
    "memory_of",
    "on_cpu",
    "worker",
]

Outcome = dict[str, Any]

_TOP = Path(__file__).parent.parent
_SAMPLE_EVERY = 0.01
_FREED = 0.5
_MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
_QUIET = 0.08  # busy part of all CPUs' time


class BenchError(HitlessError):
    """A part of the benchmark failed; there are no figures."""


class Bench:
    """A lab with what the benchmark needs in it.

    ``pins`` is on its bpffs, ``files`` in memory (a tmpfs). ``patience`` is how many seconds to wait for an idle
    machine before a run; ``quiet`` turns false when it was not idle in time. ``say`` tells of progress.
    """

    def __init__(self, lab: Lab, patience: float, say: Callable[[str], None]) -> None:
        self.lab = lab
        self.patience = patience
        self.say = say
        self.quiet = True
        self.pins = lab.bpffs / "bench"
        self.files = lab.scratch / "files"
        self.pins.mkdir()
        self.files.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", lab.name, str(self.files)], check=True)

    @property
    def source(self) -> Path:
        """Pin of the old map."""
        return self.pins / "source"

    @property
    def target(self) -> Path:
        """Pin of the new map."""
        return self.pins / "target"

    @property
    def carried(self) -> Path:
        """Directory of pins for what a carrier keeps."""
        return self.pins / "carried"

    @property
    def base_file(self) -> Path:
        """Where the C program keeps its base if it is to be a file."""
        return self.files / "base"

    @contextmanager
    def room(self) -> Iterator[None]:
        """``carried`` is there, empty, while the body runs, and nothing stays of it nor of ``base_file``."""
        self.carried.mkdir()
        try:
            yield
        finally:
            remove_tree(self.carried)
            self.base_file.unlink(missing_ok=True)

    @contextmanager
    def running(self, releases: tuple[Path, Path], entries: int) -> Iterator[Path]:
        """The first of ``releases`` runs in the lab, its map filled, while the body runs; yields the pin root."""
        node = hitless.Node(self.lab.bpffs / "store")
        hitless.apply(node, hitless.Bundle.load(releases[0], {"cgroup": str(self.lab.cgroup)}))
        try:
            fill(node.root / "maps" / "flow", entries)
            yield node.root
        finally:
            hitless.unload(node)

    def upgrade(self, root: Path, releases: tuple[Path, Path]) -> list[str]:
        """The command that upgrades what runs at ``root`` to the second of ``releases``."""
        return worker("upgrade", root, releases[1], self.lab.cgroup)

    def settle(self) -> None:
        """Wait until the machine is idle: what went before is still being freed.

        Where others are at work it never is, so once that is known it is waited for no longer than it takes to free.
        """
        until = time.monotonic() + (self.patience if self.quiet else min(self.patience, _FREED))
        quiet = 0
        while quiet < 2:
            if time.monotonic() >= until:
                self.quiet = False
                return
            quiet = quiet + 1 if _load(0.05) < _QUIET else 0


def worker(way: str, *args: object) -> list[str]:
    """The command for a way that is written in Python."""
    return [sys.executable, "-m", "benchmarks.worker", way, *map(str, args)]


def on_cpu(cpu: int | None, command: Sequence[str]) -> list[str]:
    """``command``, pinned to ``cpu`` unless that is None."""
    return [*command] if cpu is None else ["taskset", "-c", str(cpu), *command]


@contextmanager
def made_map(bundle: Path, pin: Path) -> Iterator[Map]:
    """The map of the release in ``bundle``, new and pinned at ``pin``, while the body runs."""
    release = hitless.Bundle.load(bundle, {"cgroup": "/"})
    loaded = load_object(release.objects[0].data, "flow", {}, {})
    for program in loaded.programs.values():
        program.close()
    held = loaded.maps["flow"]
    held.pin(pin)
    try:
        yield held
    finally:
        pin.unlink()
        held.close()


def fill(pin: Path, entries: int) -> None:
    """Fill the map of release 1 at ``pin``."""
    subprocess.run([str(TOOLS / "entries"), "fill", str(entries), str(pin)], check=True)


def digest(pin: Path) -> str:
    """What the map of release 2 at ``pin`` holds: its count and a hash that does not depend on the order."""
    command = [str(TOOLS / "entries"), "digest", str(pin)]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return f"{facts['entries']}-{facts['digest']}"


def memory_of(held: Map) -> int:
    """Bytes that the kernel holds for a map, by its own word (``memlock`` in fdinfo)."""
    return _memlock(Path(f"/proc/self/fdinfo/{held.fd}").read_text())


class Way:
    """A process that copies, step by step; started and waiting from the beginning."""

    def __init__(self, lab: Lab, command: Sequence[str]) -> None:
        self._command = command
        self._process = _start(lab, command, "outside")
        _expect_ready(self._process, command)

    def step(self, besides: Sequence[int] = ()) -> Outcome:
        """Let it do its next step, and return what that took.

        ``kernel`` in it is the most that the kernel held at once for maps and programs of the process, besides the
        maps with the ids ``besides``. Raises HitlessError if the process fails.
        """
        assert self._process.stdin is not None
        sampler = _Sampler(self._process.pid, besides)
        self._process.stdin.write("go\n")
        outcome: Outcome = json.loads(_line(self._process, self._command))
        outcome["kernel"] = sampler.stop() + outcome.pop("mapped", 0)
        return outcome

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._process)


class Background:
    """A C program that watches, from the beginning until :meth:`stop`."""

    def __init__(self, lab: Lab, command: Sequence[str], cgroup: str = "outside") -> None:
        self._command = command
        self._process = _start(lab, command, cgroup)
        _expect_ready(self._process, command)

    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def stop(self) -> str:
        """End it; returns what it said. Raises HitlessError if it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        said = self._process.stdout.read()
        if self._process.wait(30):
            raise _failed(self._process, self._command)
        return said

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._process)


def _load(seconds: float) -> float:
    """The busy part of all CPUs' time meanwhile."""
    before = _times()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(_times(), before, strict=True))
    return 1 - idle / total if total else 1.0


def _times() -> tuple[int, int]:
    numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(numbers), numbers[3] + numbers[4]


class _Sampler(threading.Thread):
    """Looks again and again at what the kernel holds for a process, without maps that can be mapped.

    Those may be mapped while nobody has them open, so that the process itself counts them.
    """

    def __init__(self, pid: int, besides: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._most = 0
        self._fdinfo = Path(f"/proc/{pid}/fdinfo")
        self._besides = {f"map_id:\t{number}" for number in besides}
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Until stopped."""
        while not self._over.wait(_SAMPLE_EVERY):
            self._most = max(self._most, self._held())

    def stop(self) -> int:
        """Look once more; returns the most that was seen."""
        self._over.set()
        self.join()
        return max(self._most, self._held())

    def _held(self) -> int:
        held: dict[str, int] = {}
        try:
            paths = list(self._fdinfo.iterdir())
        except (FileNotFoundError, ProcessLookupError):
            return 0
        for path in paths:
            text = _text(path)
            identity = re.search(r"^(?:map|prog)_id:\t\d+", text, re.MULTILINE)
            flags = re.search(r"^map_flags:\t(\w+)", text, re.MULTILINE)
            if identity and identity[0] not in self._besides and not (flags and int(flags[1], 16) & _MMAPABLE):
                held[identity[0]] = _memlock(text)
        return sum(held.values())


def _memlock(text: str) -> int:
    size = re.search(r"^memlock:\t(\d+)", text, re.MULTILINE)
    return int(size[1]) if size else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _start(lab: Lab, command: Sequence[str], cgroup: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return lab.popen(command, cgroup, stdin=pipe, stdout=pipe, stderr=pipe, cwd=_TOP)


def _line(process: subprocess.Popen[str], command: Sequence[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise _failed(process, command)
    return line


def _expect_ready(process: subprocess.Popen[str], command: Sequence[str]) -> None:
    if _line(process, command) != "ready":
        raise _failed(process, command)


def _failed(process: subprocess.Popen[str], command: Sequence[str]) -> BenchError:
    process.kill()
    assert process.stderr is not None
    return BenchError(f"`{' '.join(command)}` failed:\n{process.stderr.read()}", command=list(command))


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None and not pipe.closed:
            pipe.close()
