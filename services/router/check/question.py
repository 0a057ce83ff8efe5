"""One question to one pair of engines: cold, cached, and with KV that the other one sent.

The prompt is drawn anew for each check and has a salt of its own, so its blocks are nobody else's and the
first answer is cold. All of it goes by the handles that strategies have, each answer in a scope of its own,
so that nothing is left at an engine whatever happens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from microserve.protocol.messages.engine import EngineInfo, Usage
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.action.generating import Generating
from microserve.services.router.authoring.view import OwnLabels
from microserve.services.router.check.verdict import Answer
from microserve.services.router.engines.connection import Connection
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope

MAX_TOKENS = 8
NUM_LOGPROBS = 5
"""Of each token, and of so many others."""

MakeScope = Callable[[Request], RequestScope]


@dataclass(frozen=True)
class Question:
    """What all three are asked."""

    name: str
    """Of this check alone: salt, and the beginning of its requests' ids."""
    tokens: list[int]
    end: int
    """KV of ``tokens[:end]`` is sent; behind it stands at least one token that the receiver computes."""
    block_size: int
    deadline: float

    def request(self, what: str) -> Request:
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=NUM_LOGPROBS
        )
        return Request(
            f"{self.name}-{what}", self.tokens, sampling, self.deadline, self.block_size, salt=self.name
        )


def draw_question(name: str, source: EngineInfo, deadline: float, rng: random.Random) -> Question | None:
    """Two blocks and a half; None: the model's context, or the engine's pool, is too short for that."""
    unit = math.lcm(source.block_size, source.split_tokens)
    end = 2 * unit
    num_tokens = end + unit // 2 + 1
    if num_tokens + MAX_TOKENS > source.max_model_len or source.vocab_size < 1:
        return None
    tokens = [rng.randrange(source.vocab_size) for _ in range(num_tokens)]
    return Question(name, tokens, end, source.block_size, deadline)


def num_blocks_of(info: EngineInfo) -> int:
    """That the question takes at most on such an engine, in all three parts."""
    unit = math.lcm(info.block_size, info.split_tokens)
    return 3 * -(-(3 * unit + MAX_TOKENS + 1) // max(1, info.block_size))


async def ask(source: Connection, question: Question, what: str, make_scope: MakeScope) -> Answer:
    """All of it there."""
    request = question.request(what)
    with closing(make_scope(request)) as scope:
        return await _answer(_handle(source, scope).start_generate(request))


async def ask_across(
    source: Connection, target: Connection, question: Question, what: str, make_scope: MakeScope
) -> Answer:
    """The prompt's KV there, sent to ``target``, which answers."""
    request = question.request(what)
    with closing(make_scope(request)) as scope:
        scope.is_check = True
        sender, receiver = _handle(source, scope), _handle(target, scope)
        grant = await receiver.prep_recv(request, end=question.end)
        sending = sender.remote_send(request, grant, end=question.end, first_token=False)
        answer = await _answer(receiver.start_generate(request, begin=grant.end, grant=grant))
        sent = await sending
        return answer._replace(num_computed=answer.num_computed + sent.computed)


def _handle(connection: Connection, scope: RequestScope) -> Engine:
    return Engine(connection, OwnLabels(), scope, lambda engine_id: 0)


async def _answer(generating: Generating) -> Answer:
    token_ids: list[int] = []
    logprobs = []
    usage = Usage()
    async for chunk in generating:
        token_ids += chunk.token_ids
        logprobs += chunk.logprobs
        if chunk.finished is not None:
            usage = chunk.finished.usage
    computed = usage.prompt_tokens - usage.cached_tokens - usage.received_tokens + usage.output_tokens
    return Answer(token_ids, logprobs, max(0, computed))
