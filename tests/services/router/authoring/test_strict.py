"""Labels as roles: who bears the label itself, or nobody."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from microserve.services.links.stream import Tokens
from microserve.services.router.authoring import Mesh, Request
from tests.support.router.router_world import expected_output, in_loop, router_world, serve_with

PROMPT = list(range(40))


@in_loop
async def test_a_strict_label_is_a_role() -> None:
    seen: list[list[str]] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        for label in ("big", "none"):
            seen.append(sorted(engine.id for engine in mesh.engines(label, strict=True)))
            seen.append(sorted(engine.id for engine in mesh.engines(label)))
        big = mesh.pick("big", request, strict=True)
        async for tokens in big.start_generate(request):
            yield tokens

    async def excluded(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        engine = mesh.pick("big", request, strict=True, exclude=mesh.engines("big", strict=True))
        async for tokens in engine.start_generate(request):
            yield tokens

    async with router_world("a", "b", "c", labels={"a": ["big"], "b": ["small"]}) as world:
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert world.calls() == [("a", "StartGenerate")]
        assert seen == [["a"], ["a", "c"], [], ["c"]]
        answer = await serve_with(world, excluded, PROMPT, ttl_s=0.5)
        assert answer.ended is not None
        assert answer.ended.code == "no_engines"
        assert "no engine with the label 'big'" in answer.ended.detail
