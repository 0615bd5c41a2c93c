"""Maps whose entries refer to each other are carried together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

import hitless
from hitless.compare import compare
from hitless.groups import torn
from hitless.kernel.maps import Map
from tests.upgrade.conftest import Make, everything

TALLY = "struct tally { __u64 count; };\nMAP(tally, HASH, 64, __u32, struct tally);\n"
USERS = "struct user {{ {user} }};\nMAP(users, HASH, 64, __u32, struct user){tag};\n"
SESSIONS = "struct session {{ {session} }};\nMAP(sessions, HASH, 64, __u32, struct session){tag};\n"
TAG = ' TAG("group=auth")'
GROUP = '[map.users]\ngroup = "auth"\n[map.sessions]\ngroup = "auth"\n'


def release(user: str = "__u32 id;", session: str = "__u32 user;", tag: str = "") -> str:
    return TALLY + USERS.format(user=user, tag=tag) + SESSIONS.format(session=session, tag=tag)


def filled(node: hitless.Node, bundle: hitless.Bundle) -> None:
    hitless.apply(node, bundle)
    node.map("users")[1] = {"id": 1}
    node.map("sessions")[7] = {"user": 1}
    node.map("tally")[0] = {"count": 5}


def actions(plan: hitless.Plan) -> dict[str, str]:
    return {entry.name: entry.action for entry in plan.maps}


@pytest.mark.parametrize(("tag", "rules"), [("", GROUP), (TAG, "")])
def test_a_map_that_could_be_kept_is_discarded_with_its_group(
    node: hitless.Node, build: Make, tag: str, rules: str
) -> None:
    filled(node, build("1.0", release(tag=tag)))
    before = everything(node)
    second = build("2.0", release("char id[8];", tag=tag), rules)  # text for a number: nobody can convert that
    planned = hitless.plan(node, second)
    assert actions(planned) == {"tally": "keep", "users": "discard", "sessions": "discard"}
    assert [entry.name for entry in planned.blocked] == ["users", "sessions"]
    (sessions,) = (entry for entry in planned.maps if entry.name == "sessions")
    assert sessions.loss[0].startswith(
        "all entries: the group auth is carried as a whole or not at all, and users is not"
    )
    with pytest.raises(hitless.LossNotAllowedError) as caught:
        hitless.apply(node, second, allow_loss=["users"])
    assert caught.value.facts["maps"] == ["sessions"]
    assert everything(node) == before
    hitless.apply(node, second, allow_loss=["users", "sessions"])
    assert node.map("sessions").items() == node.map("users").items() == []
    assert node.map("tally").get(0) == {"count": 5}


def test_a_map_to_be_converted_is_discarded_with_its_group(node: hitless.Node, build: Make) -> None:
    filled(node, build("1.0", release()))
    planned = hitless.plan(node, build("2.0", release("char id[8];", "__u64 user;"), GROUP))
    (sessions,) = (entry for entry in planned.maps if entry.name == "sessions")
    assert (sessions.action, sessions.method, sessions.kind, sessions.verdict) == ("discard", "empty", "", "lossless")


def test_a_map_that_the_release_drops_takes_its_group_with_it(node: hitless.Node, build: Make) -> None:
    filled(node, build("1.0", release(tag=TAG)))
    second = build("2.0", TALLY + SESSIONS.format(session="__u32 user;", tag=TAG))
    assert actions(hitless.plan(node, second)) == {"tally": "keep", "sessions": "discard", "users": "drop"}


def test_a_group_that_is_carried_whole_is_carried(node: hitless.Node, build: Make) -> None:
    filled(node, build("1.0", release()))
    sessions = Map.open(node.root / "maps" / "sessions").info.id
    more = "MAP(extra, HASH, 64, __u32, __u64);\n"  # a map that joins the group brings nothing that could be missing
    second = build("2.0", release("__u64 id;") + more, GROUP + '[map.extra]\ngroup = "auth"\n')
    planned = hitless.apply(node, second)
    assert {entry.name: entry.action for entry in planned.maps}["users"] == "convert"
    assert node.map("users").get(1) == {"id": 1}
    assert Map.open(node.root / "maps" / "sessions").info.id == sessions


def test_check_says_the_same(build: Make, tmp_path: Path) -> None:
    build("1.0", release())
    build("2.0", release("char id[8];"), GROUP)
    compared = compare(str(tmp_path / "1.0"), str(tmp_path / "2.0"))
    assert [item.name for item in compared.lost] == ["users", "sessions"]
    assert "the group auth is carried as a whole or not at all, and users is not" in compared.lost[1].losses[0]
    allowed = compare(str(tmp_path / "1.0"), str(tmp_path / "2.0"), allow_loss=["users", "sessions"])
    assert not allowed.lost


def test_a_manifest_that_names_another_group_than_the_source_is_refused(build: Make) -> None:
    with pytest.raises(hitless.BundleError, match=r"toml:\d+: .*group = other, but the tag in the source says"):
        build("2.0", release(tag=TAG), '[map.users]\ngroup = "other"\n')


def test_groups_do_not_touch_each_other() -> None:
    groups = {"a": "one", "b": "one", "c": "two", "d": None}
    assert set(torn(groups, {"a": "why"})) == {"b"}
    assert set(torn(groups, {"a": "why", "c": "why", "d": "why"})) == {"b"}
    assert torn(groups, {}) == {}
