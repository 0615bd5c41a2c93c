"""The pod that the daemon runs in: which DaemonSet made it and whether that still is, and events about it.

Needs the extra ``kubernetes``; what is imported here for it is imported nowhere else before a Pod is made.
"""

from __future__ import annotations

import datetime
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hitless.errors import UnsupportedError
from meshd.leaving import Leaving

__all__ = ["Announcer", "Pod"]

_TIMEOUT = 3.0  # s for each step of a request; the whole end of a pod has 30 s unless its spec says otherwise
_WAITING = 32  # events at most that wait to be posted
_EVERY = 1.0  # s between two of them at least
_LAST = 2.0  # s to post what waits at the end


class _Owner(msgspec.Struct, frozen=True):
    name: str
    uid: str


class _Answer(msgspec.Struct, frozen=True):
    """What was ``found``, or in words what the ``trouble`` is; ``gone`` if the API server says that there is none."""

    found: Any = None
    trouble: str = ""
    gone: bool = False


class Pod:
    """The pod ``NAMESPACE/NAME``; asks the API server that the service account or ``KUBECONFIG`` leads to.

    Raises UnsupportedError if lightkube is not installed or does not know which server to ask.
    """

    def __init__(self, place: str) -> None:
        self.namespace, _, self.name = place.partition("/")
        try:
            import lightkube
            from lightkube.core.exceptions import ConfigError
        except ImportError as error:
            raise UnsupportedError(
                f"to know whether the DaemonSet of pod {place} still exists, lightkube is needed and is not installed: "
                "pip install 'hitless[kubernetes]'",
                feature="lightkube",
            ) from error
        import httpx2

        try:
            self._client = lightkube.Client(timeout=httpx2.Timeout(_TIMEOUT))
        except ConfigError as error:
            raise UnsupportedError(
                f"pod {place} has no way to the API server: {error}; it needs a service account, or KUBECONFIG",
                feature="kubernetes",
            ) from error
        self._owner: _Owner | None = None
        self.uid = ""

    @classmethod
    def own(cls, given: str | None, env: Mapping[str, str] = os.environ) -> Pod | None:
        """The ``given`` pod, else that of ``POD_NAMESPACE`` and ``POD_NAME``; None if there is neither."""
        if given is None and env.get("POD_NAME") and env.get("POD_NAMESPACE"):
            given = f"{env['POD_NAMESPACE']}/{env['POD_NAME']}"
        return cls(given) if given is not None else None

    def look(self) -> str | None:
        """Find out who owns the pod, as long as the pod is there to be asked; returns why that was not possible."""
        from lightkube.resources.core_v1 import Pod as PodResource

        answer = _ask(lambda: self._client.get(PodResource, self.name, namespace=self.namespace))
        if answer.trouble:
            return answer.trouble
        self.uid = answer.found.metadata.uid or ""
        for owner in answer.found.metadata.ownerReferences or ():
            if owner.controller and owner.kind == "DaemonSet" and owner.apiVersion.startswith("apps/"):
                self._owner = _Owner(owner.name, owner.uid)
        return None

    def leaving(self) -> Leaving:
        """Whether the DaemonSet goes on, so that the next pod takes the data path over. Raises nothing."""
        trouble = self.look() if self._owner is None else None
        if trouble is not None:
            return Leaving("restart", f"the owner of pod {self.namespace}/{self.name} is not known: {trouble}")
        if self._owner is None:
            return Leaving("restart", f"pod {self.namespace}/{self.name} is of no DaemonSet")
        return self._is_owner_there(self._owner)

    def _is_owner_there(self, owner: _Owner) -> Leaving:
        from lightkube.resources.apps_v1 import DaemonSet

        what = f"DaemonSet {self.namespace}/{owner.name}"
        answer = _ask(lambda: self._client.get(DaemonSet, owner.name, namespace=self.namespace))
        if answer.gone:
            return Leaving("normal", f"{what} is gone")
        if answer.trouble:
            return Leaving("restart", f"{what} cannot be looked at: {answer.trouble}")
        seen = answer.found.metadata
        if seen.uid != owner.uid:
            return Leaving("normal", f"{what} is gone: there is another one of that name")
        if seen.deletionTimestamp is not None:
            return Leaving("normal", f"{what} is being deleted")
        return Leaving("restart", f"{what} exists")

    def post(self, reason: str, kind: str, message: str, host: str) -> str | None:
        """Make an event about the pod (``kind``: Normal or Warning); returns why that was not possible."""
        from lightkube.models.core_v1 import EventSource, ObjectReference
        from lightkube.models.meta_v1 import ObjectMeta
        from lightkube.resources.core_v1 import Event

        now = datetime.datetime.now(datetime.UTC)
        event = Event(
            metadata=ObjectMeta(name=f"{self.name}.{time.time_ns():x}", namespace=self.namespace),
            involvedObject=ObjectReference(
                apiVersion="v1", kind="Pod", name=self.name, namespace=self.namespace, uid=self.uid or None
            ),
            reason=reason,
            type=kind,
            message=message[:1024],  # as much as an event may say
            source=EventSource(component="meshd", host=host),
            firstTimestamp=now,
            lastTimestamp=now,
            count=1,
            reportingComponent="meshd",
            reportingInstance=self.name,
        )
        return _ask(lambda: self._client.create(event)).trouble or None


class Announcer:
    """Makes Kubernetes events of what the daemon tells, as far as that goes: from a thread, and not too many.

    ``counts`` says what became of them: ``posted``, ``failed``, ``dropped``.
    """

    def __init__(self, pod: Pod) -> None:
        self.counts = {"posted": 0, "failed": 0, "dropped": 0}
        self._pod = pod
        self._waiting: queue.Queue[tuple[str, str, str, str] | None] = queue.Queue(_WAITING)
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._post, name="announcer", daemon=True)
        self._thread.start()

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take notice of an event of the daemon; see :class:`~meshd.events.Listener`."""
        said = announcement(event)
        if said is None:
            return
        try:
            self._waiting.put_nowait((*said, str(event["node"])))
        except queue.Full:
            self.counts["dropped"] += 1

    def finish(self) -> None:
        """Post what waits, if that is quickly done."""
        self._hurry.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_LAST)

    def _post(self) -> None:
        while (said := self._waiting.get()) is not None:
            trouble = self._pod.post(*said)
            self.counts["posted" if trouble is None else "failed"] += 1
            self._hurry.wait(_EVERY)


def announcement(event: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The reason, type and message of the Kubernetes event for an event of the daemon; None if it is worth none."""
    message = str(event.get("message", ""))
    match event["event"]:
        case "upgraded":
            result = event["result"]
            lost = sum(one["lost"] for one in result["maps"])
            what = f"from {result['from']} to {result['to']}, generation {result['generation']}; {lost} values lost"
            back = _numbers(result["to"]) < _numbers(result["from"])
            return ("RolledBack" if back else "Upgraded", "Normal", f"{'back ' if back else ''}{what}")
        case "upgrade-failed":
            return "UpgradeFailed", "Warning", message
        case "left-out":
            return "LeftOut", "Warning", message
        case "not-ready":
            return "NotReady", "Warning", message
        case "source-away" | "source-empty":
            return "SourceAway", "Warning", message
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _ask(request: Callable[[], Any]) -> _Answer:
    import httpx2
    from lightkube.core.exceptions import ApiError

    try:
        return _Answer(request())
    except ApiError as error:
        # Not by the number alone: anything on the way, and a server that is no API server, says 404, too.
        gone = error.status.code == 404 and error.status.reason == "NotFound"
        return _Answer(trouble=f"{error.status.code} {error}", gone=gone)
    except (httpx2.HTTPError, OSError, ValueError, KeyError) as error:  # the last two: lightkube, of what is no answer
        return _Answer(trouble=f"{type(error).__name__}: {error}")
