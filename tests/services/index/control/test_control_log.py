"""The control log: what was answered survives a kill, what was not is whole or absent, one index has it."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError, InternalError, InvalidRequest
from microserve.protocol.messages.strategy.control import Change, ControlRecord
from microserve.protocol.messages.strategy.scores import Ramp
from microserve.services.index.control_log import ControlLog
from microserve.services.index.control_state import Fold, digest_of
from tests.support.examples import examples

_IDS = itertools.count()


def change(kind: str = "publish", strategy: str = "mine", **fields: Any) -> Change:
    fields.setdefault("source", "code" if kind == "publish" else "")
    return Change(1, f"id {next(_IDS)}", kind, strategy, **fields)


def test_a_log_reopened_folds_to_the_same_state(tmp_path: Path) -> None:
    path = str(tmp_path / "control.db")
    with closing(ControlLog(path)) as log:
        log.append(change(parameters={"ratio": 0.5, "on": True, "name": "ä", "count": 3}), "local")
        log.append(change(share=0.25, source="canary"), "key")
        log.append(change("set", parameters={"count": 4}), "key")
        before = log.fold
    with closing(ControlLog(path)) as log:
        assert log.fold == before
        [entry] = log.fold.state().entries
        assert entry.stable is not None
        assert entry.stable.parameters == {"ratio": 0.5, "on": True, "name": "ä", "count": 4}
        assert log.append(change("promote"), "local") == 4


def test_a_file_of_before_shadows_and_bounds_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "control.db")
    with closing(ControlLog(path)) as log:
        log.append(change("publish"), "me")
    with closing(sqlite3.connect(path)) as database:
        for column in ("shadow", "max_ttft_s", "max_tpot_s"):
            database.execute(f"ALTER TABLE changes DROP COLUMN {column}")
    with closing(ControlLog(path)) as log:
        assert log.fold.may_serve("mine", 1)
        log.append(change("publish", shadow=True, max_ttft_s=1.5), "me")
        state = log.fold.state()
    with closing(ControlLog(path)) as log:
        assert log.fold.state() == state
        assert state.entries[0].shadow is not None
        assert state.entries[0].shadow.max_ttft_s == 1.5


def test_records_say_who_did_what_when_and_why() -> None:
    with closing(ControlLog(wall_clock=lambda: 12.5)) as log:
        log.append(change(reason="first", share=0.5), "local")
        log.append(change("rollback", reason="errors"), "router r1")
        log.append(change(strategy="other"), "local")
        rollback, publish = log.records("mine")
        assert publish == ControlRecord(
            1, 12.5, "local", "publish", "mine", digest_of("code"), {}, 0.5, "first"
        )
        assert (rollback.who, rollback.kind, rollback.reason) == ("router r1", "rollback", "errors")
        assert [record.version for record in log.records()] == [3, 2, 1]
        assert [record.version for record in log.records("", 1)] == [3]
        assert log.records("", -5) == []


def test_the_same_change_repeated_is_one() -> None:
    with closing(ControlLog()) as log:
        once = change()
        assert [log.append(once, "local"), log.append(change(), "local"), log.append(once, "local")] == [
            1,
            2,
            1,
        ]
        other = Change(1, once.change_id, "retire", "mine")
        with pytest.raises(InvalidRequest) as caught:
            log.append(other, "local")
        assert caught.value.field == "change_id"


def test_a_refused_change_leaves_no_row() -> None:
    with closing(ControlLog()) as log:
        with pytest.raises(InvalidRequest):
            log.append(change("promote"), "local")
        assert (log.fold, log.records()) == (Fold(), [])


def test_versions_are_above_those_that_routers_have() -> None:
    with closing(ControlLog()) as log:
        assert log.append(change(), "local", above=41) == 42
        assert log.append(change(), "local", above=7) == 43


@pytest.mark.slow
def test_one_index_at_a_time_has_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "control.db")
    with closing(ControlLog(path)), pytest.raises(ConfigError, match="locked") as caught:
        ControlLog(path)
    assert caught.value.field == "index.control_path"
    ControlLog(path).close()


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"control\.db"):
        ControlLog(str(path))
    with pytest.raises(ConfigError):
        ControlLog(str(tmp_path / "absent" / "control.db"))


def test_a_row_that_does_not_fold_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "control.db")
    with closing(ControlLog(path)) as log:
        log.append(change(), "local")
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE changes SET kind = 'promote', source = ''")
        database.commit()
    with pytest.raises(ConfigError, match="not under control"):
        ControlLog(path)


def test_a_disk_that_takes_nothing_leaves_what_was() -> None:
    with closing(ControlLog()) as log:
        log.append(change(), "local")
        before = log.fold
        log._database.execute("PRAGMA query_only = ON")
        with pytest.raises(InternalError):
            log.append(change(), "local")
        assert log.fold == before
        log._database.execute("PRAGMA query_only = OFF")
        assert log.append(change(), "local") == 2


CHILD = """
import sys
from microserve.protocol.messages.strategy.control import Change
from microserve.services.index.control_log import ControlLog
log = ControlLog(sys.argv[1])
for number in range(int(sys.argv[2])):
    version = log.append(Change(1, f"id {number}", "publish", "mine", source=f"code {number}"), "local")
    print(version, flush=True)
sys.stdin.read()
"""


def test_what_was_answered_survives_sigkill(tmp_path: Path) -> None:
    """Between the row and whoever would have been told: the row counts."""
    path = str(tmp_path / "control.db")
    command = [sys.executable, "-c", CHILD, path, "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
        os.kill(child.pid, signal.SIGKILL)
    with closing(ControlLog(path)) as log:
        assert log.fold.version == 3
        assert log.fold.may_serve("mine", 3)


@pytest.mark.slow
def test_killed_in_the_middle_of_writing_each_change_is_whole_or_absent(tmp_path: Path) -> None:
    for number in range(4):
        path = str(tmp_path / f"control-{number}.db")
        command = [sys.executable, "-c", CHILD, path, "100000"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(1 + 7 * number):
                told = int(child.stdout.readline())
            os.kill(child.pid, signal.SIGKILL)
        with closing(ControlLog(path)) as log:
            version = log.fold.version
            assert version >= told
            [entry] = log.fold.state().entries
            assert entry.stable is not None
            assert entry.stable.source == f"code {version - 1}"
            assert log.records("", 3)[0].version == version


@settings(max_examples=examples(40), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["publish", "set", "promote", "rollback", "retire", "share", "ramp"]),
            st.sampled_from(["a", "b"]),
            st.sampled_from([1.0, 0.5]),
            st.integers(0, 50),
        ),
        max_size=25,
    )
)
def test_the_rows_fold_to_what_may_serve(steps: list[tuple[str, str, float, int]]) -> None:
    with closing(ControlLog()) as log:
        for kind, strategy, share, above in steps:
            parameters = {"p": above} if kind == "set" else {}
            ramp = Ramp([0.75, 1.0], every_s=60.0, paused=above > 25) if above % 2 else None
            fields: dict[str, Any] = {"share": share} if kind in ("publish", "share") else {}
            if kind == "ramp" or (kind == "publish" and share < 1.0):
                fields["ramp"] = ramp
            try:
                log.append(change(kind, strategy, parameters=parameters, **fields), "local", above=above)
            except InvalidRequest:
                continue
        live, log.fold = log.fold, Fold()
        log._replay()
        assert log.fold == live


def test_a_place_where_no_log_can_be_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^index\.control_path: .*: is a directory$") as caught:
        ControlLog(str(tmp_path))
    assert caught.value.field == "index.control_path"
    with pytest.raises(ConfigError, match=r"there is no directory .*/absent$"):
        ControlLog(str(tmp_path / "absent/control.db"))
