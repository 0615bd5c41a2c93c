"""Writes what a system's own places want of both commands, from the commands themselves: man pages and completion.

    python packaging/manual.py DIRECTORY      # man/man1, bash-completion, zsh, fish, as under /usr/share
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

import hitless.cli
import meshd.cli

COMMANDS: dict[str, click.Group] = {"hitless": hitless.cli.main, "meshd": meshd.cli.main}
COMPLETION = {
    "bash": "bash-completion/completions/{name}",
    "zsh": "zsh/site-functions/_{name}",
    "fish": "fish/vendor_completions.d/{name}.fish",
}
_EXAMPLE = "Example: "


def page(name: str, command: click.Group, version: str) -> str:
    """The manual page of a command and all its commands, for man(7); with no date, so that it is reproducible."""
    context = click.Context(command, info_name=name, **command.context_settings)
    lines = [
        f'.TH {name.upper()} 1 "" "{name} {version}" "User Commands"',
        ".SH NAME",
        f"{name} \\- {_escaped(command.get_short_help_str(limit=200).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {name}",
        _escaped(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_text(command),
        ".SH OPTIONS",
        *_options(context),
        ".SH COMMANDS",
        *_commands(context, command),
    ]
    return "\n".join(lines) + "\n"


def _commands(parent: click.Context, group: click.Group) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.commands[name]
        context = click.Context(command, info_name=name, parent=parent)
        yield f'.SS "{_escaped(" ".join((context.command_path, *command.collect_usage_pieces(context))))}"'
        yield from _text(command)
        yield from _options(context)
        if isinstance(command, click.Group):
            yield from _commands(context, command)


def _text(command: click.Command) -> Iterator[str]:
    for paragraph in "\n\n".join(filter(None, (command.help, command.epilog))).split("\n\n"):
        words = " ".join(paragraph.split())
        yield ".PP"
        if words.startswith(_EXAMPLE):
            yield from ("Example:", ".PP", ".in +4n", ".nf", _escaped(words.removeprefix(_EXAMPLE)), ".fi", ".in")
        else:
            yield _escaped(words)


def _options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1]:
            yield from (".TP", f"\\fB{_escaped(record[0])}\\fP", _escaped(record[1]))


def _escaped(text: str) -> str:
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


def completion(name: str, command: click.Group, shell: str) -> str:
    """The script with which ``shell`` asks the command itself what could come next."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    return kind(command, {}, name, f"_{name.upper()}_COMPLETE").source()


def main(directory: Path) -> None:
    """Write all of it under ``directory``."""
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    for name, command in COMMANDS.items():
        _write(directory / "man/man1" / f"{name}.1", page(name, command, version))
        for shell, place in COMPLETION.items():
            _write(directory / place.format(name=name), completion(name, command, shell))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
