"""A sink that remembers, and a source that is followed in a thread while a test changes what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hitless.errors import HitlessError
from meshd.model import Config, Service
from meshd.sources import Source
from tests.meshd import labmesh

_LONG = 20.0  # s; nobody waits for what has come


def until(condition: Callable[[], object], seconds: float = _LONG) -> bool:
    """Whether ``condition`` came true in time, also on a machine that does much else."""
    return labmesh.until(condition, seconds)


class Heard:
    """What a source said: ``services`` as they are now by name, and every call in its order."""

    def __init__(self, config: Config | None = None) -> None:
        self.services = {one.name: one for one in (config.services if config else ())}
        self.replaced = 0
        self.updates: list[set[str]] = []
        self.troubles: list[HitlessError] = []

    def replace(self, config: Config) -> None:
        names = [one.name for one in config.services]
        assert len(set(names)) == len(names), "a name is there twice"
        self.services = {one.name: one for one in config.services}
        self.replaced += 1

    def update(self, services: Mapping[str, Service | None]) -> None:
        self.updates.append(set(services))
        for name, service in services.items():
            if service is None:
                del self.services[name]
            else:
                assert service.name == name
                self.services[name] = service

    def trouble(self, error: HitlessError) -> None:
        self.troubles.append(error)

    @property
    def words(self) -> str:
        return "\n".join(error.message for error in self.troubles)

    def comes_to(self, *names: str, seconds: float = _LONG) -> bool:
        """Whether exactly these services are there after a while."""
        return until(lambda: set(self.services) == set(names), seconds)

    def backends(self, name: str) -> list[str]:
        """The addresses of a service's healthy backends; none if there is no such service."""
        service = self.services.get(name)
        return [str(one.address) for one in service.backends if one.healthy] if service else []

    def backends_come_to(self, name: str, *addresses: str, seconds: float = _LONG) -> bool:
        return until(lambda: self.backends(name) == list(addresses), seconds)


@contextmanager
def following(source: Source, config: Config | None = None) -> Iterator[Heard]:
    """Follow a source until the end of the block; that ends soon and without an error."""
    heard, stop, failed = Heard(config), threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            source.follow(heard, stop)
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join(_LONG)
    assert not thread.is_alive()
    assert not failed, failed
