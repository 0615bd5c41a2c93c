"""tc filters and XDP by netlink: replaced under traffic, each packet counted once; and what can be in their way."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

from hitless.errors import GoneError, KernelError, NodeError
from hitless.kernel.filters import Direction, Filter, filters, free_place
from hitless.kernel.interfaces import interfaces
from hitless.kernel.libbpf import messages
from hitless.kernel.links import Link
from hitless.kernel.namespaces import Namespace
from hitless.kernel.xdp import Mode, Xdp, quick
from meshd.demo.lab import Lab
from tests.kernel.wires import Counter, Traffic, Wire, compile_counter, ip, wires

FILTERS = 1000
XDPS = 100


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Counter]:
    return compile_counter(tmp_path_factory.mktemp("counter"))


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wires() as made:
        yield made[0]


def tc(wire: Wire, *args: str) -> str:
    command = ["nsenter", f"--net={wire.far.namespace.path}", "tc", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def remove(wire: Wire) -> None:
    ip("-n", Path(wire.far.namespace.path).name, "link", "del", wire.far.name)


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_filter_is_replaced_without_a_gap(wire: Wire, counter: Callable[[], Counter], direction: Direction) -> None:
    one, two = counter(), counter()
    placed = Filter.attach(one.filter, wire.far if direction == "ingress" else wire.near, direction)
    with Traffic(wire) as traffic:
        for old, new in itertools.islice(itertools.cycle([(one, two), (two, one)]), FILTERS):
            placed.update(new.filter, old.filter)
    assert one.packets + two.packets == traffic.sent == traffic.received
    assert min(one.packets, two.packets) > FILTERS / 10


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdp_is_replaced_without_a_gap(wire: Wire, counter: Callable[[], Counter], mode: Mode) -> None:
    one, two = counter(), counter()
    placed = Xdp.attach(one.xdp, wire.far, mode)
    with Traffic(wire) as traffic:
        for old, new in itertools.islice(itertools.cycle([(one, two), (two, one)]), XDPS):
            placed.update(new.xdp, old.xdp)
    assert one.packets + two.packets == traffic.sent == traffic.received
    assert min(one.packets, two.packets) > XDPS


def seconds(placed: Xdp, one: Counter, two: Counter, times: int) -> list[float]:
    took = []
    for old, new in itertools.islice(itertools.cycle([(one, two), (two, one)]), times):
        began = time.monotonic()
        placed.update(new.xdp, old.xdp)
        took.append(time.monotonic() - began)
    return took


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdp_is_replaced_without_waiting_where_both_programs_run_elsewhere(
    wire: Wire, counter: Callable[[], Counter], mode: Mode
) -> None:
    one, two = counter(), counter()
    placed = Xdp.attach(one.xdp, wire.far, mode)
    here, descriptors = Path("/proc/self/ns/net").stat().st_ino, len(list(Path("/proc/self/fd").iterdir()))
    waiting = seconds(placed, one, two, 20)
    with Traffic(wire) as traffic, quick([one.xdp, two.xdp]):
        at_once = seconds(placed, one, two, 1000)
    assert median(at_once) * 5 < median(waiting)
    assert one.packets + two.packets == traffic.sent == traffic.received
    assert Path("/proc/self/ns/net").stat().st_ino == here
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_filter_is_found_where_it_was_attached_and_gone_when_detached(
    wire: Wire, counter: Callable[[], Counter]
) -> None:
    one, two = counter(), counter()
    chosen = Filter.attach(one.filter, wire.far, "egress")
    given = Filter.attach(two.filter, wire.far, "egress", priority=7, handle=3)
    assert (given.priority, given.handle) == (7, 3)
    assert [info.program_id for info in filters(wire.far, "egress")] == [two.filter.info.id, one.filter.info.id]
    assert [given.info, chosen.info] == list(filters(wire.far, "egress"))
    assert chosen.info.target_id == wire.far.index
    assert filters(wire.far, "ingress") == ()
    chosen.detach(one.filter)
    assert chosen.info.is_dead
    assert filters(wire.far, "egress") == (given.info,)


def test_clsact_stays_when_the_last_filter_goes(wire: Wire, counter: Callable[[], Counter]) -> None:
    one = counter()
    Filter.attach(one.filter, wire.far, "ingress").detach(one.filter)
    assert "clsact" in tc(wire, "qdisc", "show", "dev", wire.far.name)


def test_a_filter_of_another_program_is_neither_replaced_nor_removed(
    wire: Wire, counter: Callable[[], Counter]
) -> None:
    one, two, foreign = counter(), counter(), counter()
    placed = Filter.attach(foreign.filter, wire.far, "ingress")
    differs = f"runs program {foreign.filter.info.id}, not {one.filter.info.id} as expected"
    with pytest.raises(NodeError, match=differs):
        placed.update(two.filter, one.filter)
    with pytest.raises(NodeError, match=differs):
        placed.detach(one.filter)
    with pytest.raises(NodeError, match=f"is there already and runs program {foreign.filter.info.id}"):
        Filter.attach(one.filter, wire.far, "ingress", placed.priority, placed.handle)
    assert placed.info.program_id == foreign.filter.info.id


def test_a_filter_that_somebody_removed_is_not_made_anew(wire: Wire, counter: Callable[[], Counter]) -> None:
    one, two = counter(), counter()
    placed = Filter.attach(one.filter, wire.far, "ingress")
    tc(wire, "qdisc", "del", "dev", wire.far.name, "clsact")
    assert placed.info.is_dead
    with pytest.raises(GoneError, match="somebody removed it"):
        placed.update(two.filter, one.filter)


def test_a_filter_of_another_kind_or_protocol_is_left_alone(
    wire: Wire, counter: Callable[[], Counter], lab: Lab
) -> None:
    one, two = counter(), counter()
    pinned = lab.bpffs / "filter"
    one.filter.pin(pinned)
    Filter.attach(two.filter, wire.far, "ingress", priority=1)
    at = ["filter", "add", "dev", wire.far.name, "ingress"]
    tc(wire, *at, "pref", "2", "protocol", "ip", "u32", "match", "u32", "0", "0")
    tc(wire, *at, "pref", "3", "protocol", "ip", "bpf", "direct-action", "object-pinned", str(pinned))
    tc(wire, *at, "pref", "4", "protocol", "all", "bpf", "object-pinned", str(pinned))
    tc(wire, *at, "pref", "5", "protocol", "all", "bpf", "direct-action", "object-pinned", str(pinned))
    found = filters(wire.far, "ingress")
    assert [(info.priority, info.is_plain) for info in found] == [(1, True), (3, False), (4, False), (5, True)]
    for info in found[1:3]:
        with pytest.raises(NodeError, match="not in direct-action mode for all protocols"):
            Filter(wire.far, "ingress", info.priority, info.handle).update(two.filter, one.filter)
    Filter(wire.far, "ingress", found[3].priority, found[3].handle).update(two.filter, one.filter)


def test_a_filter_for_egress_is_not_put_where_it_would_see_what_comes_in(
    wire: Wire, counter: Callable[[], Counter]
) -> None:
    tc(wire, "qdisc", "add", "dev", wire.far.name, "ingress")
    with pytest.raises(NodeError, match="queueing discipline ingress in the place of clsact, which has no egress"):
        Filter.attach(counter().filter, wire.far, "egress")
    assert filters(wire.far, "ingress") == ()


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdp_is_found_where_it_was_attached_and_gone_when_detached(
    wire: Wire, counter: Callable[[], Counter], mode: Mode
) -> None:
    one = counter()
    assert Xdp.find(wire.far) is None
    placed = Xdp.attach(one.xdp, wire.far, mode)
    assert Xdp.find(wire.far) == placed
    assert (placed.info.program_id, placed.info.target_id) == (one.xdp.info.id, wire.far.index)
    placed.detach(one.xdp)
    assert placed.info.is_dead
    assert Xdp.find(wire.far) is None


def test_xdp_of_another_program_is_neither_replaced_nor_removed(wire: Wire, counter: Callable[[], Counter]) -> None:
    one, two, foreign = counter(), counter(), counter()
    placed = Xdp.attach(foreign.xdp, wire.far, "native")
    differs = f"runs program {foreign.xdp.info.id}, not {one.xdp.info.id} as expected"
    with pytest.raises(NodeError, match=differs):
        placed.update(two.xdp, one.xdp)
    with pytest.raises(NodeError, match=differs):
        placed.detach(one.xdp)
    modes: tuple[Mode, ...] = ("native", "generic")
    for mode in modes:
        with pytest.raises(NodeError, match=f"native XDP on .* runs program {foreign.xdp.info.id}"):
            Xdp.attach(one.xdp, wire.far, mode)
    assert placed.info.program_id == foreign.xdp.info.id


def test_xdp_that_somebody_detached_is_not_attached_anew(wire: Wire, counter: Callable[[], Counter]) -> None:
    one, two = counter(), counter()
    placed = Xdp.attach(one.xdp, wire.far, "native")
    ip("-n", Path(wire.far.namespace.path).name, "link", "set", wire.far.name, "xdp", "off")
    with pytest.raises(GoneError, match="nothing runs there any more"):
        placed.update(two.xdp, one.xdp)


def test_an_interface_without_native_xdp_says_so(wire: Wire, counter: Callable[[], Counter]) -> None:
    (loopback,) = interfaces("lo", wire.far.namespace)
    with pytest.raises(KernelError) as caught:
        Xdp.attach(counter().xdp, loopback, "native")
    assert caught.value.facts["errno"] == errno.EOPNOTSUPP


def test_an_interface_that_vanished_is_named(wire: Wire, counter: Callable[[], Counter]) -> None:
    one, two = counter(), counter()
    filter_ = Filter.attach(one.filter, wire.far, "ingress")
    xdp = Xdp.attach(one.xdp, wire.far, "native")
    remove(wire)
    attempts: list[Callable[[], object]] = [
        lambda: filter_.update(two.filter, one.filter),
        lambda: filter_.detach(one.filter),
        lambda: Filter.attach(one.filter, wire.far, "ingress"),
        lambda: xdp.update(two.xdp, one.xdp),
        lambda: xdp.detach(one.xdp),
        lambda: Xdp.attach(one.xdp, wire.far, "native"),
    ]
    for attempt in attempts:
        with pytest.raises(
            GoneError, match=f"interface w0 of network namespace {wire.far.namespace.path} .* not there"
        ):
            attempt()
    assert (filter_.info.target_id, xdp.info.target_id) == (0, 0)


def test_a_namespace_that_is_gone_is_named(wire: Wire, counter: Callable[[], Counter]) -> None:
    one, two = counter(), counter()
    filter_ = Filter.attach(one.filter, wire.far, "ingress")
    xdp = Xdp.attach(one.xdp, wire.far, "native")
    ip("netns", "del", Path(wire.far.namespace.path).name)
    with pytest.raises(GoneError, match=f"network namespace {wire.far.namespace.path} is not there"):
        filter_.update(two.filter, one.filter)
    with pytest.raises(GoneError, match=f"network namespace {wire.far.namespace.path} is not there"):
        xdp.update(two.xdp, one.xdp)
    assert filter_.info.is_dead
    assert xdp.info.is_dead


def test_what_the_kernel_refuses_is_told_by_the_error_alone(
    wire: Wire, counter: Callable[[], Counter], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = counter(), counter()
    Xdp.attach(one.xdp, wire.far, "native")

    def refused() -> None:
        with pytest.raises(NodeError, match="XDP program already attached"):
            Xdp.attach(two.xdp, wire.far, "native")

    with messages() as heard, ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(refused).result()
    assert heard == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("names", [["SYS_ADMIN"], ["SYS_ADMIN", "NET_ADMIN"]], ids=["without", "with"])
def test_changing_filters_and_xdp_takes_the_capability_that_the_document_names(
    wire: Wire, counter: Callable[[], Counter], lab: Lab, names: list[str]
) -> None:
    one, two = counter(), counter()
    filter_ = Filter.attach(one.filter, wire.far, "ingress")
    xdp = Xdp.attach(one.xdp, wire.far, "native")
    pins = [lab.bpffs / name for name in ("filter1", "filter2", "xdp1", "xdp2")]
    for program, pin in zip((one.filter, two.filter, one.xdp, two.xdp), pins, strict=True):
        program.pin(pin)
    code = f"""if True:
        from pathlib import Path
        from hitless.errors import KernelError
        from hitless.kernel.filters import Filter
        from hitless.kernel.interfaces import interfaces
        from hitless.kernel.namespaces import Namespace
        from hitless.kernel.programs import Program
        from hitless.kernel.xdp import Xdp
        filter1, filter2, xdp1, xdp2 = (Program.open(Path(pin)) for pin in {[str(pin) for pin in pins]})
        (far,) = interfaces("w0", Namespace.at({wire.far.namespace.path!r}))
        for place, new, old in (
            (Filter(far, "ingress", {filter_.priority}, {filter_.handle}), filter2, filter1),
            (Xdp(far, "native"), xdp2, xdp1),
        ):
            try:
                place.update(new, old)
                print("updated")
            except KernelError as error:
                print("CAP_NET_ADMIN" in error.message, error.facts["errno_name"])
    """
    kept = ",".join(f"+{name.lower()}" for name in names)
    command = ["setpriv", "--bounding-set", f"-all,{kept}", "--inh-caps", "-all", sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == (["updated"] * 2 if "NET_ADMIN" in names else ["True EPERM"] * 2)
    runs = two if "NET_ADMIN" in names else one
    assert (filter_.info.program_id, xdp.info.program_id) == (runs.filter.info.id, runs.xdp.info.id)


def test_many_threads_replace_filters_in_many_places_at_once(counter: Callable[[], Counter]) -> None:
    one, two = counter(), counter()
    with wires(8) as made, ThreadPoolExecutor(8) as pool:
        ends = [end for wire in made for end in (wire.near, wire.far)]
        placed = list(pool.map(lambda end: Filter.attach(one.filter, end, "ingress"), ends))
        for old, new in [(one, two), (two, one)] * 5:
            list(pool.map(lambda place, new=new, old=old: place.update(new.filter, old.filter), placed))
        assert {place.info.program_id for place in placed} == {one.filter.info.id}
        with pytest.raises(NodeError) as caught:
            list(pool.map(lambda place: place.update(one.filter, two.filter), placed))
    assert caught.value.facts["expected"] == two.filter.info.id


def test_a_namespace_that_took_the_place_of_another_is_not_taken_for_it(
    wire: Wire, counter: Callable[[], Counter]
) -> None:
    one, two = counter(), counter()
    placed = Filter.attach(one.filter, wire.near, "ingress")
    name = Path(wire.near.namespace.path).name
    before = Namespace.at(wire.near.namespace.path)
    ip("netns", "add", f"{name}-b")
    ip("netns", "del", name)
    Path(f"/run/netns/{name}").symlink_to(f"{name}-b")
    try:
        assert Namespace.at(before.path) != before
        with pytest.raises(GoneError, match="another file or namespace took its place"):
            placed.update(two.filter, one.filter)
    finally:
        Path(f"/run/netns/{name}").unlink()
        ip("netns", "del", f"{name}-b")


def test_a_free_place_is_the_one_that_the_kernel_would_choose(wire: Wire, counter: Callable[[], Counter]) -> None:
    one = counter()
    for _ in range(2):
        first = free_place(wire.far, "ingress")
        chosen = Filter.attach(one.filter, wire.far, "ingress")
        assert first == (chosen.priority, chosen.handle)
    beside = free_place(wire.far, "ingress", chosen.priority)
    assert beside == (chosen.priority, chosen.handle + 1)
    Filter.attach(one.filter, wire.far, "ingress", *beside)
    assert len(filters(wire.far, "ingress")) == 3
    Filter.attach(one.filter, wire.far, "ingress", priority=1)
    with pytest.raises(NodeError, match="has a filter with priority 1, so none can be before it"):
        free_place(wire.far, "ingress")


def test_it_is_told_whether_a_link_holds_xdp_and_nothing_changes(
    wire: Wire, counter: Callable[[], Counter]
) -> None:
    one = counter()
    placed = Xdp.attach(one.xdp, wire.far, "native")
    assert not placed.is_linked(one.xdp)
    assert placed.info.program_id == one.xdp.info.id
    placed.detach(one.xdp)
    with wire.far.entered():
        link = Link.attach(one.xdp, wire.far.index, "xdp", wire.far)
    with link:
        assert placed.is_linked(one.xdp)
