"""Clusters as a strategy sees them: who stands where, the best cache of each, the link between two."""

from __future__ import annotations

from typing import Any

from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Chunks, Mesh, Request
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
)

PROMPT = list(range(200))


async def joined(world: World) -> None:
    """Two clusters, and an engine that says none."""
    world.add_engine("a1", cluster="a", labels=["prefill"])
    world.add_engine("a2", cluster="a")
    world.add_engine("b1", cluster="b", labels=["decode"])
    world.add_engine("n1")
    await world.list_engines()


@in_loop
async def test_engines_by_cluster() -> None:
    seen: dict[str, Any] = {}

    async def body(mesh: Mesh, request: Request) -> Chunks:
        seen["clusters"] = mesh.clusters
        seen["of"] = {each: sorted(e.id for e in mesh.engines(cluster=each)) for each in mesh.clusters}
        seen["decode in a"] = [e.id for e in mesh.engines("decode", cluster="a")]
        seen["decode in a, strictly"] = mesh.engines("decode", strict=True, cluster="a")
        seen["nowhere"] = mesh.engines(cluster="c")
        seen["picked"] = {mesh.pick("decode", request, cluster="a").id for _ in range(20)}
        seen["cluster"] = {e.id: e.cluster for e in mesh.engines()}
        yield mesh.pick("decode", request, cluster="b").start_generate(request)

    async with router_world() as world:
        await joined(world)
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert answer.result.engines == ["b1"]
    assert seen["clusters"] == ["", "a", "b"]
    assert seen["of"] == {"": ["n1"], "a": ["a1", "a2"], "b": ["b1"]}
    assert seen["decode in a"] == ["a2"]
    assert seen["decode in a, strictly"] == []
    assert seen["nowhere"] == []
    assert seen["picked"] == {"a2"}
    assert seen["cluster"] == {"a1": "a", "a2": "a", "b1": "b", "n1": ""}


@in_loop
async def test_a_pick_in_a_cluster_without_engines_finds_nobody() -> None:
    async def body(mesh: Mesh, request: Request) -> Chunks:
        yield mesh.pick(None, request, cluster="gone").start_generate(request)

    async with router_world() as world:
        await joined(world)
        answer = await serve_with(world, body, PROMPT, ttl_s=0.5)
        assert answer.ended is not None
        assert answer.ended.code == "no_engines"


@in_loop
async def test_the_best_cache_of_each_cluster() -> None:
    seen: dict[str, int] = {}

    async def body(mesh: Mesh, request: Request) -> Chunks:
        seen.update(mesh.prefix_by_cluster(request))
        yield mesh.pick(None, request, prefix=True, cluster="a").start_generate(request)

    async with router_world() as world:
        await joined(world)
        for engine_id, count in (("a1", 32), ("a2", 96), ("b1", 64)):
            world.engines[engine_id].store(PROMPT[:count])
        index = world.router.prefixes.index
        assert index is not None
        await eventually(lambda: len(index.lookup(PROMPT)) == 3, "events came")
        answer = await serve_with(world, body, PROMPT)
        assert answer.result.engines == ["a2"]
    assert seen == {"a": 96, "b": 64}


@in_loop
async def test_the_link_between_two_clusters_is_the_best_of_their_pairs() -> None:
    seen: list[float] = []

    async def body(mesh: Mesh, request: Request) -> Chunks:
        seen.extend(mesh.cluster_link(*pair) for pair in (("a", "b"), ("b", "a"), ("a", "a")))
        yield mesh.pick(None, request).start_generate(request)

    async with router_world() as world:
        await joined(world)
        for source, nbytes in (("a1", 1000), ("a2", 3000)):
            sent = wire.Sent(0, "r", 10, 0, 10, nbytes, wire.Timings(transfer_s=2.0))
            world.router.serving.book.links.measure(source, "b1", sent)
        await serve_with(world, body, PROMPT)
    assert seen == [1500.0, 0.0, 0.0]
