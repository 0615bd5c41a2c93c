"""What the daemon tells, one event per line: words for people, or JSON objects for tools."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import msgspec

from hitless.errors import HitlessError

__all__ = ["Events", "Listener"]

Listener = Callable[[Mapping[str, Any]], None]


class Events:
    """Writes events to ``out`` (standard output unless given); usable from several threads.

    With ``json`` every line is an object ``{"event": NAME, "time": seconds since the epoch, "node": NAME, ...}``; while
    an upgrade runs, ``upgrade`` is its id. Whoever listens (see :meth:`listen`) hears the same objects.
    """

    def __init__(self, json: bool = False, out: TextIO | None = None, node: str | None = None) -> None:
        self._json = json
        self._out = out if out is not None else sys.stdout
        self._node = os.uname().nodename if node is None else node
        self._upgrade: str | None = None
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with each event from now on, in the thread that tells it, so it is to return at once."""
        self._listeners.append(listener)

    @contextmanager
    def upgrading(self) -> Iterator[str]:
        """While this lasts, every event carries the id of one upgrade, which is new and returned."""
        self._upgrade = uuid.uuid4().hex
        try:
            yield self._upgrade
        finally:
            self._upgrade = None

    def tell(self, event: str, **facts: Any) -> None:
        """Write one event. ``message`` among the facts is for people; in plain lines, nested facts are left out."""
        told = self._hand_on(event, facts)
        if self._json:
            self._write(msgspec.json.encode(told, enc_hook=str).decode())
        else:
            # What did not begin yet is no news for people.
            shown = {name: value for name, value in facts.items() if value} if event == "progress" else facts
            self._write(f"meshd: {event}{_plain(shown)}")

    def error(self, error: HitlessError) -> None:
        """Tell an error with its code and facts; in plain lines on standard error."""
        facts = {"code": error.code, "message": error.message, "facts": error.facts}
        if self._json:
            self.tell("error", **facts)
            return
        self._hand_on("error", facts)
        with self._lock:
            print(f"meshd: {error.message}", file=sys.stderr, flush=True)

    def _hand_on(self, event: str, facts: dict[str, Any]) -> dict[str, Any]:
        upgrade = {} if self._upgrade is None else {"upgrade": self._upgrade}
        told = {"event": event, "time": time.time(), "node": self._node, **upgrade, **facts}
        for listener in self._listeners:
            listener(told)
        return told

    def _write(self, line: str) -> None:
        with self._lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except BrokenPipeError:
                # Nobody reads any more. That must not end the mesh's upkeep, nor fail once more at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def _plain(facts: dict[str, Any]) -> str:
    words = [f" {name}={_word(value)}" for name, value in facts.items() if name != "message" and _is_word(value)]
    message = facts.get("message")
    return "".join(words) if message is None else f": {message}"


def _word(value: object) -> object:
    return f"{value:.1f}" if isinstance(value, float) else value


def _is_word(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))
