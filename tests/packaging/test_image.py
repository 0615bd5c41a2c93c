"""The Dockerfile is clean, and what it takes from the tree is there. Nothing here builds it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path, PurePath

from tests.packaging.conftest import TREE

DOCKERFILE = TREE / "packaging/Dockerfile"
HADOLINT = Path(sys.prefix) / "bin/hadolint"


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments, lines that go on put together."""
    text = re.sub(r"\\\n", " ", re.sub("^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def ignored(name: str) -> bool:
    """Whether the builder would not see it: what .dockerignore says, as far as it is used here."""
    patterns = [line for line in (TREE / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    above = [PurePath(name), *PurePath(name).parents]
    return any(
        path.match(pattern.removeprefix("**/")) if pattern.startswith("**/") else path == PurePath(pattern)
        for pattern in patterns
        for path in above
    )


def lint(text: str) -> subprocess.CompletedProcess[str]:
    command = [str(HADOLINT), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)


def test_the_linter_has_nothing_to_say() -> None:
    done = lint(DOCKERFILE.read_text())
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_what_is_wrong() -> None:
    assert "DL3020" in lint(DOCKERFILE.read_text().replace("COPY . .", "ADD . .")).stdout
    assert lint(DOCKERFILE.read_text().replace("COPY . .", "COPPY . .")).returncode != 0


def test_what_is_copied_is_there_and_not_ignored() -> None:
    stages = {rest.split()[-1]: rest for word, rest in instructions() if word == "FROM" and " AS " in rest}
    copied = [rest.split() for word, rest in instructions() if word == "COPY"]
    for words in copied:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((TREE / name).exists() and not ignored(name) for name in words[:-1])


def test_the_build_stage_sees_all_that_make_dist_needs_and_nothing_that_it_makes() -> None:
    seen = ["Makefile", "setup.py", "pyproject.toml", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE"]
    seen += ["packaging/manual.py", "packaging/systemd/meshd.service", "src/meshd/bpf/Makefile", "docs/security.md"]
    seen += ["src/meshd/bpf/v1/connect.bpf.c", "src/hitless/kernel/libbpf_build.py", "LICENSES/README.md"]
    for name in seen:
        assert (TREE / name).exists()
        assert not ignored(name), name
    made = ["dist/x.whl", ".venv/done", "src/meshd/bpf/v1/connect.bpf.o", "src/hitless/kernel/_libbpf.py", ".git/HEAD"]
    assert all(ignored(name) for name in (*made, "packaging/share/man/man1/meshd.1", "src/hitless.egg-info/PKG-INFO"))


def test_what_is_run_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (TREE / "Makefile").read_text(), re.MULTILINE))
    run = " ".join(rest for word, rest in instructions() if word == "RUN")
    assert set(re.findall(r"\bmake (\w+)", run)) <= targets
    for name in re.findall(r"--(?:constraint|requirement) (\S+\.txt)", run):
        assert (TREE / name).exists() or f">{name}" in run
    (libbpf,) = re.findall(r"^DEBIAN := (.*)", (TREE / "Makefile").read_text(), re.MULTILINE)
    assert "libbpf1" in libbpf.split()
    assert "libbpf1" in run.split()
