"""The layout package decides; it must not be able to act."""

from __future__ import annotations

import ast
from pathlib import Path

import hitless.layout

ALLOWED = {
    "__future__", "collections", "elftools", "hitless.errors", "hitless.layout", "io", "itertools", "math", "msgspec",
    "numpy", "re", "struct", "typing",
}  # fmt: skip


def test_no_module_of_it_imports_what_reaches_the_kernel_or_the_system() -> None:
    (folder,) = hitless.layout.__path__
    files = sorted(Path(folder).glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                known = any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED)
                assert known, f"{file.name} imports {name}"
