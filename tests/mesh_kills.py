"""meshd killed at random moments: ``python -m tests.mesh_kills --seconds 300`` says what clients saw of that: nothing.

Under traffic, and while the services file changes every 50 ms, meshd is started and killed (SIGKILL) after a random
while, some of the time in the middle of an upgrade or of going back, or while it takes over from one that lives. Every
now and then one may live until it has verified the mesh: then the maps hold what the file says, and nothing else, and
the one before has ended by itself. Clients count what failed for them.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from meshd.demo.lab import Lab
from tests.meshd.labmesh import VIP, VIP6, Churn, Mesh, Meshd, is_as_the_file_says, until

_LOSS = ("flow", "service_counter", "service", "policy")  # of going from 3 back to 2
_LIFE = 0.7  # s that a daemon lives at most before it is killed
_CHECK_EVERY = 4  # lives
_CONVERGED = 5.0  # s within which the maps are as the file says


class Summary(msgspec.Struct):
    """What came of it; ``killed`` counts lives by how far they had come, ``slowest`` is in seconds."""

    seed: int
    killed: dict[str, int]
    checks: int = 0
    taken_over: int = 0
    slowest: float = 0.0
    connections: int = 0
    failed: int = 0
    held: int = 0
    alive: int = 0
    problems: list[str] = []

    @property
    def is_good(self) -> bool:
        """Whether nobody saw anything of it."""
        return not self.problems and not self.failed and self.alive == self.held and self.connections > 0


def run(lab: Lab, seconds: float, seed: int, releases: Sequence[int] = (2, 3)) -> Summary:
    """Kill for so many seconds, and some more until the last life has ended and the maps were looked at once.

    One of ``releases`` is started each time: 2 or 3, or always the same one.
    """
    chance = random.Random(seed)
    mesh = Mesh(lab)
    churn = Churn(mesh)
    with churn:
        until(mesh.file.exists)
    release = chance.choice(releases)
    mesh.start(release)
    clients = [mesh.python("connect", vip, "80", "1000000000", cgroup="clients") for vip in (VIP, VIP6)]
    held = mesh.hold(VIP, 20)
    killed: Counter[str] = Counter()
    summary = Summary(seed, {}, held=20)
    end = time.monotonic() + seconds
    lives = 0
    older: Meshd | None = mesh.daemon
    while (time.monotonic() < end or not summary.checks) and not summary.problems:
        lives += 1
        release = chance.choice(releases) if chance.random() < 0.4 else release
        daemon = mesh.launch(release, *(f"--allow-loss={name}" for name in _LOSS if len(releases) > 1))
        stays = chance.random() < 0.3  # until the next one has taken over
        with churn:
            if lives % _CHECK_EVERY and not stays:
                if chance.random() < 0.8:
                    daemon.lines.wait_for({}, 30)  # its first word: a good part of a short life is the start of Python
                time.sleep(chance.uniform(0, _LIFE))
            else:
                daemon.lines.wait_for({"event": ("verified", "error", "stopped")}, 30)
        if lives % _CHECK_EVERY == 0:
            began = time.monotonic()
            if not until(lambda now=release: is_as_the_file_says(mesh, now), _CONVERGED):  # type: ignore[misc]
                summary.problems.append(f"life {lives}: the maps of release {release} are not as the file says")
            summary.slowest = max(summary.slowest, time.monotonic() - began)
            summary.checks += 1
            if older is not None:
                summary.taken_over += 1
                if older.process.wait(10) != 0:
                    summary.problems.append(f"the life before {lives} did not end well: {older.lines.last}")
        if daemon.process.poll() is not None:
            summary.problems.append(f"life {lives} ended by itself: {daemon.lines.last}")
        if older is not None:
            older.process.kill()
        if stays:
            older = daemon
            continue
        older = None
        daemon.process.kill()
        daemon.process.wait(10)
        killed[str(daemon.lines.last.get("step") or daemon.lines.last.get("event") or "start")] += 1
    if older is not None:
        older.process.kill()
    for client in clients:
        client.send_signal(signal.SIGINT)
        said = msgspec.json.decode(client.communicate(timeout=20)[0])
        summary.connections += sum(said["answers"].values())
        summary.failed += sum(said["errors"].values())
        if said["errors"]:
            summary.problems.append(f"clients saw {said['errors']}")
    summary.alive = held.alive()
    held.close()
    summary.killed = dict(killed)
    return summary


def main() -> None:
    """Run it, print the summary, and exit with 1 if anybody saw anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.mesh_kills", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--releases", type=int, nargs="+", default=[2, 3], help="2 and 3, or one of them all")
    args = parser.parse_args()
    with Lab() as lab:
        summary = run(lab, args.seconds, args.seed, args.releases)
    print(
        f"{sum(summary.killed.values())} kills (seed {summary.seed}; last word before: {summary.killed})\n"
        f"{summary.connections} connections, {summary.failed} failed; {summary.alive} of {summary.held} held live\n"
        f"{summary.checks} times all maps were as the file says, {summary.slowest:.2f} s after it changed at most,\n"
        f"{summary.taken_over} of these times by a daemon that took over from one that lived"
    )
    for problem in summary.problems:
        print(problem, file=sys.stderr)
    sys.exit(not summary.is_good)


if __name__ == "__main__":
    main()
