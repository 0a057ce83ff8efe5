"""The end of a generation request in numbers: usage for the client, metrics, the canonical lines.

Pure reading: nothing here changes a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from microserve.gateway.api.format import UsageCounts
from microserve.gateway.generation.summary import Summary, form_of, phase_durations, write_line
from microserve.gateway.http.errors import ClientGone
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.keys.usage import Counts
from microserve.gateway.state import GatewayState
from microserve.gateway.text.answer.choice import Choice, Timeline
from microserve.gateway.view.forms import RequestForm
from microserve.protocol.errors import MeshError
from microserve.protocol.request_id import of_choice


def usage_of(choices: Iterable[Choice], n: int) -> UsageCounts:
    """Tokens of a whole answer with ``n`` choices for each prompt; a prompt counts once."""
    prompt_tokens = completion_tokens = cached_tokens = 0
    reasoning_tokens: int | None = None
    for choice in choices:
        completion_tokens += choice.num_output_tokens
        if choice.is_read:
            reasoning_tokens = (reasoning_tokens or 0) + choice.num_reasoning_tokens
        if choice.index % n == 0:
            prompt_tokens += choice.num_prompt_tokens
            if choice.ended is not None:
                cached_tokens += choice.ended.usage.cached_tokens
    return UsageCounts(prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens)


def account(
    state: GatewayState,
    exchange: Exchange,
    choices: list[Choice],
    times: Timeline,
    *,
    n: int,
    stream: bool,
    failure: MeshError | None,
    attributes: Mapping[str, str],
    model: str,
) -> None:
    """Count a finished request and write its lines; ``times`` are those of a request without choices, ``n``
    the choices of each prompt; ``model``: who answers."""
    assert times.ended is not None
    code = "" if failure is None else failure.code
    state.metrics.answered(exchange.status, code or "ok", times.ended - times.arrived)
    if isinstance(failure, ClientGone):
        state.metrics.disconnected(_phase(times, choices))
    if exchange.visit is not None:
        used = usage_of((choice for choice in choices if _has_cost(choice)), n)
        state.quotas.settle(
            exchange.visit, Counts(1, 0, used.prompt_tokens, used.cached_tokens, used.completion_tokens)
        )
    if not choices:
        _tell(
            state,
            Summary(
                request_id=of_choice(exchange.unique_id, 0),
                http_request_id=exchange.request_id,
                key=exchange.key.name,
                times=times,
                status=exchange.status,
                code=code,
                finish_reason=_reason(None, failure),
                model=model,
                path=exchange.path,
                stream=stream,
            ),
        )
    told = state.attributes.told(attributes)
    for choice in choices:
        reason = _reason(choice, failure)
        state.metrics.choice_ended(reason, choice.num_output_tokens)
        if choice.is_read:
            state.metrics.calls_read(choice.num_calls, choice.num_unread)
        ended = choice.ended
        if ended is not None:
            state.metrics.ended(ended)
        _tell(
            state,
            Summary(
                request_id=of_choice(exchange.unique_id, choice.index),
                http_request_id=exchange.request_id,
                key=exchange.key.name,
                times=choice.times,
                status=exchange.status,
                code=code,
                finish_reason=reason,
                model=model,
                path=exchange.path,
                stream=stream,
                index=choice.index,
                prompt_tokens=choice.num_prompt_tokens,
                output_tokens=choice.num_output_tokens,
                strategy="" if ended is None else ended.strategy,
                strategy_version=0 if ended is None else ended.strategy_version,
                share="" if ended is None else ended.share,
                moves=0 if ended is None else ended.num_moves,
                alone="" if ended is None else ended.alone,
                heaps=[] if ended is None else ended.heaps,
                engines=[] if ended is None else ended.engines,
                why="" if ended is None else ended.why,
                capped_to=0 if ended is None else ended.capped_to,
                numerics=choice.numerics,
                cached_tokens=0 if ended is None else ended.usage.cached_tokens,
                received_tokens=0 if ended is None else ended.usage.received_tokens,
                phases=None if ended is None else ended.phases,
                attributes=told,
            ),
        )


def _tell(state: GatewayState, summary: Summary) -> None:
    """The log and the view."""
    durations, view = phase_durations(summary.times, summary.phases), state.view
    write_line(summary, durations)
    if view.requests.is_on:
        view.requests.add(form_of(summary, durations, view.wall_clock()), view.clock())


def running_forms(
    state: GatewayState,
    exchange: Exchange,
    choices: Iterable[Choice],
    times: Timeline,
    now: float,
    *,
    stream: bool,
) -> list[RequestForm]:
    """As they stand: without phases, for these are told at the end."""
    forms: list[RequestForm] = []
    for choice in choices or (None,):
        own = times if choice is None else choice.times
        if own.ended is not None:
            continue
        mailbox = None if choice is None else choice.mailbox
        served = None if mailbox is None else mailbox.served
        forms.append(
            RequestForm(
                id=of_choice(exchange.unique_id, 0 if choice is None else choice.index),
                http_id=exchange.request_id,
                at=0.0,
                age_s=max(0.0, now - own.arrived),
                path=exchange.path,
                stream=stream,
                status=exchange.status,
                code="",
                finish_reason="",
                model=state.model,
                key=exchange.key.name,
                strategy="" if served is None else served.strategy,
                strategy_version=0 if served is None else served.strategy_version,
                share="",
                engines=[] if served is None else served.engines,
                heaps=[],
                why="",
                alone="",
                moves=0,
                numerics="",
                exact=False,
                prompt_tokens=0 if choice is None else choice.num_prompt_tokens,
                cached_tokens=0,
                received_tokens=0,
                output_tokens=0 if choice is None else choice.num_output_tokens,
                ttft_s=None if own.first_token is None else own.first_token - own.arrived,
                wall_s=max(0.0, now - own.arrived),
                phases_s={},
            )
        )
    return forms


def _has_cost(choice: Choice) -> bool:
    """The mesh has worked for it: not for one that was refused, or came to no router."""
    return bool(choice.num_output_tokens) or (choice.ended is not None and not choice.ended.code)


def _reason(choice: Choice | None, failure: MeshError | None) -> str:
    """``stop`` or ``length`` of a finished choice, whatever became of the others; else why it has none."""
    if choice is not None and choice.finish_reason is not None:
        return choice.finish_reason
    return "abort" if isinstance(failure, ClientGone) else "error"


def _phase(times: Timeline, choices: list[Choice]) -> str:
    if times.submitted is None:
        return "queued"
    return "decode" if any(choice.times.first_token is not None for choice in choices) else "prefill"
