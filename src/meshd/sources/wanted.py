"""Which control planes a daemon listens to; those whose packages are an extra are imported only if they are wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from meshd.releases import Release
from meshd.sources import Source, SourceError
from meshd.sources.file import FileSource

__all__ = ["Wanted", "sources"]


class Wanted(msgspec.Struct, frozen=True):
    """``services``: a file. ``kubernetes``: the cluster of this pod, or of ``kubeconfig``. ``xds``: HOST:PORT.

    The first of these wins where two claim one address. See the classes of the sources for the rest; ``node`` is this
    machine's name in the cluster.
    """

    services: Path | None = None
    kubernetes: bool = False
    kubeconfig: Path | None = None
    namespace: str = ""
    node: str = ""
    xds: str | None = None
    xds_node_id: str = ""
    xds_ca: Path | None = None


def sources(wanted: Wanted, release: Release, cgroup: Path) -> list[Source]:
    """The wanted sources, the one that wins first. Raises SourceError if one cannot be set up or is not installed."""
    clusters: list[Source] = []
    if wanted.kubernetes:
        with _extra("kubernetes"):
            from meshd.sources.kubernetes import KubernetesSource
        clusters.append(KubernetesSource(wanted.kubeconfig, wanted.namespace, wanted.node))
    if wanted.xds is not None:
        # What goes wrong comes as an error of a call; gRPC's own words would go to standard error, past the events.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        with _extra("xds"):
            from meshd.sources.xds import XdsSource
        clusters.append(XdsSource(wanted.xds, wanted.xds_node_id, wanted.xds_ca))
    if wanted.services is None:
        return clusters
    return [FileSource(wanted.services, release, cgroup, alone=not clusters), *clusters]


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SourceError(
            f"--{name} needs a package that is not installed or too old ({error}): pip install 'hitless[{name}]'",
            source=name,
        ) from error
