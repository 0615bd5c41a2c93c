"""What becomes of each type of map in an upgrade: one answer a type, from which all plans, messages and docs come.

A map that did not change is kept, save those that a release fills itself. For one that changed, the answer names the
kind of carrier that brings its contents into the new map, or says why there is none and whether that loses anything.
``python -m hitless.layout.answers`` prints the table of docs/map-types.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = ["ANSWERS", "Answer", "answer", "table"]


class Answer(msgspec.Struct, frozen=True):
    """What becomes of a map of one type when its definition changed.

    ``kind`` is its carrier, empty if its contents are not carried; ``words`` says how it travels, or why it does not.
    ``loses``: what is not carried is lost, and somebody must allow that. ``anew``: the release fills such maps when
    it is loaded, so that each release has one of its own, even if nothing changed.
    """

    words: str
    kind: str = ""
    loses: bool = False
    anew: bool = False


def _carried(kind: str, words: str) -> Answer:
    return Answer(words, kind)


def _lost(words: str) -> Answer:
    return Answer(words, loses=True)


def _filled_by_release(words: str) -> Answer:
    return Answer(words, anew=True)


_ENTRIES = "each entry is converted; what programs write meanwhile is merged"
_ORDER = "its elements are moved in one go after the cutover, in their order"
_INNER = "each inner map is converted into a new one if those changed; slots that share one keep sharing one"
_REFERENCES = "its entries are written anew, with the programs that they name"
_SOCKETS = "its sockets are added to the new map, and stay connected and in the old one"
_STORAGE = "each owner's value is converted; what programs write meanwhile is merged"
_ATTACHED = "a program that is updated in place keeps the storage of the old map"

#: The answer for every type of map that a kernel is known to have.
ANSWERS: Mapping[str, Answer] = {
    "hash": _carried("entries", _ENTRIES),
    "array": _carried("entries", _ENTRIES),
    "prog_array": _filled_by_release("a slot that somebody else filled starts empty, and that must be allowed"),
    "perf_event_array": _lost("its perf events cannot be listed: readers have to open theirs in the new map"),
    "percpu_hash": _carried("entries", _ENTRIES),
    "percpu_array": _carried("entries", _ENTRIES),
    "stack_trace": _lost("its stacks cannot be written by anybody but the kernel"),
    "cgroup_array": _lost("its cgroups cannot be listed: who put them in has to do so again"),
    "lru_hash": _carried("entries", _ENTRIES),
    "lru_percpu_hash": _carried("entries", _ENTRIES),
    "lpm_trie": _carried("entries", _ENTRIES),
    "array_of_maps": _carried("inner-maps", _INNER),
    "hash_of_maps": _carried("inner-maps", _INNER),
    "devmap": _carried("references", _REFERENCES),
    "sockmap": _carried("sockets", _SOCKETS),
    "cpumap": _carried("references", _REFERENCES),
    "xskmap": _lost("its AF_XDP sockets cannot be read back: the processes that own them have to put them in again"),
    "sockhash": _carried("sockets", _SOCKETS),
    "cgroup_storage": _lost(_ATTACHED),
    "reuseport_sockarray": _lost(
        "a socket can be in one such map only, and is put there by its owner, who has to do so again"
    ),
    "percpu_cgroup_storage": _lost(_ATTACHED),
    "queue": _carried("queue", _ORDER),
    "stack": _carried("queue", _ORDER),
    "sk_storage": _carried("storage", _STORAGE),
    "devmap_hash": _carried("references", _REFERENCES),
    "struct_ops": _filled_by_release("it holds the release's own programs; connections keep the one they began with"),
    "ringbuf": _carried("ring", "its readers drain the old one, which stays beside the new one in previous/"),
    "inode_storage": _lost("the inodes that have a value in it cannot be listed"),
    "task_storage": _carried("storage", _STORAGE),
    "bloom_filter": _lost("what was put into it cannot be listed: who did has to do so again"),
    "user_ringbuf": _lost("what no program has drained stays behind: its writers have to open the new map"),
    "cgrp_storage": _carried("storage", _STORAGE),
    "arena": _lost("its memory holds pointers into itself"),
    "insn_array": _filled_by_release("it holds places in the release's own programs"),
}


def answer(kind: str) -> Answer:
    """The answer for maps of the type ``kind``; one that came after this version cannot be carried."""
    return ANSWERS.get(kind) or _lost(f"maps of type {kind} are not known to this version")


def table() -> str:
    """All answers as a table in Markdown."""
    rows = ["| type | not changed | changed | needs `--allow-loss` |", "|---|---|---|---|"]
    for kind, found in sorted(ANSWERS.items()):
        same = "made anew" if found.anew else "kept"
        how = f"carried: {found.words}" if found.kind else f"not carried: {found.words}"
        rows.append(f"| `{kind}` | {same} | {how} | {'yes' if found.loses else 'no'} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
