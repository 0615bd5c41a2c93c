"""The command ``meshd``: run the daemon, or check a services file."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import cast

import click

from hitless.errors import HitlessError
from meshd import config
from meshd.config import ConfigError
from meshd.events import Events
from meshd.releases import RELEASES, Release

__all__ = ["main"]

_NEWEST = max(RELEASES)
_FILE = click.Path(path_type=Path)


def _release(context: click.Context, parameter: click.Parameter, value: str) -> Release:
    return RELEASES[int(value)]


def _target(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    host, _, port = (value or "").rpartition(":")
    if value is None or value.startswith("unix:/") or (host and port.isdigit() and 0 < int(port) < 65536):
        return value
    raise click.BadParameter(f"{value!r} is neither HOST:PORT nor unix:/PATH")


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
@click.option("--node", envvar="NODE_NAME", default="", help="With --kubernetes: this node's name (else NODE_NAME).")
@click.option("--xds", metavar="HOST:PORT", callback=_target, help="Follow an xDS server (ADS), in plain text.")
@click.option("--xds-node-id", metavar="ID", help="With --xds: what to call itself; the host name if not given.")
@click.option("--xds-ca", type=_FILE, help="With --xds: speak TLS with a server of this authority (PEM).")
@click.option("--allow-loss", metavar="MAP", multiple=True, help="This map may lose what the release has no place for.")
@click.option(
    "--exit-type",
    type=click.Choice(["restart", "normal"]),
    help="restart leaves the data path running, normal removes it; if not given: restart if the services file exists.",
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

    events = Events(json)
    node_id = xds_node_id or socket.gethostname()
    wanted = Wanted(services, kubernetes, kubeconfig, namespace, node, xds, node_id, xds_ca)
    settings = Settings(release, root, cgroup, wanted, frozenset(allow_loss), cast("ExitType | None", exit_type))
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


def _tell_wrong(events: Events, error: ConfigError, json: bool) -> None:
    if json:
        events.tell("config-error", message=error.message, **error.facts)
    else:
        click.echo(error.message, err=True)


if __name__ == "__main__":
    main()
