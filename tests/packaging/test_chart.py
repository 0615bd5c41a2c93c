"""What the chart renders is right by the API's schemas and by what meshd needs; the manifests are what it renders."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from manifests import CHART, MANIFESTS

from hitless.kernel.capabilities import USED
from meshd import config
from meshd.releases import RELEASES
from tests.meshd.labmesh import VIP, A, service
from tests.packaging.chart import container, documents, known, one, options

# The oldest that the chart allows, and the newest that there are schemas of.
KUBERNETES = ("1.29", kubernetes_validate.latest_version())
OTHERWISE: dict[str, Any] = {
    "image": {"repository": "registry.example/mesh/meshd", "tag": "2.0", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "kubernetes": False,
    "services": {"services": [service("web", VIP, A)], "policies": []},
    "port": 9191,
    "extraArgs": ["--release", "2"],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "podAnnotations": {"prometheus.io/scrape": "true"},
}


def manifests() -> list[dict[str, Any]]:
    return [one for path in sorted(MANIFESTS.iterdir()) for one in yaml.safe_load_all(path.read_text())]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("documents", [manifests(), documents(OTHERWISE)], ids=["manifests", "other-values"])
def test_every_document_is_valid_by_the_schemas_of_the_api(documents: list[dict[str, Any]], version: str) -> None:
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    assert len(documents) >= 5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "containers", 0, "livenessProb"), {}),
        (("spec", "updateStrategy", "rollingUpdate", "maxSurge"), {}),
        (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "9090"),
        (("spec", "selector"), None),
    ],
)
def test_a_broken_document_is_not_valid(path: tuple[Any, ...], value: Any) -> None:
    broken = copy.deepcopy(one("DaemonSet"))
    *above, last = path
    place: Any = broken
    for step in above:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[-1], strict=True)


def test_helm_finds_nothing_to_say_about_the_chart() -> None:
    report = helm_python.lint(CHART, strict=True, kube_version=f"v{KUBERNETES[0]}.0")
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


def test_the_manifests_are_what_the_chart_renders() -> None:
    (namespace, *rendered) = manifests()
    assert rendered == documents(), "say `make manifests`"
    assert {document["metadata"].get("namespace", namespace["metadata"]["name"]) for document in rendered} == {
        namespace["metadata"]["name"]
    }


@pytest.mark.parametrize(
    "values", [{"ports": 9090}, {"port": "9090"}, {"root": "../other"}, {"image": {"repository": ""}}, {"cgroup": "/"}]
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError):
        documents(values)


def test_the_chart_is_of_the_release_that_it_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert container()["image"].endswith(f":{project['version']}")


def test_meshd_knows_every_option_that_a_pod_gives_it() -> None:
    args = [arg.partition("=")[0] for arg in container()["args"] if arg.startswith("--")]
    assert {"--root", "--cgroup", "--services"} <= set(args)
    assert set(args) <= options()
    assert known(["run", "--nonsense=1", "--json"]) == ["run", "--json"]


def test_the_services_file_of_the_chart_is_one_that_meshd_accepts() -> None:
    for values, count in ((None, 0), (OTHERWISE, 1)):
        text = one("ConfigMap", values)["data"]["services.yaml"]
        assert len(config.parse(text.encode(), "services.yaml", RELEASES[1]).services) == count


def test_a_new_pod_takes_over_before_the_old_one_ends() -> None:
    # The API server refuses both or neither; no schema says so.
    rolling = one("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    pod = one("DaemonSet")["spec"]["template"]["spec"]
    # Two pods on one node: neither the node's network, nor a port of it.
    assert "hostNetwork" not in pod
    assert not any("hostPort" in port for port in container()["ports"])


def test_a_pod_gets_what_is_needed_and_no_more() -> None:
    security = container()["securityContext"]
    assert security["privileged"] is False
    assert security["allowPrivilegeEscalation"] is False
    needed = [one.name.removeprefix("CAP_") for one in USED if one.needed]
    assert security["capabilities"] == {"drop": ["ALL"], "add": needed}
    pod = one("DaemonSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_roles_reach_no_further_than_meshd_asks() -> None:
    (cluster,) = (role["rules"] for role in documents() if role["kind"] == "ClusterRole")
    (own,) = (role["rules"] for role in documents() if role["kind"] == "Role")
    asked = {(kind, verb) for rule in (*cluster, *own) for kind in rule["resources"] for verb in rule["verbs"]}
    assert asked == {
        *((kind, verb) for kind in ("services", "endpointslices") for verb in ("list", "watch")),
        ("pods", "get"), ("daemonsets", "get"), ("events", "create"),
    }  # fmt: skip
    assert not any(role["kind"] == "ClusterRole" for role in documents(OTHERWISE))


def test_what_a_last_pod_asks_with_outlives_an_uninstallation() -> None:
    kept = {"ServiceAccount", "Role", "RoleBinding"}
    policy = "helm.sh/resource-policy"
    found = {document["kind"] for document in documents() if policy in document["metadata"].get("annotations", {})}
    assert found == kept


def test_two_releases_of_the_chart_do_not_share_a_name() -> None:
    names = [one("DaemonSet", name=name)["metadata"]["name"] for name in ("meshd", "blue", "x" * 53)]
    assert names == ["meshd", "blue-meshd", f"{'x' * 44}-meshd"]
