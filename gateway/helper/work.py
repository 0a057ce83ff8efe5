"""What a helper does with a job, and how much CPU time and memory it may take for that.

Owns the budgets: the kernel ends the process that has used one up, whatever it does at the time. Bodies are
``preparing.py``'s, imported at the first one: a template needs neither tokenizer nor schema.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microserve.gateway.helper.jobs import (
    Asked,
    CheckedGrammar,
    CheckGrammar,
    Job,
    Refused,
    Render,
    Rendered,
    Result,
    Setup,
)
from microserve.gateway.text.prompt.chat_template import ChatTemplate
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError
from microserve.protocol.messages.request.sampling import Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from microserve.gateway.helper.preparing import Preparer

BASE_CPU_S = 2.0
CPU_S_PER_MB = 1.5
"""Of a body; parsing and tokenising 1 MB of text takes about 0.2 s."""
GRAMMAR_CPU_S = 1.0
"""For one grammar; the largest that bounds let through takes a fifth of it."""
LOAD_CPU_S = 60.0
"""Once in a process: a vocabulary of any size."""
MAX_RENDERED_CHARS = 32 << 20
"""Of a template's text, whatever the model's limits are."""


def cpu_budget_s(body_nbytes: int) -> float:
    """For all that is done with a body, its template aside."""
    return BASE_CPU_S + CPU_S_PER_MB * body_nbytes / 1e6


@contextmanager
def cpu_budget(seconds: float) -> Iterator[None]:
    """Inside, this process has so many seconds of CPU time, or SIGPROF ends it. Budgets may be nested: what
    is used of an inner one is not used of the outer one."""
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)


class Worker:
    """``do`` one job after the other."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def do(self, job: Job, bulk: bytes) -> tuple[Result, bytes]:
        """The answer and its bulk. Never raises: what is wrong is an answer."""
        try:
            if isinstance(job, Render):
                asked = msgspec.json.decode(job.asked, type=Asked)
                return Rendered(self._render(asked.messages, asked.tools, asked.options)), b""
            if isinstance(job, CheckGrammar):
                return self._check(job), b""
            with cpu_budget(LOAD_CPU_S):
                preparer = self._preparer
            with cpu_budget(cpu_budget_s(len(bulk))):
                return asyncio.run(preparer.prepare(job, bulk))
        except MeshError as error:
            return Refused(error.code, error.detail, error.field, error.retry_after_s), b""
        except MemoryError:
            return Refused(InvalidRequest.code, "the request takes too much memory", None, 0.0), b""
        except Exception as error:
            return Refused(InternalError.code, f"in the helper: {error!r}"[:512], None, 0.0), b""

    def _check(self, job: CheckGrammar) -> CheckedGrammar:
        from microserve.gateway.grammar.checking import checked

        with cpu_budget(LOAD_CPU_S):
            tokenizer = self._constrained
        with cpu_budget(GRAMMAR_CPU_S):
            grammar, warnings = checked(
                tokenizer, Grammar(kind=job.kind, text=job.text), is_strict=job.is_strict
            )
        return CheckedGrammar(grammar.text, warnings)

    @cached_property
    def _constrained(self) -> LLTokenizer:
        from microserve.protocol.grammar.compiled import load_tokenizer

        return load_tokenizer(Path(self._setup.directory))

    @cached_property
    def _preparer(self) -> Preparer:
        from microserve.gateway.helper.preparing import Preparer

        return Preparer(self._setup, self._render)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.of_model(self._setup.directory)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any] | None,
    ) -> str:
        with cpu_budget(self._setup.template_cpu_s):  # it is compiled in the first one
            template = self._template
            if template is None:
                raise InternalError("the model has no chat template")
            text = template.render(messages, tools, options)
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequest("the model's chat template made too long a text", field="messages")
        return text
