"""Each planted fault is found by name, from what was seen; and where nothing is wrong, nothing is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.index import IndexReport, MissingEngine
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.numerics import Numerics
from microserve.services.command.doctor.judging import judge
from microserve.services.command.doctor.observation import (
    AnswerSeen,
    CacheSeen,
    EngineSeen,
    GatewaySeen,
    HostSeen,
    LinkSeen,
    Observation,
    Place,
    Reach,
    RouterSeen,
)
from microserve.services.command.doctor.table import as_json, lines
from tests.support.index.index_world import make_info

FACTS = HostFacts(1e9, 40, 65_536, -1, 1 << 30, 1 << 29)
SHAPE = Geometry("bfloat16", "rows", 16, 30, 3, 64)
REPORT = IndexReport(1, 2, 0, 0, {}, host=FACTS)


def info(engine_id: str, **said: Any) -> EngineInfo:
    known = {"backend": "native", "backend_version": "0.2.0", "geometry": SHAPE, "heaps": ["shm"]}
    return make_info(engine_id, **{**known, **said})


def engine(engine_id: str, **said: Any) -> EngineSeen:
    about = info(engine_id, **said)
    places = [Place(what, f"tcp://h:{n}") for n, what in enumerate(("actions", "events", "replay"))]
    return EngineSeen(about, EngineLoad(), places, HostSeen(f"engine {engine_id}", FACTS, 0.001, 0.002))


LINKS = [LinkSeen("e1", "e2", "shm", 4 << 20, 0.3), LinkSeen("e2", "e1", "shm", 4 << 20, 0.004)]
ANSWERS = [
    AnswerSeen("cold", "e1", [5, 6]),
    AnswerSeen("cached", "e1", [5, 6], 32),
    AnswerSeen("transferred", "e2", [5, 6], 32),
]
WELL = Observation(
    Place("index", "tcp://h:9"),
    version="0.2.0",
    own=HostSeen("this host", FACTS),
    index_host=HostSeen("the index's host", FACTS, -0.002, 0.001),
    report=REPORT,
    engines=[engine("e1"), engine("e2")],
    routers=[RouterSeen("router", "0.2.0", HostSeen("router router", FACTS, 0.0, 0.001))],
    gateways=[GatewaySeen("http://h:80", Place("HTTP", "http://h:80"), "0.2.0")],
    links=LINKS,
    num_pairs=2,
    cache=CacheSeen(ANSWERS, is_exact=True),
)


def names(seen: Observation) -> list[str]:
    return [finding.name for finding in judge(seen)]


def missing(code: str, field: str = "", detail: str = "d", age_s: float = 2.0) -> Observation:
    absent = MissingEngine("e3", 7, "tcp://h:7", code, field, detail, age_s)
    return replace(WELL, report=msgspec.structs.replace(REPORT, missing=[absent]))


def with_first(**changes: Any) -> Observation:
    return replace(WELL, engines=[replace(WELL.engines[0], **changes), WELL.engines[1]])


def host(**facts: Any) -> Observation:
    return with_first(host=HostSeen("engine e1", msgspec.structs.replace(FACTS, **facts), 0.0, 0.0))


def gateway(**said: Any) -> Observation:
    return replace(WELL, gateways=[replace(WELL.gateways[0], **said)])


def unreached(what: str, reach: Reach) -> Observation:
    return with_first(
        places=[replace(p, reach=reach) if p.what == what else p for p in WELL.engines[0].places]
    )


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    assert judge(WELL) == []
    assert lines(WELL, [])[-1] == "nothing is wrong"


FAULTS: dict[str, list[Observation]] = {
    "wrong_key": [
        replace(WELL, index=Place("index", "tcp://h:9", Reach.NO_HANDSHAKE), report=None),
        replace(WELL, index=Place("index", "tcp://h:9", Reach.NO_HANDSHAKE), report=None, has_keys=False),
        unreached("events", Reach.NO_HANDSHAKE),
        replace(WELL, report=msgspec.structs.replace(REPORT, refused_keys={"k": 3.0})),
        missing("not_permitted", "curve_key"),
    ],
    "wrong_model": [
        replace(WELL, engines=[*WELL.engines, engine("e3", model="another")]),
        missing("invalid_request", "revision", "e3 has revision 'b', e1 has 'a'"),
    ],
    "other_block_size": [missing("invalid_request", "block_size")],
    "other_dtype": [missing("invalid_request", "dtype")],
    "port_closed": [
        unreached("actions", Reach.REFUSED),
        gateway(place=Place("HTTP", "http://h:80", Reach.REFUSED)),
        replace(WELL, index=Place("index", "tcp://h:9", Reach.REFUSED), report=None),
    ],
    "unreachable": [
        unreached("replay", Reach.SILENT),
        gateway(place=Place("HTTP", "http://h:80", Reach.SILENT)),
    ],
    "bad_address": [unreached("events", Reach.NO_ADDRESS)],
    "gateway_silent": [gateway(error="/ready answers 404 and is no gateway's")],
    "gateway_not_ready": [gateway(unready="none of its 1 routers answers it")],
    "clock_off": [
        with_first(host=HostSeen("engine e1", FACTS, 3600.0, 0.01)),
        replace(WELL, index_host=HostSeen("the index's host", FACTS, -3600.0, 0.01)),
        replace(WELL, routers=[RouterSeen("router", "", HostSeen("router router", FACTS, 3600.0, 0.01))]),
        gateway(host=HostSeen("gateway http://h:80", FACTS, -3600.0, 0.01)),
    ],
    "shm_full": [host(shm_free_nbytes=0), host(shm_free_nbytes=1 << 20)],
    "few_descriptors": [host(max_descriptors=256)],
    "slow_link": [replace(WELL, links=[LinkSeen("e1", "e2", "tcp", 4 << 20, 3.4), LINKS[1]])],
    "dead_engine": [missing("engine_lost", "", "fell silent")],
    "stuck_engine": [missing("engine_lost", "", "has work and makes no progress")],
    "two_engines_of_one_id": [missing("engine_lost", "incarnation", "life 7 of e3 has left or was replaced")],
    "heap_unreachable": [replace(WELL, links=[LinkSeen("e1", "e2", error="out of reach"), LINKS[1]])],
    "engine_silent": [with_first(error="e1 answered nothing")],
    "little_locked_memory": [
        replace(
            host(max_locked_nbytes=65_536),
            engines=[
                replace(host(max_locked_nbytes=65_536).engines[0], info=info("e1", heaps=["shm", "nixl"])),
                WELL.engines[1],
            ],
        )
    ],
    "versions_differ": [
        replace(WELL, version="0.3.0"),
        replace(WELL, routers=[RouterSeen("router", "0.1.0")]),
        gateway(version="0.1.0"),
    ],
    "no_engines": [replace(WELL, engines=[], links=[], cache=None)],
    "no_router": [replace(WELL, routers=[])],
    "index_silent": [replace(WELL, report=None)],
    "answers_differ": [
        replace(WELL, cache=CacheSeen([ANSWERS[0], ANSWERS[1], replace(ANSWERS[2], token_ids=[5, 7])], True))
    ],
    "no_cache_hit": [
        replace(WELL, cache=CacheSeen([ANSWERS[0], replace(ANSWERS[1], found_tokens=0), ANSWERS[2]], True))
    ],
    "probe_failed": [replace(WELL, cache=CacheSeen([AnswerSeen("cold", "e1", error="no")], True))],
}


@pytest.mark.parametrize(
    ("name", "seen"), [(name, seen) for name, each in FAULTS.items() for seen in each], ids=str
)
def test_each_fault_is_found_by_its_name_and_alone(name: str, seen: Observation) -> None:
    [finding] = judge(seen)

    assert finding.name == name
    assert finding.what and finding.where and finding.mend
    assert finding.name in "\n".join(lines(seen, [finding]))
    assert as_json(seen, [finding])["findings"][0]["name"] == name


def test_what_costs_answers_comes_first() -> None:
    both = replace(missing("engine_lost", "", "fell silent"), version="0.3.0")

    assert names(both) == ["dead_engine", "versions_differ"]
    assert [finding.is_error for finding in judge(both)] == [True, False]


def test_a_key_that_was_turned_away_long_ago_is_no_news() -> None:
    assert judge(replace(WELL, report=msgspec.structs.replace(REPORT, refused_keys={"k": 300.0}))) == []


def test_a_clock_is_judged_by_what_can_be_known_of_it() -> None:
    assert judge(with_first(host=HostSeen("engine e1", FACTS, 1.5, 2.0))) == []
    assert judge(with_first(host=HostSeen("engine e1", FACTS, None, 0.0))) == []


def test_a_slow_answer_of_little_kv_is_no_slow_link() -> None:
    assert judge(replace(WELL, links=[LinkSeen("e1", "e2", "shm", 50_000, 0.1), LINKS[1]])) == []


def test_other_tokens_are_a_warning_where_no_equal_bits_are_promised() -> None:
    other = [ANSWERS[0], ANSWERS[1], replace(ANSWERS[2], token_ids=[5, 7])]
    [finding] = judge(replace(WELL, cache=CacheSeen(other, is_exact=False)))

    assert (finding.name, finding.is_error) == ("answers_differ", False)


def test_engines_that_exchange_no_kv_need_not_agree_in_blocks() -> None:
    plain = engine("e3", can=[], block_size=32, layout_hash="x", numerics=Numerics("loose"))

    assert judge(replace(WELL, engines=[*WELL.engines, plain])) == []
