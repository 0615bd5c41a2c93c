"""Each kind of change that real releases made, from objects to entries, by the real kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.demo.lab import Lab
from tests.catalogue.changes import CHANGES, Kind
from tests.catalogue.run import compiled, run, table

Objects = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """Old and new object of each kind."""
    return compiled(tmp_path_factory.mktemp("catalogue"), (kind.source for kind in CHANGES))


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[kind.change.replace(" ", "-") for kind in CHANGES])
def test_a_kind_of_change_is_carried_or_refused_as_the_catalogue_says(
    number: int, module_lab: Lab, objects: Objects
) -> None:
    outcome = run(CHANGES[number], number, module_lab, objects)
    assert outcome.problem is None
    assert CHANGES[number].change in table([outcome])


def test_every_source_is_in_the_catalogue() -> None:
    sources = {path.name.removesuffix(".bpf.c") for path in Path(__file__).parent.glob("*.bpf.c")}
    assert sources == {kind.source for kind in CHANGES}


def test_an_entry_that_is_not_as_it_should_be_is_a_problem(module_lab: Lab, objects: Objects) -> None:
    wrong = Kind("field appended", "appended", "lossless", {"m": {1: {"a": 7}}}, {"m": {1: {"a": 7, "b": 1}}})
    problem = run(wrong, len(CHANGES), module_lab, objects).problem
    assert problem is not None and "'b': 0" in problem
