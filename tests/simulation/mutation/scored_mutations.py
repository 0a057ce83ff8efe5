"""Bugs planted where prompts are told of their own tokens: hunted in worlds whose requests ask for that."""

from __future__ import annotations

from contextlib import ExitStack

from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.services.engine.core.request.sequence import Sequence
from microserve.services.router.request.request import Request
from microserve.services.router.serving.failover import Failover
from microserve.services.router.serving.live import LiveRequest
from tests.simulation.mutation.planting import mutation, replace

TOLD_TWICE = "A prompt that is computed again by another engine is told of once more from its first token"
STEPPED_OVER = "A prompt is told of the token behind the wrong row where it is cut into chunks"
BY_STRATEGY = "A request that must be computed by one engine is served as its strategy says"
SCORED = {TOLD_TWICE, STEPPED_OVER, BY_STRATEGY}
"""The others are hunted in worlds without such requests."""


@mutation
def _rows_are_told_twice(stack: ExitStack) -> None:
    """A prompt that is computed again by another engine is told of once more from its first token."""

    def all_rows(self: LiveRequest, prompt: PromptLogprobs) -> PromptLogprobs | None:
        return PromptLogprobs(self.next_row, prompt.num_top, prompt.rows) if len(prompt) else None

    def counted(self: LiveRequest, prompt: PromptLogprobs) -> PromptLogprobs | None:
        told = all_rows(self, prompt)
        self.next_row = self.next_row if told is None else told.end
        return told

    replace(stack, LiveRequest, "fresh_rows", counted)


@mutation
def _the_row_beside(stack: ExitStack) -> None:
    """A prompt is told of the token behind the wrong row where it is cut into chunks."""
    score_of = Sequence.score_of

    def shifted(self: Sequence, start: int, end: int) -> object:
        spec = score_of(self, start, end)
        if spec is not None and start:
            spec.targets[:] = [self.token_ids[start], *spec.targets[:-1]]
        return spec

    replace(stack, Sequence, "score_of", shifted)


@mutation
def _by_its_strategy(stack: ExitStack) -> None:
    """A request that must be computed by one engine is served as its strategy says."""
    begin = Failover.__init__

    def not_plain(self: Failover, request: Request, *, patience_s: float) -> None:
        begin(self, request, patience_s=patience_s)
        self.terms = type(self.terms)()

    replace(stack, Failover, "__init__", not_plain)
