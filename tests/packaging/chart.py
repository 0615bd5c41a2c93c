"""What tests ask of the rendered chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import yaml
from manifests import render

import meshd.cli

Document = dict[str, Any]


def documents(values: dict[str, Any] | None = None, **release: str) -> list[Document]:
    """All documents of the chart with these values."""
    return [one for one in yaml.safe_load_all(render(values, **release)) if one is not None]


def one(kind: str, values: dict[str, Any] | None = None, **release: str) -> Document:
    """The only document of a kind."""
    (found,) = (document for document in documents(values, **release) if document["kind"] == kind)
    return found


def container(values: dict[str, Any] | None = None) -> Document:
    """meshd's container."""
    (found,) = one("DaemonSet", values)["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def options() -> set[str]:
    """The options of ``meshd run``."""
    run = meshd.cli.main.commands["run"]
    return {name for option in run.params if isinstance(option, click.Option) for name in option.opts}


def known(args: Sequence[str]) -> list[str]:
    """Arguments without the options that this meshd does not have."""
    return [arg for arg in args if not arg.startswith("--") or arg.partition("=")[0] in options()]
