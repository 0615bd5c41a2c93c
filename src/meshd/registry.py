"""What all sources say together: of two services that claim one address or one name, one has it. No effects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from meshd.model import Address, Config, Policy, Protocol, Service
from meshd.releases import Release

__all__ = ["LIVE", "Frontend", "News", "Registry"]

LIVE = "what is live"  # a source that every registry has, after all others

Claim = tuple[int, str]  # the source's place in the order of sources, the service's name


class Frontend(msgspec.Struct, frozen=True):
    """What clients connect to, and a service's identity in the kernel."""

    address: Address
    port: int
    protocol: Protocol

    @classmethod
    def of(cls, service: Service) -> Frontend:
        """The frontend of a service."""
        return cls(service.address, service.port, service.protocol)


class News(msgspec.Struct, frozen=True):
    """What changed: services by their frontends, None for gone; and all policies, None if they are as they were.

    ``policies`` are with the frontend of the service that they name; one that names none that there is, is left out.
    """

    services: dict[Frontend, Service | None]
    policies: tuple[tuple[Policy, Frontend | None], ...] | None = None

    def __bool__(self) -> bool:
        return bool(self.services) or self.policies is not None


class Registry:
    """Services and policies by source; the first of ``sources`` wins over later ones, then the first by name.

    A service that cannot be had (its frontend is another's already, or ``release`` has no room for it) is left out
    and named by :meth:`problems` for as long as that is so; of one with more backends than the release holds, those
    that are not healthy or drain are left out first. A policy is for each service of the name that it has.

    What nobody else speaks of may be said by LIVE. Its policies hold until a service's name is sure: as long as a
    source was not heard that comes before the one that has the service's frontend.
    """

    def __init__(self, sources: Sequence[str], release: Release) -> None:
        self._most = release.backends
        self._sources = [*sources, LIVE]
        self._release = release
        self._services: dict[str, dict[str, Service]] = {name: {} for name in self._sources}
        self._policies: dict[str, tuple[Policy, ...]] = dict.fromkeys(self._sources, ())
        self._claims: dict[Frontend, list[Claim]] = defaultdict(list)
        self._changed: set[Frontend] = set()
        self._doubtful: set[Frontend] = set()  # claimed by several, or not had as it was claimed
        self._policies_changed = False
        self._said = False
        self._told: dict[Frontend, Service] = {}
        self._backends = 0  # of all that are told
        self._named: dict[str, set[Frontend]] = defaultdict(set)
        self._silent = set(range(len(sources)))  # those that never said all that they say

    def services_of(self, source: str) -> Mapping[str, Service]:
        """What a source said, by the names of its services."""
        return self._services[source]

    @property
    def has_news(self) -> bool:
        """Whether anything was said since the last :meth:`take_news`."""
        return self._said

    def bound(self, backends: int | None) -> None:
        """Let no service have more than so many backends, None: than the release holds.

        For as long as the release before, which holds fewer, runs on the same entries.
        """
        most = min(self._release.backends, backends) if backends is not None else self._release.backends
        if most != self._most:
            low, self._most = min(most, self._most), most
            for of in self._services.values():
                self._changed |= {Frontend.of(one) for one in of.values() if low < len(one.backends)}
            self._said = self._said or bool(self._changed)

    def replace(self, source: str, config: Config) -> None:
        """Take ``config`` for all that ``source`` says."""
        at = self._sources.index(source)
        if at in self._silent:
            self._silent.remove(at)
            if self._policies[LIVE]:
                self._policies_changed = self._said = True
        new = {service.name: service for service in config.services}
        gone = dict.fromkeys(self._services[source].keys() - new.keys())
        self.update(source, {**gone, **new})
        if config.policies != self._policies[source]:
            self._policies[source] = config.policies
            self._policies_changed = self._said = True

    def update(self, source: str, services: Mapping[str, Service | None]) -> None:
        """Take these services of ``source`` for changed, None for gone."""
        mine = self._services[source]
        at = self._sources.index(source)
        for name, service in services.items():
            before = mine.get(name)
            if service == before:
                continue
            self._said = True
            if before is not None:
                frontend = Frontend.of(before)
                self._claims[frontend].remove((at, name))
                if not self._claims[frontend]:
                    del self._claims[frontend]
                self._changed.add(frontend)
                del mine[name]
            if service is not None:
                frontend = Frontend.of(service)
                self._claims[frontend].append((at, name))
                self._claims[frontend].sort()
                self._changed.add(frontend)
                mine[name] = service

    def take_news(self) -> News:
        """What changed since the last call."""
        services: dict[Frontend, Service | None] = {}
        coming = []
        for frontend in sorted(self._changed, key=_order):
            winner, told = self._winner(frontend), self._told.get(frontend)
            if winner is not None and len(winner.backends) > (len(told.backends) if told is not None else -1):
                coming.append((frontend, winner))
            elif winner != told:
                services[frontend] = winner
        for frontend, winner_or_none in services.items():
            self._tell(frontend, winner_or_none)
        asked_of = tuple(self._changed)
        self._changed = set()
        for frontend, winner in coming:
            if self._full(frontend, winner) is None:
                services[frontend] = winner
                self._tell(frontend, winner)
            else:
                self._changed.add(frontend)  # until others go
        for frontend in asked_of:
            claims = self._claims.get(frontend, ())
            told = self._told.get(frontend)
            if len(claims) > 1 or (
                claims and (told is None or frontend in self._changed or told is not self._claimed(claims[0]))
            ):
                self._doubtful.add(frontend)
            else:
                self._doubtful.discard(frontend)
        policies = tuple(self._resolved()) if self._policies_changed else None
        self._policies_changed = self._said = False
        return News(services, policies)

    def _full(self, frontend: Frontend, service: Service) -> str | None:
        """Why there is no room for the service now."""
        told, release = self._told.get(frontend), self._release
        if told is None and len(self._told) >= release.services:
            return f"release {release.version} holds {release.services} services at most"
        more = len(service.backends) - (len(told.backends) if told is not None else 0)
        if release.all_backends is not None and self._backends + more > release.all_backends:
            return f"release {release.version} holds {release.all_backends} backends at most, over all services"
        return None

    def _tell(self, frontend: Frontend, service: Service | None) -> None:
        before = self._told.pop(frontend, None)
        self._backends += (len(service.backends) if service else 0) - (len(before.backends) if before else 0)
        if before is not None:
            self._named[before.name].discard(frontend)
            if not self._named[before.name]:
                del self._named[before.name]
        if service is not None:
            self._told[frontend] = service
            self._named[service.name].add(frontend)
        if (before and before.name) != (service and service.name):
            self._policies_changed = True  # what they name is another frontend now

    def all(self) -> News:
        """Everything, as if all had changed."""
        self.take_news()
        return News(dict(self._told), tuple(self._resolved()))

    def names(self) -> dict[Frontend, str]:
        """The services in force, by what clients connect to."""
        return {frontend: service.name for frontend, service in self._told.items()}

    def counts(self) -> dict[str, int]:
        """How many services and policies are in force."""
        return {"services": len(self._told), "policies": sum(1 for _ in self._resolved())}

    def problems(self) -> list[str]:
        """What was left out and why, one sentence each, in a stable order."""
        found = []
        for frontend in self._doubtful | self._changed:
            claims = self._claims.get(frontend, [])
            services = [self._claimed(claim) for claim in claims]
            fitting = [one for one in services if self._unfit(one) is None]
            for claim, service in zip(claims, services, strict=True):
                why = self._unfit(service)
                if self._sources[claim[0]] == LIVE:
                    continue  # it is there only for want of others
                if why is None and service is not fitting[0]:
                    where = f"{frontend.address} port {frontend.port} ({frontend.protocol})"
                    why = f"{where} is {fitting[0].name}'s already"
                if why is None and self._told.get(frontend) != self._trimmed(service):
                    why = self._full(frontend, service)
                told = f"{self._sources[claim[0]]}: service {service.name}"
                if why is not None:
                    found.append(f"{told} is left out: {why}")
                elif len(service.backends) > self._most:
                    held = f"{self._most} of {len(service.backends)} backends"
                    found.append(f"{told} has {held}: release {self._release.version} holds no more for one service")
        return sorted(found + self._for_nobody())

    def _for_nobody(self) -> list[str]:
        if self._silent:
            return []  # they may name them yet
        return [
            f"{source}: a policy to {policy.action} {policy.service} has no effect: no service in force has this name"
            for source in self._sources[:-1]
            for policy in self._policies[source]
            if policy.service and policy.service not in self._named
        ]

    def _winner(self, frontend: Frontend) -> Service | None:
        services = (self._claimed(claim) for claim in self._claims.get(frontend, ()))
        return next((self._trimmed(service) for service in services if self._unfit(service) is None), None)

    def _trimmed(self, service: Service) -> Service:
        """The service with as many of its backends as it can have, in their order."""
        if len(service.backends) <= self._most:
            return service
        best = sorted(service.backends, key=lambda one: (not one.healthy, one.weight == 0))[: self._most]
        kept = set(map(id, best))
        return msgspec.structs.replace(service, backends=tuple(one for one in service.backends if id(one) in kept))

    def _claimed(self, claim: Claim) -> Service:
        return self._services[self._sources[claim[0]]][claim[1]]

    def _unfit(self, service: Service) -> str | None:
        """Why the release cannot have the service."""
        if service.protocol not in self._release.protocols:
            return f"release {self._release.version} does not serve {service.protocol}"
        return None

    def _resolved(self) -> Iterable[tuple[Policy, Frontend | None]]:
        seen = set()
        for source in self._sources:
            for policy in self._policies[source]:
                for frontend in self._frontends(source, policy) if policy.service else (None,):
                    who = policy.source, frontend, policy.destination, policy.clients, policy.port, policy.protocol
                    if who not in seen:
                        seen.add(who)
                        yield policy, frontend

    def _frontends(self, source: str, policy: Policy) -> Iterable[Frontend]:
        """Of the services that a policy of ``source`` is for."""
        if source != LIVE:
            return sorted(self._named.get(policy.service, ()), key=_order)
        recalled = self._services[LIVE].get(policy.service)
        return (Frontend.of(recalled),) if recalled is not None and self._is_unsure(Frontend.of(recalled)) else ()

    def _is_unsure(self, frontend: Frontend) -> bool:
        """Whether a source that was never heard may give the service there another name."""
        claims = self._claims.get(frontend)
        if not claims or frontend not in self._told:
            return False
        at, _ = claims[0]
        return self._sources[at] == LIVE or any(silent < at for silent in self._silent)


def _order(frontend: Frontend) -> tuple[int, bytes, int, str]:
    return frontend.address.version, frontend.address.packed, frontend.port, frontend.protocol
