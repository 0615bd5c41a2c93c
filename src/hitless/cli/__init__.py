"""The hitless command: one thin function per command, each calling one function of the library."""

from hitless.cli.commands import main

__all__ = ["main"]
