"""The command ``meshd``: run the daemon, or check a services file."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, cast

import click
import msgspec

from hitless.errors import HitlessError
from meshd import config
from meshd.config import ConfigError
from meshd.events import Events
from meshd.model import Address, Locality, Protocol
from meshd.releases import RELEASES, Release

__all__ = ["main"]

_NEWEST = max(RELEASES)
_POLL = 0.1  # s between looks at the access log
_FILE = click.Path(path_type=Path)


def _release(context: click.Context, parameter: click.Parameter, value: str) -> Release:
    return RELEASES[int(value)]


def _locality(context: click.Context, parameter: click.Parameter, value: str) -> Locality:
    parts = value.split("/")
    if len(parts) > 3:
        raise click.BadParameter(f"{value!r} has more parts than region/zone/node")
    return Locality(*parts)


def _target(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    host, _, port = (value or "").rpartition(":")
    if value is None or value.startswith("unix:/") or (host and port.isdigit() and 0 < int(port) < 65536):
        return value
    raise click.BadParameter(f"{value!r} is neither HOST:PORT nor unix:/PATH")


def _pod(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and [bool(part) for part in value.split("/")] != [True, True]:
        raise click.BadParameter(f"'{value}' is not of the form NAMESPACE/NAME")
    return value


def _listen(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    address, _, port = value.rpartition(":")
    try:
        where = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
        if not 0 <= int(port) < 65536:
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"'{value}' is not of the form ADDRESS:PORT, as in 127.0.0.1:9102 or [::]:9102"
        ) from None
    return str(where), int(port)


_release_option = click.option(
    "--release",
    type=click.Choice([str(number) for number in RELEASES]),
    default=str(_NEWEST),
    show_default=True,
    callback=_release,
    help="The bundled release of the mesh.",
)
_json_option = click.option("--json", is_flag=True, help="JSON objects, one a line, instead of words.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hitless")
def main() -> None:
    """A small L4 service mesh on eBPF, upgraded with hitless."""


@main.command()
@_release_option
@click.option("--root", type=_FILE, required=True, help="Pin root: a directory on a bpffs, made if missing.")
@click.option("--cgroup", type=_FILE, required=True, help="cgroup2 directory whose processes are in the mesh.")
@click.option("--services", type=_FILE, help="The services file (YAML); changes are followed.")
@click.option("--kubernetes", is_flag=True, help="Follow the Services and EndpointSlices of the cluster of this pod.")
@click.option("--kubeconfig", type=_FILE, help="With --kubernetes: the cluster of this file's current context.")
@click.option("--namespace", default="", help="With --kubernetes: only this namespace.")
@click.option(
    "--node",
    envvar="NODE_NAME",
    default="",
    help="This node's name in events and in the cluster (else NODE_NAME, then the host name).",
)
@click.option("--xds", metavar="HOST:PORT", callback=_target, help="Follow an xDS server (ADS), in plain text.")
@click.option("--xds-node-id", metavar="ID", help="With --xds: what to call itself; the host name if not given.")
@click.option("--xds-ca", type=_FILE, help="With --xds: speak TLS with a server of this authority (PEM).")
@click.option("--allow-loss", metavar="MAP", multiple=True, help="This map may lose what the release has no place for.")
@click.option(
    "--exit-type",
    type=click.Choice(["restart", "normal"]),
    help="restart leaves the data path running, normal removes it; if not given, that is found out at the end.",
)
@click.option(
    "--locality",
    metavar="REGION/ZONE/NODE",
    default="",
    callback=_locality,
    help="Where this node is, for services whose clients are sent to near backends; parts may be left out: /zone-a.",
)
@click.option("--access-log", is_flag=True, help="Log connections into the ring buffer that `meshd access` reads.")
@click.option(
    "--kubernetes-pod",
    "pod",
    metavar="NAMESPACE/NAME",
    callback=_pod,
    help="The pod that this runs in (else POD_NAMESPACE and POD_NAME): its DaemonSet decides what the end is.",
)
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    callback=_listen,
    help="Serve /metrics, /healthz and /readyz there; nowhere if not given.",
)
@_json_option
def run(
    release: Release,
    root: Path,
    cgroup: Path,
    services: Path | None,
    kubernetes: bool,
    kubeconfig: Path | None,
    namespace: str,
    node: str,
    xds: str | None,
    xds_node_id: str | None,
    xds_ca: Path | None,
    allow_loss: tuple[str, ...],
    exit_type: str | None,
    locality: Locality,
    access_log: bool,
    pod: str | None,
    listen: tuple[str, int] | None,
    json: bool,
) -> None:
    """Start the mesh, or upgrade the one that runs, and keep it as the services file and the cluster say.

    Where two say different things about one address, the file wins, then Kubernetes. A file beside a cluster may have
    only policies.

    Example: meshd run --root /sys/fs/bpf/mesh --cgroup /sys/fs/cgroup/apps --services services.yaml
    """
    if services is None and not kubernetes and xds is None:
        raise click.UsageError("Nothing says which services there are: give --services, --kubernetes or --xds.")
    if not kubernetes and (kubeconfig is not None or namespace):
        raise click.UsageError("--kubeconfig and --namespace are for --kubernetes, which is not given.")
    if xds is None and (xds_node_id is not None or xds_ca is not None):
        raise click.UsageError("--xds-node-id and --xds-ca are for --xds, which is not given.")
    # Late: it loads libbpf, which `meshd check` and --help do without.
    from meshd.daemon import Daemon, ExitType, Settings
    from meshd.sources.wanted import Wanted

    events = Events(json, node=node or None)
    leave = cast("ExitType | None", exit_type)
    node_id = xds_node_id or socket.gethostname()
    wanted = Wanted(services, kubernetes, kubeconfig, namespace, node, xds, node_id, xds_ca)
    settings = Settings(
        release, root, cgroup, wanted, frozenset(allow_loss), leave, locality, access_log, pod, listen
    )
    try:
        Daemon(settings, events).run()
    except ConfigError as error:
        _tell_wrong(events, error, json)
        sys.exit(1)
    except HitlessError as error:
        events.error(error)
        sys.exit(1)


@main.command()
@click.argument("file", type=_FILE)
@_release_option
@click.option("--cgroup", type=_FILE, help="Look up clients' cgroups under this one; without it they are not checked.")
@_json_option
def check(file: Path, release: Release, cgroup: Path | None, json: bool) -> None:
    """Say what is wrong with a services file: exit code 0 if nothing is, 1 otherwise. Changes nothing.

    Example: meshd check services.yaml --release 1
    """
    events = Events(json)
    try:
        found = config.parse(config.read(file), str(file), release, cgroup)
    except ConfigError as error:
        _tell_wrong(events, error, json)
        sys.exit(1)
    counts = {"services": len(found.services), "policies": len(found.policies)}
    events.tell("config", file=str(file), **counts, cgroups_checked=cgroup is not None)


@main.command(name="explain")
@click.argument("where", metavar="ADDRESS:PORT[/udp]")
@click.option("--root", type=_FILE, required=True, help="The mesh's pin root.")
@click.option("--client", type=_FILE, help="The client's cgroup2 directory; without it, one that no policy names.")
@_json_option
def explain_command(where: str, root: Path, client: Path | None, json: bool) -> None:
    """Say which backends a connect would get, with which share, and why: from the kernel's maps alone.

    Example: meshd explain 10.96.0.10:80 --root /sys/fs/bpf/mesh
    """
    import hitless
    from meshd.explain import explain, words

    address, port, protocol = _where(where)
    try:
        found = explain(hitless.Node(root), address, port, protocol, client)
    except HitlessError as error:
        _fail(error, json)
    if json:
        click.echo(msgspec.json.encode(found, enc_hook=str).decode())
    else:
        click.echo("\n".join(words(found)))


@main.command(name="access")
@click.option("--root", type=_FILE, required=True, help="The mesh's pin root.")
@_json_option
def access_command(root: Path, json: bool) -> None:
    """Print the access log as it comes, a line for each connection, until interrupted; there can be one reader.

    Times are seconds since the machine started.

    Example: meshd access --root /sys/fs/bpf/mesh --json
    """
    import hitless
    from meshd.access import AccessLog

    try:
        log = AccessLog(hitless.Node(root))
        while True:
            for one in log.take():
                facts = msgspec.to_builtins(one, enc_hook=str)
                click.echo(msgspec.json.encode(facts).decode() if json else _access_line(facts))
            time.sleep(_POLL)
    except HitlessError as error:
        _fail(error, json)
    except KeyboardInterrupt:
        return


def _access_line(facts: dict[str, Any]) -> str:
    backend = facts["backend"] or {"address": "none", "port": "-"}
    return (
        f"{facts['end']:.6f} {facts['verdict']} {facts['protocol']} {facts['service']['address']} "
        f"{facts['service']['port']} to {backend['address']} {backend['port']} client={facts['client']} "
        f"seconds={facts['end'] - facts['start']:.6f} sent={facts['sent']} received={facts['received']} "
        f"rtt={facts['rtt']:.6f} retransmits={facts['retransmits']}"
    )


def _where(text: str) -> tuple[Address, int, Protocol]:
    place, _, protocol = text.partition("/")
    host, _, port = place.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no ADDRESS:PORT such as 10.96.0.10:80 or [fd00::10]:53/udp") from error
    if not 0 < number < 65536:
        raise click.BadParameter(f"{number} is no port")
    if protocol not in ("", "tcp", "udp"):
        raise click.BadParameter(f"{protocol!r} is neither tcp nor udp")
    return address, number, "udp" if protocol == "udp" else "tcp"


def _fail(error: HitlessError, json: bool) -> NoReturn:
    Events(json).error(error)
    sys.exit(1)


@main.command()
@click.option("--root", type=_FILE, required=True, help="Pin root of the mesh.")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once; exit code 1 if no mesh is live.")
@_json_option
def top(root: Path, every: float, once: bool, json: bool) -> None:
    """Show services, connections and a running upgrade, as the kernel has them; no daemon is needed.

    Plain lines where standard output is no terminal.

    Example: meshd top --root /sys/fs/bpf/mesh
    """
    import hitless
    from meshd.top import show

    sys.exit(show(hitless.Node(root), every, once, json))


@main.command()
def metrics() -> None:
    """List the metrics that the daemon serves at /metrics, as a table in Markdown.

    Example: meshd metrics
    """
    from meshd.metrics import METRICS

    click.echo("| metric | kind | labels | meaning |\n|---|---|---|---|")
    for name, defined in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in defined.labels)
        click.echo(f"| `{name}` | {defined.kind} | {labels} | {defined.help} |")


def _tell_wrong(events: Events, error: ConfigError, json: bool) -> None:
    if json:
        events.tell("config-error", message=error.message, **error.facts)
    else:
        click.echo(error.message, err=True)


if __name__ == "__main__":
    main()
