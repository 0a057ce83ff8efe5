"""What the index says of engines, and a quarter of an hour of it."""

from __future__ import annotations

import msgspec
import pytest

from microserve.gateway.view.history import INTERVAL_S, KEPT_S, MAX_ENGINES, NUM_SAMPLES, History
from microserve.gateway.view.mesh import Mesh, heap_between, host_of, load_form
from microserve.protocol.messages.check import PairCheck, Suspect
from microserve.protocol.messages.engine import EngineLoad, LinkGoodput
from microserve.protocol.messages.index import Member, Members, MissingEngine
from microserve.protocol.messages.strategy.control import EngineLabels
from tests.support.gateway.view_forms import load_form as load
from tests.support.index.index_world import make_info

pytestmark = pytest.mark.quick


def members(*engines: tuple[str, EngineLoad], version: int = 1, life: int = 7) -> Members:
    return Members(life, version, [Member(make_info(name), said) for name, said in engines])


def test_blocks_are_told_by_what_they_are_for() -> None:
    info = make_info("e", num_blocks=100)
    said = load_form(info, EngineLoad(free_blocks=60, cached_blocks=25, quarantined_blocks=10, num_grants=2))
    assert (said.used_blocks, said.cached_blocks, said.free_blocks) == (30, 25, 35)
    assert (said.quarantined_blocks, said.grants) == (10, 2)
    assert load_form(info, EngineLoad(free_blocks=1, cached_blocks=9)).free_blocks == 0


def test_time_is_told_by_what_it_went_to() -> None:
    """An engine of vLLM's does not say its prefill: it is what is left. One of before says nothing at all."""
    info = make_info("e")
    said = load_form(info, EngineLoad(prefill_share=0.5, decode_share=0.25, idle_share=0.25))
    assert (said.prefill_share, said.decode_share, said.transfer_share, said.idle_share) == (
        0.5,
        0.25,
        0,
        0.25,
    )
    assert load_form(info, EngineLoad(decode_share=0.25, idle_share=0.5)).prefill_share == 0.25
    assert load_form(info, EngineLoad()).prefill_share == 0.0
    said = load_form(info, EngineLoad(granted_blocks=7, oldest_lease_s=1.5))
    assert (said.granted_blocks, said.oldest_lease_s) == (7, 1.5)


def test_members_come_and_go_and_the_missing_are_shown() -> None:
    mesh = Mesh(0.0, silence_s=5.0)
    assert (mesh.engines(), mesh.is_index_alive(0.0)) == ([], False)
    mesh.take_members(members(("b", EngineLoad()), ("a", EngineLoad(draining=True))), 1.0)
    mesh.take_missing(
        [
            MissingEngine("b", 1, "tcp://h:1", "engine_lost"),
            MissingEngine("c", 1, "tcp://h:2", "engine_lost", detail="it fell silent"),
            MissingEngine("d", 1, "tcp://h:3", "mismatch", "block_size", "16 and 32"),
        ]
    )
    mesh.take_labels([EngineLabels("b", ["decode"])])
    shown = [(each.id, each.state, each.detail) for each in mesh.engines()]
    assert shown == [
        ("a", "draining", ""),
        ("b", "ready", ""),
        ("c", "lost", "it fell silent"),
        ("d", "refused", "block_size: 16 and 32"),
    ]
    assert mesh.engines()[1].labels == ["decode"]
    assert mesh.is_index_alive(6.0) and not mesh.is_index_alive(6.1)
    assert [each.id for each in mesh.engines()] == ["a", "b", "c", "d"], "silence is no news of engines"


def test_an_older_list_of_the_same_life_changes_nothing() -> None:
    mesh = Mesh(0.0, silence_s=5.0)
    mesh.take_members(members(("a", EngineLoad()), version=5), 1.0)
    mesh.take_members(members(("b", EngineLoad()), version=4), 2.0)
    assert [each.id for each in mesh.engines()] == ["a"]
    mesh.take_members(members(("b", EngineLoad()), version=1, life=8), 3.0)
    assert [each.id for each in mesh.engines()] == ["b"]


def test_a_pair_has_the_first_heap_that_both_have() -> None:
    source, target = make_info("a", heaps=["tcp", "shm"]), make_info("b", heaps=["shm", "tcp"])
    assert (heap_between(source, target), heap_between(target, source)) == ("shm", "tcp")
    assert heap_between(make_info("a", heaps=["shm"]), make_info("b", heaps=["tcp"])) == ""
    mesh = Mesh(0.0, silence_s=5.0)
    mesh.take_members(Members(7, 1, [Member(each, EngineLoad()) for each in (source, target)]), 1.0)
    assert [(each.source, each.target, each.heap) for each in mesh.pairs()] == [
        ("a", "b", "shm"),
        ("b", "a", "tcp"),
    ]


def test_a_pair_has_the_rate_that_its_sender_reports() -> None:
    mesh = Mesh(0.0, silence_s=5.0)
    load = EngineLoad(links=[LinkGoodput("b", 1.25e6), LinkGoodput("gone", 1.0)])
    mesh.take_members(
        Members(7, 1, [Member(make_info("a"), load), Member(make_info("b"), EngineLoad())]), 1.0
    )
    assert [(each.source, each.target, each.bytes_per_s) for each in mesh.pairs()] == [
        ("a", "b", 1.25e6),
        ("b", "a", 0.0),
    ]


def test_hosts_are_read_from_addresses() -> None:
    assert host_of("tcp://10.0.0.5:7200") == "10.0.0.5"
    assert host_of("tcp://[fe80::1]:7200") == "fe80::1"
    assert host_of("ipc:///tmp/x") == "ipc:///tmp/x"


class TestHistory:
    def test_a_value_is_the_mean_of_its_interval_and_silence_repeats_it(self) -> None:
        history = History(0.0)
        history.add("e", load(running=2, free_blocks=5, used_blocks=5), 1.0)
        history.add("e", load(running=4, free_blocks=10), 2.0)
        history.tick(INTERVAL_S)
        history.tick(2 * INTERVAL_S)
        [form] = history.forms()
        assert (form.engine, form.running, form.kv_usage) == ("e", [3, 3], [0.25, 0.25])

    def test_steps_a_second_bear_a_new_life(self) -> None:
        history = History(0.0)
        history.add("e", load(num_steps=100), 0.0)
        history.add("e", load(num_steps=120), 2.0)
        history.tick(INTERVAL_S)
        history.add("e", load(num_steps=3), INTERVAL_S + 1.0)
        history.tick(2 * INTERVAL_S)
        assert history.forms()[0].steps_per_s == [10.0, 0.0]

    def test_it_is_bounded_in_time_and_engines(self) -> None:
        history, now = History(0.0), 0.0
        for number in range(MAX_ENGINES + 3):
            history.add(f"e{number}", load(), now)
        for _ in range(NUM_SAMPLES + 10):
            now += INTERVAL_S
            history.add("e0", load(), now)
            history.tick(now)
        forms = history.forms()
        assert [form.engine for form in forms] == ["e0"], "the others have not been heard of for too long"
        assert len(forms[0].running) == NUM_SAMPLES

    def test_a_process_that_stood_still_begins_anew(self) -> None:
        history = History(0.0)
        history.add("e", load(), 0.0)
        history.tick(3 * KEPT_S)
        assert history.forms() == []


def test_checks_keep_their_time_from_report_to_report() -> None:
    mesh = Mesh(0.0, silence_s=5.0)
    check = PairCheck("a", "b", "equal", compared="bits", took_s=0.5, age_s=3.0, router_id="r")
    mesh.take_checks([check], wall_s=1000.0)
    [first] = mesh.checks()
    assert (first.source, first.target, first.outcome, first.at) == ("a", "b", "equal", 997.0)
    mesh.take_checks([msgspec.structs.replace(check, age_s=8.01)], wall_s=1005.0)
    assert mesh.checks() == [first], "nothing that a reader would have to be told"
    mesh.take_checks([msgspec.structs.replace(check, took_s=0.25, age_s=1.0)], wall_s=1010.0)
    assert mesh.checks()[0].at == 1009.0


def test_the_last_list_says_who_is_out_of_use() -> None:
    mesh = Mesh(0.0, silence_s=5.0)
    mesh.take_members(msgspec.structs.replace(members(), suspects=[Suspect("a", "b")]), 1.0)
    assert mesh.suspects == [Suspect("a", "b")]
    mesh.take_members(members(version=2), 2.0)
    assert mesh.suspects == []
