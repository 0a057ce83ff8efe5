"""What every engine refuses, whatever computes behind it: the bounds of WIRE.md 4.1 as pure functions.

Each raises a :class:`MeshError` that names the field and the limit. Knows no state but :class:`Limits`.
"""

from __future__ import annotations

from dataclasses import dataclass

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import (
    InvalidInterval,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    TransferFailed,
    UnknownRequest,
    UnsupportedAction,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import Adapter, adapter_named
from microserve.protocol.messages.kv.geometry import difference
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant
from microserve.protocol.messages.request.interval import bound
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.types import MAX_REQUEST_ID_CHARS


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be asked of this engine."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    max_waiting: int
    eos_token_ids: frozenset[int]
    adapters: tuple[Adapter, ...] = ()

    def room(self, block_size: int) -> int:
        """Tokens that one sequence can have here."""
        return min(self.max_model_len, self.num_blocks * block_size)


def check_request(request_id: str, token_ids: list[int] | None, ttl_s: float, limits: Limits) -> None:
    """``token_ids``: those that came along."""
    if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters", field="request_id"
        )
    check_ttl(ttl_s)
    if token_ids is not None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty", field="tokens")
        if max(token_ids) >= limits.vocab_size:
            raise InvalidRequest(
                f"token id {max(token_ids)} is not below {limits.vocab_size}", field="tokens"
            )


def check_adapter(name: str, limits: Limits) -> None:
    """May a request name it here? Empty is the model alone."""
    if not name or adapter_named(name, limits.adapters) is not None:
        return
    if not limits.adapters:
        raise UnsupportedAction(
            f"this engine has no adapters, and was asked for {name[:128]!r}", field="model"
        )
    known = ", ".join(adapter.name for adapter in limits.adapters)
    raise ModelNotFound(f"this engine has no adapter {name[:128]!r}, only {known}", field="model")


def check_ttl(ttl_s: float) -> None:
    if not ttl_s > 0.0:
        raise InvalidRequest("ttl_s must be above 0", field="ttl_s")


def check_fits(num_tokens: int, room: int, *, more: int = 1) -> None:
    """Could it ever run here? ``more`` positions are needed than the tokens known."""
    if num_tokens + more > room:
        raise PromptTooLong(
            f"this engine's maximum context length is {room} tokens; {num_tokens} and at least {more} "
            "more were asked for",
            field="tokens",
        )


def check_sampling(params: SamplingParams, limits: Limits) -> None:
    params.validate(limits.vocab_size)
    forbidden = limits.eos_token_ids.union(params.stop_token_ids)
    if params.min_tokens and len(forbidden) >= limits.vocab_size:
        raise InvalidRequest("min_tokens leaves no token that may be chosen", field="min_tokens")


def send_bounds(message: wire.RemoteSend, num_tokens: int) -> tuple[int, int]:
    """``begin`` and ``end`` of a send of a prompt of so many tokens."""
    grant = message.grant
    begin, end = bound("begin", message.begin, num_tokens), bound("end", message.end, num_tokens)
    if not begin <= end <= grant.end:
        raise InvalidInterval(f"[{begin}, {end}) is not inside the grant's [0, {grant.end})", field="end")
    if not 0 <= message.lane < MAX_LANES:
        raise InvalidRequest(f"lane is {message.lane}, 0 to {MAX_LANES - 1}", field="lane")
    return begin, end


def check_same_kv(layout: KvLayout, grant: Grant) -> None:
    """Before anything is computed: could the receiver read what we would put there?"""
    different = difference(layout.geometry, grant.geometry)
    if not different and layout.layout_hash != grant.layout_hash:
        different = f"layout_hash: {layout.layout_hash} here, {grant.layout_hash} there"
    if different:
        raise TransferFailed(f"KV of engine {grant.engine_id} is another one: {different}")


def check_same_adapter(name: str, limits: Limits, grant: Grant) -> None:
    """Is what the receiver waits for KV of the same adapter, if any, as we would compute it with?"""
    ours = adapter_named(name, limits.adapters)
    if ours != grant.adapter:
        raise TransferFailed(
            f"KV of engine {grant.engine_id} is another one: adapter: {ours or 'none'} here, "
            f"{grant.adapter or 'none'} there"
        )


def check_first(message: wire.RemoteSend, end: int, num_tokens: int, limits: Limits) -> None:
    """Of a send: may it sample the first token, if it is to?"""
    if message.sampling is None:
        return
    check_sampling(message.sampling, limits)
    if end != num_tokens:
        raise InvalidInterval("sampling needs end == len(prompt)", field="end")
    if message.sampling.prompt_logprobs is not None and not message.num_output_tokens:
        raise _not_alone()
    if not 0 <= message.num_output_tokens < min(num_tokens, message.sampling.max_tokens):
        raise InvalidRequest("num_output_tokens leaves no token to sample", field="num_output_tokens")


def generate_bounds(message: wire.StartGenerate, num_tokens: int) -> tuple[int, int]:
    """``begin``, and how many of the tokens are prompt."""
    begin = bound("begin", message.begin, num_tokens)
    num_prompt = num_tokens - message.num_output_tokens
    if not 0 < num_prompt <= num_tokens:
        raise InvalidRequest(f"num_output_tokens must be below {num_tokens}", field="num_output_tokens")
    if message.num_output_tokens and message.num_output_tokens >= message.sampling.max_tokens:
        raise InvalidRequest("max_tokens are out already", field="num_output_tokens")
    if message.sampling.prompt_logprobs is not None and not message.num_output_tokens and message.grant_id:
        raise _not_alone()
    return begin, num_prompt


def check_builds_on(
    message: wire.StartGenerate, begin: int, num_tokens: int, grant: Grant | None, *, commits: bool
) -> None:
    """Does it fit the record's open grant? ``commits``: a ``Commit`` of that is under way."""
    if message.grant_id is None:
        if begin != 0:
            raise InvalidInterval(f"begin must be 0 without a grant, is {begin}", field="begin")
        return
    if grant is None or grant.grant_id != message.grant_id:
        raise UnknownRequest(f"no open grant {message.grant_id!r}", field="grant_id")
    if commits:
        raise InvalidRequest("a commit of this grant is under way", field="grant_id")
    if begin != grant.end:
        raise InvalidInterval(f"begin must be the grant's end {grant.end}, is {begin}", field="begin")
    if message.await_first and (begin != num_tokens or grant.matched == begin):
        raise InvalidInterval(
            "await_first needs a send that ends at begin == len(prompt)", field="await_first"
        )


def _not_alone() -> InvalidRequest:
    """Of a prefix that another engine computes there are no logits here."""
    return InvalidRequest(
        "prompt_logprobs needs an engine that computes all of the prompt", field="prompt_logprobs"
    )
