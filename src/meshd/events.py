"""What the daemon tells, one event per line: words for people, or JSON objects for tools."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, TextIO

import msgspec

from hitless.errors import HitlessError

__all__ = ["Events"]


class Events:
    """Writes events to ``out`` (standard output unless given); usable from several threads.

    With ``json`` every line is an object ``{"event": NAME, "time": seconds since the epoch, ...}``.
    """

    def __init__(self, json: bool = False, out: TextIO | None = None) -> None:
        self._json = json
        self._out = out if out is not None else sys.stdout
        self._lock = threading.Lock()

    def tell(self, event: str, **facts: Any) -> None:
        """Write one event. ``message`` among the facts is for people; in plain lines, nested facts are left out."""
        if self._json:
            line = msgspec.json.encode({"event": event, "time": time.time(), **facts}, enc_hook=str).decode()
        else:
            line = f"meshd: {event}{_plain(facts)}"
        with self._lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except BrokenPipeError:
                # Nobody reads any more. That must not end the mesh's upkeep, nor fail once more at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def error(self, error: HitlessError) -> None:
        """Tell an error with its code and facts; in plain lines on standard error."""
        if self._json:
            self.tell("error", code=error.code, message=error.message, facts=error.facts)
        else:
            with self._lock:
                print(f"meshd: {error.message}", file=sys.stderr, flush=True)


def _plain(facts: dict[str, Any]) -> str:
    words = [f" {name}={value}" for name, value in facts.items() if name != "message" and _is_word(value)]
    message = facts.get("message")
    return "".join(words) if message is None else f": {message}"


def _is_word(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))
