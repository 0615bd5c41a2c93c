"""What several sources say becomes one set of services: who wins, what is left out and why, what is news."""

from __future__ import annotations

import ipaddress

import msgspec

from meshd.model import Backend, Config, Policy, Service
from meshd.registry import LIVE, Frontend, News, Registry
from meshd.releases import RELEASES

SMALL = msgspec.structs.replace(RELEASES[3], services=2)


def service(name: str, address: str = "10.0.0.1", port: int = 80, backends: int = 1) -> Service:
    there = tuple(Backend(ipaddress.ip_address("10.1.0.1"), 1 + number) for number in range(backends))
    return Service(name, ipaddress.ip_address(address), port, "tcp", there)


WEB, DB = service("web"), service("db", port=5432)


def registry() -> Registry:
    return Registry(["file", "cluster"], RELEASES[3])


def test_news_are_told_once() -> None:
    heard = registry()
    heard.replace("file", Config((WEB, DB)))
    assert heard.take_news().services == {Frontend.of(WEB): WEB, Frontend.of(DB): DB}
    assert not heard.take_news()
    heard.replace("file", Config((WEB, DB)))
    assert not heard.has_news


def test_what_a_source_no_longer_says_is_gone() -> None:
    heard = registry()
    heard.replace("file", Config((WEB, DB)))
    heard.take_news()
    heard.replace("file", Config((DB,)))
    assert heard.take_news() == News({Frontend.of(WEB): None}, ())


def test_the_first_source_has_an_address_that_two_claim_and_the_other_comes_after_it() -> None:
    heard = registry()
    theirs = service("shop.web.http", backends=2)
    heard.replace("cluster", Config((theirs,)))
    heard.replace("file", Config((WEB,)))
    assert heard.take_news().services == {Frontend.of(WEB): WEB}
    assert heard.problems() == [
        "cluster: service shop.web.http is left out: 10.0.0.1 port 80 (tcp) is web's already"
    ]
    heard.update("file", {"web": None})
    assert heard.take_news().services == {Frontend.of(WEB): theirs}
    assert heard.problems() == []


def test_what_the_release_cannot_have_is_left_out_by_name_and_the_rest_is_served() -> None:
    heard = registry()
    heard.replace("cluster", Config((msgspec.structs.replace(service("big"), protocol="udp"), DB)))
    assert list(heard.take_news().services.values()) == [DB]
    assert heard.problems() == ["cluster: service big is left out: release 3.0.0 does not serve udp"]


def test_of_more_backends_than_the_release_holds_the_healthy_ones_are_served() -> None:
    heard = registry()
    big = service("big", backends=20)
    sick = tuple(msgspec.structs.replace(one, healthy=one.port > 3) for one in big.backends)
    heard.replace("cluster", Config((msgspec.structs.replace(big, backends=sick),)))
    (told,) = heard.take_news().services.values()
    assert told is not None
    assert [one.port for one in told.backends] == list(range(4, 20))
    assert heard.problems() == [
        "cluster: service big has 16 of 20 backends: release 3.0.0 holds no more for one service"
    ]


def test_while_the_release_before_runs_no_service_has_more_backends_than_that_holds() -> None:
    heard = registry()
    heard.bound(8)
    heard.replace("cluster", Config((service("big", backends=12), DB)))
    assert [len(one.backends) for one in heard.take_news().services.values() if one] == [8, 1]
    heard.bound(None)
    assert heard.has_news
    assert [len(one.backends) for one in heard.take_news().services.values() if one] == [12]
    assert heard.problems() == []


def test_a_service_that_finds_no_room_comes_when_another_goes() -> None:
    heard = Registry(["file"], SMALL)
    many = [service(f"s{number}", port=1 + number) for number in range(3)]
    heard.replace("file", Config(tuple(many)))
    assert list(heard.take_news().services.values()) == many[:2]
    assert heard.problems() == ["file: service s2 is left out: release 3.0.0 holds 2 services at most"]
    heard.update("file", {"s0": None})
    assert heard.take_news().services == {Frontend.of(many[0]): None, Frontend.of(many[2]): many[2]}


def test_a_service_that_grows_beyond_the_room_of_all_stays_as_it_was_until_there_is_room() -> None:
    heard = Registry(["file"], msgspec.structs.replace(RELEASES[4], all_backends=5))
    small, other, large = service("a", backends=2), service("b", port=81, backends=2), service("a", backends=4)
    heard.replace("file", Config((small, other)))
    heard.take_news()
    heard.update("file", {"a": large})
    assert heard.take_news().services == {}
    full = "release 4.0.0 holds 5 backends at most, over all services"
    assert heard.problems() == [f"file: service a is left out: {full}"]
    assert heard.all().services[Frontend.of(small)] == small, "what was in force is"
    heard.update("file", {"b": None})
    assert heard.take_news().services == {Frontend.of(other): None, Frontend.of(large): large}
    assert heard.problems() == []


def test_a_policy_follows_the_service_that_it_names_to_another_address_and_source() -> None:
    heard = registry()
    policy = Policy("deny", "web")
    heard.replace("file", Config((), (policy,)))
    assert heard.take_news().policies == ()
    heard.replace("cluster", Config((WEB,)))
    assert heard.take_news().policies == ((policy, Frontend.of(WEB)),)
    moved = service("web", "10.0.0.2")
    heard.update("cluster", {"web": moved})
    assert heard.take_news().policies == ((policy, Frontend.of(moved)),)


def test_a_policy_follows_its_service_when_two_exchange_their_addresses() -> None:
    heard = registry()
    policy = Policy("deny", "web")
    for web, db in (("10.0.0.2", "10.0.0.1"), ("10.0.0.1", "10.0.0.2")):
        heard.replace("file", Config((service("web", web), service("db", db)), (policy,)))
        assert heard.take_news().policies == ((policy, Frontend.of(service("web", web))),)


def test_a_policy_is_for_all_services_of_its_name_and_stays_for_one_when_another_goes() -> None:
    heard = registry()
    policy = Policy("deny", "web")
    other = service("web", "10.0.0.2")
    heard.replace("cluster", Config((other,)))
    heard.replace("file", Config((WEB,), (policy,)))
    assert heard.take_news().policies == ((policy, Frontend.of(WEB)), (policy, Frontend.of(other)))
    heard.update("file", {"web": None})
    assert heard.take_news().policies == ((policy, Frontend.of(other)),)


def test_a_policy_that_is_live_holds_until_whoever_may_name_its_service_was_heard() -> None:
    heard = Registry(["file", "kubernetes", "xds"], RELEASES[3])
    live, named = Policy("deny", "10.0.0.1.80.tcp", source=7), Policy("deny", "shop.web.http", source=7)
    heard.replace(LIVE, Config((service("10.0.0.1.80.tcp"),), (live,)))
    heard.replace("file", Config((), (named,)))
    heard.replace("xds", Config((service("shop.web.80"),)))
    assert heard.take_news().policies == ((live, Frontend.of(WEB)),)
    heard.replace("kubernetes", Config((service("shop.web.http"),)))
    assert heard.take_news().policies == ((named, Frontend.of(WEB)),)


def test_a_policy_that_is_live_is_not_kept_for_a_service_of_the_file_which_has_its_own_policies() -> None:
    heard = registry()
    heard.replace(LIVE, Config((service("10.0.0.1.80.tcp"),), (Policy("deny", "10.0.0.1.80.tcp"),)))
    heard.replace("file", Config((WEB,)))
    assert heard.take_news().policies == ()


def test_a_policy_for_a_service_that_nobody_has_is_named_once_all_were_heard() -> None:
    heard = registry()
    heard.replace("file", Config((), (Policy("deny", "shop.wbe.http"),)))
    heard.take_news()
    assert heard.problems() == []
    heard.replace("cluster", Config((service("shop.web.http"),)))
    heard.take_news()
    (problem,) = heard.problems()
    assert problem == "file: a policy to deny shop.wbe.http has no effect: no service in force has this name"


def test_a_change_of_backends_is_no_news_of_policies() -> None:
    heard = registry()
    heard.replace("file", Config((WEB,), (Policy("deny", "web"),)))
    heard.take_news()
    heard.update("file", {"web": service("web", backends=3)})
    assert heard.take_news().policies is None


def test_what_is_live_serves_only_where_nobody_else_says_anything() -> None:
    heard = registry()
    recalled = service("10.0.0.1.80.tcp", backends=2)
    heard.replace(LIVE, Config((recalled, DB), (Policy("deny", recalled.name), Policy("deny", "db"))))
    heard.replace("file", Config((), (Policy("deny", "web", source=7),)))
    news = heard.take_news()
    assert news.services == {Frontend.of(WEB): recalled, Frontend.of(DB): DB}
    assert news.policies is not None
    assert [where for _, where in news.policies] == [Frontend.of(WEB), Frontend.of(DB)]
    heard.update("cluster", {"web": WEB})
    news = heard.take_news()
    assert news.services == {Frontend.of(WEB): WEB}
    ours = (Policy("deny", "web", source=7), Frontend.of(WEB))
    assert news.policies == (ours, (Policy("deny", "db"), Frontend.of(DB)))
    assert heard.problems() == []
    heard.replace(LIVE, Config(()))
    assert heard.take_news().services == {Frontend.of(DB): None}
