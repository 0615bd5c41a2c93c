"""Damage that gets past the first check: each mutator knows its format and keeps most of it whole."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["MUTATORS", "Mutator"]

#: Seed bytes and dice -> damaged bytes.
Mutator = Callable[[bytes, random.Random], bytes]

_BTF_HEADER = struct.Struct("<HBBIIIII")
_ITEM_WORDS = {1: (1, 0), 3: (3, 0), 4: (0, 3), 5: (0, 3), 6: (0, 2), 13: (0, 2), 14: (1, 0), 15: (0, 3), 17: (1, 0),
               19: (0, 3)}  # fmt: skip
_ELF_NAMES = b".maps .BTF .bss .data .rodata license maps .struct_ops ?xdp .text .kconfig .symtab".split()


def plain(data: bytes, dice: random.Random) -> bytes:
    """Bits flipped, pieces cut out, doubled or overwritten, the end missing: needs no format."""
    out = bytearray(data)
    for _ in range(_few(dice)):
        at = dice.randrange(len(out) + 1)
        size = dice.choice((1, 2, 4, 8, dice.randint(1, 64)))
        match dice.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << dice.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at : at + size] = dice.randbytes(size)
            case 4:
                out[at : at + 4] = _word(dice, len(out)).to_bytes(4, "little")
            case 5 if not dice.randrange(4):
                del out[at:]
    return bytes(out)


def btf(data: bytes, dice: random.Random) -> bytes:
    """Names, kinds, counts, sizes, references and offsets changed; types doubled and dropped; the header adjusted."""
    if len(data) < _BTF_HEADER.size or not dice.randrange(20):
        return plain(data, dice)
    *head, start, size, text, text_size = _BTF_HEADER.unpack_from(data)
    at = head[-1]
    if max(start + size, text + text_size) + at > len(data):
        return plain(data, dice)
    body = bytearray(data[at + start : at + start + size])
    strings = bytearray(data[at + text : at + text + text_size])
    for _ in range(_few(dice)):
        places = _btf_types(body)
        if not places:
            break
        index = dice.randrange(len(places))
        begin, end = places[index]
        field = begin + 4 * dice.randrange((end - begin) // 4)
        match dice.randrange(8):
            case 0:  # kind, count or flag
                (info,) = struct.unpack_from("<I", body, begin + 4)
                other = info & ~(31 << 24) | dice.randrange(20) << 24
                info = dice.choice((info ^ 1 << 31, other, max(0, info + dice.randint(-2, 2))))
                struct.pack_into("<I", body, begin + 4, info)
                fixed, each = _ITEM_WORDS.get(info >> 24 & 31, (0, 0))
                wanted = 12 + 4 * (fixed + each * (info & 0xFFFF))
                if wanted < 1000 and dice.randrange(8):  # what follows stays where it can be read
                    body[begin:end] = body[begin:end].ljust(wanted, b"\0")[:wanted]
            case 1:
                body[begin:begin] = body[begin:end]
            case 2:
                del body[begin:end]
            case 3:  # a reference to itself or to a neighbour
                struct.pack_into("<I", body, field, max(0, index + dice.randint(-2, 4)))
            case 4 if strings:
                strings[dice.randrange(len(strings))] = dice.choice((0, 0x1B, 0x2E, 0x80, dice.randrange(256)))
            case 5:
                struct.pack_into("<I", body, field, dice.randrange(len(strings) + 2))
            case 6:
                struct.pack_into("<I", body, field, dice.randrange(len(places) + 2))
            case _:
                struct.pack_into("<I", body, field, _word(dice, len(places)))
    head[-1] = _BTF_HEADER.size
    lie = dice.choice((0,) * 60 + (1, -1, 4, 1 << 31))
    sizes = (0, len(body), (len(body) + lie) % (1 << 32), len(strings))
    return _BTF_HEADER.pack(*head, *sizes) + bytes(body) + bytes(strings)


def elf(data: bytes, dice: random.Random) -> bytes:
    """Section headers, symbols and names changed, or the BTF inside, put back at the end of the file."""
    sections = _elf_sections(data)
    if not sections or not dice.randrange(20):
        return plain(data, dice)
    out = bytearray(data)
    for _ in range(_few(dice)):
        header, (_name, kind, _flags, _addr, offset, size, *_rest) = dice.choice(sections)
        match dice.randrange(8):
            case 0:
                _put(out, header + 4 * dice.randrange(16), _word(dice, len(out)))
            case 1:  # symbols
                if kind == 2 and size >= 4:
                    _put(out, offset + 4 * dice.randrange(size // 4), _word(dice, len(sections)))
            case 2 if kind == 3 and size:
                word = dice.choice((*_ELF_NAMES, b"\x1b[2J"))
                place = offset + dice.randrange(size)
                out[place : place + len(word)] = word
            case 3:
                _put(out, 4 * dice.randrange(16), _word(dice, len(sections)))
            case 4 if kind != 8 and 0 < size <= len(out):  # what is in it: debug information, relocations
                for _ in range(_few(dice)):
                    place = (offset + dice.randrange(size)) % len(out)
                    out[place] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            case _:
                for place, (_, _, _, _, start, length, *_) in sections:
                    if data[start : start + 2] == b"\x9f\xeb" and place + 40 <= len(out):
                        blob = btf(bytes(data[start : start + length]), dice)
                        struct.pack_into("<QQ", out, place + 24, len(out), len(blob))
                        out += blob
                        break
    return bytes(out)


def snapshot(data: bytes, dice: random.Random) -> bytes:
    """Nodes of the JSON replaced, dropped, doubled, nested and swapped; now and then no JSON any more."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return plain(data, dice)
    if not dice.randrange(20):
        return plain(data, dice)
    for _ in range(_few(dice)):
        spots = list(_spots(tree))
        if not spots:
            break
        holder, key = dice.choice(spots)
        match dice.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, its = dice.choice(spots)
                holder[key] = other[its]
            case 2 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 3:
                for _ in range(dice.choice((1, 3, 100, 1200))):
                    holder[key] = dice.choice(([holder[key]], {"type": "array", "element": holder[key], "count": 1}))
            case _:
                holder[key] = dice.choice(_ODD)
        tree = json.loads(text) if (text := _text(tree)) else {}
    return (_text(tree) or "{}").encode("utf-8", "surrogatepass")


def manifest(data: bytes, dice: random.Random) -> bytes:
    """Lines dropped, doubled and swapped; keys and values put where they do not belong."""
    if not dice.randrange(10):
        return plain(data, dice)
    lines = data.split(b"\n")
    for _ in range(_few(dice)):
        at = dice.randrange(len(lines))
        match dice.randrange(6):
            case 0:
                lines[at : at + 1] = []
            case 1:
                lines.insert(at, dice.choice(lines or [b""]))
            case 2:
                key = lines[at].partition(b"=")[0]
                lines[at] = key + b"= " + dice.choice(_TOML_VALUES)
            case 3:
                lines.insert(at, dice.choice(_TOML_KEYS) + b" = " + dice.choice(_TOML_VALUES))
            case 4:
                lines.insert(at, dice.choice(_TOML_TABLES))
            case _:
                words = re.findall(rb"\w+", data)
                if words and (old := re.findall(rb"\w+", lines[at])):
                    lines[at] = lines[at].replace(dice.choice(old), dice.choice(words), 1)
        lines = lines or [b""]
    return b"\n".join(lines)


#: By the name of the format.
MUTATORS: dict[str, Mutator] = {"elf": elf, "btf": btf, "snapshot": snapshot, "kmesh": snapshot, "manifest": manifest}

_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 8, 64, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1 << 200, 1.5, 1e308, "", "x", "key", "record",
    "\x1b[2J", "\ud800", "a\0b", "é", [], {}, [1, 2], {"type": "int", "name": "u", "size": 4, "signed": False},
    {"type": "opaque", "name": "o", "size": 8}, {"type": "array", "element": {"type": "opaque", "name": "", "size": 0},
     "count": 1 << 31}, {"type": "record", "name": "r", "size": 0, "fields": []}, "hitless:was=x", "hitless:default=",
)  # fmt: skip
_TOML_VALUES = (
    b"1", b"-1", b"1.5", b"nan", b"true", b"[]", b"{}", b'""', b'"x"', b'"sum"', b'"discard"', b'"\\u0000"',
    b'"../../etc"', b'"."', b'"${cgroup}"', b'"${}"', b"1979-05-27", b'["a", "b"]', b"{ was = 1 }", b'"\\u001b[2J"',
    b'"key"', b'"struct value"', b'"union nothing"', b"99999999999999999999999999", b"[[[[[[[[]]]]]]]]", b'"""a\nb"""',
    b"[" * 2000, b"[" * 400 + b"]" * 400, b"{ a = " * 500,
)  # fmt: skip
_TOML_KEYS = (
    b"file", b"program", b"hook", b"target", b"link", b"was", b"key", b"value", b"old_value", b"convert", b"on_loss",
    b"on_collision", b"field", b"merge", b"default", b"name", b"version", b"a.b.c", b'"quoted key"', b"bundle", b"map",
)  # fmt: skip
_TOML_TABLES = (
    b"[map.service]", b"[map.nothing]", b'[map.service.field."hits"]', b"[[attach]]", b"[[object]]", b"[bundle]",
    b"[object.program.x]", b"[map]", b"[[map]]", b'[map.".bss"]', b"[a.b.c.d]", b"[[bundle]]", b"[",
    b"[" + b"a." * 2000 + b"a]",
)  # fmt: skip


def _few(dice: random.Random) -> int:
    return dice.choice((1, 1, 1, 2, 3, 5))


def _word(dice: random.Random, near: int) -> int:
    return dice.choice(
        (0, 1, 2, 4, 7, 8, 32, 64, 0xFF, 0xFFFF, 1 << 24, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF, near, near + 1,
         dice.randrange(near + 2), dice.getrandbits(32), dice.randrange(256))
    )  # fmt: skip


def _put(out: bytearray, at: int, word: int) -> None:
    if 0 <= at <= len(out) - 4:
        struct.pack_into("<I", out, at, word)


def _btf_types(body: bytearray) -> list[tuple[int, int]]:
    out = []
    at = 0
    while at + 12 <= len(body):
        (info,) = struct.unpack_from("<I", body, at + 4)
        fixed, each = _ITEM_WORDS.get(info >> 24 & 31, (0, 0))
        end = at + 12 + 4 * (fixed + each * (info & 0xFFFF))
        if end > len(body):
            break
        out.append((at, end))
        at = end
    return out


def _elf_sections(data: bytes) -> list[tuple[int, tuple[int, ...]]]:
    if len(data) < 64:
        return []
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    if size != 64 or start + 64 * count > len(data):
        return []
    return [(start + 64 * i, struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i)) for i in range(count)]


def _spots(tree: Any) -> list[tuple[Any, Any]]:
    out: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict | list):
            items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
            out += [(node, key) for key, _ in items]
            todo += [value for _, value in items]
    return out


def _text(tree: Any) -> str:
    try:
        return json.dumps(tree, ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""
