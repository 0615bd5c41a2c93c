"""The kinds: what their old maps hold, what the new release's manifest says, and what becomes of the entries."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["CHANGES", "Kind"]

Entries = Mapping[str, Mapping[Any, Any]]


class Kind(msgspec.Struct, frozen=True):
    """One kind of change: ``source`` names its C file, which is compiled without and with ``NEW``.

    ``before`` and ``after`` are entries by map; keys that are structs are tuples of their fields, in the order of the
    struct. ``rules`` end the new manifest, ``converters`` is its module; ``old_rules`` end the old one. ``refused``:
    words of the refusal, where hitless does not do that.
    """

    change: str
    source: str
    verdict: str
    before: Entries
    after: Entries = {}
    rules: str = ""
    old_rules: str = ""
    converters: str = ""
    allow_loss: tuple[str, ...] = ()
    refused: str | None = None


def _attach(number: int) -> str:
    return (
        f'[[attach]]\nprogram = "connect{number}"\nhook = "cgroup"\ntarget = "${{cgroup}}"\nlink = "connect{number}"\n'
        f'pin = "connect{number}"\n'
    )


_CONVERT = '[map.m]\nconvert = "converters:m"\n'
_IDS = """IDS = {b"web": 7, b"db": 9}


"""
_VALUES = {1: {"a": 1, "b": 2}, 2: {"a": 3, "b": 4}}
_PLAIN = {1: 10, 2: 20}
_SIZED = {1: {"size": 3, "bytes": b"abc" + bytes(253)}, 2: {"size": 200, "bytes": b"x" * 200 + bytes(56)}}

CHANGES = (
    Kind("field appended", "appended", "lossless", {"m": {1: {"a": 7}}}, {"m": {1: {"a": 7, "b": 0}}}),
    Kind("field inserted in the middle", "inserted", "lossless",
         {"m": {1: {"a": 1, "c": 3}}}, {"m": {1: {"a": 1, "b": 0, "c": 3}}}),
    Kind("field removed", "removed", "lossy", {"m": {1: {"a": 1, "b": 2, "c": 3}}}, {"m": {1: {"a": 1, "c": 3}}},
         allow_loss=("m",)),
    Kind("field renamed", "renamed", "lossless", {"m": {1: {"a": 1, "count": 5}}}, {"m": {1: {"a": 1, "hits": 5}}}),
    Kind("field widened", "widened", "lossless",
         {"m": {1: {"a": 4_000_000_000, "b": 65535}}}, {"m": {1: {"a": 4_000_000_000, "b": 65535}}}),
    Kind("field narrowed", "narrowed", "lossy", {"m": {1: {"a": 80}}}, {"m": {1: {"a": 80}}}, allow_loss=("m",)),
    Kind("scalar to struct of one member", "into_struct", "lossless",
         {"m": {1: {"id": 9, "b": 1}}}, {"m": {1: {"id": {"value": 9}, "b": 1}}}),
    Kind("struct of one member to scalar", "out_of_struct", "lossy",
         {"m": {1: {"id": {"value": 9}, "b": 1}}}, {"m": {1: {"id": 9, "b": 1}}}, allow_loss=("m",)),
    Kind("scalar to array", "into_array", "lossless",
         {"m": {1: {"count": 4, "b": 1}}}, {"m": {1: {"count": [4, 0, 0], "b": 1}}}),
    Kind("array grown", "array_grown", "lossless", {"m": {1: {"a": [1, 2]}}}, {"m": {1: {"a": [1, 2, 0, 0]}}}),
    Kind("array shrunk", "array_shrunk", "lossy", {"m": {1: {"a": [1, 2, 0, 0]}}}, {"m": {1: {"a": [1, 2]}}},
         allow_loss=("m",)),
    Kind("u32 to struct with a union", "into_union", "lossless",
         {"m": {1: {"addr": 0x0100000A, "port": 80}}},
         {"m": {1: {"addr": {"{ip4|ip6}": bytes([10, 0, 0, 1]) + bytes(12)}, "port": 80}}}),
    Kind("renamed and nested at once", "renamed_and_nested", "lossless",
         {"m": {1: {"endpoint_count": 3, "b": 1}}}, {"m": {1: {"b": 1, "prio": {"count": [3, 0]}}}},
         '[map.m.field."prio.count[0]"]\nwas = "endpoint_count"\n'),
    Kind("enum value added", "enum_value", "lossless",
         {"m": {1: {"proto": 6, "a": 1}}}, {"m": {1: {"proto": 6, "a": 1}}}),
    Kind("key field inserted", "key_inserted", "lossless", {"m": {(1, 80, 0): 7}}, {"m": {(1, 0, 80, 0): 7}}),
    Kind("key field appended", "key_appended", "lossless", {"m": {(1,): 7}}, {"m": {(1, 0): 7}}),
    Kind("key field removed, keys collide", "key_removed", "lossy",
         {"m": {(1, 0): {"hits": 5}, (1, 1): {"hits": 6}, (2, 0): {"hits": 7}}},
         {"m": {(1,): {"hits": 11}, (2,): {"hits": 7}}},
         '[map.m]\non_collision = "merge"\n[map.m.field.hits]\nmerge = "sum"\n', allow_loss=("m",)),
    Kind("key field removed, nothing said", "key_removed", "needs-converter",
         {"m": {(1, 0): {"hits": 5}, (1, 1): {"hits": 6}}}, refused="two entries could become one"),
    Kind("key field widened", "key_widened", "lossless", {"m": {(4_000_000_000,): 7}}, {"m": {(4_000_000_000,): 7}}),
    Kind("key field retyped", "key_retyped", "lossy", {"m": {(5,): 7}}, {"m": {(5,): 7}},
         '[map.m]\non_collision = "error"\n', allow_loss=("m",)),
    Kind("string to id, by a function", "string_to_id", "needs-converter",
         {"m": {1: {"name": b"web", "hits": 3}}}, {"m": {1: {"name": 7, "hits": 3}}}, _CONVERT,
         converters=_IDS + "def m(keys, old, new):\n    new['name'] = [IDS[one] for one in old['name']]\n"
         "    return new\n"),
    Kind("string to id in the key, by a function", "key_string_to_id", "needs-converter",
         {"m": {(b"web",): 3, (b"db",): 4}}, {"m": {(7,): 3, (9,): 4}}, _CONVERT,
         converters=_IDS + "def m(keys, old, new):\n    return new\n\n\ndef m_key(old, new):\n"
         "    new['name'] = [IDS[one] for one in old['name']]\n    return new\n"),
    Kind("char[] grown", "text_resized", "lossless", {"m": {1: {"name": "abc"}}}, {"m": {1: {"name": "abc"}}}),
    Kind("char[] cut", "text_cut", "lossy", {"m": {1: {"name": "abc"}}}, {"m": {1: {"name": "abc"}}},
         allow_loss=("m",)),
    Kind("field into padding, size unchanged", "into_padding", "lossless",
         {"m": {1: {"a": 1, "b": 2}}}, {"m": {1: {"a": 1, "flag": 0, "b": 2}}}),
    Kind("byte order, by a function", "byte_order", "needs-converter",
         {"m": {1: {"port": 80, "a": 1}}}, {"m": {1: {"port": socket.htons(80), "a": 1}}}, _CONVERT,
         converters="def m(keys, old, new):\n    new['port'] = old['port']\n    return new\n"),
    Kind("all maps renamed", "maps_renamed", "identical",
         {"service": _PLAIN, "endpoint": {3: 30}}, {"km_service": _PLAIN, "km_endpoint": {3: 30}},
         '[map.km_service]\nwas = "service"\n[map.km_endpoint]\nwas = "endpoint"\n'),
    Kind("map split in two, by fields", "split", "lossless", {"both": _VALUES},
         {"first": {1: {"a": 1}, 2: {"a": 3}}, "second": {1: {"b": 2}, 2: {"b": 4}}},
         '[map.first]\nwas = "both"\n[map.second]\nwas = "both"\n'),
    Kind("map split in two, one part carried", "split", "lossy", {"both": _VALUES},
         {"first": {1: {"a": 1}, 2: {"a": 3}}, "second": {}}, '[map.first]\nwas = "both"\n', allow_loss=("both",)),
    Kind("two maps folded into one", "folded", "lossless", {"first": {1: 10}, "second": {2: 20}},
         {"both": {1: 10, 2: 20}}, '[map.both]\nwas = ["first", "second"]\n'),
    Kind("two maps folded into one, keys meet", "folded", "lossless",
         {"first": {1: 10, 3: 30}, "second": {1: 5, 2: 20}}, {"both": {1: 15, 2: 20, 3: 30}},
         '[map.both]\nwas = ["first", "second"]\non_collision = "merge"\n[map.both.field.value]\nmerge = "sum"\n'),
    Kind("two maps folded into one, keys meet, nothing said", "folded", "lossless",
         {"first": {1: 10}, "second": {1: 5}}, rules='[map.both]\nwas = ["first", "second"]\n',
         refused="first 01000000 and second 01000000"),
    Kind("two maps folded into one, each by a function", "folded", "lossless",
         {"first": {1: 10}, "second": {2: 20}}, {"both": {1: 1010, 2: 2020}},
         '[map.both]\nwas = ["first", "second"]\nconvert = "converters:one"\n'
         '[map.both.from.second]\nconvert = "converters:two"\n',
         converters="def one(keys, old, new):\n    return old + 1000\n\n\n"
         "def two(keys, old, new):\n    return old + 2000\n"),
    Kind("map to global variables", "into_variables", "lossless", {"config": {0: {"log_level": 3, "node_ip": 10}}},
         {"new.data": {0: {"node_ip": 10, "log_level": 3}}}, '[map."new.data"]\nwas = "config"\n'),
    Kind("hash to several sized hashes", "sized_hashes", "lossy", {"all": _SIZED},
         {"map_of_64": {1: {"size": 3, "bytes": b"abc" + bytes(61)}}, "map_of_256": {2: _SIZED[2]}},
         '[map.map_of_64]\nwas = "all"\nconvert = "converters:small"\n'
         '[map.map_of_256]\nwas = "all"\nconvert = "converters:large"\n',
         converters="def small(keys, old, new):\n    return new, old['size'] <= 64\n\n\n"
         "def large(keys, old, new):\n    return new, old['size'] > 64\n"),
    Kind("hash to sized hashes, an entry that none takes", "sized_hashes", "lossy", {"all": _SIZED},
         rules='[map.map_of_64]\nwas = "all"\nconvert = "converters:small"\n'
         '[map.map_of_256]\nwas = "all"\nconvert = "converters:large"\n',
         converters="def small(keys, old, new):\n    return new, old['size'] <= 64\n\n\n"
         "def large(keys, old, new):\n    return new, old['size'] > 200\n",
         refused="1 entries go to none of map_of_64, map_of_256"),
    Kind("hash to sized hashes, into the largest", "sized_hashes", "added", {"all": _SIZED},
         {"map_of_64": {}, "map_of_256": _SIZED}, '[map.map_of_256]\nwas = "all"\n'),
    Kind("max_entries and flags only", "room", "lossless", {"m": _PLAIN}, {"m": _PLAIN}),
    Kind("ring buffer resized", "ring_resized", "lossless", {"m": _PLAIN}, {"m": _PLAIN}),
    Kind("types lost, bytes unchanged", "types_lost", "identical", {"m": _VALUES}, {"m": _VALUES},
         '[map.m]\nkey = "__u32"\nvalue = "value"\n'),
    Kind("types gained, bytes unchanged", "types_gained", "identical", {"m": _VALUES}, {"m": _VALUES},
         old_rules='[map.m]\nkey = "__u32"\nvalue = "value"\n'),
    Kind("types lost, nothing said", "types_lost", "unknown", {"m": _VALUES}, refused="m"),
    Kind("program and hook added", "program_added", "identical", {"m": _PLAIN}, {"m": _PLAIN},
         _attach(4) + _attach(6), _attach(6)),
    Kind("program and hook removed", "program_removed", "identical", {"m": _PLAIN}, {"m": _PLAIN},
         _attach(6), _attach(4) + _attach(6)),
)  # fmt: skip
"""In the order of the list that was made of such changes."""
