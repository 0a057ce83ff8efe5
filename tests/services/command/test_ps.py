"""``microserve ps``: what is said of an engine beside its state, and of engines that the index follows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
from click.testing import CliRunner

from microserve.protocol.settings.sources import load_settings
from microserve.services.command.main import main
from microserve.services.local.composition import compose
from microserve.services.local.directory import ChildState, ForeignState, MeshDirectory, MeshState
from tests.support.engine.engine_world import engine_world
from tests.support.router.router_world import in_loop

FACTS = {"heaps": "shm tcp", "events": "tcp://10.0.0.5:5557", "replay": "tcp://10.0.0.5:5657"}
ENGINE = ChildState("engine-e0", "ready", 7, "tcp://here", 0, "", "e", "native 1, heap shm tcp", FACTS)
FOLLOWED = [ForeignState("v0", "Qwen", "tcp://h:1", "tcp://h:2"), ForeignState("v1", "Qwen", "tcp://h:3")]


def told(directory: Path, state: MeshState, *flags: str) -> str:
    mesh = MeshDirectory(directory)
    mesh.make()
    with mesh.hold():
        mesh.write(state)
        return CliRunner().invoke(main, ["ps", "--directory", str(directory), *flags]).output


def state_of(*children: ChildState) -> MeshState:
    return MeshState(os.getpid(), "http://here", "tiny", [*children], foreign=FOLLOWED)


def test_people_see_heap_event_addresses_and_whom_the_index_follows(tmp_path: Path) -> None:
    _, engine, first, second = told(tmp_path, state_of(ENGINE)).splitlines()
    assert engine.endswith("native 1, heap shm tcp, events 10.0.0.5:5557, replay 10.0.0.5:5657")
    assert first.split() == ["v0", "followed", "Qwen", "events", "h:1", "replay", "h:2"]
    assert second.split() == ["v1", "followed", "Qwen", "events", "h:3"]

    gone = msgspec.structs.replace(ENGINE, state="restarting")
    assert "5557" not in told(tmp_path, state_of(gone))


def test_programs_see_the_same(tmp_path: Path) -> None:
    state = json.loads(told(tmp_path, state_of(ENGINE), "--json"))
    assert state["children"][0]["facts"] == FACTS
    assert state["foreign"][0] == {
        "engine_id": "v0",
        "model": "Qwen",
        "events": "tcp://h:1",
        "replay": "tcp://h:2",
    }


def test_whom_the_index_follows_is_known_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    line = "v0 model=Qwen/Qwen3-8B events=tcp://h:5557 replay=tcp://h:5657 block_size=16 rank=1"
    settings = load_settings(overrides=[f"model.path={tmp_path}", f"index.foreign={json.dumps([line])}"])
    [member] = compose(settings, [], tmp_path, tmp_path / "control.db").foreign
    assert member == ForeignState("v0", "Qwen/Qwen3-8B", "tcp://h:5558", "tcp://h:5658")


@in_loop
async def test_an_engine_says_its_heap_and_where_it_tells_of_its_cache() -> None:
    async with engine_world() as world:
        [member] = world.members
        facts, about = world.service._facts, world.service._about
        assert facts["heaps"] == " ".join(member.info.all_heaps) == "shm"
        assert (facts["events"], facts["replay"]) == (member.info.events_address, member.info.replay_address)
        assert "heap shm" in about
