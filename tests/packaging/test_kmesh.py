"""The init container for Kmesh's DaemonSet: its patch is a right one, and what it calls is a command that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from hitless.cli import main
from hitless.kernel.capabilities import USED
from hitless.profiles.kmesh import PUBLIC

TREE = Path(__file__).parents[2]
PATCH = TREE / "packaging" / "kmesh" / "init-container.yaml"
PAGE = TREE / "docs" / "kmesh.md"


@pytest.fixture
def pod() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(PATCH.read_text())["spec"]["template"]["spec"]
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a hitless command as its parser takes them; it is not run."""
    name, rest = words[0], words[1:]
    command = main.commands[name]
    context: click.Context = command.make_context(name, list(rest))
    return context.params


def test_the_patched_daemonset_is_valid_by_the_schemas_of_the_api(pod: dict[str, Any]) -> None:
    whole = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "kmesh", "namespace": "kmesh-system"},
        "spec": {
            "selector": {"matchLabels": {"app": "kmesh"}},
            "template": {
                "metadata": {"labels": {"app": "kmesh"}},
                "spec": {**pod, "containers": [{"name": "kmesh", "image": "kmesh"}]},
            },
        },
    }
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def test_the_command_takes_its_arguments(pod: dict[str, Any]) -> None:
    container = pod["initContainers"][0]
    assert container["command"] == ["hitless"]
    options = parsed(container["args"])
    assert options["bundle"] == "/bundle" and options["yes"]
    assert options["variables"] == {"cgroup": "/host/cgroup"}


def test_what_the_command_needs_is_mounted(pod: dict[str, Any]) -> None:
    container = pod["initContainers"][0]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    options = parsed(container["args"])
    assert str(Path(options["root"]).parent) in mounted
    assert options["variables"]["cgroup"] in mounted
    assert str(Path(PUBLIC["snapshot"]).parent) in mounted
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    given = {f"CAP_{name}" for name in container["securityContext"]["capabilities"]["add"]}
    assert {one.name for one in USED if one.needed} <= given <= {one.name for one in USED}


def test_commands_of_the_page_are_commands_that_there_are() -> None:
    lines = [line.strip() for line in PAGE.read_text().replace("\\\n", " ").splitlines()]
    commands = [line.removeprefix("$ ").split() for line in lines if line.startswith("hitless ")]
    assert len(commands) >= 6
    for words in commands:
        parsed(words[1:])
