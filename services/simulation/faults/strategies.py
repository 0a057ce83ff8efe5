"""Strategies that nobody would serve with: they make meetings that are rare under those of routers.

Several lanes fill one grant, rows behind a gap come in first, writers come after their grant's end, a send
fails and its request goes on. All of it is what an author may do, so every promise holds here too. Imports
what operators' files may import.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from microserve.services.router.authoring import (
    CapacityError,
    Engine,
    Entrant,
    Generating,
    Mesh,
    PeerError,
    Request,
    Tokens,
    strategy,
)


def _trio(mesh: Mesh, request: Request) -> tuple[Engine, Engine, Engine]:
    """One that decodes and two that prefill; in a small mesh some are the same."""
    decode = mesh.pick("decode", request)
    first = mesh.pick("prefill", request, exclude=[decode])
    second = mesh.pick("prefill", request, exclude=[decode, first])
    return decode, first, second


@strategy
async def halves(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """Two senders fill one grant; that of the later half is asked first, and samples."""
    decode, first, second = _trio(mesh, request)
    grant = await decode.prep_recv(request)
    middle = (grant.matched + grant.end) // 2
    second.remote_send(request, grant, begin=middle)
    first.remote_send(request, grant, end=middle, first_token=False)
    async for tokens in decode.start_generate(request, begin=grant.end, grant=grant):
        yield tokens


@strategy
async def lanes(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """Three lanes in any order, and the last tokens of the prompt are computed where it decodes."""
    decode, first, second = _trio(mesh, request)
    tail = min(max(1, request.num_tokens // 3), 6)
    grant = await decode.prep_recv(request, end=request.num_tokens - tail)
    cuts = sorted(mesh.rng.randint(grant.matched, grant.end) for _ in range(2))
    bounds = [grant.matched, *cuts, grant.end]
    parts = list(zip(bounds[:-1], bounds[1:], (first, second, first), strict=True))
    mesh.rng.shuffle(parts)
    for begin, end, sender in parts:
        sender.remote_send(request, grant, begin=begin, end=end, first_token=False)
    async for tokens in decode.start_generate(request, begin=grant.end, grant=grant):
        yield tokens


@strategy
async def raced(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """A disaggregated generation against a plain one of the sender's, in a random order."""
    decode, first, _ = _trio(mesh, request)
    grant = await decode.prep_recv(request)
    sending = first.remote_send(request, grant)

    def disaggregated() -> Generating:
        return decode.start_generate(request, begin=grant.end, after=sending)

    entrants: list[Entrant] = [disaggregated, first]
    if first == decode:
        entrants = [disaggregated]
    mesh.rng.shuffle(entrants)
    async for tokens in await mesh.race(request, *entrants, after_s=mesh.rng.choice((0.0, 0.01, 0.1))):
        yield tokens


@strategy
async def tailed(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """One sender, and the last tokens of the prompt are computed where it decodes."""
    decode, first, _ = _trio(mesh, request)
    end = request.num_tokens - min(max(1, request.num_tokens // 3), 6)
    grant = await decode.prep_recv(request, end=end)
    first.remote_send(request, grant, end=end)
    async for tokens in decode.start_generate(request, begin=end, grant=grant):
        yield tokens


@strategy
async def gathered(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """Two lanes into a grant that becomes prefix cache."""
    decode, first, second = _trio(mesh, request)
    grant = await decode.prep_recv(request, end=request.num_block_tokens)
    middle = (grant.matched + grant.end) // 2
    second.remote_send(request, grant, begin=middle, end=grant.end, first_token=False)
    first.remote_send(request, grant, end=middle, first_token=False)
    await decode.commit(request, grant)
    async for tokens in decode.start_generate(request):
        yield tokens


@strategy
async def regretted(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """The grant is given back under its writer, and another asked for at once."""
    decode, first, second = _trio(mesh, request)
    grant = await decode.prep_recv(request)
    first.remote_send(request, grant, first_token=False)
    await decode.release(request, grant)
    again = await decode.prep_recv(request)
    sending = second.remote_send(request, again)
    async for tokens in decode.start_generate(request, begin=again.end, after=sending):
        yield tokens


@strategy
async def patient(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """Waits for its send; when that fails, the same attempt goes on without it."""
    decode, first, _ = _trio(mesh, request)
    end = (request.num_tokens - 1) // request.block_size * request.block_size
    try:
        grant = await decode.prep_recv(request, end=end)
        await first.remote_send(request, grant, end=end, first_token=False)
    except (CapacityError, PeerError):
        decode.abort(request)
        generation = mesh.pick(None, request).start_generate(request)
    else:
        generation = decode.start_generate(request, begin=end, grant=grant)
    async for tokens in generation:
        yield tokens


PROVOKING = (halves, lanes, raced, tailed, gathered, regretted, patient)
