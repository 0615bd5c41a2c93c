"""Pods: network namespaces with a veth pair to the lab's, which carries packets to them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from meshd.demo.lab import Lab

__all__ = ["Pods", "Sender"]


class Pods:
    """Namespaces in ``directory``, one file each; in each an ``eth0`` whose other end is in the lab's namespace.

    They live as long as a process of the lab, so that nothing is left of them after any end of it. At most 255.
    """

    def __init__(self, lab: Lab) -> None:
        """None at first."""
        self.lab = lab
        self.directory = lab.scratch / "pods"
        self.directory.mkdir()
        self._next = 1

    def add(self, count: int) -> list[int]:
        """Make so many more and return their numbers."""
        numbers = list(range(self._next, self._next + count))
        self._next += count
        made = {}
        for number in numbers:
            command = ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"]
            made[number] = self.lab.popen(command, stdout=subprocess.PIPE)
        for process in made.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
        self._batch(
            line
            for number, process in made.items()
            for line in (
                f"link add veth{number} address {_mac(number, 1)} type veth "
                f"peer name eth0 address {_mac(number, 2)} netns {process.pid}",
                f"addr add {_address(number, 1)}/24 dev veth{number}",
                f"link set veth{number} up",
                f"neigh replace {_address(number, 2)} lladdr {_mac(number, 2)} dev veth{number} nud permanent",
            )
        )
        for number, process in made.items():
            self._within(process.pid, f"addr add {_address(number, 2)}/24 dev eth0", "link set eth0 up")
            (self.directory / f"pod{number}").symlink_to(f"/proc/{process.pid}/ns/net")
        self._wait({f"veth{number}" for number in numbers})
        return numbers

    def _wait(self, names: set[str]) -> None:
        """Until the kernel lets packets through, which it drops before it has looked at new carriers."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            told = self.lab.run(["ip", "-brief", "link", "show", "up"]).stdout.splitlines()
            if names <= {line.split("@")[0] for line in told if line.split()[1] == "UP"}:
                return
            time.sleep(0.01)
        raise TimeoutError(names)

    def remove(self, number: int) -> None:
        """Take the interface of one away; its namespace stays."""
        self._batch([f"link del veth{number}"])

    def forget(self, number: int) -> None:
        """Take the interface and the file of the namespace away."""
        self.remove(number)
        (self.directory / f"pod{number}").unlink()

    def send(self, numbers: list[int], seconds: float, most: int) -> Sender:
        """Send packets to these in turn."""
        return Sender(self.lab, [_address(number, 2) for number in numbers], seconds, most)

    def _batch(self, lines: Iterator[str] | list[str]) -> None:
        self._ip(["nsenter", f"--net={self.lab.netns}", "ip", "-batch", "-"], lines)

    def _within(self, pid: int, *lines: str) -> None:
        self._ip(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-batch", "-"], list(lines))

    @staticmethod
    def _ip(command: list[str], lines: Iterator[str] | list[str]) -> None:
        subprocess.run(command, input="".join(f"{line}\n" for line in lines), text=True, check=True)


_SENDER = """
import itertools, select, socket, sys, time
addresses, seconds, most = sys.argv[1].split(","), float(sys.argv[2]), int(sys.argv[3])
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
until, sent = time.monotonic() + seconds, {one: 0 for one in addresses}
print("go", flush=True)
for number, address in enumerate(itertools.cycle(addresses)):
    if number >= most or (number % 64 == 0 and (time.monotonic() > until or select.select([0], [], [], 0)[0])):
        break
    try:
        made.sendto(b"x", (address, 4242))
    except OSError:
        continue
    sent[address] += 1
    if number % 16 == 0:
        time.sleep(0.0005)
print(*sent.values(), flush=True)
"""


class Sender:
    """Sends UDP packets to port 4242 until it is stopped."""

    def __init__(self, lab: Lab, addresses: list[str], seconds: float, most: int) -> None:
        """Begin: for so many ``seconds``, and ``most`` packets."""
        command = [sys.executable, "-c", _SENDER, ",".join(addresses), str(seconds), str(most)]
        self._process = lab.popen(command, "clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "go\n"

    def stop(self) -> list[int]:
        """Stop, and say how many were sent to each."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        return self.all()

    def all(self) -> list[int]:
        """The same, when as many as were wanted have been sent."""
        assert self._process.stdout is not None
        return [int(count) for count in self._process.stdout.read().split()]


def _mac(number: int, end: int) -> str:
    return f"02:00:00:00:{number:02x}:{end:02x}"


def _address(number: int, end: int) -> str:
    return f"10.9.{number}.{end}"
