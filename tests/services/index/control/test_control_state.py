"""The fold of changes: what each leaves in force, what is refused, and that nothing else can come of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microserve.protocol.bus.codec import INDEX_REPLY, MAX_MESSAGE_NBYTES
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.strategy.control import (
    KINDS,
    MAX_CONTROL_ENTRIES,
    MAX_SOURCE_NBYTES,
    Change,
    ControlEntry,
    StrategyVersion,
)
from microserve.protocol.messages.strategy.scores import Ramp
from microserve.services.index.control_state import MAX_BEFORE, Fold, digest_of


def change(kind: str, strategy: str = "mine", **fields: Any) -> Change:
    fields.setdefault("source", "code" if kind == "publish" else "")
    return Change(1, "id", kind, strategy, **fields)


def fold_of(*changes: Change) -> Fold:
    fold = Fold()
    for version, each in enumerate(changes, 1):
        fold = fold.after(each, version)
    return fold


def entry_of(*changes: Change) -> ControlEntry:
    [entry] = fold_of(*changes).state().entries
    return entry


def numbers(*changes: Change) -> tuple[int, int, float]:
    """Versions in force, stable and canary (0: none), and the share."""
    entry = entry_of(*changes)
    return (
        entry.stable.version if entry.stable else 0,
        entry.canary.version if entry.canary else 0,
        entry.share,
    )


def test_publish_makes_a_stable_version_with_its_digest() -> None:
    entry = entry_of(change("publish", source="s", parameters={"ratio": 0.5}))
    assert entry == ControlEntry("mine", StrategyVersion(1, "s", digest_of("s"), {"ratio": 0.5}))


def test_a_canary_stands_beside_the_stable_version_until_it_is_promoted_or_dropped() -> None:
    begun = [change("publish"), change("publish", source="new", share=0.1)]
    assert numbers(*begun) == (1, 2, 0.1)
    assert numbers(*begun, change("publish", source="newer", share=0.2)) == (1, 3, 0.2)
    assert numbers(*begun, change("promote")) == (2, 0, 0.0)
    assert numbers(*begun, change("promote"), change("rollback")) == (1, 0, 0.0)
    assert numbers(*begun, change("rollback")) == (1, 0, 0.0)
    assert numbers(*begun, change("rollback", version=1)) == (0, 2, 0.1), "the stable one is at fault"
    assert numbers(*begun, change("publish", source="all")) == (3, 0, 0.0)


def test_a_shadow_stands_beside_both_and_moves_by_its_own_flag() -> None:
    begun = [
        change("publish"),
        change("publish", source="new", share=0.1),
        change("publish", source="dark", share=0.5, shadow=True, max_ttft_s=2.0),
    ]
    entry = entry_of(*begun)
    assert entry.shadow == StrategyVersion(3, "dark", digest_of("dark"), {}, 2.0)
    assert (entry.shadow_share, numbers(*begun)) == (0.5, (1, 2, 0.1))
    assert fold_of(*begun).may_serve("mine", 3)
    assert entry_of(*begun, change("publish", source="darker", shadow=True)).shadow_share == 1.0
    for dropped in (change("rollback", shadow=True), change("rollback", version=3)):
        assert entry_of(*begun, dropped).shadow is None
        assert numbers(*begun, dropped) == (1, 2, 0.1)
    assert numbers(*begun, change("rollback")) == (1, 0, 0.0), "what serves goes first"
    assert entry_of(*begun, change("rollback")).shadow is not None
    promoted = entry_of(*begun, change("promote", shadow=True))
    assert (promoted.stable, promoted.canary, promoted.shadow) == (entry.shadow, None, None)
    assert numbers(*begun, change("promote")) == (2, 0, 0.0)


RAMP = Ramp([0.1, 0.5, 1.0], every_s=60.0)


def test_a_canary_has_another_share_or_goes_on_by_itself() -> None:
    begun = [change("publish"), change("publish", source="new", share=0.1, ramp=RAMP)]
    assert entry_of(*begun).ramp == RAMP
    assert fold_of(*begun).rollouts["mine"].next_share == 0.5
    grown = [*begun, change("share", share=0.2)]
    assert numbers(*grown) == (1, 2, 0.2)
    assert entry_of(*grown).ramp == RAMP, "from there on"
    assert entry_of(*grown, change("ramp")).ramp is None, "as it is from now on"
    assert numbers(*grown, change("ramp")) == (1, 2, 0.2)
    short = Ramp([0.1, 0.3], min_requests=5)
    assert entry_of(*begun, change("ramp", ramp=short), change("share", share=0.3)).ramp is None, (
        "its last one"
    )
    for end in ("promote", "rollback"):
        assert entry_of(*begun, change(end)).ramp is None
    assert entry_of(*begun, change("publish", source="all")).ramp is None
    assert entry_of(*begun, change("publish", source="newer", share=0.1)).ramp is None
    assert entry_of(*begun, change("set", parameters={"a": 1})).ramp == RAMP


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (change("share", share=1.0), "share"),
        (change("share", share=0.0), "share"),
        (change("ramp", ramp=Ramp([])), "ramp"),
        (change("ramp", ramp=Ramp([0.5, 0.2], every_s=1.0)), "ramp"),
        (change("ramp", ramp=Ramp([0.5, 1.5], every_s=1.0)), "ramp"),
        (change("ramp", ramp=Ramp([float("nan")], every_s=1.0)), "ramp"),
        (change("ramp", ramp=Ramp([1.0])), "ramp"),
        (change("ramp", ramp=Ramp([1.0], every_s=float("inf"))), "ramp"),
        (change("ramp", ramp=Ramp([1.0], every_s=1.0, until="soon")), "ramp"),
        (change("ramp", ramp=Ramp([0.05], every_s=1.0)), "ramp"),
        (change("promote", ramp=RAMP), "ramp"),
        (change("publish", ramp=RAMP), "ramp"),
        (change("publish", share=0.1, shadow=True, ramp=RAMP), "ramp"),
        (change("publish", share=0.1, sticky_by="user", ramp=Ramp([1.0], until="better")), "ramp"),
        (change("share", "other", share=0.5), "strategy"),
        (change("ramp", "plain", ramp=RAMP), "strategy"),
        (change("share", "plain", share=0.5), "strategy"),
    ],
)
def test_a_share_or_ramp_that_cannot_be_is_refused(asked: Change, field: str) -> None:
    fold = fold_of(change("publish"), change("publish", source="new", share=0.1), change("publish", "plain"))
    with pytest.raises(InvalidRequest) as refused:
        fold.after(asked, 9)
    assert refused.value.field == field


def test_bounds_go_with_the_version_and_stay_when_parameters_change() -> None:
    entry = entry_of(change("publish", max_ttft_s=2.0, max_tpot_s=0.5), change("set", parameters={"a": 1}))
    assert entry.stable is not None
    assert (entry.stable.version, entry.stable.max_ttft_s, entry.stable.max_tpot_s) == (2, 2.0, 0.5)


def test_set_keeps_the_source_and_the_other_parameters() -> None:
    entry = entry_of(
        change("publish", source="s", parameters={"a": 1, "b": 2}), change("set", parameters={"b": 3})
    )
    assert entry.stable == StrategyVersion(2, "s", digest_of("s"), {"a": 1, "b": 3})


def test_set_of_a_strategy_that_was_never_published_means_the_routers_own() -> None:
    entry = entry_of(change("set", "balanced", parameters={"ratio": 0.25}))
    assert entry.stable == StrategyVersion(1, "", "", {"ratio": 0.25})


def test_rollback_goes_back_version_by_version_to_the_routers_own() -> None:
    begun = [change("publish"), change("publish"), change("publish")]
    found = [numbers(*begun, *[change("rollback")] * count)[0] for count in range(4)]
    assert found == [3, 2, 1, 0]
    with pytest.raises(InvalidRequest):
        fold_of(*begun, *[change("rollback")] * 4)


def test_a_version_that_was_given_up_after_another_took_its_place_never_returns() -> None:
    begun = [change("publish"), change("publish"), change("publish"), change("rollback", version=2)]
    assert numbers(*begun) == (3, 0, 0.0), "what is in force stays"
    assert not fold_of(*begun).may_serve("mine", 2)
    assert numbers(*begun, change("rollback")) == (1, 0, 0.0)
    assert numbers(*begun, change("rollback"), change("rollback")) == (0, 0, 0.0)


def test_a_rollback_of_a_version_that_can_never_serve_changes_nothing() -> None:
    fold = fold_of(change("publish"), change("publish"), change("rollback"))
    for version in (2, 7):
        with pytest.raises(InvalidRequest) as caught:
            fold.after(change("rollback", version=version), 4)
        assert caught.value.field == "version"


def test_retire_leaves_nothing() -> None:
    assert fold_of(change("publish"), change("retire")).state().entries == []


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (change("explode"), "kind"),
        (change("publish", "two words"), "strategy"),
        (change("publish", "class"), "strategy"),
        (change("publish", "x" * 65), "strategy"),
        (change("publish", source=""), "source"),
        (change("set", source="x", parameters={"a": 1}), "source"),
        (change("publish", source="x" * (MAX_SOURCE_NBYTES + 1)), "source"),
        (change("publish", share=0.0), "share"),
        (change("publish", share=1.5), "share"),
        (change("publish", share=float("nan")), "share"),
        (change("promote", share=0.5), "share"),
        (change("set", shadow=True, parameters={"a": 1}), "shadow"),
        (change("promote", shadow=True), "strategy"),
        (change("rollback", shadow=True), "version"),
        (change("publish", max_ttft_s=-1.0), "max_ttft_s"),
        (change("publish", max_tpot_s=float("inf")), "max_tpot_s"),
        (change("set", parameters={"a": 1}, max_ttft_s=1.0), "max_ttft_s"),
        (change("set"), "parameters"),
        (change("rollback", parameters={"a": 1}), "parameters"),
        (change("promote"), "strategy"),
        (change("promote", "other"), "strategy"),
        (change("rollback", "other"), "strategy"),
        (change("retire", "other"), "strategy"),
        (change("publish", reason="x" * 1001), "reason"),
        (Change(1, "", "publish", "mine", "s"), "change_id"),
    ],
)
def test_a_refusal_names_the_field(wrong: Change, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fold_of(change("publish")).after(wrong, 2)
    assert caught.value.field == field


def test_versions_only_grow() -> None:
    with pytest.raises(InvalidRequest):
        fold_of(change("publish")).after(change("publish"), 1)


def test_what_is_under_control_always_fits_into_a_message() -> None:
    fold, big = Fold(), "x" * MAX_SOURCE_NBYTES
    with pytest.raises(InvalidRequest) as caught:
        for number in range(2 * MAX_CONTROL_ENTRIES):
            fold = fold.after(
                change("publish", f"s{number // 2}", source=big, share=(0.5, 1.0)[number % 2]), number + 1
            )
    assert caught.value.field == "source"
    assert len(INDEX_REPLY.encode(fold.state())[1]) < MAX_MESSAGE_NBYTES


def test_there_are_at_most_so_many() -> None:
    fold = fold_of(*(change("publish", f"s{number}") for number in range(MAX_CONTROL_ENTRIES)))
    with pytest.raises(InvalidRequest) as caught:
        fold.after(change("publish", "more"), MAX_CONTROL_ENTRIES + 1)
    assert caught.value.field == "strategy"


CHANGES = st.builds(
    Change,
    st.just(1),
    st.just("id"),
    st.sampled_from(KINDS),
    st.sampled_from(["a", "b"]),
    source=st.sampled_from(["", "x", "y"]),
    parameters=st.sampled_from([{}, {"p": 1}, {"q": 0.5}]),
    share=st.sampled_from([1.0, 0.5]),
    version=st.integers(0, 30),
    shadow=st.booleans(),
    ramp=st.sampled_from([None, RAMP]),
)


@given(st.lists(CHANGES, max_size=60))
def test_any_changes_leave_versions_that_were_made_by_some_change(changes: list[Change]) -> None:
    fold, made = Fold(), {0}
    for each in changes:
        try:
            after = fold.after(each, fold.version + 1)
        except InvalidRequest as error:
            assert error.field
            continue
        assert after.version == fold.version + 1
        if each.kind in ("publish", "set"):
            made.add(after.version)
            assert after.may_serve(each.strategy, after.version)
        if each.kind == "rollback" and each.version:
            assert fold.may_serve(each.strategy, each.version)
            assert not after.may_serve(each.strategy, each.version)
        others = {name: rollout for name, rollout in after.rollouts.items() if name != each.strategy}
        assert others == {n: r for n, r in fold.rollouts.items() if n != each.strategy}
        fold = after
    for entry in fold.state().entries:
        present = [v for v in (entry.stable, entry.canary, entry.shadow) if v is not None]
        assert {version.version for version in present} <= made
        assert len({version.version for version in present}) == len(present)
        assert (entry.canary is None) == (entry.share == 0.0)
        assert entry.ramp is None or fold.rollouts[entry.strategy].next_share > entry.share > 0.0
        assert (entry.shadow is None) == (entry.shadow_share == 0.0)
        assert all(
            version.digest == (digest_of(version.source) if version.source else "") for version in present
        )
        assert len(fold.rollouts[entry.strategy].before) <= MAX_BEFORE


class Rollbacks(RuleBasedStateMachine):
    """Against a model: a stack of what was stable, as far back as is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = Fold()
        self.stack: list[int] = []
        self.canary = 0

    def take(self, each: Change) -> int:
        self.fold = self.fold.after(each, self.fold.version + 1)
        return self.fold.version

    @rule(share=st.sampled_from([0.3, 1.0]))
    def publish(self, share: float) -> None:
        version = self.take(change("publish", share=share))
        if share < 1.0:
            self.canary = version
        else:
            self.stack, self.canary = [*self.stack, version][-MAX_BEFORE - 1 :], 0

    @rule()
    def set(self) -> None:
        self.stack = [*self.stack, self.take(change("set", parameters={"a": 1}))][-MAX_BEFORE - 1 :]

    @precondition(lambda self: self.canary)
    @rule()
    def promote(self) -> None:
        self.take(change("promote"))
        self.stack, self.canary = [*self.stack, self.canary][-MAX_BEFORE - 1 :], 0

    @precondition(lambda self: self.canary or self.stack)
    @rule()
    def roll_back(self) -> None:
        self.take(change("rollback"))
        if self.canary:
            self.canary = 0
        else:
            self.stack.pop()

    @invariant()
    def agrees(self) -> None:
        entries = self.fold.state().entries
        stable = entries[0].stable if entries else None
        canary = entries[0].canary if entries else None
        assert (stable.version if stable else 0) == (self.stack[-1] if self.stack else 0)
        assert (canary.version if canary else 0) == self.canary


TestRollbacks = Rollbacks.TestCase


def test_a_fold_is_a_value() -> None:
    fold = fold_of(change("publish"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fold.version = 9  # type: ignore[misc]
    with pytest.raises(TypeError):
        fold.rollouts["mine"] = fold.rollouts["mine"]  # type: ignore[index]
