"""Answers of one engine alone, as what answers by two are held against; and how they are compared.

The oracle is a request that one engine serves by itself, from the same cached prefix, under a salt of its
own: a cold run takes another path of computation, and of an engine that is not exact other bits.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.wire_client import Stream, WireClient

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2)
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=5, temperature=0.9, top_k=40, top_p=0.95, seed=7, ignore_eos=True)

LOGPROB_TOLERANCE = 0.02
"""Between answers of a class that is not exact, by the same path of computation."""


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: list[TokenLogprob]

    @classmethod
    def of(cls, stream: Stream) -> Answer:
        assert stream.finished is not None
        assert stream.finished.reason in ("length", "stop"), stream.finished
        return cls(list(stream.token_ids), list(stream.logprobs))

    def behind(self, token: int, logprob: TokenLogprob | None) -> Answer:
        """This, and before it a first token that somebody else brought."""
        return Answer([token, *self.token_ids], [*([logprob] if logprob else []), *self.logprobs])


def make_prompt(info: EngineInfo, length: int, seed: int | str) -> list[int]:
    """Random tokens that end no sequence."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(20, min(250, info.vocab_size)) for _ in range(length)]


async def generate(
    client: WireClient,
    request_id: str,
    tokens: list[int],
    sampling: SamplingParams = GREEDY,
    *,
    salt: str = "",
) -> Stream:
    """The whole stream of one request that this engine serves by itself."""
    await client.start_generate(request_id, 0, sampling, tokens, salt=salt)
    return await client.finished(request_id)


async def warm(client: WireClient, name: str, tokens: list[int], salt: str) -> None:
    """Let the engine have this prefix in its cache, as far as whole blocks go."""
    if tokens:
        await generate(client, f"warm {name} {len(tokens)}", tokens, ONE, salt=salt)


async def alone(
    client: WireClient,
    name: str,
    tokens: list[int],
    sampling: SamplingParams = GREEDY,
    *,
    cached: Sequence[int] = (),
) -> Answer:
    """What one engine says by itself, with prefixes of these lengths computed before, one upon the other."""
    salt = f"alone {name}"
    for length in cached:
        await warm(client, salt, tokens[:length], salt)
    return Answer.of(await generate(client, salt, tokens, sampling, salt=salt))


def require_equal(got: Answer, expected: Answer, info: EngineInfo, what: object = "") -> None:
    """Tokens, and log-probabilities: their bits in an exact class, else within the tolerance."""
    assert got.token_ids == expected.token_ids, (what, got, expected)
    assert len(got.logprobs) == len(expected.logprobs), (what, got, expected)
    if info.numerics.is_exact:
        assert list(map(_bits, got.logprobs)) == list(map(_bits, expected.logprobs)), (what, got, expected)
        return
    for mine, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert abs(mine.logprob - theirs.logprob) <= LOGPROB_TOLERANCE, (what, mine, theirs)


def _bits(logprob: TokenLogprob) -> tuple[bytes, list[tuple[int, bytes]]]:
    return struct.pack("d", logprob.logprob), [(token, struct.pack("d", each)) for token, each in logprob.top]
