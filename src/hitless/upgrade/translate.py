"""How entries of one layout become entries of another: by what the types tell, or by functions of the user's.

A :class:`Translation` is used row by row on arrays of bytes; it knows nothing of maps in the kernel.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.errors import ConverterError, LayoutError
from hitless.layout.conversion import Conversion, Converted, Misfit, Records
from hitless.layout.diff import MapDiff, draft, same
from hitless.layout.model import MapSpec, Order, Type
from hitless.layout.rules import MapRules, OnCollision, bind_old
from hitless.layout.structured import convert, select

__all__ = ["Steps", "Translation"]

_TRACE_LINES = 8


class _Step(Protocol):
    """One side of an entry on its way: ``records`` of ``keys``, with ``onto`` as in :meth:`Conversion.apply`."""

    def apply(self, keys: Records, records: Records, onto: Records | None = None) -> Converted:
        """The converted records."""


class _ByTypes:
    """What the types tell; ``conversion`` None leaves the bytes as they are."""

    def __init__(self, conversion: Conversion | None) -> None:
        self.conversion = conversion

    def apply(self, keys: Records, records: Records, onto: Records | None = None) -> Converted:
        return Converted(records, ()) if self.conversion is None else self.conversion.apply(records, onto)


class _ByFunction:
    """What a function of the user's makes of the types' draft; ``key`` is the type of the keys it wants to see."""

    def __init__(
        self, function: Callable[..., object], what: Mapping[str, str], key: Type | None, old: Type, new: Type,
        drafted: Conversion, order: Order, selects: bool = False,
    ) -> None:  # fmt: skip
        self._selects = selects
        self._function = function
        self._what = what
        self._key = key
        self._old = old
        self._new = new
        self._draft = drafted
        self._order = order

    def apply(self, keys: Records, records: Records, onto: Records | None = None) -> Converted:
        if not len(records):
            return Converted(np.zeros((0, self._new.size), np.uint8), ())
        drafted = self._draft.apply(records, onto)
        made, taken = self._call(keys, records, drafted.records)
        # An entry that changes later is converted again, by itself, and must come out the same.
        one = slice(len(records) // 2, len(records) // 2 + 1)
        alone, taken_alone = self._call(keys[one], records[one], drafted.records[one])
        if (alone != made[one]).any() or (taken_alone != taken[one]).any():
            raise ConverterError(
                f"map {self._what['map']}: {self._what['function']} gave one result for the entry with key "
                f"{keys[one].tobytes().hex()} among {len(records)}, and another for it alone: the result for an entry "
                "may depend on nothing but the entry",
                **self._what, returned=None, traceback=None,
            )  # fmt: skip
        return Converted(made, tuple(misfit for misfit in drafted.misfits if self._left(misfit, drafted.records, made)))

    def taken(self, keys: Records, records: Records) -> npt.NDArray[np.bool_]:
        """Which of these entries the function takes."""
        if not len(records):
            return np.zeros(0, np.bool_)
        return self._call(keys, records, self._draft.apply(records).records)[1]

    def _left(self, misfit: Misfit, drafted: Records, made: Records) -> bool:
        """Whether the function left a field, of which the types say that it does not fit, as they had drafted it."""
        moves = tuple(move for move in self._draft.moves if move.path == misfit.path)
        alone = msgspec.structs.replace(self._draft, moves=moves, defaults=(), cuts=())
        blank = np.zeros((1, self._old.size), np.uint8)
        low, high = (alone.apply(blank, np.full((1, self._new.size), fill, np.uint8)).records for fill in (0, 255))
        field, rows = (low == high)[0], list(misfit.first)
        return bool((made[rows][:, field] == drafted[rows][:, field]).all(axis=1).any() and field.any())

    def _call(
        self, keys: Records, records: Records, drafted: Records
    ) -> tuple[Records, npt.NDArray[np.bool_]]:
        given = [(self._key, keys)] if self._key is not None else []
        what = f"map {self._what['map']}: {self._what['function']}"
        try:
            if not self._selects:
                made = convert(self._function, [*given, (self._old, records)], self._new, drafted, self._order)
                return made, np.ones(len(records), np.bool_)
            return select(self._function, [*given, (self._old, records)], self._new, drafted, self._order)
        except LayoutError as error:
            if "returned" not in error.facts:
                raise
            facts = {**self._what, "returned": str(error.facts["returned"])}
            raise ConverterError(f"{what}: {error.message}", **facts, traceback=None) from None


class _Code:
    """The user's module, run once: by :meth:`load`, or when its first function is called."""

    def __init__(self, map_name: str, convert: str, source: str) -> None:
        self._map = map_name
        self._convert = convert
        self._module = convert.partition(":")[0]
        self._source = source
        self._file = f"<hitless {map_name}>/{self._module}.py"
        self._names: dict[str, object] | None = None

    def function(self, name: str) -> Callable[..., object]:
        """A function that runs ``module:name``; whatever that raises is a ConverterError."""

        def run(*arguments: object) -> object:
            found = self.load().get(name.partition(":")[2])
            if not callable(found):
                raise self._failed(name, "is no function after its module was run", None)
            return self._guarded(name, lambda: found(*arguments))

        return run

    def load(self) -> dict[str, object]:
        """The names in the module, which is run for that once."""
        if self._names is None:
            linecache.cache[self._file] = (len(self._source), None, self._source.splitlines(True), self._file)
            names: dict[str, object] = {"__name__": self._module, "__file__": self._file}
            self._guarded(self._convert, lambda: exec(compile(self._source, self._file, "exec"), names))
            self._names = names
        return self._names

    def _guarded(self, name: str, action: Callable[[], object]) -> object:
        try:
            return action()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's code may raise anything
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if PurePath(frame.filename) == PurePath(self._file)] or frames[-1:]
            lines = [*traceback.format_list(own), *traceback.format_exception_only(error)]
            text = "".join(lines).rstrip()
            raise self._failed(name, f"raised {type(error).__name__}: {error}", text) from None

    def _failed(self, name: str, why: str, trace: str | None) -> ConverterError:
        shown = "".join(f"\n  {line}" for line in (trace or "").splitlines()[:_TRACE_LINES])
        return ConverterError(
            f"map {self._map}: {name} {why}{shown}", map=self._map, function=name, returned=None, traceback=trace
        )


class Steps(NamedTuple):
    """From one release's entries to the other's; None where there is no way."""

    key: _Step | None
    value: _Step | None


class Translation:
    """How one map's entries are translated, there and back; keys and values are rows of bytes, one entry each.

    ``kernel``: types alone tell it, without a possible misfit, so that generated BPF code can do the same.
    ``on_collision`` is the rule where two keys may become one, else None.
    """

    def __init__(
        self, name: str, there: Steps, back: Steps, on_collision: OnCollision | None = None, kernel: bool = False,
        code: _Code | None = None, turned: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.on_collision = on_collision
        self.kernel = kernel
        self._there = there
        self._back = back
        self._code = code
        self._turned = turned

    @classmethod
    def of(
        cls, old: MapSpec, new: MapSpec, diff: MapDiff, rules: MapRules, code: str = "", split: bool = False
    ) -> Translation:
        """The translation from ``old`` to ``new``; ``code`` is the source of the module that ``rules.convert`` names.

        ``split``: the old map has other heirs too, and a function may say which entries are this one's.

        Raises LayoutError for types that are not known.
        """
        if rules.convert is None:
            folds = diff.key_change == "folds"
            there = Steps(_ByTypes(diff.key), _ByTypes(diff.value))
            back = Steps(None if folds else _inverse(diff.key), None if folds else _inverse(diff.value))
            exact = all(conversion is None or conversion.exact for conversion in (diff.key, diff.value))
            return cls(new.name, there, back, (rules.on_collision or "error") if folds else None, exact and not folds)
        old = bind_old(old, rules)
        assert old.key is not None and old.value is not None and new.key is not None and new.value is not None
        drafted_key, drafted_value = draft(old, new, rules)
        module = _Code(new.name, rules.convert, code)

        def step(
            suffix: str, key: Type | None, one: Type, other: Type, drafted: Conversion, selects: bool = False
        ) -> _Step | None:
            name = rules.function(suffix)
            if name is None:
                return None
            what = {"map": new.name, "function": name}
            return _ByFunction(module.function(name), what, key, one, other, drafted, new.order, selects)

        value = step("", old.key, old.value, new.value, drafted_value, split)
        # What a rollback splits again is selected by the function back; until then it is asked for values alone.
        folded = rules.apart and not split
        value_back = step("_back", new.key, new.value, old.value, drafted_value.inverse(), folded)
        key = step("_key", None, old.key, new.key, drafted_key)
        key_back = step("_key_back", None, new.key, old.key, drafted_key.inverse())
        if key is None:
            plain = None if same(old.key, new.key) else drafted_key
            key, key_back = _ByTypes(plain), None if diff.key_change == "folds" else _inverse(plain)
        on_collision = (rules.on_collision or "error") if key_back is None else None
        return cls(new.name, Steps(key, value), Steps(key_back, value_back), on_collision, code=module)

    def load(self) -> None:
        """Run the user's module, if there is one, which else the first entry does. Raises ConverterError."""
        if self._code is not None:
            self._code.load()

    @property
    def by_types(self) -> bool:
        """Whether no function of the user's has a part in it."""
        return self._code is None

    @property
    def conversions(self) -> tuple[Conversion | None, Conversion | None]:
        """Those of key and value, where they are :attr:`by_types`; None leaves the bytes as they are."""
        key, value = self._there
        assert isinstance(key, _ByTypes) and isinstance(value, _ByTypes)
        return key.conversion, value.conversion

    @property
    def finds_old(self) -> bool:
        """Whether the old key can be told from the new one."""
        return self._back.key is not None

    @property
    def goes_back(self) -> bool:
        """Whether entries of the new release can become entries of the old one."""
        return self._back.key is not None and self._back.value is not None

    def reversed(self) -> Translation:
        """The same with the sides changed, where it :attr:`goes_back`."""
        assert self.goes_back
        return Translation(self.name, self._back, self._there, kernel=self.kernel, code=self._code, turned=True)

    def keys(self, old: Records) -> Records:
        """Keys of the new release. Raises ConverterError, as all others do, where a function of the user's fails."""
        return self.keys_and_misfits(old).records

    def keys_and_misfits(self, old: Records) -> Converted:
        """The same, with what did not fit."""
        assert self._there.key is not None
        made = self._there.key.apply(old, old)
        if isinstance(self._there.key, _ByFunction) and self._back.key is not None:
            wrong = np.flatnonzero(~self._comes_back(old, made.records))
            if len(wrong):
                raise ConverterError(
                    f"map {self.name}: {len(wrong)} keys do not come back as they were from the function for keys and "
                    f"the one back, the first {old[wrong[0]].tobytes().hex()}: make one undo the other, or leave the "
                    "one back out",
                    map=self.name, key=old[wrong[0]].tobytes().hex(), count=len(wrong),
                )  # fmt: skip
        return made

    def values(self, keys: Records, old: Records, onto: Records | None = None) -> Converted:
        """Values of the new release, and what did not fit; ``keys`` are the old ones."""
        assert self._there.value is not None
        return self._there.value.apply(keys, old, onto)

    def taken(self, keys: Records, old: Records) -> npt.NDArray[np.bool_]:
        """Which of these entries go over, where the old map has other heirs too."""
        if isinstance(self._there.value, _ByFunction):
            return self._there.value.taken(keys, old)
        return np.ones(len(old), np.bool_)

    def shown(self, key: Records) -> str:
        """An old key, as errors tell it."""
        return key.tobytes().hex()

    def back_keys(self, new: Records) -> Records:
        """Keys of the old release, where it :attr:`finds_old`."""
        assert self._back.key is not None
        return self._back.key.apply(new, new).records

    def reversed_key(self, new: Records) -> Records | None:
        """The old key of one new key, None if the old release cannot hold it: it would be that of another entry."""
        old = self.back_keys(new)
        assert self._there.key is not None
        return old if (self._there.key.apply(old, old).records == new).all() else None

    def back_values(self, keys: Records, new: Records, onto: Records | None = None) -> Converted:
        """Values of the old release, where it :attr:`goes_back`; ``keys`` are the new ones.

        ``onto`` is what the old release holds there: fields that only it has stay.
        """
        assert self._back.value is not None
        return self._back.value.apply(keys, new, onto)

    def representable(self, old: Records) -> npt.NDArray[np.bool_]:
        """Which of these keys the new release can hold too; the others would become a different key.

        All, where keys may become one: then the rule for that holds. All, too, where a function of the user's tells the
        new key: one that it cannot tell is an error, except on the way back.
        """
        assert self._there.key is not None
        conversion = self._there.key.conversion if isinstance(self._there.key, _ByTypes) else None
        if isinstance(self._there.key, _ByTypes) and (conversion is None or conversion.exact):
            return np.ones(len(old), np.bool_)
        if self._back.key is None or (isinstance(self._there.key, _ByFunction) and not self._turned):
            return np.ones(len(old), np.bool_)
        return self._comes_back(old, self._there.key.apply(old, old).records)

    def _comes_back(self, old: Records, new: Records) -> npt.NDArray[np.bool_]:
        return np.asarray((self.back_keys(new) == old).all(axis=1), np.bool_)


def _inverse(conversion: Conversion | None) -> _ByTypes:
    return _ByTypes(conversion.inverse() if conversion else None)
