"""The release as this kernel can have it, where an elder method of the kernel stands for one that it has not got. Pure.

All that comes behind it, the record included, knows what is used, and the plan why.
"""

from __future__ import annotations

from collections.abc import Container

import msgspec

from hitless.attach import Attach
from hitless.bundle import Bundle
from hitless.hooks import ELDERS, TCX

__all__ = ["fitted"]


def fitted(bundle: Bundle, features: Container[str]) -> Bundle:
    """The release with filters at clsact for its hooks of tcx, if tcx is not among ``features``.

    Its daemon's own loader cannot pin a link of those either.
    """
    lesser = {entry.link for entry in bundle.attach if entry.hook in ELDERS}
    if not lesser or TCX in features:
        return bundle
    public = bundle.public
    if public is not None:
        links = {name: pin for name, pin in public.links.items() if name not in lesser}
        public = msgspec.structs.replace(public, links=links)
    return msgspec.structs.replace(bundle, attach=tuple(map(_elder, bundle.attach)), public=public)


def _elder(entry: Attach) -> Attach:
    if entry.hook not in ELDERS:
        return entry
    return msgspec.structs.replace(entry, hook=ELDERS[entry.hook], instead_of=entry.hook)
