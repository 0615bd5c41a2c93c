"""The compiler is the oracle: what a conversion derived from BTF makes of records, native C reads and judges.

HITLESS_ORACLE_PAIRS says how many pairs of structs (100 if it is not set), HITLESS_ORACLE_SEED with which seed.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hitless.layout.diff import diff_map
from hitless.layout.elf import read_object
from hitless.layout.model import MapSpec
from tests.layout.generate import Group, Maker, Pair, assignments, body

KINDS = (
    "added", "removed", "moved", "renamed", "widened", "narrowed", "retyped", "resized", "nested", "enum-added",
    "enum-removed", "enum-changed",
)  # fmt: skip
BATCH = 100
ROWS = 24
MORE = "typedef unsigned __int128 __u128; typedef __int128 __s128; typedef __u64 __be64;\n"
JUDGE = Path(__file__).with_name("judge.c").read_text()


def bpf(groups: list[Group]) -> str:
    out = [MORE]
    for index, made in enumerate(groups):
        spelled = body(made, "", out)
        out.append(
            "struct { __uint(type, 1); __uint(max_entries, 4); __type(key, __u32);"
            f' __type(value, {spelled}); }} m{index} SEC(".maps");'
        )
    return "\n".join(out)


def native(pairs: list[Pair]) -> str:
    out = [JUDGE]
    fills, checks = [], []
    for pair in pairs:
        old, new = body(pair.old, "_o", out), body(pair.new, "_n", out)
        out.append(f"static void fill{pair.index}({old} *was) {{")
        out += assignments(pair.old, "o")
        out += ["}", f"static void check{pair.index}({old} *was, {new} *now) {{", *pair.lines, "}"]
        fills.append(
            f"{{ static {old} r; for (row = 0; row < {ROWS}; row++) {{ noise(&r, sizeof r); fill{pair.index}(&r);"
            " fwrite(&r, sizeof r, 1, stdout); } }"
        )
        checks.append(
            f"{{ static {old} a[{ROWS}]; static {new} b[{ROWS}]; pair = {pair.index}; memset(counts, 0, sizeof counts);"
            " if (fread(a, sizeof a, 1, stdin) != 1 || fread(b, sizeof b, 1, stdin) != 1) return 1;"
            f" for (row = 0; row < {ROWS}; row++) {{"
            f" memset(flags, 0, sizeof flags); check{pair.index}(a + row, b + row);"
            " for (int i = 0; i < 512; i++) counts[i] += flags[i]; }"
            ' for (int i = 0; i < 512; i++) if (counts[i]) printf("lost %d %d %ld\\n", pair, i, counts[i]); }'
        )
    out += [
        "int main(int argc, char **argv) { if (argc > 1) { state = atoll(argv[1]);", *fills, "return 0; }", *checks,
        'printf("checked %ld\\n", checked); return 0; }',
    ]  # fmt: skip
    return "\n".join(out)


def batches(count: int) -> Iterator[int]:
    for start in range(0, count, BATCH):
        yield min(BATCH, count - start)


def test_what_a_conversion_makes_of_records_is_what_c_would_have_assigned(
    compile_bpf: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = int(os.environ.get("HITLESS_ORACLE_PAIRS", "100"))
    seed = int(os.environ.get("HITLESS_ORACLE_SEED", "1"))
    tally: Counter[str] = Counter()
    for number, count in enumerate(batches(total)):
        run_batch(seed * 1_000_003 + number, count, compile_bpf, tmp_path, tally)
    kinds: Counter[str] = Counter({kind: tally.pop("kind " + kind) for kind in KINDS if tally["kind " + kind]})
    with capsys.disabled():
        print("\n" + ", ".join(f"{amount:,} {what}" for what, amount in tally.items() if amount))
        print("changes: " + ", ".join(f"{amount:,} {kind}" for kind, amount in kinds.most_common()))
    assert total < BATCH or len(kinds) == len(KINDS), f"never seen: {set(KINDS) - set(kinds)}"


def run_batch(
    seed: int, count: int, compile_bpf: Callable[..., bytes], folder: Path, tally: Counter[str]
) -> None:
    maker = Maker(seed)
    pairs = [maker.pair(index) for index in range(count)]
    sides = [
        {spec.name: spec for spec in read_object(compile_bpf(bpf(groups), *flags), "oracle.o").maps}
        for groups, flags in (([p.old for p in pairs], ("-w",)), ([p.new for p in pairs], ("-w",)))
    ]
    program, source = folder / "judge", native(pairs)
    built = subprocess.run(
        ["cc", "-w", "-O0", "-x", "c", "-o", str(program), "-"], input=source, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    filled = subprocess.run([str(program), str(seed)], capture_output=True, check=True, timeout=60).stdout
    handed, misfits = bytearray(), {}
    at = 0
    for pair in pairs:
        old, new = sides[0][f"m{pair.index}"], sides[1][f"m{pair.index}"]
        before = filled[at : at + ROWS * old.value_size]
        at += len(before)
        after, misfits[pair.index] = convert(pair, old, new, before, f"seed {seed} pair {pair.index}", tally)
        handed += before + after
    assert at == len(filled), "the compilers disagree about a size"
    said = subprocess.run([str(program)], input=bytes(handed), capture_output=True, check=True, timeout=60).stdout
    counted: dict[int, list[tuple[str, int]]] = {pair.index: [] for pair in pairs}
    for line in said.decode().splitlines():
        word, *numbers = line.split()
        if word == "bad":
            where, row, number = map(int, numbers)
            shown = source.splitlines()[number - 1]
            pytest.fail(f"seed {seed}, pair {where}, row {row}: {shown}\n{pairs[where].old}\n{pairs[where].new}")
        elif word == "lost":
            counted[int(numbers[0])].append((pairs[int(numbers[0])].flags[int(numbers[1])], int(numbers[2])))
        else:
            tally["pairs"] += count
            tally["fields carried"] += sum(pair.carried for pair in pairs)
            tally["fields defaulted"] += sum(pair.defaulted for pair in pairs)
            tally["changes that lose, named"] += sum(len(pair.losses) for pair in pairs)
            tally["values judged by C"] += int(numbers[0])
    for pair in pairs:
        assert sorted(misfits[pair.index]) == sorted(counted[pair.index]), f"seed {seed}, pair {pair.index}"
        tally["values that did not fit, counted"] += sum(number for _, number in counted[pair.index])


def convert(
    pair: Pair, old: MapSpec, new: MapSpec, before: bytes, where: str, tally: Counter[str]
) -> tuple[bytes, list[tuple[str, int]]]:
    diff = diff_map(old, new)
    assert diff.verdict in ("identical", "lossless", "lossy"), f"{where}: {diff.changes}"
    assert {change.path for change in diff.changes if change.loss} == pair.losses, f"{where}: {diff.changes}"
    assert (diff.verdict == "lossy") == bool(pair.losses), where
    tally.update(f"kind {change.kind}" for change in diff.changes)
    if diff.value is None:
        return before, []
    done = diff.value.apply(np.frombuffer(before, np.uint8).reshape(ROWS, -1))
    return done.records.tobytes(), [(misfit.path, misfit.count) for misfit in done.misfits]
