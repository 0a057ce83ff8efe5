"""Who is let in, who is refused and why, and who is lost."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.protocol.bus.peers import Loss
from microserve.protocol.errors import EngineLost, InvalidRequest, MeshError, QueueFull
from microserve.protocol.messages.adapter import (
    MAX_ADAPTERS,
    MAX_ADAPTERS_CHARS,
    Adapter,
    fault_of_adapters,
)
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.engine_info import ABILITIES
from microserve.protocol.messages.index import Member
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.numerics import Numerics
from microserve.services.index import membership
from microserve.services.index.membership import Admission, Membership
from tests.support.examples import examples
from tests.support.index.index_world import make_info

SILENCE_S = 3.0
STUCK_S = 20.0
NEVER_LATE_S = 1000.0
"""The interval: no look here is late, so time counts as it is; test_peers.py has the rest."""
IDLE = EngineLoad()


def busy(progress: int) -> EngineLoad:
    return EngineLoad(progress=progress, num_running=1)


@pytest.fixture
def members() -> Membership:
    return Membership(interval_s=NEVER_LATE_S, silence_s=SILENCE_S, stuck_s=STUCK_S)


def test_engine_joins_once(members: Membership) -> None:
    assert members.register(make_info(), 0.0) is Admission.JOINED
    assert members.version == 1
    assert members.register(make_info(), 1.0) is Admission.RENEWED
    assert members.version == 1
    assert members.members() == [Member(make_info(), EngineLoad())]
    assert members.info("e1") == make_info()
    assert members.info("e2") is None


def test_one_name_of_an_adapter_is_one_adapter(members: Membership) -> None:
    sql, poet = Adapter("sql", "r1"), Adapter("poet", "r2")
    members.register(make_info("e1", adapters=[sql]), 0.0)
    members.register(make_info("e2", adapters=[poet]), 0.0)
    members.register(make_info("e3"), 0.0)
    with pytest.raises(InvalidRequest) as caught:
        members.register(make_info("e4", adapters=[poet, Adapter("sql", "another")]), 0.0)
    assert caught.value.field == "adapters"
    assert "sql@another" in caught.value.detail and "sql@r1" in caught.value.detail
    members.register(make_info("e4", adapters=[poet, sql]), 0.0)


def test_as_many_adapters_as_an_engine_may_have_fit_into_its_info(members: Membership) -> None:
    names = [f"{n}".zfill(MAX_ADAPTERS_CHARS // MAX_ADAPTERS) for n in range(MAX_ADAPTERS)]
    assert not fault_of_adapters(names)
    adapters = [Adapter(name, "0" * 32) for name in names]
    geometry = Geometry("bfloat16", "vllm LBHNC 12", 128, 999, 999, 999, "fp8_e4m3", "y" * 100)
    said = msgspec.structs.replace(
        make_info("e" * 40), adapters=adapters, geometry=geometry, can=[*ABILITIES], curve_key="k" * 40
    )
    members.register(said, 0.0)


def test_beat_tells_the_load_and_changes_no_version(members: Membership) -> None:
    members.register(make_info(), 0.0)

    assert members.beat("e1", 11, EngineLoad(free_blocks=5), 1.0)
    assert members.members() == [Member(make_info(), EngineLoad(free_blocks=5))]
    assert members.version == 1


def test_beat_of_a_stranger_or_of_another_life_is_unknown(members: Membership) -> None:
    members.register(make_info(), 0.0)

    assert not members.beat("e2", 11, IDLE, 0.0)
    assert not members.beat("e1", 12, IDLE, 0.0)


def test_newer_life_replaces_and_the_older_is_refused_for_ever(members: Membership) -> None:
    members.register(make_info(incarnation=11), 0.0)

    assert members.register(make_info(incarnation=5), 1.0) is Admission.REPLACED
    assert members.version == 2
    assert not members.beat("e1", 11, IDLE, 1.0)
    with pytest.raises(EngineLost, match="life 11 of e1"):
        members.register(make_info(incarnation=11), 1.0)
    assert not members.deregister("e1", 11)
    assert members.beat("e1", 5, IDLE, 1.0)


def test_silent_engine_is_lost_and_may_return(members: Membership) -> None:
    members.register(make_info(), 0.0)
    assert members.expire(SILENCE_S) == []

    assert members.expire(SILENCE_S + 0.1) == [(make_info(), Loss.SILENT)]
    assert len(members) == 0
    assert members.version == 2
    assert not members.beat("e1", 11, IDLE, 4.0)
    assert members.register(make_info(), 4.0) is Admission.JOINED


def test_frozen_life_cannot_return_after_its_successor_came(members: Membership) -> None:
    members.register(make_info(incarnation=11), 0.0)
    members.expire(10.0)
    members.register(make_info(incarnation=12), 11.0)

    with pytest.raises(EngineLost):
        members.register(make_info(incarnation=11), 60.0)


def test_stuck_engine_is_lost_and_returns_with_progress(members: Membership) -> None:
    members.register(make_info(), 0.0)
    for second in range(1, 22):
        members.beat("e1", 11, busy(progress=40), float(second))
    [(_, loss)] = members.expire(21.5)
    assert loss is Loss.STUCK

    # It still beats. It is told nothing, for if it registered it would be refused:
    assert members.beat("e1", 11, busy(progress=40), 22.0)
    with pytest.raises(EngineLost, match="stands still at 40"):
        members.register(make_info(), 22.0)

    assert not members.beat("e1", 11, busy(progress=41), 23.0)
    assert members.register(make_info(), 23.0) is Admission.JOINED


def test_stuck_engine_returns_when_its_work_is_gone(members: Membership) -> None:
    members.register(make_info(), 0.0)
    for second in range(1, 22):
        members.beat("e1", 11, busy(progress=40), float(second))
    members.expire(21.5)

    assert not members.beat("e1", 11, EngineLoad(progress=40), 22.0)
    assert members.register(make_info(), 22.0) is Admission.JOINED


def test_idle_engine_is_never_stuck(members: Membership) -> None:
    members.register(make_info(), 0.0)
    for second in range(1, 100):
        members.beat("e1", 11, EngineLoad(num_waiting=3), float(second))
        assert members.expire(float(second)) == []


def test_deregistered_life_does_not_return(members: Membership) -> None:
    members.register(make_info(), 0.0)

    assert not members.deregister("e1", 12)
    assert members.deregister("e1", 11)
    assert len(members) == 0
    assert not members.deregister("e1", 11)
    with pytest.raises(EngineLost):
        members.register(make_info(), 1.0)


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("revision", "other"),
        ("block_size", 32),
        ("layout_hash", "other"),
        ("vocab_size", 999),
        ("eos_token_ids", [3]),
    ],
)
def test_same_model_with_another_revision_or_layout_is_refused_naming_both(
    members: Membership, field: str, theirs: Any
) -> None:
    own = make_info("e1", revision="r")
    members.register(own, 0.0)

    with pytest.raises(InvalidRequest) as refused:
        members.register(make_info("e2", **{"revision": "r", field: theirs}), 0.0)

    assert refused.value.field == field
    for part in ("e1", "e2", repr(theirs), repr(getattr(own, field))):
        assert part in refused.value.detail
    assert members.register(make_info("e2", model="other", **{field: theirs}), 0.0) is Admission.JOINED


@pytest.mark.parametrize("other", [{"block_size": 32}, {"layout_hash": "x"}, {"revision": ""}])
def test_an_engine_that_exchanges_no_kv_may_have_other_blocks(members: Membership, other: Any) -> None:
    members.register(make_info("e1", revision="r"), 0.0)

    assert members.register(make_info("e2", **{"can": [], "revision": "r", **other}), 0.0) is Admission.JOINED
    members.check_integrity()
    with pytest.raises(InvalidRequest) as refused:
        members.register(make_info("e3", can=[], revision="other"), 0.0)
    assert refused.value.field == "revision"
    with pytest.raises(InvalidRequest) as refused:
        members.register(make_info("e3", can=[], revision="r", vocab_size=9), 0.0)
    assert refused.value.field == "vocab_size"


def test_kv_of_another_shape_is_refused_by_the_field_that_differs(members: Membership) -> None:
    shape = Geometry("bfloat16", "rows", 16, 2, 1, 64)
    members.register(make_info("e1", geometry=shape, revision="of bfloat16"), 0.0)

    with pytest.raises(InvalidRequest) as refused:
        other = msgspec.structs.replace(shape, dtype="float32")
        members.register(make_info("e2", geometry=other, revision="of float32", layout_hash="x"), 0.0)
    assert refused.value.field == "dtype"
    assert refused.value.detail == "e2 has dtype 'float32', e1 has 'bfloat16'; they must agree"


def test_only_engine_of_a_model_may_return_with_another_layout(members: Membership) -> None:
    members.register(make_info(incarnation=11), 0.0)

    assert members.register(make_info(incarnation=12, block_size=32), 1.0) is Admission.REPLACED


def test_engines_of_several_numerics_classes_are_members_of_one_mesh(members: Membership) -> None:
    members.register(make_info(numerics=Numerics("a", is_exact=True)), 0.0)

    assert members.register(make_info("e2", numerics=Numerics("b")), 0.0) is Admission.JOINED
    assert members.register(make_info("e3"), 0.0) is Admission.JOINED


def test_what_cannot_be_a_numerics_class_is_refused_by_name(members: Membership) -> None:
    for numerics in (Numerics("mixed"), Numerics("a b"), Numerics(is_exact=True)):
        with pytest.raises(InvalidRequest) as refused:
            members.register(make_info(numerics=numerics), 0.0)
        assert refused.value.field == "numerics"


@pytest.mark.parametrize("first", ["", "r"])
def test_an_engine_that_says_no_revision_is_let_in_beside_one_that_does(
    members: Membership, first: str
) -> None:
    """A release of before said none, and laid its KV out otherwise: none goes between the two."""
    second = "" if first else "r"
    members.register(make_info(revision=first, layout_hash=f"of {first!r}"), 0.0)

    joined = members.register(make_info("e2", revision=second, layout_hash=f"of {second!r}"), 0.0)

    assert joined is Admission.JOINED
    members.check_integrity()
    with pytest.raises(InvalidRequest, match="revision"):
        members.register(make_info("e3", revision="other"), 0.0)


def test_other_wire_version_is_refused_naming_both(members: Membership) -> None:
    with pytest.raises(InvalidRequest, match=r"wire_version 2, the index has 1") as refused:
        members.register(make_info(wire_version=2), 0.0)
    assert refused.value.field == "wire_version"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine_id", ""),
        ("engine_id", "x" * 129),
        ("incarnation", 0),
        ("block_size", 0),
        ("num_blocks", 0),
        ("vocab_size", -1),
        ("split_tokens", 0),
        ("model", ""),
        ("address", ""),
        ("events_address", ""),
    ],
)
def test_field_out_of_bounds_is_refused_by_name(members: Membership, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        members.register(make_info(**{field: value}), 0.0)
    assert refused.value.field == field


def test_info_is_bounded_so_that_members_fit_one_message(members: Membership) -> None:
    with pytest.raises(InvalidRequest, match="at most 4096 bytes"):
        members.register(make_info(labels=["x" * 100] * 50), 0.0)


def test_info_is_fixed_for_a_life(members: Membership) -> None:
    members.register(make_info(labels=["prefill"]), 0.0)

    with pytest.raises(InvalidRequest, match="does not change"):
        members.register(make_info(labels=["decode"]), 1.0)


def test_number_of_members_is_bounded(members: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_MEMBERS", 3)
    for i in range(3):
        members.register(make_info(f"e{i}"), 0.0)

    with pytest.raises(QueueFull):
        members.register(make_info("e3"), 0.0)
    assert members.register(make_info("e2", incarnation=12), 0.0) is Admission.REPLACED


def test_memory_of_the_past_is_bounded(members: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_REMEMBERED_ENGINES", 4)
    for i in range(20):
        members.register(make_info(f"left{i}"), 0.0)
        members.deregister(f"left{i}", 11)
        members.register(make_info(f"lost{i}"), 100.0 * i)
        members.expire(100.0 * i + 10.0)
        members.check_integrity()

    assert len(members._retired) == 4
    assert len(members._absent) == 4


class MembershipMachine(RuleBasedStateMachine):
    """Any order of events keeps the tables together, and the version grows with every change."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Membership(interval_s=NEVER_LATE_S, silence_s=SILENCE_S, stuck_s=STUCK_S)
        self.now = 0.0
        self.seen = (0, frozenset[tuple[str, int]]())

    engine_ids = st.sampled_from(["e1", "e2", "e3"])
    lives = st.integers(1, 4)

    @rule(engine_id=engine_ids, life=lives, block_size=st.sampled_from([4, 4, 8]))
    def register(self, engine_id: str, life: int, block_size: int) -> None:
        before = self.members.members()
        try:
            self.members.register(make_info(engine_id, life, block_size=block_size), self.now)
        except MeshError:
            assert self.members.members() == before

    @rule(engine_id=engine_ids, life=lives, progress=st.integers(0, 2), running=st.integers(0, 1))
    def beat(self, engine_id: str, life: int, progress: int, running: int) -> None:
        known = (engine_id, life) in self.ids()
        load = EngineLoad(progress=progress, num_running=running)
        if known:
            assert self.members.beat(engine_id, life, load, self.now)
        else:
            self.members.beat(engine_id, life, load, self.now)

    @rule(engine_id=engine_ids, life=lives)
    def deregister(self, engine_id: str, life: int) -> None:
        assert ((engine_id, life) in self.ids()) == self.members.deregister(engine_id, life)

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        before = self.ids()
        lost = {(info.engine_id, info.incarnation) for info, _ in self.members.expire(self.now)}
        assert self.ids() == before - lost

    def ids(self) -> frozenset[tuple[str, int]]:
        return frozenset((m.info.engine_id, m.info.incarnation) for m in self.members.members())

    @invariant()
    def consistent(self) -> None:
        self.members.check_integrity()
        version, ids = self.seen
        assert self.members.version > version or self.ids() == ids
        self.seen = (self.members.version, self.ids())


MembershipMachine.TestCase.settings = settings(
    max_examples=examples(80), stateful_step_count=40, deadline=None
)
TestAnyOrder = MembershipMachine.TestCase
