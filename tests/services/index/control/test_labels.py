"""Labels in the control log: what a change leaves, what is refused and survives, who is told, who may."""

from __future__ import annotations

import itertools
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, MAX_MESSAGE_NBYTES
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.index import Members, Watch
from microserve.protocol.messages.strategy.control import (
    LABEL,
    MAX_CONTROL_NBYTES,
    MAX_LABEL_CHARS,
    MAX_LABELLED_ENGINES,
    MAX_LABELS,
    UNLABEL,
    Change,
    Changed,
    ControlHistory,
    ControlRecords,
    ControlState,
    EngineLabels,
)
from microserve.services.index.control import ControlDesk
from microserve.services.index.control_log import ControlLog
from microserve.services.index.control_state import Fold
from tests.support.index.index_service import Index, with_index
from tests.support.index.index_world import World

_IDS = itertools.count()


def label(engine: str, *labels: str, kind: str = LABEL, **fields: Any) -> Change:
    name = fields.pop("strategy", "")
    return Change(next(_IDS) + 1, f"id {next(_IDS)}", kind, name, engine=engine, labels=[*labels], **fields)


def unlabel(engine: str, **fields: Any) -> Change:
    return label(engine, kind=UNLABEL, **fields)


def publish(strategy: str = "mine", **fields: Any) -> Change:
    return Change(next(_IDS) + 1, f"id {next(_IDS)}", "publish", strategy, "code", **fields)


def fold_of(*changes: Change) -> Fold:
    fold = Fold()
    for version, each in enumerate(changes, 1):
        fold = fold.after(each, version)
    return fold


# --- the fold --------------------------------------------------------------------------------------


def test_the_last_word_counts_and_other_engines_and_strategies_are_left_alone() -> None:
    fold = fold_of(
        label("b", "decode"), publish(), label("a", "prefill", "rack-1"), label("b", "near"), label("c")
    )
    state = fold.state()
    assert state.labels == [
        EngineLabels("a", ["prefill", "rack-1"]),
        EngineLabels("b", ["near"]),
        EngineLabels("c", []),
    ]
    assert [entry.strategy for entry in state.entries] == ["mine"]
    after = fold.after(unlabel("b"), 6)
    assert [each.engine for each in after.state().labels] == ["a", "c"]
    assert after.rollouts == fold.rollouts
    assert fold_of(label("a", "x"), publish(), publish()).labels == {"a": ("x",)}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (label("", "x"), "engine"),
        (label("e" * 129, "x"), "engine"),
        (label("e", ""), "labels"),
        (label("e", "two words"), "labels"),
        (label("e", "line\n"), "labels"),
        (label("e", "x" * (MAX_LABEL_CHARS + 1)), "labels"),
        (label("e", "any"), "labels"),
        (label("e", "x", "x"), "labels"),
        (label("e", *map(str, range(MAX_LABELS + 1))), "labels"),
        (label("e", "x", strategy="mine"), "strategy"),
        (label("e", "x", source="code"), "source"),
        (label("e", "x", parameters={"a": 1}), "parameters"),
        (label("e", "x", share=0.5), "share"),
        (label("e", "x", reason="x" * 1001), "reason"),
        (unlabel("other"), "engine"),
        (label("e", "x", kind=UNLABEL), "labels"),
        (publish(engine="e"), "engine"),
        (publish(labels=["x"]), "labels"),
    ],
)
def test_a_refusal_names_the_field(wrong: Change, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fold_of(label("e", "y")).after(wrong, 2)
    assert caught.value.field == field


@pytest.mark.slow
def test_labels_always_fit_into_a_message() -> None:
    fold = Fold()
    for number in range(MAX_LABELLED_ENGINES):
        fold = fold.after(label(f"engine-{number}", "x"), number + 1)
    with pytest.raises(InvalidRequest) as caught:
        fold.after(label("one-more", "x"), MAX_LABELLED_ENGINES + 1)
    assert caught.value.field == "engine"
    longest = [f"{number:02}" + "\N{GRINNING FACE}" * (MAX_LABEL_CHARS - 2) for number in range(MAX_LABELS)]
    fold = Fold()
    with pytest.raises(InvalidRequest) as caught:
        for number in range(MAX_LABELLED_ENGINES):
            fold = fold.after(label(f"{number:0128}", *longest), number + 1)
    assert caught.value.field == "labels"
    assert MAX_CONTROL_NBYTES / 2 < len(INDEX_REPLY.encode(fold.state())[1]) < MAX_MESSAGE_NBYTES


CHANGES = st.lists(
    st.one_of(
        st.builds(lambda e, ls: label(e, *ls), st.sampled_from("abc"), st.sets(st.sampled_from("xyz"))),
        st.builds(unlabel, st.sampled_from("abc")),
        st.builds(publish, st.sampled_from(["s", "t"])),
    ),
    max_size=30,
)


@given(CHANGES)
def test_the_state_is_the_last_word_for_each_engine(changes: list[Change]) -> None:
    with closing(ControlLog()) as control_log:
        expected: dict[str, list[str]] = {}
        for each in changes:
            if each.kind == UNLABEL and each.engine not in expected:
                with pytest.raises(InvalidRequest):
                    control_log.append(each, "local")
                continue
            control_log.append(each, "local")
            if each.kind == LABEL:
                expected[each.engine] = each.labels
            expected = {e: ls for e, ls in expected.items() if (each.kind, each.engine) != (UNLABEL, e)}
        state = control_log.fold.state()
        assert {each.engine: each.labels for each in state.labels} == expected
        live, control_log.fold = control_log.fold, Fold()
        control_log._replay()
        assert control_log.fold == live


# --- the log ---------------------------------------------------------------------------------------


def test_labels_survive_the_index_and_its_records_say_who_set_them(tmp_path: Path) -> None:
    path = str(tmp_path / "control.db")
    with closing(ControlLog(path, wall_clock=lambda: 12.5)) as control_log:
        control_log.append(label("e", "prefill", "ä", reason="why"), "key")
        control_log.append(unlabel("e"), "local")
        control_log.append(label("e", "decode"), "local")
    with closing(ControlLog(path)) as control_log:
        assert control_log.fold.labels == {"e": ("decode",)}
        assert control_log.append(label("f"), "local") == 4
        first = control_log.records()[-1]
    assert (first.version, first.at, first.who, first.kind, first.reason) == (1, 12.5, "key", LABEL, "why")
    assert (first.strategy, first.engine, first.labels) == ("", "e", ["prefill", "ä"])


def test_the_same_label_repeated_is_one_change() -> None:
    with closing(ControlLog()) as control_log:
        once = label("e", "x")
        assert [control_log.append(each, "local") for each in (once, label("e", "y"), once)] == [1, 2, 1]
        assert control_log.fold.labels == {"e": ("y",)}
        other = Change(1, once.change_id, LABEL, "", engine="f", labels=["x"])
        with pytest.raises(InvalidRequest) as caught:
            control_log.append(other, "local")
        assert caught.value.field == "change_id"


def test_a_log_from_before_there_were_labels_is_read_and_gets_them(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    with closing(ControlLog(str(path))) as control_log:
        control_log.append(publish(), "local")
    with closing(sqlite3.connect(path)) as database:
        for column in ("engine", "labels"):
            database.execute(f"ALTER TABLE changes DROP COLUMN {column}")
        database.commit()
    for version in (2, 3):
        with closing(ControlLog(str(path))) as control_log:
            assert control_log.append(label("e", str(version)), "local") == version
    with closing(ControlLog(str(path))) as control_log:
        assert (control_log.fold.labels, list(control_log.fold.rollouts)) == ({"e": ("3",)}, ["mine"])


# --- the desk --------------------------------------------------------------------------------------


def test_a_label_reaches_every_router_and_is_an_audit_event() -> None:
    async def test(world: World, index: Index) -> None:
        routers, publisher = [index.peer(), index.peer()], index.peer()
        for number, router in enumerate(routers):
            await router.ask(Members, Watch(f"r{number}", 0))
        with structlog.testing.capture_logs() as logs:
            changed = await publisher.ask(Changed, label("engine-9", "prefill", reason="busy"))
            await publisher.ask(Changed, unlabel("engine-9"))
        assert changed.version == 1
        events = [entry for entry in logs if entry["event"] == log.ENGINE_LABELLED]
        assert [(e["kind"], e["who"], e["engine_id"], e["labels"], e["reason"]) for e in events] == [
            (LABEL, "local", "engine-9", ["prefill"], "busy"),
            (UNLABEL, "local", "engine-9", [], ""),
        ]
        for router in routers:
            assert await router.ask(ControlState, Watch("again", 0))
            told = [each for each in router.replies if isinstance(each, ControlState)]
            assert told[0].labels == [EngineLabels("engine-9", ["prefill"])]
            assert told[-1] == ControlState(2, [])
        history = await publisher.ask(ControlRecords, ControlHistory(7))
        assert [(record.kind, record.engine) for record in history.records] == [
            (UNLABEL, "engine-9"),
            (LABEL, "engine-9"),
        ]

    with_index(test)


def test_without_the_right_nobody_labels() -> None:
    desk = ControlDesk(ControlLog(), lambda peer, reply: True, may_publish=lambda key: key == "good")
    try:
        with structlog.testing.capture_logs() as logs, pytest.raises(InvalidRequest) as caught:
            desk.answer(label("e", "x"), "bad")
        assert caught.value.field == "operators"
        [event] = [entry for entry in logs if entry["event"] == log.STRATEGY_REFUSED]
        assert (event["who"], event["kind"], event["engine_id"]) == ("bad", LABEL, "e")
        reply = desk.answer(label("e", "x"), "good")
        assert isinstance(reply, Changed)
    finally:
        desk.close()
