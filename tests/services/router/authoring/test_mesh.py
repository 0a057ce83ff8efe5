"""What a strategy sees: labels, load, lots, prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from tests.support.router.router_world import World, eventually, in_loop, router_world, serve_with

PROMPT = list(range(50))


async def look(world: World, probe: Callable[[Mesh, Request], None]) -> None:
    """Run ``probe`` inside a request."""

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        probe(mesh, request)
        async for tokens in mesh.pick(None, request).start_generate(request):
            yield tokens

    answer = await serve_with(world, body, PROMPT)
    assert answer.result.reason == "length", answer.result


@in_loop
async def test_labels_are_preferences() -> None:
    labels = {"p": ["prefill"], "d": ["decode"], "both": ["prefill", "decode"], "any": []}
    async with router_world("p", "d", "both", "any", labels=labels) as world:

        def probe(mesh: Mesh, request: Request) -> None:
            def ids(label: str | None) -> set[str]:
                return {engine.id for engine in mesh.engines(label)}

            assert ids("prefill") == {"p", "both", "any"}
            assert ids("decode") == {"d", "both", "any"}
            assert ids("unheard of") == {"any"}
            assert ids(None) == {"p", "d", "both", "any"}

        await look(world, probe)


@in_loop
async def test_a_label_that_nobody_has_means_everybody() -> None:
    async with router_world("p", "q", labels={"p": ["prefill"], "q": ["prefill"]}) as world:

        def probe(mesh: Mesh, request: Request) -> None:
            assert {engine.id for engine in mesh.engines("decode")} == {"p", "q"}

        await look(world, probe)


@in_loop
async def test_pick_takes_the_least_uncached_tokens_then_the_fewest_sequences() -> None:
    async with router_world("a", "b", "c") as world:
        world.engines["a"].load = EngineLoad(queued_prefill_tokens=10)
        world.engines["b"].load = EngineLoad(num_running=0, num_waiting=5)
        world.engines["c"].load = EngineLoad(num_waiting=6)
        connections = {c.engine_id: c for c in world.router.registry.joined()}
        await eventually(lambda: connections["a"].load.queued_prefill_tokens == 10, "heartbeat")
        await eventually(lambda: connections["b"].load.num_waiting == 5, "heartbeat")
        await eventually(lambda: connections["c"].load.num_waiting == 6, "heartbeat")

        def probe(mesh: Mesh, request: Request) -> None:
            a, b, c = sorted(mesh.engines(), key=lambda engine: engine.id)
            assert mesh.pick(None, request) == b
            assert mesh.pick(None, request, exclude=[b]) == c
            assert mesh.pick(None, request, exclude=[b, c]) == a
            assert mesh.pick(None, request, exclude=[a, b, c]) == b  # better busy than nobody
            assert mesh.pick(None, request, cost=lambda engine: -ord(engine.id)) == c
            assert (mesh.load(a).uncached_tokens, mesh.load(b).sequences) == (10, 5)
            assert a.reported.queued_prefill_tokens == 10

        await look(world, probe)


@in_loop
async def test_exclude_looks_beyond_the_label_before_it_yields() -> None:
    async with router_world("p", "d", labels={"p": ["prefill"], "d": ["decode"]}) as world:

        def probe(mesh: Mesh, request: Request) -> None:
            p = mesh.pick("prefill", request)
            assert p.id == "p"
            assert mesh.pick("prefill", request, exclude=[p]).id == "d"

        await look(world, probe)


@in_loop
async def test_equals_are_drawn_by_lot_and_the_lot_by_seed() -> None:
    async def draw() -> list[str]:
        picked: list[str] = []
        async with router_world("a", "b", "c") as world:

            def probe(mesh: Mesh, request: Request) -> None:
                picked.extend(mesh.pick(None, request).id for _ in range(300))

            await look(world, probe)
        return picked

    first, second = await draw(), await draw()
    assert first == second
    assert min(Counter(first).values()) > 60


@in_loop
async def test_prefix_comes_from_the_events_and_is_kept_apart_by_salt() -> None:
    async with router_world("a", "b") as world:
        world.engines["a"].store(PROMPT[:32])
        world.engines["b"].store(PROMPT[:16])
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(PROMPT) == {"a": 32, "b": 16}, "events came")

        def probe(mesh: Mesh, request: Request) -> None:
            a, b = sorted(mesh.engines(), key=lambda engine: engine.id)
            assert mesh.prefix(request) == {"a": 32, "b": 16}
            assert mesh.pick(None, request, prefix=True) == a
            assert mesh.pick(None, request, prefix=True, exclude=[a]) == b
            assert (mesh.uncached(a, request), mesh.uncached(b, request)) == (18, 34)

        await look(world, probe)

        def other_tenant(mesh: Mesh, request: Request) -> None:
            assert mesh.prefix(request) == {}

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            other_tenant(mesh, request)
            async for tokens in mesh.pick(None, request).start_generate(request):
                yield tokens

        answer = await serve_with(world, body, PROMPT, salt="tenant")
        assert answer.result.reason == "length"


@in_loop
async def test_a_lost_engine_takes_its_prefixes_along() -> None:
    async with router_world("a", "b") as world:
        world.engines["a"].store(PROMPT)
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(PROMPT) == {"a": 48}, "events came")
        world.engines["a"].die()
        await eventually(lambda: len(world.router.registry.joined()) == 1, "a is lost")
        assert index is not None
        assert index.lookup(PROMPT) == {}


@in_loop
async def test_reservations_show_in_the_load_while_the_work_lasts() -> None:
    async with router_world("a", "b", labels={"a": ["decode"], "b": ["prefill"]}) as world:
        a, b = world.engines["a"], world.engines["b"]
        book = world.router.serving.book
        b.paused.add("RemoteSend")
        a.paused.add("decode")
        answer = world.gateway.start(PROMPT, strategy="balanced")
        await b.saw(type(await b.saw(object)))
        await a.saw(object, 2)
        assert (book.load("b", EngineLoad()).uncached_tokens, book.load("b", EngineLoad()).sequences) == (
            45,
            0,
        )
        assert (book.load("a", EngineLoad()).uncached_tokens, book.load("a", EngineLoad()).sequences) == (
            5,
            1,
        )
        b.resume("RemoteSend")
        await eventually(lambda: book.load("b", EngineLoad()).uncached_tokens == 0, "sent")
        assert book.load("a", EngineLoad()).uncached_tokens == 5
        a.resume("decode")
        await answer.wait()
