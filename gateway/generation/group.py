"""The choices of one HTTP request on the bus: sent together, taken as they come, given back in the end.

Owns the room that they take, their mailboxes and the deadline; knows nothing of how an answer looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from time import monotonic

import msgspec

from microserve.gateway.generation.trace import trace_of
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.keys.salt import cache_salt
from microserve.gateway.request.request import MAX_CHOICES, GenerateRequest
from microserve.gateway.request.sampling import seed_of
from microserve.gateway.routers.mailbox import Inbox, Mailbox, TokenBatch
from microserve.gateway.state import GatewayState
from microserve.gateway.text.answer.choice import Choice, Piece, Timeline
from microserve.gateway.text.answer.reading import ReadChoice, Reading
from microserve.gateway.text.answer.scored import ScoredPrompt
from microserve.protocol.errors import DeadlineExceeded, InvalidRequest
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.attributes import MAX_PRIORITY
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended, Served
from microserve.protocol.request_id import of_choice

DEADLINE_GRACE_S = 2.0
"""The router ends a request at its deadline; only if it does not, we do."""
SETTLE_S = 0.5
"""Longest wait for the router's account of a choice that was cancelled."""


class ChoiceGroup:
    """Empty until ``submit``; ``release`` at the end, whatever happened."""

    def __init__(self, state: GatewayState, exchange: Exchange) -> None:
        self.inbox = Inbox()
        self.times = Timeline(exchange.arrived)
        """What all choices have in common; each has a copy of its own from ``submit`` on."""
        self.trace = trace_of(exchange)
        self.choices: list[Choice] = []
        self.sampling: SamplingParams | None = None
        """As it was asked for; None: it did not get so far."""
        self.attributes: Mapping[str, str] = {}
        """What strategies are told of the request."""
        self._state = state
        self._exchange = exchange
        self._num_reserved = 0
        self._deadline: asyncio.TimerHandle | None = None

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        request: GenerateRequest,
        *,
        ttl_s: float,
        strategy: str | None,
        attributes: Mapping[str, str],
        exact: bool | None = None,
        reading: Reading | None = None,
    ) -> None:
        """Send the choices of each prompt to one router, where they share its prefix; the first of them asks
        for what is told of the prompt's own tokens. ``exact``: as in ``Generate``; ``reading``: None where an
        answer is nothing but text.

        ``ttl_s`` counts from the request's arrival. Raises :class:`InvalidRequest`, ``QueueFull``,
        ``RateLimited``, ``BudgetSpent``, ``NoEngines``, ``Draining``, :class:`DeadlineExceeded`, or what has
        ended the inbox meanwhile.
        """
        state, exchange, inbox = self._state, self._exchange, self.inbox
        self.attributes, self.sampling = attributes, sampling
        each = request.num_generated
        count = len(prompts) * each
        if count > MAX_CHOICES:
            name = "n" if request.best_of is None else "best_of"
            raise InvalidRequest(f"prompts times {name} must be at most {MAX_CHOICES}", field=name)
        state.check_open()
        if inbox.error is not None:  # the client went while its prompt was tokenised
            raise inbox.error
        if exchange.visit is not None:
            num_prompt_tokens = sum(map(len, prompts))
            state.quotas.reserve(exchange.visit, count, num_prompt_tokens + count * sampling.max_tokens)
        now = monotonic()
        remaining_s = exchange.arrived + ttl_s - now
        if remaining_s <= 0.0:
            raise DeadlineExceeded(f"{ttl_s:.3f} s were over before the request was sent")
        adapter = state.adapter_of(request.model)
        link = state.routers.choose_soon(adapter)
        state.reserve(count, exchange.key)
        self._num_reserved = count
        self.times.submitted = now
        self._deadline = asyncio.get_running_loop().call_later(
            remaining_s + DEADLINE_GRACE_S,
            self._expire,
            ttl_s,
        )
        salt = cache_salt(exchange.key, request.salt, shared=state.shared_prefix_cache)
        is_scored = sampling.prompt_logprobs is not None
        names = state.tokenizer.vocabulary
        scored = [ScoredPrompt(prompt_ids, names) if is_scored else None for prompt_ids in prompts]
        for index in range(count):
            prompt_ids = prompts[index // each]
            asked = msgspec.structs.replace(
                sampling,
                seed=seed_of(sampling.seed, index),
                prompt_logprobs=None if index % each else sampling.prompt_logprobs,
            )
            make = Choice if reading is None else partial(ReadChoice, reading=reading)
            choice = make(
                state.tokenizer,
                index=index,
                prompt_ids=prompt_ids,
                sampling=sampling,
                stop=request.stop,
                text=request.text,
                eos_token_ids=state.routers.eos_token_ids,
                times=self.times.copy(),
                echo=request.shows_prompt,
                scored=scored[index // each],
            )
            self.choices.append(choice)
            choice.mailbox = state.routers.generate(
                inbox,
                link,
                request_id=of_choice(exchange.unique_id, index),
                index=index,
                tokens=prompt_ids,
                sampling=asked,
                ttl_s=remaining_s,
                strategy=strategy,
                salt=salt,
                tenant=exchange.key.name,
                priority=max(exchange.key.priority - request.gives_way, -MAX_PRIORITY),
                attributes=attributes,
                adapter=adapter,
                traceparent=self.trace.text,
                exact=exact,
            )
        state.metrics.submitted(sum(map(len, prompts)), each, sampling.max_tokens)

    def _expire(self, ttl_s: float) -> None:
        """The router has not ended it in time: we do."""
        error = DeadlineExceeded(f"the request took longer than {ttl_s:.3f} s")
        for mailbox in self.inbox.mailboxes:
            mailbox.cancel()
            mailbox.fail(error)

    @property
    def numerics(self) -> Numerics | None:
        """In which class all output so far was made; None: there is none."""
        classes = [mailbox.numerics for mailbox in self.inbox.mailboxes if mailbox.has_begun]
        return reduce(Numerics.joined, classes) if classes else None

    @property
    def served(self) -> Served | Ended | None:
        """By what the first choice of which that is known is served."""
        told = (mailbox.ended or mailbox.served for mailbox in self.inbox.mailboxes)
        return next((each for each in told if each is not None), None)

    @property
    def over(self) -> bool:
        return all(choice.over for choice in self.choices)

    def take(self, mailbox: Mailbox) -> tuple[Choice, Piece]:
        """What has come for one choice; its ``error`` is set if it failed.

        A deadline is no failure once there is some output: who waited so long gets what there is.
        """
        choice = self.choices[mailbox.index]
        if choice.scored is not None and (rows := mailbox.take_rows()) is not None:
            choice.scored.add(rows)
            for other in self.choices:
                if other.scored is choice.scored and other is not choice and other.mailbox is not None:
                    self.inbox.notify(other.mailbox)
        if choice.lacks_prompt and not mailbox.has_failed:
            piece = choice.push(TokenBatch()) if choice.has_prompt else Piece()
            if choice.has_prompt or not choice.lacks_prompt:
                self.inbox.notify_later(mailbox)
            return choice, piece
        batch = mailbox.take()
        if batch.token_ids and not choice.over:
            times, now = choice.times, monotonic()
            if times.first_token is None:
                times.first_token = mailbox.first_at
                self._state.metrics.first_token(now - times.arrived)
            else:
                self._state.metrics.next_tokens(now - choice.last_tokens_at, len(batch.token_ids))
            choice.last_tokens_at = now
        piece = choice.push(batch)
        if not choice.over:
            choice.error = mailbox.failed
        has_output = any(each.output for each in self.inbox.mailboxes) and not choice.lacks_prompt
        if isinstance(choice.error, DeadlineExceeded) and has_output:
            choice.cut_short(piece)
        if choice.finish_reason is not None:
            mailbox.cancel()  # a stop string ended it; the engine does not know yet
        return choice, piece

    def told(self, count: int, generated: int) -> list[Choice]:
        """Of the ``generated`` choices of each prompt the ``count`` likeliest, by the mean of their tokens'
        log-probabilities, the likeliest first; all in their order where that is all."""
        if count == generated:
            return self.choices
        prompts = range(0, len(self.choices), generated)
        ranked = (
            sorted(self.choices[at : at + generated], key=lambda choice: -choice.mean_logprob)
            for at in prompts
        )
        return [choice for choices in ranked for choice in choices[:count]]

    def raise_failure(self) -> None:
        """One failed choice fails the request: half an answer would look like a whole one."""
        for choice in self.choices:
            if choice.error is not None:
                raise choice.error

    async def settle(self) -> None:
        """Wait for the router's account of what was cancelled, but not for long."""
        await self.inbox.settle(SETTLE_S)

    def stamp_end(self) -> None:
        """What has not ended yet ends now."""
        now = monotonic()
        for times in (self.times, *(choice.times for choice in self.choices)):
            if times.ended is None:
                times.ended = now

    def release(self) -> None:
        self.inbox.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        for mailbox in self.inbox.mailboxes:
            self._state.routers.forget(mailbox)
        self._state.give_back(self._num_reserved)
        self._num_reserved = 0
