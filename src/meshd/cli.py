"""The command ``meshd``: run the daemon, or check a services file."""

from __future__ import annotations

import ipaddress
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
def main() -> None:
    """A small L4 service mesh on eBPF, upgraded with hitless."""


@main.command()
@_release_option
@click.option("--root", type=_FILE, required=True, help="Pin root: a directory on a bpffs, made if missing.")
@click.option("--cgroup", type=_FILE, required=True, help="cgroup2 directory whose processes are in the mesh.")
@click.option("--services", type=_FILE, required=True, help="The services file (YAML); changes are followed.")
@click.option("--allow-loss", metavar="MAP", multiple=True, help="This map may lose what the release has no place for.")
@click.option(
    "--exit-type",
    type=click.Choice(["restart", "normal"]),
    help="restart leaves the data path running, normal removes it; if not given, that is found out at the end.",
)
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
@click.option("--node", envvar="NODE_NAME", help="Name of this machine in events; the host name if not given.")
@_json_option
def run(
    release: Release,
    root: Path,
    cgroup: Path,
    services: Path,
    allow_loss: tuple[str, ...],
    exit_type: str | None,
    pod: str | None,
    listen: tuple[str, int] | None,
    node: str | None,
    json: bool,
) -> None:
    """Start the mesh, or upgrade the one that runs, and keep it as the services file says.

    Example: meshd run --root /sys/fs/bpf/mesh --cgroup /sys/fs/cgroup/apps --services services.yaml
    """
    # Late: it loads libbpf, which `meshd check` and --help do without.
    from meshd.daemon import Daemon, ExitType, Settings

    events = Events(json, node=node)
    settings = Settings(
        release, root, cgroup, services, frozenset(allow_loss), cast("ExitType | None", exit_type), pod, listen
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
