"""What operators and tools ask: health, readiness, models, version, metrics, tokenising by hand."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from microserve.gateway.api.parse import parsed
from microserve.gateway.dialects import COUNTINGS
from microserve.gateway.document import document
from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.gateway.http.exchange import Exchange, warning_header
from microserve.gateway.openai.models import model_card
from microserve.gateway.state import GatewayState
from microserve.protocol.metrics.text import CONTENT_TYPE


async def health(state: GatewayState, exchange: Exchange) -> None:
    """The process lives and its loop turns; says nothing of the mesh."""
    await exchange.reply(200, b"{}")


async def ready(state: GatewayState, exchange: Exchange) -> None:
    """200 when a request could be served now, else 503; both list the routers, and say what time it is here
    for who compares clocks."""
    is_ready = state.routers.ready and not state.draining
    body = {
        "ready": is_ready,
        "draining": state.draining,
        "routers": state.routers.status(),
        "version": state.version,
        "time": time.time(),
    }
    headers = {} if is_ready else {"retry-after": "1"}
    await exchange.reply(200 if is_ready else 503, msgspec.json.encode(body), headers)


async def version(state: GatewayState, exchange: Exchange) -> None:
    await exchange.reply(200, msgspec.json.encode({"version": state.version}))


async def openapi(state: GatewayState, exchange: Exchange) -> None:
    """The API as it is here and now: with this model's and these settings' bounds."""
    limits = state.routers.known_limits
    num_texts, needs_key = state.tokenizer.vocab_size, not state.keys.is_open
    names = (state.model, *state.routers.adapters)
    body = document(state.version, names, state.max_n, limits, num_texts, needs_key)
    await exchange.reply(200, body)


async def metrics(state: GatewayState, exchange: Exchange) -> None:
    text = await state.metrics.text(state.families, vllm_names=b"names=vllm" in exchange.query.split(b"&"))
    await exchange.reply(200, text, kind=CONTENT_TYPE.encode())


async def models(state: GatewayState, exchange: Exchange) -> None:
    allowed = exchange.key.models
    names = [name for name in (state.model, *state.routers.adapters) if not allowed or name in allowed]
    body = {"object": "list", "data": [_model_card(state, name) for name in names]}
    await exchange.reply(200, msgspec.json.encode(body))


async def model(state: GatewayState, exchange: Exchange) -> None:
    name = exchange.path_params["model_id"]
    state.check_model(name, exchange.key)
    await exchange.reply(200, msgspec.json.encode(_model_card(state, name)))


def _model_card(state: GatewayState, name: str) -> dict[str, Any]:
    return model_card(
        name,
        parent=state.model if state.adapter_of(name) else None,
        created=state.created,
        max_model_len=state.routers.max_model_len,
        parsers=state.parsers,
        template=state.tokenizer.template,
        dtype=state.dtype,
        weights=state.weights,
    )


async def tokenizer_info(state: GatewayState, exchange: Exchange) -> None:
    """What lm-eval asks of a tokenizer that it has not got itself."""
    body = state.tokenizer.description | {"model_max_length": state.routers.max_model_len or None}
    await exchange.reply(200, msgspec.json.encode(body))


async def tokenize(state: GatewayState, exchange: Exchange) -> None:
    """``{"prompt"}`` or ``{"messages"}`` -> ``{"count", "max_model_len", "tokens"}``."""
    await _count(state, exchange, "tokenize", "prompt")


async def detokenize(state: GatewayState, exchange: Exchange) -> None:
    """``{"tokens"}`` -> ``{"prompt"}``."""
    await _count(state, exchange, "detokenize", "tokens")


async def count_tokens(state: GatewayState, exchange: Exchange) -> None:
    """As for ``/v1/messages`` -> ``{"input_tokens"}``."""
    await _count(state, exchange, "count_tokens", "messages")


async def _count(state: GatewayState, exchange: Exchange, name: str, field: str) -> None:
    """``field``: what takes the time of a large body."""
    body = await exchange.read_body(state.bodies)
    with state.bodies.hold(len(body)):
        if len(body) > INLINE_BODY_NBYTES:
            state.check_some_model(exchange.key)  # the name in it is the helper's to check
            reply, warnings = await state.helpers.reply(name, body, state.routers.known_limits, field=field)
        else:
            counting = COUNTINGS[name]
            found = parsed(body, counting.body, state.shape)
            state.check_model(found.body.model, exchange.key)
            reply = await counting.reply(found.body, state.tokenizer, state.routers.max_model_len)
            warnings = found.warnings
    await exchange.reply(200, reply, warning_header(warnings))
