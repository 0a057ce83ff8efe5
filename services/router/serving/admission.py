"""What may be served at all: a request's bounds against the mesh's, its time against the work ahead.

Sans-I/O but for the clock. A refusal takes nothing, asks nobody and waits for nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from microserve.protocol.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NoEngines,
    PromptTooLong,
    ProtocolViolation,
    QueueFull,
)
from microserve.protocol.messages.adapter import adapter_named
from microserve.protocol.messages.request.attributes import PRIORITY, TENANT, fault_of_attributes
from microserve.protocol.messages.router import Generate
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.engines.prediction import EngineView, engine_view, predicted_ttft_s
from microserve.services.router.engines.prefix import Lookup
from microserve.services.router.engines.registry import Registry
from microserve.services.router.request.request import RETRY_AFTER_S, Request, fits
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.serving.turnstile import Turnstile

MIN_RETRY_S, MAX_RETRY_S = 0.5, 60.0
"""Bounds of what a refusal for lack of time says: predictions are no better than that."""


class Admitted(NamedTuple):
    """What may be served."""

    strategy: Strategy
    request: Request
    num_uncached: int
    """Prompt tokens that some engine must compute, as far as was asked."""
    prompt: int
    """Tells equal prompts in the book."""
    shadow: Strategy | None = None
    """Decides about the request as well."""
    share: str = ""
    """As what the strategy serves it."""
    num_unheld: int = 0
    """Prompt tokens that no engine was known to hold; all of them where nobody has asked."""


class Admission:
    """Turns a ``Generate`` into a :class:`Request` and its strategy, or raises the reason why not."""

    def __init__(
        self,
        settings: RouterSettings,
        strategies: StrategyBook,
        registry: Registry,
        book: LoadBook,
        lookup: Lookup,
        turnstile: Turnstile,
    ) -> None:
        """``book``, ``registry`` and ``turnstile`` are only read."""
        self._settings = settings
        self._strategies = strategies
        self._registry = registry
        self._book = book
        self._lookup = lookup
        self._turnstile = turnstile
        self._loop = asyncio.get_running_loop()

    def strategy_name(self, message: Generate) -> str:
        return message.strategy or self._settings.default_strategy

    def current(self, strategy: Strategy) -> Strategy:
        """What is to run for an admitted request now."""
        return self._strategies.current(strategy)

    def admit(self, message: Generate, token_frame: bytes, num_live: int) -> Admitted:
        """Raises a ``RequestError`` that names the field, a ``CapacityError`` or ``DeadlineExceeded``.

        ``QueueFull`` also when no engine is predicted to give the first token within the request's time or
        ``router.max_ttft_s``; its ``retry_after_s`` is how much too late it would come.
        """
        if message.ttl_s <= 0:
            raise DeadlineExceeded("the request's time was used up before it came", field="ttl_s")
        if not message.ttl_s > 0:
            raise InvalidRequest("ttl_s must be a number", field="ttl_s")
        if num_live >= self._settings.max_requests:
            raise QueueFull(f"{num_live} requests are live already", retry_after_s=RETRY_AFTER_S)
        self._turnstile.check(message.tenant, num_live)
        name, attributes = self.strategy_name(message), _attributes(message)
        strategy = self._strategies.get(name, message.request_id, attributes)
        served = self._registry.served
        if served is None or not self._registry.usable():
            raise NoEngines("no engine is alive", retry_after_s=RETRY_AFTER_S)
        # A gateway that greeted us before the first engine came knows no model yet.
        if message.model not in ("", served.model):
            raise ModelNotFound(f"no model {message.model!r} here, only {served.model!r}", field="model")
        adapter_revision = self._adapter_revision(message)
        message.sampling.validate(served.vocab_size)
        if fault := fault_of_attributes(message.attributes):
            raise InvalidRequest(fault, field="attributes")
        deadline = self._loop.time() + min(message.ttl_s, self._settings.deadline_s)
        try:
            request = Request.from_frame(
                message.request_id,
                token_frame,
                message.sampling,
                deadline=deadline,
                block_size=served.block_size,
                salt=message.salt,
                num_output_tokens=message.num_output_tokens,
                attributes=attributes,
                adapter=message.adapter,
                adapter_revision=adapter_revision,
                exact=message.exact,
            )
        except ProtocolViolation as error:
            raise InvalidRequest(error.detail, field="tokens") from None
        self._check_tokens(request, served.vocab_size)
        # Who wants to be told of the prompt's own tokens shares no computed prefix.
        is_alone = request.sampling.prompt_logprobs is not None
        alone = request.request_id if is_alone else ""
        prompt = hash((request.token_frame, request.salt, request.adapter, alone))
        share, num_unheld = self._strategies.share_of(strategy), self._num_unheld(name, request)
        if request.num_output_tokens:  # it runs already, elsewhere: too late to refuse it
            return Admitted(strategy, request, request.num_tokens, prompt, share=share, num_unheld=num_unheld)
        num_uncached = self._check_time(request, prompt, self._turnstile.tokens_ahead(message.tenant))
        shadow = None if is_alone else self._strategies.shadow(name, message.request_id, attributes)
        return Admitted(strategy, request, num_uncached, prompt, shadow, share, num_unheld)

    def _num_unheld(self, name: str, request: Request) -> int:
        """Where two versions are compared the prefix replica is asked, whether they ask it or not."""
        if not self._strategies.is_on_trial(name):
            return request.num_tokens
        return request.num_tokens - max(self._held(request).values(), default=0)

    def _held(self, request: Request) -> dict[str, int]:
        return self._lookup(request.tokens, request.salt, request.adapter)

    def _adapter_revision(self, message: Generate) -> str:
        """Of the adapter that is to answer: what it is all through the answer. Raises :class:`NoEngines`."""
        if not message.adapter:
            return ""
        for connection in self._registry.usable():
            known = adapter_named(message.adapter, connection.info.adapters)
            if known is not None and message.adapter_revision in ("", known.revision):
                return known.revision
        name = message.adapter[:128]
        raise NoEngines(f"no engine with the adapter {name!r} is alive", retry_after_s=RETRY_AFTER_S)

    def _check_tokens(self, request: Request, vocab_size: int) -> None:
        if not request.tokens:
            raise InvalidRequest("the prompt is empty", field="tokens")
        largest = max(request.tokens)
        if largest >= vocab_size:
            raise InvalidRequest(f"token id {largest} is not below {vocab_size}", field="tokens")
        limit, max_tokens = self._registry.max_model_len, request.sampling.max_tokens
        most = min(request.num_tokens - 1, max_tokens)
        if not 0 <= request.num_output_tokens <= most:
            raise InvalidRequest(
                f"num_output_tokens must be 0 to {most}, is {request.num_output_tokens}",
                field="num_output_tokens",
            )
        num_prompt = request.num_tokens - request.num_output_tokens
        if num_prompt + max_tokens > limit:
            raise PromptTooLong(
                f"the maximum context length is {limit} tokens; {num_prompt} of the prompt and "
                f"{max_tokens} of output were asked for",
                field="tokens",
            )

    # --- time --------------------------------------------------------------------------------------

    def _check_time(self, request: Request, prompt: int, tokens_ahead: float) -> int:
        """Tokens that the engine with the best prediction must compute. Raises :class:`QueueFull`.

        ``tokens_ahead``: of prompts that wait for a turn before it."""
        now = self._loop.time()
        allowed_s, why = request.deadline - now, "the request allows"
        bound_s = self._settings.max_ttft_s
        if 0.0 < bound_s < allowed_s:
            allowed_s, why = bound_s, "router.max_ttft_s is"
        views = self._views(request, now, tokens_ahead)

        def best(cached: Mapping[str, int]) -> tuple[float, int]:
            """Prediction and tokens to compute of the engine that is soonest."""
            uncached = {
                e: 0 if self._book.shares(e, prompt) else request.num_tokens - cached.get(e, 0) for e in views
            }
            return min((predicted_ttft_s(views[e], uncached[e]), uncached[e]) for e in views)

        # Without a bound nearly everything is far within its time even if nothing of it is cached.
        best_s, num_uncached = best({}) if not bound_s else (math.inf, 0)
        if best_s > allowed_s:
            is_alone = request.sampling.prompt_logprobs is not None
            best_s, num_uncached = best({} if is_alone else self._held(request))
        if best_s > allowed_s:
            raise QueueFull(
                f"the first token is predicted in {best_s:.1f} s, {why} {allowed_s:.1f} s",
                retry_after_s=min(max(best_s - allowed_s, MIN_RETRY_S), MAX_RETRY_S),
            )
        return num_uncached

    def _views(self, request: Request, now: float, tokens_ahead: float) -> dict[str, EngineView]:
        """What is known of every engine that may compute the request's prompt."""
        fitting = [c for c in self._registry.usable() if fits(request, c.info)]
        chosen = [c for c in fitting if _computes_prompts(c)] or fitting
        share = (self._book.unplaced_tokens + tokens_ahead) / len(chosen)
        return {c.engine_id: engine_view(c, self._book, now, unplaced_tokens=share) for c in chosen}


def _attributes(message: Generate) -> Mapping[str, str]:
    """With those that have fields of their own."""
    own = {TENANT: message.tenant, PRIORITY: str(message.priority)}
    return MappingProxyType({**message.attributes, **own})


def _computes_prompts(connection: Connection) -> bool:
    """An engine that is not for prefill and has never done any says nothing of how long prompts wait."""
    labels = connection.labels
    return not labels or "prefill" in labels or connection.load.prefill_tokens_per_s > 0.0
