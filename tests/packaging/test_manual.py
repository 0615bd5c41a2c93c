"""The manual pages say what the commands say of themselves."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from manual import COMMANDS, COMPLETION, completion, page


def plain(text: str) -> str:
    for escape, character in (("\\&", ""), ("\\-", "-"), ("\\(dq", '"'), ("\\e", "\\"), ("\\fB", ""), ("\\fP", "")):
        text = text.replace(escape, character)
    return text


def commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(f"{path} {name}", below)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_every_command_with_its_options_and_example(name: str) -> None:
    text = plain(page(name, COMMANDS[name], "1.0"))
    for path, command in commands(name, COMMANDS[name]):
        assert path in text
        assert " ".join((command.help or "").split("\n\n")[0].split()) in text
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in text
                assert option.help is None or option.help in text
    assert text.count("Example:") >= len(COMMANDS[name].commands) // 2
    assert f"-h, --help{chr(10)}Show this message and exit." in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_no_line_that_man_would_take_for_a_request(name: str) -> None:
    requests = {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".in", ".nf", ".fi"}
    for line in page(name, COMMANDS[name], "1.0").splitlines():
        assert not line.startswith("'")
        assert not line.startswith(".") or line.split()[0] in requests, line


@pytest.mark.parametrize("shell", COMPLETION)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_shell_asks_the_command_itself(name: str, shell: str) -> None:
    assert f"_{name.upper()}_COMPLETE={shell}_complete" in completion(name, COMMANDS[name], shell)
