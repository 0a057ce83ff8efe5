"""What engines do for us: KV sent from one to another, and one prompt answered cold, cached and transferred.

Owns the prompts, which are nobody's else, and that all of it is given back. Judges nothing.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from functools import partial

from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import MeshError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.command.doctor.observation import AnswerSeen, CacheSeen, LinkSeen
from microserve.services.links.engine import EngineConnection
from microserve.services.links.stream import TokenStream

TRY_S = 30.0
"""Longest time of one thing that is tried."""
SENT_NBYTES = 4 << 20
"""Of KV that is sent to measure a link, about: a third of a second at 100 Mbit/s."""
MAX_BLOCKS = 16
NUM_TIMED = 2
MIN_TOLD_S = 0.05
"""Engines that are busy, or models whose KV is small, take as long for other reasons."""
ANSWER_TOKENS = 8
_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)


async def measure_link(source: EngineConnection, target: EngineConnection) -> LinkSeen:
    """Send one block and many, of KV that the sender has computed already; the best of several each. What the
    many take longer is the link's, unless that is too little to tell it from the noise."""
    prompts = [_prompt(target.info, num_tokens) for num_tokens in sorted({*_sizes(target.info)})]
    best: list[tuple[float, wire.Sent]] = []
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(TRY_S):
            for tokens in prompts:
                timed = [await _sent_once(source, target, tokens) for _ in range(1 + NUM_TIMED)]
                best.append(min(timed[1:], key=lambda each: each[0]))  # the first has computed it
    except TimeoutError:
        if not best:
            return _link(source, target, error=f"one block was not sent within {TRY_S:g} s")
        return _link(source, target, best[0][1], asyncio.get_running_loop().time() - began)
    except MeshError as error:
        return _link(source, target, error=error.detail)
    (few_s, few), (many_s, many) = best[0], best[-1]
    if many_s - few_s < MIN_TOLD_S:
        return _link(source, target, many, many_s)
    return _link(source, target, many, many_s - few_s, less_nbytes=few.nbytes)


async def _sent_once(
    source: EngineConnection, target: EngineConnection, tokens: list[int]
) -> tuple[float, wire.Sent]:
    """Seconds from the question until every byte is put, and the answer; nothing is kept of it."""
    request_id = _request_id()
    try:
        grant = await _grant(target, request_id, tokens, len(tokens))
        began = asyncio.get_running_loop().time()
        sent = await _send(source, request_id, tokens, grant)
        return asyncio.get_running_loop().time() - began, sent
    finally:
        target.abort(request_id)
        source.abort(request_id)


async def try_cache(engine: EngineConnection, other: EngineConnection | None) -> CacheSeen:
    """One prompt: by ``engine`` twice, then by ``other`` with the KV that ``engine`` sends it."""
    num_tokens = _num_tokens(engine.info)
    tokens = _prompt(engine.info, num_tokens + 3)
    seen = CacheSeen(is_exact=engine.info.numerics.is_exact)
    for how in ("cold", "cached"):
        seen.answers.append(await _answer(how, engine, tokens))
    if other is None:
        return seen
    request_id = _request_id()
    try:
        async with asyncio.timeout(TRY_S):
            grant = await _grant(other, request_id, tokens, num_tokens)
            await _send(engine, request_id, tokens, grant)
        answer = await _answer("transferred", other, tokens, request_id, grant, engine.info.numerics.name)
    except (MeshError, TimeoutError) as error:
        answer = AnswerSeen("transferred", other.engine_id, error=_words(error))
    finally:
        engine.abort(request_id)
        other.abort(request_id)
    is_exact = seen.is_exact and engine.info.numerics == other.info.numerics
    return CacheSeen([*seen.answers, answer], is_exact)


def can_send(source: EngineConnection, target: EngineConnection) -> bool:
    """They say that KV goes from the one to the other."""
    return source is not target and source.info.does(REMOTE_SEND) and target.info.does(PREP_RECV)


async def _answer(
    how: str,
    engine: EngineConnection,
    tokens: list[int],
    request_id: str = "",
    grant: Grant | None = None,
    numerics: str = "",
) -> AnswerSeen:
    request_id = request_id or _request_id()
    stream = TokenStream(request_id, engine.engine_id)
    engine.streams.add(stream)
    token_ids: list[int] = []
    try:
        async with asyncio.timeout(TRY_S):
            build = partial(
                wire.StartGenerate,
                request_id=request_id,
                begin=0 if grant is None else grant.end,
                sampling=_GREEDY,
                ttl_s=TRY_S,
                grant_id=None if grant is None else grant.grant_id,
                numerics=numerics,
            )
            call_id, accepted = engine.begin(build, *([encode_tokens(tokens)] if grant is None else []))
            stream.accepted = accepted
            await engine.wait(call_id, accepted, TRY_S)
            while True:
                chunk = await stream.next()
                token_ids += chunk.token_ids
                if chunk.finished is not None:
                    usage = chunk.finished.usage
                    found = usage.cached_tokens + usage.received_tokens
                    return AnswerSeen(how, engine.engine_id, token_ids, found)
    except (MeshError, TimeoutError) as error:
        return AnswerSeen(how, engine.engine_id, token_ids, error=_words(error))
    finally:
        engine.streams.remove(stream)
        if grant is None:
            engine.abort(request_id)


async def _grant(engine: EngineConnection, request_id: str, tokens: list[int], end: int) -> Grant:
    build = partial(wire.PrepRecv, request_id=request_id, end=end, ttl_s=TRY_S)
    return (await engine.call(build, wire.Granted, encode_tokens(tokens), timeout_s=TRY_S)).grant


async def _send(engine: EngineConnection, request_id: str, tokens: list[int], grant: Grant) -> wire.Sent:
    build = partial(
        wire.RemoteSend,
        request_id=request_id,
        begin=grant.matched,
        end=grant.end,
        grant=grant,
        lane=0,
        ttl_s=TRY_S,
    )
    return await engine.call(build, wire.Sent, encode_tokens(tokens), timeout_s=TRY_S)


def _sizes(info: wire.EngineInfo) -> tuple[int, int]:
    return info.block_size, _num_tokens(info)


def _num_tokens(info: wire.EngineInfo) -> int:
    """Whole blocks of about ``SENT_NBYTES``, that fit a pool with others in it."""
    shape = info.geometry
    item_nbytes = _ITEM_NBYTES.get(shape.dtype, 2)
    block_nbytes = (
        2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item_nbytes * info.block_size or 1
    )
    room = min(info.max_model_len - ANSWER_TOKENS - 4, info.num_blocks * info.block_size // 4)
    most = max(1, min(MAX_BLOCKS, room // info.block_size))
    return min(most, max(1, SENT_NBYTES // block_nbytes)) * info.block_size


def _prompt(info: wire.EngineInfo, num_tokens: int) -> list[int]:
    """Random, so that nobody has it."""
    draw = random.SystemRandom()
    return [draw.randrange(info.vocab_size) for _ in range(num_tokens)]


def _request_id() -> str:
    return f"doctor-{secrets.token_hex(8)}"


def _link(
    source: EngineConnection,
    target: EngineConnection,
    sent: wire.Sent | None = None,
    seconds: float = 0.0,
    *,
    less_nbytes: int = 0,
    error: str = "",
) -> LinkSeen:
    heap, nbytes = (sent.heap, sent.nbytes - less_nbytes) if sent is not None else ("", 0)
    return LinkSeen(source.engine_id, target.engine_id, heap, nbytes, seconds, error)


def _words(error: MeshError | TimeoutError) -> str:
    return error.detail if isinstance(error, MeshError) else f"not done within {TRY_S:g} s"
