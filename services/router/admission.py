"""What may be served at all: a request's bounds against what the mesh is. Sans-I/O but for the clock."""

from __future__ import annotations

import asyncio

from microserve.protocol.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NoEngines,
    PromptTooLong,
    ProtocolViolation,
    QueueFull,
)
from microserve.protocol.serving import Generate
from microserve.protocol.settings import RouterSettings
from microserve.services.router.mesh import RETRY_AFTER_S
from microserve.services.router.registry import Registry
from microserve.services.router.request import Request
from microserve.services.router.strategy import Strategy, StrategyBook


class Admission:
    """Turns a ``Generate`` into a :class:`Request` and its strategy, or raises the reason why not."""

    def __init__(self, settings: RouterSettings, strategies: StrategyBook, registry: Registry) -> None:
        self._settings = settings
        self._strategies = strategies
        self._registry = registry
        self._loop = asyncio.get_running_loop()

    def strategy_name(self, message: Generate) -> str:
        return message.strategy or self._settings.default_strategy

    def admit(self, message: Generate, token_frame: bytes, num_live: int) -> tuple[Strategy, Request]:
        """Raises a ``RequestError`` that names the field, a ``CapacityError`` or ``DeadlineExceeded``."""
        if message.ttl_s <= 0:
            raise DeadlineExceeded("the request's time was used up before it came", field="ttl_s")
        if not message.ttl_s > 0:
            raise InvalidRequest("ttl_s must be a number", field="ttl_s")
        if num_live >= self._settings.max_requests:
            raise QueueFull(f"{num_live} requests are live already", retry_after_s=RETRY_AFTER_S)
        strategy = self._strategies.get(self.strategy_name(message))
        served = self._registry.served
        if served is None or not self._registry.usable():
            raise NoEngines("no engine is alive", retry_after_s=RETRY_AFTER_S)
        # A gateway that greeted us before the first engine came knows no model yet.
        if message.model not in ("", served.model):
            raise ModelNotFound(f"no model {message.model!r} here, only {served.model!r}", field="model")
        message.sampling.validate(served.vocab_size)
        deadline = self._loop.time() + min(message.ttl_s, self._settings.deadline_s)
        try:
            request = Request.from_frame(
                message.request_id,
                token_frame,
                message.sampling,
                deadline=deadline,
                block_size=served.block_size,
                salt=message.salt,
            )
        except ProtocolViolation as error:
            raise InvalidRequest(error.detail, field="tokens") from None
        self._check_tokens(request, served.vocab_size)
        return strategy, request

    def _check_tokens(self, request: Request, vocab_size: int) -> None:
        if not request.tokens:
            raise InvalidRequest("the prompt is empty", field="tokens")
        largest = max(request.tokens)
        if largest >= vocab_size:
            raise InvalidRequest(f"token id {largest} is not below {vocab_size}", field="tokens")
        limit = self._registry.max_model_len
        needed = request.num_tokens + request.sampling.max_tokens
        if needed > limit:
            raise PromptTooLong(
                f"{request.num_tokens} prompt tokens and {request.sampling.max_tokens} of output are more "
                f"than the model's {limit}",
                field="tokens",
            )
