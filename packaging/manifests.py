"""Renders the chart with its own values, by Helm's own engine, into packaging/manifests: for those who have no Helm.

    python packaging/manifests.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python

CHART = Path(__file__).parent / "chart"
MANIFESTS = Path(__file__).parent / "manifests"
NAMESPACE = "meshd-system"  # as in 00-namespace.yaml

_HEAD = "# Made from packaging/chart by `make manifests`: change that.\n"


def render(values: dict[str, Any] | None = None, name: str = "meshd", namespace: str = NAMESPACE) -> str:
    """All documents of the chart with these values instead of its own, as ``helm template`` would give them."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=name, namespace=namespace)
    return "".join(f"---\n{text.strip()}\n" for path, text in sorted(files.items()) if path.endswith(".yaml"))


if __name__ == "__main__":
    (MANIFESTS / "meshd.yaml").write_text(_HEAD + render())
