"""What every control plane of a cluster is asked before it is believed, and how it is asked again. No effects."""

from __future__ import annotations

import ipaddress
import random
import re

from meshd.model import Address

__all__ = ["Pace", "address", "name", "plain", "port", "virtual_address"]

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_SLOWEST = 30.0  # s
_LONGEST = 600  # signs


class Pace:
    """How long to wait before the next try: twice as long each time up to 30 s, and never quite as long as others."""

    def __init__(self, first: float = 0.2) -> None:
        self._first = first
        self._next = first

    def wait(self) -> float:
        """Seconds to wait now."""
        now, self._next = self._next, min(self._next * 2, _SLOWEST)
        return now * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Say that a try went well."""
        self._next = self._first


def address(text: str) -> Address:
    """The address of one host. Raises ValueError whose words say why it is none."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is no IPv4 or IPv6 address") from None
    if found.is_unspecified or found.is_multicast or int(found) == 2**32 - 1:
        raise ValueError(f"{found} is no address of one host")
    if isinstance(found, ipaddress.IPv6Address) and (found.ipv4_mapped or found.scope_id):
        raise ValueError(f"{found} is an IPv4 address or has a zone, which is not supported")
    return found


def virtual_address(text: str) -> Address:
    """An address that a service may have, which those of the host itself are not. Raises ValueError."""
    found = address(text)
    if found.is_loopback or found.is_link_local:
        raise ValueError(f"{found} is every host's own, and no address of a service")
    return found


def plain(text: str) -> str:
    """A server's words as a log and a terminal can be trusted with: one line, not too long."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:_LONGEST])


def port(number: int) -> int:
    """The port itself. Raises ValueError."""
    if not 1 <= number <= 65535:
        raise ValueError(f"{number} is no port from 1 to 65535")
    return number


def name(text: str) -> str:
    """The name itself. Raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is no name: letters, digits, '.', '_' and '-', at most 253")
    return text
