"""One sequence to be served, as a strategy sees it: tokens, sampling, deadline.

Immutable, and the only place where bounds of half-open prompt intervals are resolved. Knows no engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from microserve.protocol.bus.codec import decode_tokens, encode_tokens
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.messages.request.interval import bound
from microserve.protocol.messages.request.sampling import SamplingParams

NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})
READS_ONLY = ("Request.",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a gateway asked for."""

    request_id: str
    tokens: Sequence[int]
    """Prompt token ids; never changed."""
    sampling: SamplingParams
    deadline: float
    """By the loop's clock, seconds."""
    block_size: int
    """Tokens in a KV block of this mesh."""
    salt: str = ""
    """Prefix cache namespace."""
    num_output_tokens: int = 0
    """The last so many of ``tokens`` are output, delivered before an engine or a router failed."""
    attributes: Mapping[str, str] = field(default_factory=lambda: NO_ATTRIBUTES)
    """What the gateway tells of who asks: ``tenant`` and ``priority``, and what its operator lets through
    (``gateway.attributes``). Read only."""
    adapter: str = ""
    """Name of the model's adapter that answers; empty: the model alone. A mesh made for the request shows the
    engines that have it, and no others."""
    adapter_revision: str = ""
    """What that name stands for, all through the answer; empty: not known yet."""
    exact: bool | None = None
    """May its KV come by a codec that loses something? True: never; False: it may; None: its strategy
    says."""
    token_frame: bytes = field(default=b"", repr=False)
    """The prompt as it travels (raw little-endian u32), made from ``tokens`` if not given."""

    def __post_init__(self) -> None:
        if not self.token_frame:
            object.__setattr__(self, "token_frame", encode_tokens(self.tokens))

    @classmethod
    def from_frame(
        cls,
        request_id: str,
        token_frame: bytes,
        sampling: SamplingParams,
        *,
        deadline: float,
        block_size: int,
        salt: str = "",
        num_output_tokens: int = 0,
        attributes: Mapping[str, str] = NO_ATTRIBUTES,
        adapter: str = "",
        adapter_revision: str = "",
        exact: bool | None = None,
    ) -> Request:
        """Read the prompt from its wire form. Raises ``ProtocolViolation`` if the frame is cut."""
        tokens = decode_tokens(token_frame)
        return cls(
            request_id,
            tokens,
            sampling,
            deadline,
            block_size,
            salt,
            num_output_tokens,
            attributes,
            adapter,
            adapter_revision,
            exact,
            token_frame=token_frame,
        )

    def begun(self) -> Request:
        """The request as it was before it had any output."""
        if not self.num_output_tokens:
            return self
        tokens = self.tokens[: self.num_tokens - self.num_output_tokens]
        return replace(self, tokens=tokens, num_output_tokens=0, token_frame=b"")

    def continued(self, delivered: Sequence[int]) -> Request:
        """The same request after ``delivered`` output tokens: they count as known tokens from now on."""
        num_output_tokens = self.num_output_tokens + len(delivered)
        tokens = [*self.tokens, *delivered]
        return replace(self, tokens=tokens, num_output_tokens=num_output_tokens, token_frame=b"")

    def may_lose(self, lossy: bool | None) -> bool:
        """May its KV come by a codec that loses something? ``lossy``: what its strategy says; None:
        nothing."""
        if self.exact or lossy is False:
            return False
        return self.exact is False or lossy is True

    @property
    def num_tokens(self) -> int:
        """Of the prompt, with the output that was delivered before."""
        return len(self.tokens)

    @property
    def num_block_tokens(self) -> int:
        """Tokens in whole blocks: what a prefix cache can hold of this prompt, at most ``num_tokens``."""
        return self.num_tokens - self.num_tokens % self.block_size

    def bound(self, name: str, value: int | None) -> int:
        """A bound of an interval: None is the prompt's end, a negative one counts from it.

        Raises :class:`InvalidInterval` when it lies outside ``[0, num_tokens]``.
        """
        if value is None:
            return self.num_tokens
        return bound(name, value, self.num_tokens)


def fits(request: Request, info: EngineInfo) -> bool:
    """Has the engine the adapter that is to answer, if one is?"""
    return info.has_adapter(request.adapter, request.adapter_revision)


RETRY_AFTER_S = 1.0
