"""What a gateway asks of its helpers: a conversation's text, and all that is made of a large body.

Owns three processes: what is long waits for each other and never before a conversation that is short, and
grammars have one of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from microserve.gateway.helper.jobs import (
    Answered,
    Asked,
    CheckedGrammar,
    CheckGrammar,
    Job,
    Prepare,
    Prepared,
    Refused,
    Render,
    Rendered,
    Result,
    Setup,
    Wanting,
)
from microserve.gateway.helper.process import HelperDied, HelperProcess
from microserve.gateway.helper.work import GRAMMAR_CPU_S, cpu_budget_s
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError, error_for
from microserve.protocol.messages.request.sampling import Grammar

INLINE_BODY_NBYTES = 64 << 10
"""Smaller bodies are parsed in the loop: within a millisecond, whatever is in them."""
SHORT_MESSAGES = 64
"""A template may take a time that grows with the square of these: longer ones wait with the large bodies."""
BODIES_MEMORY_MB = 1536
"""For a body of 32 MB, its text, and its tokens as objects; templates alone have the default."""
GRAMMARS_MEMORY_MB = 1024
"""A large vocabulary as llguidance has it, and a grammar."""
WALL_S_PER_CPU_S = 5.0
"""On a machine that has other things to do."""
START_S = 30.0

Find = Callable[[Mapping[str, str]], Awaitable[Mapping[str, bytes]]]
"""What was kept under these names, which came by these fields. Raises what says that there is none."""


class Helpers:
    """One per gateway; ``close`` it."""

    def __init__(self, setup: Setup) -> None:
        self.adapters: Callable[[], Collection[str]] = tuple
        """Names that a body may have as its model, besides the model's."""
        self._setup = setup
        self._templates = HelperProcess("templates", setup)
        self._bodies = HelperProcess("bodies", msgspec.structs.replace(setup, memory_mb=BODIES_MEMORY_MB))

        self._grammars = HelperProcess(
            "grammars", msgspec.structs.replace(setup, memory_mb=GRAMMARS_MEMORY_MB)
        )

    @property
    def pids(self) -> list[int]:
        """Of the processes that have been started."""
        return [each.pid for each in self._all if each.pid is not None]

    @property
    def _all(self) -> tuple[HelperProcess, ...]:
        return self._templates, self._bodies, self._grammars

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Raises :class:`InvalidRequest` when the template refuses it, or takes more than it may have.
        """
        wall_s = START_S + WALL_S_PER_CPU_S * self._setup.template_cpu_s
        job = Render(msgspec.json.encode(Asked(messages, tools or None, options or {})))
        process = self._templates if len(messages) <= SHORT_MESSAGES else self._bodies
        answer = await _ask(process, job, b"", wall_s, "messages", None)
        assert answer is not None
        if not isinstance(answer[0], Rendered):
            raise InternalError("a helper gave another job's answer")
        return answer[0].text

    async def check(
        self, grammar: Grammar, is_strict: bool, is_wanted: Callable[[], bool] | None = None
    ) -> tuple[str, list[str]] | None:
        """The text of a grammar that can be enforced, and what was relaxed for that; None when its turn came
        and nobody wanted it any more.

        Raises :class:`InvalidRequest` for one that cannot, or takes more than it may have."""
        job = CheckGrammar(grammar.kind, grammar.text, is_strict)
        wall_s = START_S + WALL_S_PER_CPU_S * GRAMMAR_CPU_S
        answer = await _ask(self._grammars, job, b"", wall_s, "grammar", is_wanted, what="the grammar")
        if answer is None:
            return None
        if not isinstance(answer[0], CheckedGrammar):
            raise InternalError("a helper gave another job's answer")
        return answer[0].text, answer[0].warnings

    async def prepare(
        self,
        kind: str,
        body: bytes,
        limits: ModelLimits,
        *,
        field: str,
        is_wanted: Callable[[], bool],
        find: Find,
        kept: Mapping[str, bytes] | None = None,
    ) -> tuple[GenerateRequest, list[Sequence[int]]] | None:
        """The request of a large body, without its prompt, and the ids of its prompts; None when its turn
        came and nobody wanted it any more. ``kind``: the name of its dialect; ``field``: of it, that becomes
        the prompt; ``find``: brings what the body needs, where that is not in ``kept``. Raises what parsing
        and tokenising it here would."""
        answer = await self._prepare(kind, body, limits, field, is_wanted, kept)
        if answer is not None and isinstance(answer[0], Wanting):
            kept = await find(answer[0].names)
            answer = await self._prepare(kind, body, limits, field, is_wanted, kept)
        if answer is None:
            return None
        prepared, bulk = answer
        if not isinstance(prepared, Prepared):
            raise InternalError("a helper gave another job's answer")
        num_ids = sum(prepared.lengths)
        ids = array("I")
        ids.frombytes(memoryview(bulk)[: num_ids * ids.itemsize])
        prompts: list[Sequence[int]] = []
        begin = 0
        for length in prepared.lengths:
            prompts.append(ids[begin : begin + length])
            begin += length
        request = msgspec.json.decode(prepared.request, type=GenerateRequest)
        request.context = bulk[num_ids * ids.itemsize :]
        return request, prompts

    async def reply(
        self, kind: str, body: bytes, limits: ModelLimits, *, field: str
    ) -> tuple[bytes, list[str]]:
        """The whole reply to a large body for which no router is asked, and what its client is to be warned
        of."""
        answer = await self._prepare(kind, body, limits, field, None)
        assert answer is not None
        if not isinstance(answer[0], Answered):
            raise InternalError("a helper gave another job's answer")
        return answer[1], answer[0].warnings

    async def _prepare(
        self,
        kind: str,
        body: bytes,
        limits: ModelLimits,
        field: str,
        is_wanted: Callable[[], bool] | None,
        kept: Mapping[str, bytes] | None = None,
    ) -> tuple[Result, bytes] | None:
        sizes = {name: len(data) for name, data in (kept or {}).items()}
        job = Prepare(
            kind, limits.max_model_len, limits.vocab_size, sizes, kept is not None, [*self.adapters()]
        )
        if kept:
            body = b"".join([body, *kept.values()])
        wall_s = START_S + WALL_S_PER_CPU_S * (self._setup.template_cpu_s + cpu_budget_s(len(body)))
        return await _ask(self._bodies, job, body, wall_s, field, is_wanted)

    def end(self, error: MeshError) -> None:
        """Nothing new from now on: what runs or waits raises ``error``."""
        for process in self._all:
            process.end(error)

    async def close(self) -> None:
        for process in self._all:
            await process.close()


async def _ask(
    process: HelperProcess,
    job: Job,
    bulk: bytes,
    wall_s: float,
    field: str,
    is_wanted: Callable[[], bool] | None,
    what: str = "the prompt",
) -> tuple[Result, bytes] | None:
    try:
        answer = await process.ask(job, bulk, wall_s=wall_s, is_wanted=is_wanted)
    except HelperDied as death:
        if not death.is_over_budget:
            raise
        raise InvalidRequest(f"{what} takes more time or memory than it may", field=field) from None
    if answer is not None and isinstance(refused := answer[0], Refused):
        raise error_for(
            refused.code, refused.detail, field=refused.field, retry_after_s=refused.retry_after_s
        )
    return answer
