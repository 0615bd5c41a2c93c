"""The services file: YAML text to values of :mod:`meshd.model`, or an error that names each wrong line and field.

Reading it has no effect and needs no kernel; only the ids of clients' cgroups are looked up in the file system.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from hitless.errors import HitlessError
from meshd.model import Action, Address, Backend, Config, Locality, Network, Policy, Protocol, Service
from meshd.releases import Release

__all__ = [
    "SIZE_LIMIT",
    "ConfigError",
    "Problem",
    "cgroup_id",
    "parse",
    "read",
]

SIZE_LIMIT = 8 << 20  # bytes; 10,000 services with ten backends each take 6 MiB

_SHOWN = 20
_DEEPEST = 20
_WEIGHT_MAX = 65535
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_TCP: Protocol = "tcp"
_NUMBER = re.compile(r"[0-9]{1,18}")
_AFFINITY_MAX = 86400  # s
_SAME = {
    "service": "the same source and service",
    "destination": "the same source, destination, port and protocol",
    "clients": "the same clients, port and protocol",
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

T = TypeVar("T")


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    ``line`` counts from 1, None when it is about the whole file; ``field`` is a path such as
    ``services[0].backends[1].port``, empty when the text is no YAML.
    """

    line: int | None
    field: str
    message: str


class ConfigError(HitlessError):
    """The services file cannot be used, and nothing was changed because of it.

    ``problems`` has every :class:`Problem`; ``facts`` has them as plain values, and the ``file``, ``line`` and
    ``field`` of the first.
    """

    code = "config"

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        lines = [_line(file, problem) for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"and {len(self.problems) - _SHOWN} more")
        facts = {"file": file, "line": first.line, "field": first.field}
        super().__init__("\n".join(lines), **facts, problems=msgspec.to_builtins(self.problems))


def read(path: Path) -> str:
    """Return the text of a services file; raises ConfigError when it cannot be read, is too large or no UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(str(path), [Problem(None, "", f"cannot be read: {error.strerror}")]) from error
    if len(data) > SIZE_LIMIT:
        raise ConfigError(str(path), [Problem(None, "", f"is larger than {SIZE_LIMIT} bytes, which is the limit")])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(str(path), [Problem(line, "", "is not UTF-8 text")]) from error


def parse(text: str, file: str, release: Release, cgroup: Path | None = None, alone: bool = True) -> Config:
    """Return what ``text`` asks for; ``file`` is the name to use in errors.

    Unless the file is ``alone``, its policies may name services that are not in it.

    ``cgroup`` is the directory that the mesh is attached to: clients' cgroups are looked up under it. Without it they
    are not looked up, and every ``source`` is 0. Raises ConfigError with every problem found.
    """
    try:
        _check_depth(text, file)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = mark.line + 1 if mark else None
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(file, [Problem(where, "", f"is not YAML: {what}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError(file, [Problem(None, "", f"is not YAML: {error}")]) from error
    reader = _Reader(release, cgroup, alone)
    config = reader.config(root)
    if reader.problems:
        raise ConfigError(file, sorted(reader.problems, key=lambda problem: problem.line or 0))
    return config


def cgroup_id(path: Path) -> int:
    """Return the kernel's id of the cgroup2 directory ``path``; raises OSError when it is none."""
    # On cgroup2 the inode number is the id that bpf_get_current_cgroup_id() tells.
    (path / "cgroup.procs").stat()
    return path.stat().st_ino


def _check_depth(text: str, file: str) -> None:
    # Composing recurses, in libyaml's case without a limit, until the stack is used up; parsing events does not.
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else None
                raise ConfigError(file, [Problem(line, "", "is nested too deeply")])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Wrong(Exception):  # noqa: N818
    """A node has no usable value; the problem is noted already."""


class _Reader:
    """Walks the YAML nodes, which unlike plain values know their lines, and notes all problems on its way."""

    def __init__(self, release: Release, cgroup: Path | None, alone: bool) -> None:
        self.problems: list[Problem] = []
        self._alone = alone
        self._release = release
        self._cgroup = cgroup
        self._names: set[str] = set()  # also of services with other problems: one mistake, one message

    def config(self, root: yaml.Node | None) -> Config:
        if root is None:
            self.problems.append(Problem(1, "services", "is missing: the file is empty"))
            return Config(())
        try:
            required, optional = (("services",), ("policies",)) if self._alone else ((), ("services", "policies"))
            fields = self._fields(root, "", required, optional)
        except _Wrong:
            return Config(())
        services = self._each(fields.get("services"), "services", self._service, self._release.services)
        self._distinct(services, "name", lambda one: one.name)
        self._distinct(
            services, "address", lambda one: (one.address, one.port, one.protocol), "the same address and port"
        )
        policies = self._each(fields.get("policies"), "policies", self._policy, self._release.policies)
        for kind, what in _SAME.items():
            of_kind = [one for one in policies if getattr(one[2], kind)]
            self._distinct(of_kind, kind, _identity, what)
        for node, field, policy in policies:
            if self._alone and policy.service and policy.service not in self._names:
                self._note(node, f"{field}.service", f"no service has the name {policy.service!r}")
        return Config(tuple(one for _, _, one in services), tuple(one for _, _, one in policies))

    def _service(self, node: yaml.Node, field: str) -> Service:
        optional = ("protocol", "affinity", "local")
        fields = self._fields(node, field, ("name", "address", "port", "backends"), optional)
        name = self._try(self._name, fields.get("name"), f"{field}.name")
        address = self._try(self._address, fields.get("address"), f"{field}.address")
        port = self._try(self._port, fields.get("port"), f"{field}.port")
        protocol = self._given(fields, field, "protocol", self._protocol, _TCP)
        affinity = self._given(fields, field, "affinity", self._affinity, 0)
        local = self._given(fields, field, "local", self._yes, False)
        if name is not None:
            self._names.add(name)
        limit = self._release.backends
        backends = self._each(fields.get("backends"), f"{field}.backends", self._backend, limit)
        self._distinct(backends, "address", lambda one: (one.address, one.port), "the same address and port")
        if name is None or address is None or port is None or protocol is None or affinity is None or local is None:
            raise _Wrong
        for where, path, backend in backends:
            if backend.address.version != address.version:
                what = f"{backend.address} cannot serve {address}: both must be IPv4 or both IPv6"
                self._note(where, f"{path}.address", what)
        return Service(name, address, port, protocol, tuple(one for _, _, one in backends), affinity, local)

    def _backend(self, node: yaml.Node, field: str) -> Backend:
        fields = self._fields(node, field, ("address", "port"), ("weight", "healthy", "locality"))
        address = self._try(self._address, fields.get("address"), f"{field}.address")
        port = self._try(self._port, fields.get("port"), f"{field}.port")
        weight = self._given(fields, field, "weight", self._weight, 1)
        healthy = self._given(fields, field, "healthy", self._yes, True)
        locality = self._given(fields, field, "locality", self._locality, Locality())
        if address is None or port is None or weight is None or healthy is None or locality is None:
            raise _Wrong
        return Backend(address, port, weight, healthy, locality)

    def _locality(self, node: yaml.Node, field: str) -> Locality:
        fields = self._fields(node, field, (), ("region", "zone", "node"))
        found = {name: self._try(self._name, value, f"{field}.{name}") for name, value in fields.items()}
        if None in found.values():
            raise _Wrong
        return Locality(**{name: value for name, value in found.items() if value is not None})

    def _policy(self, node: yaml.Node, field: str) -> Policy:
        optional = ("service", "destination", "clients", "source", "port", "protocol")
        fields = self._fields(node, field, ("action",), optional)
        action = self._try(self._action, fields.get("action"), f"{field}.action")
        kinds = [name for name in ("service", "destination", "clients") if name in fields]
        if len(kinds) != 1:
            what = f"names {' and '.join(kinds)}, but a policy is for one" if kinds else "is missing"
            raise self._wrong(node, f"{field}.service", f"{what}: give service, destination or clients")
        if kinds == ["clients"] and "source" in fields:
            what = "is of no use with clients, who come from other nodes as well"
            raise self._wrong(fields["source"], f"{field}.source", what)
        if kinds == ["service"]:
            for name in ("port", "protocol"):
                if name in fields:
                    self._note(fields[name], f"{field}.{name}", "is of no use with service, which has its own")
        elif not self._release.tables:
            what = f"is a policy by addresses, which release {self._release.version} does not have"
            raise self._wrong(fields[kinds[0]], f"{field}.{kinds[0]}", what)
        path: Path | None = None
        source: int | None = 0
        if "source" in fields:
            where = self._fields(fields["source"], f"{field}.source", ("cgroup",), ())
            found = self._try(self._source, where.get("cgroup"), f"{field}.source.cgroup")
            path, source = found if found else (None, None)
        port = self._given(fields, field, "port", self._port, 0)
        protocol = self._given(fields, field, "protocol", self._protocol, _TCP)
        service = self._given(fields, field, "service", self._name, "")
        ends = {name: self._try(self._network, fields[name], f"{field}.{name}") for name in kinds if name != "service"}
        if action is None or service is None or source is None or port is None or protocol is None:
            raise _Wrong
        if None in ends.values():
            raise _Wrong
        return Policy(action, service, path, source, ends.get("destination"), ends.get("clients"), port, protocol)

    def _source(self, node: yaml.Node, field: str) -> tuple[Path, int]:
        text = self._text(node, field)
        if not text or "\0" in text:
            raise self._wrong(node, field, "is empty: give the path of a cgroup, relative to the mesh's or absolute")
        if self._cgroup is None:
            return Path(text), 0
        path = self._cgroup / text
        try:
            inside = path.resolve().is_relative_to(self._cgroup.resolve())
            found = cgroup_id(path)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise self._wrong(node, field, f"{path} is no cgroup2 directory: {why}") from error
        if not inside:
            what = f"{path} is not under {self._cgroup}, where the mesh is attached: it never sees such clients"
            raise self._wrong(node, field, what)
        return path, found

    def _action(self, node: yaml.Node, field: str) -> Action:
        text = self._text(node, field)
        if text == "allow":
            return "allow"
        if text == "deny":
            return "deny"
        raise self._wrong(node, field, f"{text!r} is neither allow nor deny")

    def _protocol(self, node: yaml.Node, field: str) -> Protocol:
        text = self._text(node, field)
        for known in self._release.protocols:
            if text == known:
                return known
        what = " or ".join(self._release.protocols)
        raise self._wrong(node, field, f"{text[:60]!r} is not served by release {self._release.version}: give {what}")

    def _affinity(self, node: yaml.Node, field: str) -> int:
        if not self._release.tables:
            raise self._wrong(node, field, f"is a thing that release {self._release.version} does not have")
        return self._number(node, field, 0, _AFFINITY_MAX)

    def _yes(self, node: yaml.Node, field: str) -> bool:
        text = self._text(node, field)
        if text not in ("true", "false"):
            raise self._wrong(node, field, f"{text[:60]!r} is neither true nor false")
        return text == "true"

    def _network(self, node: yaml.Node, field: str) -> Network:
        text = self._text(node, field)
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise self._wrong(node, field, f"{text[:60]!r} is no network such as 10.1.0.0/16: {error}") from error
        if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
            raise self._wrong(node, field, f"{network} are IPv4 addresses: write them so")
        return network

    def _name(self, node: yaml.Node, field: str) -> str:
        text = self._text(node, field)
        if not _NAME.fullmatch(text):
            what = f"{text[:60]!r} is no name: letters, digits, '.', '_' and '-', at most 253, first and last no sign"
            raise self._wrong(node, field, what)
        return text

    def _address(self, node: yaml.Node, field: str) -> Address:
        text = self._text(node, field)
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise self._wrong(node, field, f"{text[:60]!r} is no IPv4 or IPv6 address") from error
        if address.is_unspecified or address.is_multicast:
            raise self._wrong(node, field, f"{address} is no address of one host")
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped:
                raise self._wrong(node, field, f"{address} is an IPv4 address: write {address.ipv4_mapped}")
            if address.scope_id:
                raise self._wrong(node, field, f"{address} has a zone, which is not supported")
        return address

    def _port(self, node: yaml.Node, field: str) -> int:
        return self._number(node, field, 1, 65535)

    def _weight(self, node: yaml.Node, field: str) -> int:
        return self._number(node, field, 0, _WEIGHT_MAX)

    def _number(self, node: yaml.Node, field: str, low: int, high: int) -> int:
        text = self._text(node, field)
        if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
            raise self._wrong(node, field, f"{text[:60]!r} is no whole number from {low} to {high}")
        return int(text)

    def _text(self, node: yaml.Node, field: str) -> str:
        # As written, whatever YAML makes of it: an unquoted 1:2 or 010 must not become another number.
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, field, f"is {_kind(node)}, but one value is wanted")
        return str(node.value)

    def _fields(
        self, node: yaml.Node, field: str, required: tuple[str, ...], optional: tuple[str, ...]
    ) -> dict[str, yaml.Node]:
        wanted = ", ".join((*required, *(f"{name} (optional)" for name in optional)))
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, field, f"is {_kind(node)}, but fields are wanted: {wanted}")
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _kind(key)
            path = f"{field}.{name}".lstrip(".")
            if name in fields:
                self._note(key, path, "is given twice")
            elif name not in required and name not in optional:
                self._note(key, path, f"is an unknown field; known are {wanted}")
            else:
                fields[name] = value
        for name in required:
            if name not in fields:
                self._note(node, f"{field}.{name}".lstrip("."), "is missing")
        return fields

    def _each(
        self, node: yaml.Node | None, field: str, read: Callable[[yaml.Node, str], T], limit: int
    ) -> list[tuple[yaml.Node, str, T]]:
        """Return what ``read`` makes of each element that has no problem, with its node and field path."""
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self._note(node, field, f"is {_kind(node)}, but a list is wanted")
            return []
        if len(node.value) > limit:
            what = f"has {len(node.value)} elements, but release {self._release.version} holds {limit} at most"
            self._note(node, field, what)
            return []
        found = []
        for index, element in enumerate(node.value):
            path = f"{field}[{index}]"
            value = self._try(read, element, path)
            if value is not None:
                found.append((element, path, value))
        return found

    def _distinct(
        self, found: list[tuple[yaml.Node, str, T]], field: str, key: Callable[[T], object], what: str = "the same"
    ) -> None:
        seen: dict[object, int] = {}
        for node, path, value in found:
            if key(value) in seen:
                self._note(node, f"{path}.{field}", f"{what} as in line {seen[key(value)]}")
            else:
                seen[key(value)] = _line_of(node)

    def _given(
        self, fields: dict[str, yaml.Node], field: str, name: str, read: Callable[[yaml.Node, str], T], default: T
    ) -> T | None:
        """What ``read`` makes of an optional field, ``default`` if it is not there, None if it is wrong."""
        return self._try(read, fields[name], f"{field}.{name}") if name in fields else default

    def _try(self, read: Callable[[yaml.Node, str], T], node: yaml.Node | None, field: str) -> T | None:
        if node is None:
            return None  # missing, and noted so
        try:
            return read(node, field)
        except _Wrong:
            return None

    def _wrong(self, node: yaml.Node, field: str, message: str) -> _Wrong:
        self._note(node, field, message)
        return _Wrong()

    def _note(self, node: yaml.Node, field: str, message: str) -> None:
        self.problems.append(Problem(_line_of(node), field, message))


def _identity(policy: Policy) -> tuple[object, ...]:
    who = policy.source or policy.cgroup
    return who, policy.service, policy.destination, policy.clients, policy.port, policy.protocol


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a set of fields"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "empty" if not node.value else "one value"


def _line(file: str, problem: Problem) -> str:
    where = file if problem.line is None else f"{file}:{problem.line}"
    return f"{where}: {problem.field}: {problem.message}" if problem.field else f"{where}: {problem.message}"
