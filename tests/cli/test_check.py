"""``hitless check`` as CI runs it: no root, no kernel, quick, and in the words of whoever reads it."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_commands import as_json, hitless_command
from tests.releases import ATTACH, COUNTING, FIRST, SECOND, compile_object, write_release

OBJECTS = 9


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two releases of nine objects each, 27 maps, most of which changed."""
    top = tmp_path_factory.mktemp("nine")

    def write(name: str, source: str) -> Path:
        folder = top / name
        folder.mkdir()
        head = f'[bundle]\nname = "nine"\nversion = "{name}"\n'
        for number in range(OBJECTS):
            text = source + COUNTING
            for word in ("tally", "limits", "limit", "owner", "extra", "count4"):
                text = text.replace(f" {word};", f" {word}{number};")
                for mark in ("(", "&"):
                    text = text.replace(f"{mark}{word},", f"{mark}{word}{number},")
            text = text.replace("int count4(", f"int count4{number}(")
            compile_object(text, folder / f"part{number}.bpf.o")
            head += f'[[object]]\nfile = "part{number}.bpf.o"\n'
        (folder / "bundle.toml").write_text(head)
        return folder

    return write("1", FIRST), write("2", SECOND.replace("limits", "limit"))


Release = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Release:
    """The fields of ``struct tally``, and more maps or lines of the manifest -> a release."""

    def write(name: str, fields: str, more: str = "", manifest: str = "") -> Path:
        source = f"struct tally {{ __u32 count; {fields} }};\nMAP(tally, HASH, 64, __u32, struct tally);\n{more}"
        return write_release(tmp_path / name, name, source + COUNTING, ATTACH + manifest)

    return write


def test_it_ends_with_0_when_all_state_survives(made: Release) -> None:
    old, new = made("1", "__u32 last;"), made("2", "__u64 last;")
    assert as_json("check", old, new)["survives"] is True
    assert hitless_command("check", old, new).endswith("All state survives the upgrade.\n")


def test_it_ends_with_1_and_names_each_map_and_field_that_would_be_lost(made: Release) -> None:
    old = made("1", "__u32 last; __u32 port;", "MAP(gone, HASH, 8, __u32, __u64);")
    new = made("2", "__u16 port;")
    found = as_json("check", old, new, code=1)
    assert found["schema"] == 1
    assert [(entry["name"], entry["verdict"], entry["losses"]) for entry in found["maps"]] == [
        ("tally", "lossy", ["port: values outside 0 to 65535 do not fit", "last is dropped"]),
        ("gone", "removed", ["the map and its entries are dropped"]),
    ]
    assert {"path", "kind", "old", "new", "loss"} <= set(found["maps"][0]["changes"][0])
    text = hitless_command("check", old, new, code=1)
    assert "lost: last is dropped" in text
    assert "--allow-loss tally --allow-loss gone" in text.splitlines()[-1]


def test_an_accepted_loss_ends_with_0_whoever_accepted_it(made: Release) -> None:
    old, new = made("1", "__u32 last;"), made("2", "")
    hitless_command("check", old, new, code=1)
    assert as_json("check", old, new, "--allow-loss", "tally")["maps"][0]["allowed"] is True
    agreed = made("3", "", manifest='[map.tally]\non_loss = "discard"\n')
    assert "which is accepted" in hitless_command("check", old, agreed)


def test_what_this_version_cannot_carry_is_a_loss_though_the_layouts_allow_it(made: Release) -> None:
    old = made("1", "", "MAP(kept, HASH, 8, __u32, __u64);")
    new = made("2", "", "MAP(kept, PERCPU_HASH, 8, __u32, __u64);")
    (kept,) = [entry for entry in as_json("check", old, new, code=1)["maps"] if entry["name"] == "kept"]
    assert kept["losses"] == ["all entries: from a map of type hash to percpu_hash is not supported yet"]
    assert "kept loses all entries: from a map of type" in hitless_command("check", old, new, code=1)


def test_trouble_ends_with_2(made: Release, tmp_path: Path) -> None:
    old = made("1", "")
    assert as_json("check", old, tmp_path / "gone", code=2)["error"]["code"] == "bundle"
    assert as_json("check", old, old, "--allow-loss", "nothing", code=2)["error"]["map"] == "nothing"
    assert as_json("check", old, code=2)["error"]["code"] == "usage"
    assert json.loads(hitless_command("check", old, "--format", "json", code=2))["error"]["code"] == "usage"
    told = hitless_command("check", old, tmp_path / "gone", "--format", "github", code=2)
    assert told.startswith("::error title=hitless%3A trouble::")


def test_on_github_each_loss_is_an_error_at_the_manifest(made: Release) -> None:
    old, new = made("1", "__u32 last;", "MAP(gone, HASH, 8, __u32, __u64);"), made("2", "")
    lines = hitless_command("check", old, new, "--format", "github", "--allow-loss", "gone", code=1).splitlines()
    lost = f"::error file={new}/bundle.toml,title=hitless%3A tally would lose state::last is dropped%0A"
    assert lines[0].startswith(lost)
    assert lines[1].startswith(f"::warning file={new}/bundle.toml,title=hitless%3A gone loses state%2C as accepted::")
    assert len(lines) == 3
    assert hitless_command("check", new, new, "--format", "github").startswith("::notice ")


def test_a_name_cannot_end_an_annotation_or_speak_to_the_terminal(made: Release, tmp_path: Path) -> None:
    new = made("2", "")
    for evil, code in (("::error::bad,%", 1), ("x\n::error::bad", 2), ("\x1b[31m", 2)):
        snapshot = json.loads(hitless_command("snapshot", made("1", "__u32 last;")))
        for spec in snapshot["objects"]["store"]["maps"]:
            if spec["name"] == "tally":
                spec["name"] = evil
        file = tmp_path / "evil.json"
        file.write_text(json.dumps(snapshot))
        text = hitless_command("check", file, new, "--format", "github", code=code)
        assert not any(line.startswith("::error::") for line in text.splitlines())
        assert "\x1b" not in text
        assert code == 2 or "%3A%3Aerror%3A%3Abad%2C%25" in text


def test_colours_are_for_a_terminal_that_wants_them(made: Release) -> None:
    old, new = made("1", "__u32 last;"), made("2", "")
    assert "\x1b[31m" in _on_a_terminal(["check", str(old), str(new)])
    assert "\x1b" not in _on_a_terminal(["check", str(old), str(new)], NO_COLOR="1")
    assert "\x1b" not in hitless_command("check", old, new, code=1)


def _on_a_terminal(arguments: list[str], **variables: str) -> str:
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", 0) as terminal:
        subprocess.run(
            [sys.executable, "-m", "hitless", *arguments],
            stdout=slave, stderr=subprocess.PIPE, timeout=30, check=False, env={**os.environ, **variables},
        )  # fmt: skip
        os.close(slave)
        return terminal.read(65536).decode()


def test_nine_objects_a_side_take_less_than_half_a_second(nine: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "hitless", "check", *map(str, nine)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tally") >= OBJECTS
    # It waits for nothing, and what else the machine does is not the command's time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("form", ["text", "json", "github", "html"])
def test_it_loads_nothing_that_could_reach_the_kernel_or_takes_long(nine: tuple[Path, Path], form: str) -> None:
    program = (
        "import sys\n"
        "from hitless.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "check", *map(str, nine), "--format", form],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    loaded = done.stderr.split()
    assert "hitless.compare" in loaded
    bad = ("cffi", "_cffi_backend", "hitless.kernel", "hitless.upgrade", "rich", "numpy")
    assert [name for name in loaded if name.startswith(bad)] == []
