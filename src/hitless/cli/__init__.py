"""The hitless command: one thin function per command."""
