"""A strategy lets a request have less than it asks for: it ends earlier, with the same tokens."""

from __future__ import annotations

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.control import Scalar
from microserve.services.router.authoring import Chunks, InvalidRequest, Mesh, Request
from microserve.services.simulation.trial.dry_run import try_strategy
from tests.support.router.router_world import expected_output, in_loop, router_world, serve_with, start_with
from tests.support.router.scripted_engine import output_token

PROMPT = list(range(50))
LIVE: list[tuple[Mesh, Request]] = []


async def short(mesh: Mesh, request: Request) -> Chunks:
    """Capped in its first run only; what it has said then holds."""
    LIVE[:] = [(mesh, request)]
    if not request.num_output_tokens:
        mesh.cap(request, max_tokens=6)
    yield mesh.pick("decode", request).start_generate(request)


async def split(mesh: Mesh, request: Request) -> Chunks:
    """The first token is sampled by the sender."""
    mesh.cap(request, max_tokens=6)
    decode = mesh.pick("decode", request)
    grant = await decode.prep_recv(request)
    mesh.pick("prefill", request, exclude=[decode]).remote_send(request, grant)
    yield decode.start_generate(request, begin=grant.end, grant=grant)


async def raced(mesh: Mesh, request: Request) -> Chunks:
    mesh.cap(request, max_tokens=6)
    yield await mesh.race(request, *mesh.engines())


@pytest.mark.parametrize("body", [short, split, raced])
def test_an_answer_ends_at_its_cap_and_nothing_else_of_its_sampling_is_another(body: object) -> None:
    asked = SamplingParams(
        max_tokens=20, min_tokens=9, temperature=0.5, seed=7, ignore_eos=True, logit_bias={4: 1.0}
    )

    @in_loop
    async def main() -> None:
        async with router_world("a", "b", labels={"a": ["decode"]}) as world:
            answer = await serve_with(world, body, PROMPT, params=asked)  # type: ignore[arg-type]
            assert (answer.result.reason, answer.token_ids) == ("length", expected_output(6))
            assert answer.result.capped_to == 6
            sampled = [
                call.sampling
                for engine in world.engines.values()
                for kind in (wire.StartGenerate, wire.RemoteSend)
                for call in engine.of(kind)
            ]
            assert sampled and set(map(repr, sampled)) == {
                repr(msgspec.structs.replace(asked, max_tokens=6, min_tokens=6))
            }

    main()


@in_loop
async def test_what_asks_for_less_stays_as_it_is_and_of_two_caps_the_lower_counts() -> None:
    async def twice(mesh: Mesh, request: Request) -> Chunks:
        mesh.cap(request, max_tokens=5, logprobs=2)
        mesh.cap(request, max_tokens=9, logprobs=0)
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        answer = await serve_with(world, twice, PROMPT, max_tokens=3)
        assert (answer.token_ids, answer.result.capped_to) == (expected_output(3), 0)
        answer = await serve_with(world, twice, PROMPT, max_tokens=30, logprobs=3)
        assert (answer.token_ids, answer.result.capped_to) == (expected_output(5), 5)
        told = [call.sampling.logprobs for call in world.engines["a"].of(wire.StartGenerate)]
        assert told == [None, 0], "none were asked for, or the chosen token's alone"
        [explained], _ = world.router.serving.explain(answer.request_id)
        notes = [(note.text, note.values) for note in explained.attempts[0].notes]
        assert notes[0] == ("capped", {"max_tokens": 5, "logprobs": 2})


@pytest.mark.parametrize("how", ["lost", "moved"])
def test_it_holds_on_the_engine_where_the_answer_goes_on(how: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", "b", labels={"a": ["decode"]}) as world:
            first = world.engines["a"]
            first.manual = True
            answer = world.gateway.start(PROMPT, max_tokens=40, strategy=start_with(world, short))
            await first.saw(wire.StartGenerate)
            first.emit(wire.Delta(answer.request_id, 0, [output_token(0), output_token(1)]))
            await answer.tokens(2)
            if how == "lost":
                first.die()
            else:
                mesh, request = LIVE[0]
                assert mesh.move(request, next(engine for engine in mesh.engines() if engine.id == "b"))
            assert (await answer.wait()).reason == "length"
            assert (answer.token_ids, answer.result.capped_to) == (expected_output(6), 6)
            assert world.engines["b"].of(wire.StartGenerate)[-1].sampling.max_tokens == 6

    main()


@in_loop
async def test_it_outlives_the_strategy_s_own_mistake() -> None:
    async def mistaken(mesh: Mesh, request: Request) -> Chunks:
        mesh.cap(request, max_tokens=6)
        yield mesh.engines()[7].start_generate(request)

    async with router_world("a", "b") as world:
        answer = await serve_with(world, mistaken, PROMPT, max_tokens=40)
        assert (answer.result.reason, answer.token_ids) == ("length", expected_output(6))


@pytest.mark.parametrize("have", [4, 6, 9])
def test_of_an_answer_that_another_router_brought_to_its_cap_only_the_end_is_told(have: int) -> None:
    async def always(mesh: Mesh, request: Request) -> Chunks:
        mesh.cap(request, max_tokens=6)
        yield mesh.pick(None, request).start_generate(request)

    @in_loop
    async def main() -> None:
        async with router_world("a") as world:
            answer = await serve_with(world, always, PROMPT, max_tokens=40, output=expected_output(have))
            assert (answer.result.reason, answer.token_ids) == ("length", expected_output(max(6, have)))
            assert len(world.engines["a"].of(wire.StartGenerate)) == (have < 6)

    main()


WRONG: list[tuple[dict[str, object], bool, str]] = [
    ({"max_tokens": 0}, False, "cap: max_tokens is 0, not a whole number from 1"),
    ({"max_tokens": True}, False, "cap: max_tokens is True"),
    ({"max_tokens": 2.5}, False, "cap: max_tokens is 2.5"),
    ({"logprobs": -1}, False, "cap: logprobs is -1, not a whole number from 0"),
    ({"max_tokens": 6}, True, "a request is capped before it is sent to an engine"),
]


@pytest.mark.parametrize(("cap", "is_late", "told"), WRONG)
def test_what_is_no_cap_or_comes_too_late_is_the_author_s_mistake(
    cap: dict[str, int], is_late: bool, told: str
) -> None:
    async def wrong(mesh: Mesh, request: Request) -> Chunks:
        generation = mesh.pick(None, request).start_generate(request) if is_late else None
        mesh.cap(request, **cap)
        if generation is not None:
            yield generation

    @in_loop
    async def main() -> None:
        async with router_world("a") as world:
            with structlog.testing.capture_logs() as lines:
                answer = await serve_with(world, wrong, PROMPT, max_tokens=8)
            assert (answer.token_ids, answer.result.capped_to) == (expected_output(8), 0)
            [line] = [line for line in lines if line["event"] == log.STRATEGY_FAILED]
            assert told in line["error"]

    main()


@in_loop
async def test_another_sampling_cannot_be_had() -> None:
    """Neither by a request of one's own nor by what it is made of."""

    async def sly(mesh: Mesh, request: Request) -> Chunks:
        other = Request(request.request_id, request.tokens, SamplingParams(seed=9), request.deadline, 16)
        yield mesh.pick(None, request).start_generate(other)

    async def slyer(mesh: Mesh, request: Request) -> Chunks:
        request.sampling.seed = 9  # type: ignore[misc]
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        for body in (sly, slyer):
            answer = await serve_with(world, body, PROMPT, seed=3)
            assert answer.token_ids == expected_output(4)
        assert [call.sampling.seed for call in world.engines["a"].of(wire.StartGenerate)] == [3, 3]


@in_loop
async def test_a_request_can_be_refused_by_the_field_that_is_not_wanted() -> None:
    async def without(mesh: Mesh, request: Request) -> Chunks:
        if request.sampling.logprobs is not None and not request.num_output_tokens:
            raise InvalidRequest("no log-probabilities at this hour", field="logprobs")
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        with structlog.testing.capture_logs() as lines:
            refused = await serve_with(world, without, PROMPT, logprobs=0)
        assert (refused.result.code, refused.result.field) == ("invalid_request", "logprobs")
        assert not [line for line in lines if line["event"] == log.STRATEGY_FAILED]
        assert (await serve_with(world, without, PROMPT)).token_ids == expected_output(4)


CAPPED = """
from microserve.services.router.authoring import strategy

@strategy
async def frugal(mesh, request, *, most: int = 7):
    mesh.cap(request, max_tokens=most)
    decode = mesh.pick(None, request)
    other = mesh.pick(None, request, exclude=[decode])
    yield await mesh.race(request, decode, other, after_s=0.05)
"""


@pytest.mark.slow
def test_in_a_simulated_mesh_with_slow_and_lost_engines_its_tokens_are_the_model_s() -> None:
    parameters: dict[str, Scalar] = {"most": 3}
    assert try_strategy("frugal", CAPPED, parameters, [[], [], []]).found == []
