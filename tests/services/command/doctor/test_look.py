"""A doctor looks at a real index and a real engine, in this process, over real sockets."""

from __future__ import annotations

import time
from pathlib import Path

from microserve.protocol.bus.curve import create_keys
from microserve.services.command.doctor.judging import judge
from microserve.services.command.doctor.look import look
from microserve.services.command.doctor.observation import Reach
from microserve.services.command.doctor.reach import try_place
from tests.support.engine.engine_world import engine_world, make_settings
from tests.support.router.router_world import in_loop


@in_loop
async def test_an_engine_whose_clock_is_off_by_an_hour_is_found() -> None:
    async with engine_world(wall_clock=lambda: time.time() + 3600.0) as world:
        world.gate.set()
        seen = await look(world.settings, tries=False, tell=lambda _: None)
        [engine] = seen.engines
        assert engine.error == "" and {place.reach for place in engine.places} == {Reach.REACHED}
        findings = {finding.name: finding for finding in judge(seen)}
        assert findings.keys() == {"clock_off", "no_router"}
        assert findings["clock_off"].where == "engine e"
        assert "ahead" in findings["clock_off"].what


@in_loop
async def test_one_prompt_is_asked_cold_and_cached() -> None:
    async with engine_world() as world:
        world.gate.set()
        seen = await look(world.settings, tries=True, tell=lambda _: None)
        assert seen.cache is not None
        cold, cached = seen.cache.answers
        assert (cold.error, cached.error) == ("", "")
        assert cold.token_ids == cached.token_ids and len(cold.token_ids) == 8
        assert (cold.found_tokens, cached.found_tokens > 0) == (0, True)
        assert [finding.name for finding in judge(seen)] == ["no_router"]
        assert world.core.memory.pool.num_used == 0


@in_loop
async def test_an_index_that_is_away_is_found() -> None:
    settings = make_settings("tcp://127.0.0.1:1")
    [finding] = judge(await look(settings, tries=True, tell=lambda _: None))
    assert (finding.name, finding.where) == ("port_closed", "index, index, tcp://127.0.0.1:1")


@in_loop
async def test_a_name_that_means_nothing_is_found() -> None:
    for name in ("no-such-host.invalid", "no..name", "n" * 64):
        place = try_place("actions", f"tcp://{name}:1", None, "", 5.0)
        assert place.reach is Reach.NO_ADDRESS


@in_loop
async def test_who_comes_without_keys_to_who_has_some_is_told_so(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    async with engine_world(curve_dir=str(tmp_path / "keys")) as world:
        world.gate.set()
        without = make_settings(world.settings.index.address)
        [finding] = judge(await look(without, tries=False, tell=lambda _: None))
        assert finding.name == "wrong_key"
        assert "we have no keys" in finding.what
