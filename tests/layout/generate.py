"""Pairs of related C structs, made at random, with the C that fills the old one and judges the new one.

What a conversion owes is worked out here from the declarations alone, never from BTF and never with the code under
test: offsets and widths are the C compiler's own business.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_INTS = {
    "__u8": (8, False), "__u16": (16, False), "__u32": (32, False), "__u64": (64, False),
    "__s8": (8, True), "__s16": (16, True), "__s32": (32, True), "__s64": (64, True),
}  # fmt: skip
_WIDE = {"__u128": (128, False), "__s128": (128, True)}
_NETWORK = {"__be16": (16, False), "__be32": (32, False), "__be64": (64, False)}


@dataclass(frozen=True)
class Number:
    ctype: str
    width: int
    signed: bool = False
    bits: int = 0

    @property
    def boolean(self) -> bool:
        return self.ctype == "_Bool"

    @property
    def network(self) -> bool:
        return self.ctype.startswith("__be")


@dataclass(frozen=True)
class Names:
    """An enum; the number of bits that it is stored in is fixed by its largest name, as in C."""

    uid: int
    values: tuple[tuple[str, int], ...]
    signed: bool
    width: int
    bits: int = 0


@dataclass(frozen=True)
class Text:
    count: int


@dataclass(frozen=True)
class Address:
    pass


@dataclass(frozen=True)
class Many:
    element: Node
    count: int


@dataclass(frozen=True)
class Member:
    """``src`` is the old member that it comes from, None if it is new; ``default`` is what its tag says."""

    name: str
    node: Node
    src: Member | None = None
    default: int | None = None
    gap: str = ""  # an unnamed bitfield before it


@dataclass(frozen=True)
class Group:
    """A struct or union; ``apart`` members are put into an anonymous struct, which changes no name."""

    uid: int
    members: tuple[Member, ...]
    union: bool = False
    packed: bool = False
    apart: tuple[int, int] = (0, 0)


Node = Number | Names | Text | Address | Many | Group


@dataclass
class Pair:
    """An old and a new struct; ``losses`` are the paths that must be reported as losing, ``flags`` the paths whose
    misfits are counted, by the number that the C code knows them by."""

    index: int
    old: Group
    new: Group
    lines: list[str] = field(default_factory=list)
    losses: set[str] = field(default_factory=set)
    flags: list[str] = field(default_factory=list)
    carried: int = 0
    defaulted: int = 0


class Maker:
    """Everything random comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.uid = 0

    def pair(self, index: int) -> Pair:
        old = self.struct(3)
        made = Pair(index, old, self.changed_group(old, 3))
        Judge(made).group(made.old, made.new, "o", "n", "", "", 0)
        return made

    def next(self) -> int:
        self.uid += 1
        return self.uid

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def number(self, bitfield: bool = True) -> Number:
        dice = self.random.randrange(20)
        if dice == 0:
            return Number("_Bool", 8, False, 1 if bitfield and self.chance(30) else 0)
        if dice == 1:
            ctype = self.random.choice(list(_WIDE))
            return Number(ctype, *_WIDE[ctype])
        if dice == 2:
            ctype = self.random.choice(list(_NETWORK))
            return Number(ctype, *_NETWORK[ctype])
        ctype = self.random.choice(list(_INTS))
        width, signed = _INTS[ctype]
        bits = self.random.randint(1, width) if bitfield and self.chance(35) else 0
        return Number(ctype, width, signed, bits)

    def names(self, bitfield: bool = True) -> Names:
        uid, signed, large = self.next(), self.chance(30), self.chance(30)
        count = self.random.randint(1, 5)
        values = [(f"N{uid}_{i}", i) for i in range(count)]
        if signed:
            values.append((f"N{uid}_less", -3))
        if large:
            values.append((f"N{uid}_large", 1 << 40))
        # A bitfield that cannot hold a name of its own enum would not be C that anyone writes.
        bits = self.random.randint(5, 20) if bitfield and not large and self.chance(20) else 0
        return Names(uid, tuple(values), signed, 64 if large else 32, bits)

    def node(self, depth: int, bitfield: bool = True) -> Node:
        dice = self.random.randrange(100)
        if dice < 50 or not depth:
            return self.number(bitfield)
        if dice < 60:
            return self.names(bitfield)
        if dice < 66:
            return Text(self.random.randint(1, 16))
        if dice < 69:
            return Address()
        if dice < 80:
            return Many(self.node(depth - 1, False), self.random.randint(1, 4))
        if dice < 92:
            return self.struct(depth - 1)
        return self.union()

    def union(self) -> Group:
        members = [Member(f"u{self.next()}", self.plain()) for _ in range(self.random.randint(1, 3))]
        return Group(self.next(), tuple(members), union=True)

    def plain_number(self) -> Number:
        ctype = self.random.choice(list(_INTS))
        return Number(ctype, *_INTS[ctype])

    def plain(self) -> Node:
        made = self.plain_number()
        return Many(made, self.random.randint(1, 4)) if self.chance(30) else made

    def struct(self, depth: int) -> Group:
        members = tuple(self.member(depth) for _ in range(self.random.randint(1, 8)))
        return self.arranged(Group(self.next(), members, packed=self.chance(25)))

    def member(self, depth: int) -> Member:
        node = self.node(depth)
        name = "" if isinstance(node, Group) and node.union and self.chance(50) else f"f{self.next()}"
        return Member(name, node, None, self.default(node), self.gap(node))

    def gap(self, node: Node) -> str:
        if isinstance(node, Number | Names) and node.bits and self.chance(10):
            return self.random.choice(("__u32 :0;", "__u32 :3;", "__u8 :1;"))
        return ""

    def default(self, node: Node) -> int | None:
        if not self.chance(20):
            return None
        if isinstance(node, Number) and not node.network:
            low, high = reach(node)
            return self.random.choice((low, high, self.random.randint(low, high)))
        if isinstance(node, Names):
            return self.random.choice(node.values)[1]
        return None

    def arranged(self, made: Group) -> Group:
        if made.union or not self.chance(20):
            return replace(made, apart=(0, 0))
        ends = sorted(self.random.sample(range(len(made.members) + 1), 2))
        return replace(made, apart=(ends[0], ends[1]))

    def changed(self, node: Node, depth: int, bitfield: bool) -> Node:
        if self.chance(35) and not isinstance(node, Many | Group):
            return node
        if isinstance(node, Number | Names) and not node.bits and self.chance(6):
            return Many(node, self.random.randint(1, 3))
        if isinstance(node, Number | Names) and not node.bits and self.chance(6):
            return Group(self.next(), (Member(f"f{self.next()}", node),))
        match node:
            case Number(network=True):
                wanted = [name for name, (width, _) in _NETWORK.items() if width != node.width]
                ctype = self.random.choice(wanted)
                return Number(ctype, *_NETWORK[ctype])
            case Number():
                made = self.number(bitfield)
                return node if made.network else made
            case Names():
                return self.plain_number() if self.chance(5) else self.changed_names(node)
            case Text():
                return Text(self.random.randint(1, 16))
            case Many(element=element, count=count):
                if count and isinstance(element, Number | Names) and self.chance(8):
                    return element
                grown = max(1, count + self.random.choice((-2, -1, 0, 0, 1, 2)))
                return Many(self.changed(element, depth - 1, False), grown)
            case Group(union=True):
                extra = (Member(f"u{self.next()}", self.plain()),) if self.chance(40) else ()
                kept = tuple(replace(member, src=member) for member in node.members)
                if len(kept) > 1 and self.chance(20):
                    kept = kept[:-1]
                return Group(self.next(), kept + extra, union=True)
            case Group():
                return self.changed_group(node, depth - 1)
        return node

    def changed_names(self, node: Names) -> Names:
        values = list(node.values)
        if self.chance(30) and len(values) > 1:
            values.pop(self.random.randrange(len(values)))
        if self.chance(40):
            values = [(name, number + 1 if number >= 0 else number) for name, number in values]
        taken = {number for _, number in values}
        if self.chance(50):
            fresh = next(number for number in range(30) if number not in taken)
            values.append((f"N{node.uid}_new{self.next()}", fresh))
        large = any(number >= 1 << 32 for _, number in values)
        if not large and not node.bits and self.chance(15):
            values.append((f"N{node.uid}_large{self.next()}", 1 << 41))
            large = True
        if node.signed and not any(number < 0 for _, number in values):
            values.append((f"N{node.uid}_less{self.next()}", -9))
        bits = self.random.randint(6, 20) if node.bits else 0
        return Names(node.uid, tuple(values), node.signed, 64 if large else 32, bits)

    def changed_group(self, old: Group, depth: int) -> Group:
        members: list[Member] = []
        for member in old.members:
            if self.chance(12):
                continue
            members += self.changed_member(member, depth)
        for _ in range(self.random.choice((0, 0, 1, 1, 2))):
            members.insert(self.random.randint(0, len(members)), self.member(max(depth, 0)))
        if not members:
            members.append(self.member(0))
        if self.chance(30):
            self.random.shuffle(members)
        packed = old.packed if self.chance(70) else not old.packed
        return self.arranged(Group(self.next(), tuple(members), packed=packed))

    def changed_member(self, member: Member, depth: int) -> list[Member]:
        node = member.node
        gap = self.gap(node)
        if isinstance(node, Number) and not node.bits and not node.network and node.width < 128 and self.chance(6):
            other = Member(f"u{self.next()}", self.plain())
            inner = Member(member.name, node, member)
            return [Member("", Group(self.next(), (inner, other), union=True))]
        if isinstance(node, Group) and node.union and not member.name and self.chance(25):
            inner = self.random.choice(node.members)
            return [Member(inner.name, inner.node, member)]
        changed = self.changed(node, depth, isinstance(node, Number | Names))
        name = member.name
        if name and self.chance(15):
            name = f"f{self.next()}"
        return [Member(name, changed, member, self.default(changed), gap)]


def reach(node: Number | Names) -> tuple[int, int]:
    width = node.bits or node.width
    if isinstance(node, Number) and node.boolean:
        return 0, 1
    return (-(1 << width - 1), (1 << width - 1) - 1) if node.signed else (0, (1 << width) - 1)


class Judge:
    """Writes the C that compares a new record with the old one that it was made from."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def say(self, text: str) -> None:
        self.pair.lines.append(text)

    def flag(self, path: str) -> int:
        self.pair.flags.append(path)
        return len(self.pair.flags) - 1

    def group(self, old: Group, new: Group, o: str, n: str, there: str, here: str, depth: int) -> None:
        used = [member.src for member in new.members if member.src is not None]
        for member in new.members:
            path = dotted(here, label(member))
            inner = [m for m in member.node.members if m.src] if isinstance(member.node, Group) else []
            came = [m for m in old.members if any(m is part.src for part in inner)]
            if came:
                used += came
                (source,) = came
                (part,) = [m for m in inner if m.src is source]
                self.node(
                    source.node, part.node, f"{o}.{source.name}", f"{n}.{part.name}",
                    dotted(there, source.name), dotted(here, part.name), depth,
                )  # fmt: skip
            elif member.src is None:
                self.fresh(member.node, dot(n, member.name), member.default, depth)
            elif isinstance(member.src.node, Group) and member.src.node.union and not isinstance(member.node, Group):
                self.out_of_union(member.src.node, member, o, n, there, here, depth)
            else:
                self.node(
                    member.src.node, member.node, dot(o, member.src.name), dot(n, member.name),
                    dotted(there, member.src.name), path, depth,
                )  # fmt: skip
        for gone in old.members:
            if not any(gone is source for source in used):
                self.pair.losses.add(dotted(there, label(gone)))

    def out_of_union(self, union: Group, member: Member, o: str, n: str, there: str, here: str, depth: int) -> None:
        if len(union.members) > 1:
            self.pair.losses.add(dotted(here, member.name))
        where = f"{o}.{member.name}"
        flag = self.flag(dotted(there, member.name))
        ends = ", ".join(f"sizeof({o}.{m.name})" for m in union.members)
        self.say(f"BEYOND({flag}, &{where}, sizeof({where}), {len(union.members)}, {ends});")
        self.node(member.node, member.node, where, f"{n}.{member.name}", "", dotted(here, member.name), depth)

    def node(self, old: Node, new: Node, o: str, n: str, there: str, here: str, depth: int) -> None:
        match old, new:
            case (Number() | Names(), Number() | Names()):
                self.number(old, new, o, n, here)
            case Text(), Text():
                self.pair.carried += 1
                self.say(f"SAME({o}, {n}, {min(old.count, new.count)});")
                if old.count > new.count:
                    self.lost(o, new.count, old.count, here)
                else:
                    self.say(f"ZERO((char *)&{n} + {old.count}, {new.count - old.count});")
            case Address(), Address():
                self.pair.carried += 1
                self.say(f"EQUAL({o} == {n});")
            case Many(), Many():
                i = f"i{depth}"
                kept = min(old.count, new.count)
                self.say(f"for (int {i} = 0; {i} < {kept}; {i}++) {{")
                self.node(old.element, new.element, f"{o}[{i}]", f"{n}[{i}]", there + "[]", here + "[]", depth + 1)
                self.say("}")
                if old.count > new.count:
                    self.lost(o, new.count, old.count, here)
                self.rest(new, n, kept, depth)
            case _, Many():
                self.node(old, new.element, o, f"{n}[0]", there, here + "[0]", depth)
                self.rest(new, n, 1, depth)
            case Many(), _:
                if old.count > 1:
                    self.lost(o, 1, old.count, here)
                self.node(old.element, new, f"{o}[0]", n, there + "[0]", here, depth)
            case Group(union=True), Group(union=True):
                self.union(old, new, o, n, here)
            case Group(), Group():
                self.group(old, new, o, n, there, here, depth)
            case _, Group():
                (only,) = new.members
                self.node(old, only.node, o, f"{n}.{only.name}", there, dotted(here, only.name), depth)
            case _:
                raise AssertionError((old, new))

    def union(self, old: Group, new: Group, o: str, n: str, here: str) -> None:
        kept = {member.name for member in new.members}
        outer = here.rpartition(".")[0] if here.endswith("}") else here
        for member in old.members:
            if member.name in kept:
                self.pair.carried += 1
                self.say(f"SAME({o}.{member.name}, {n}.{member.name}, sizeof({n}.{member.name}));")
            else:
                self.pair.losses.add(dotted(outer, member.name))
        # Bytes of a member that is gone fit, or do not, by the size of what remains.
        before, after = (
            ", ".join(f"sizeof({e}.{m.name})" for m in made.members) for e, made in ((o, old), (n, new))
        )
        base = f"&{o}.{old.members[0].name}"
        most = f"MOST({len(new.members)}, {after})"
        self.say(f"BEYOND({self.flag(here)}, {base}, {most}, {len(old.members)}, {before});")

    def lost(self, o: str, first: int, count: int, path: str) -> None:
        self.pair.losses.add(path)
        self.say(f"LOST({self.flag(path)}, &{o}[{first}], {count - first} * sizeof({o}[0]));")

    def rest(self, new: Many, n: str, first: int, depth: int) -> None:
        if new.count > first:
            i = f"i{depth}"
            self.say(f"for (int {i} = {first}; {i} < {new.count}; {i}++) {{")
            self.fresh(new.element, f"{n}[{i}]", None, depth + 1)
            self.say("}")

    def number(self, old: Number | Names, new: Number | Names, o: str, n: str, path: str) -> None:
        self.pair.carried += 1
        (low, high), (new_low, new_high) = reach(old), reach(new)
        boolean = int(isinstance(new, Number) and new.boolean)
        width = new.bits or new.width
        if low < new_low or high > new_high:
            self.pair.losses.add(path)
        names, count = "0", -1
        if isinstance(old, Names) and isinstance(new, Names):
            before, after = dict(old.values), dict(new.values)
            if any(after.get(name) != number for name, number in before.items()):
                self.pair.losses.add(path)
                pairs = [(number, after[name]) for name, number in before.items() if name in after]
                names = "(long long[]){" + ", ".join(f"{was}LL, {now}LL" for was, now in pairs) + "}"
                count = len(pairs)
        network = isinstance(old, Number) and old.network
        source, target = (f"NET({e})" if network else e for e in (o, n))
        flag = self.flag(path)
        self.say(
            f"NUMBER({flag}, V({source}, {int(old.signed)}), V({target}, {int(new.signed)}), "
            f"{width}, {int(new.signed)}, {boolean}, ({names}), {count});"
        )

    def fresh(self, node: Node, n: str, default: int | None, depth: int) -> None:
        match node:
            case Number() | Names():
                self.pair.defaulted += 1
                self.say(f"EQUAL({n} == {literal(default or 0)});")
            case Text():
                self.say(f"ZERO(&{n}, sizeof({n}));")
            case Address():
                self.say(f"EQUAL(!{n});")
            case Many():
                self.rest(node, n, 0, depth)
            case Group(union=True):
                for member in node.members:
                    self.say(f"ZERO(&{n}.{member.name}, sizeof({n}.{member.name}));")
            case Group():
                for member in node.members:
                    self.fresh(member.node, dot(n, member.name), member.default, depth)


def literal(number: int) -> str:
    if -(1 << 63) < number < 1 << 63:
        return f"{number}LL"
    whole = number & (1 << 128) - 1
    return f"(__{'s' if number < 0 else 'u'}128)((__u128){whole >> 64}ULL << 64 | {whole & (1 << 64) - 1}ULL)"


def dot(expression: str, name: str) -> str:
    return f"{expression}.{name}" if name else expression


def label(member: Member) -> str:
    """The name that reports use; an anonymous union goes by what is in it."""
    if member.name or not isinstance(member.node, Group):
        return member.name
    return "{" + "|".join(inner.name for inner in member.node.members) + "}"


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def declare(node: Node, name: str, side: str, out: list[str]) -> str:
    """The declaration of ``name``; definitions that it needs first go to ``out``. ``side`` ends names that C would
    have to tell apart."""
    counts = ""
    while isinstance(node, Many):
        counts += f"[{node.count}]"
        node = node.element
    match node:
        case Number():
            spelled = node.ctype
        case Names():
            spelled = f"enum e{node.uid}{side}"
            values = ", ".join(f"{word}{side} = {number}LL" for word, number in node.values)
            text = f"{spelled} {{ {values} }};"
            if text not in out:
                out.append(text)
        case Text():
            spelled, counts = "char", f"{counts}[{node.count}]"
        case Address():
            return f"void *{name}{counts}"
        case Group():
            spelled = body(node, side, out, tag=bool(name))
    bits = f":{node.bits}" if isinstance(node, Number | Names) and node.bits else ""
    return f"{spelled} {name}{counts}{bits}".rstrip()


def body(made: Group, side: str, out: list[str], tag: bool = True) -> str:
    lines = []
    for index, member in enumerate(made.members):
        if made.apart[0] == index and made.apart[1] > index:
            lines.append("struct {")
        tags = ""
        if member.src is not None and member.src.name and member.name and member.name != member.src.name:
            tags += f' TAG("hitless:was={member.src.name}")'
        if member.default is not None:
            tags += f' TAG("hitless:default={member.default}")'
        lines.append(f"{member.gap}{declare(member.node, member.name, side, out)}{tags};")
        if made.apart[1] == index + 1 and made.apart[0] <= index:
            lines.append(f"}}{PACKED if made.packed else ''};")
    keyword = "union" if made.union else "struct"
    packed = PACKED if made.packed else ""
    inner = " ".join(lines)
    if not tag:
        return f"{keyword} {{ {inner} }}{packed}"
    out.append(f"{keyword} s{made.uid}{side} {{ {inner} }}{packed};")
    return f"{keyword} s{made.uid}{side}"


PACKED = " __attribute__((packed))"


def assignments(node: Node, o: str, depth: int = 0) -> Iterator[str]:
    """C that gives every field of a record a random value."""
    match node:
        case Number():
            yield f"{o} = {'any() & 1' if node.boolean else 'anywide()' if node.width == 128 else 'any()'};"
        case Names():
            choices = "".join(f"case {i}: {o} = {number}LL; break; " for i, (_, number) in enumerate(node.values))
            yield f"switch (any() % {len(node.values) + 1}) {{ {choices}default: {o} = any(); }}"
        case Text():
            yield f"text((char *)&{o}, {node.count});"
        case Address():
            yield f"{o} = (void *)any();"
        case Many():
            i = f"i{depth}"
            yield f"for (int {i} = 0; {i} < {node.count}; {i}++) {{"
            yield from assignments(node.element, f"{o}[{i}]", depth + 1)
            yield "}"
        case Group(union=True):
            for member in node.members:
                yield f"noise(&{o}.{member.name}, sizeof({o}.{member.name}));"
        case Group():
            for member in node.members:
                yield from assignments(member.node, dot(o, member.name), depth)
