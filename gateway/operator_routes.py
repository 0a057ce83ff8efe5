"""What operators and tools ask: health, readiness, models, version, metrics, tokenising by hand."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.gateway.http.exchange import Exchange
from microserve.gateway.metrics import CONTENT_TYPE
from microserve.gateway.openai.chat import template_messages
from microserve.gateway.openai.parse import parse
from microserve.gateway.openai.schema import MAX_TOKENIZE_TOKENS, DetokenizeRequest, TokenizeRequest
from microserve.gateway.state import GatewayState
from microserve.protocol.errors import InvalidRequest


async def health(state: GatewayState, exchange: Exchange) -> None:
    """The process lives and its loop turns; says nothing of the mesh."""
    await exchange.reply(200, b"{}")


async def ready(state: GatewayState, exchange: Exchange) -> None:
    """200 when a request could be served now, else 503; both list the routers."""
    is_ready = state.routers.ready and not state.draining
    body = {"ready": is_ready, "draining": state.draining, "routers": state.routers.status()}
    headers = {} if is_ready else {"retry-after": "1"}
    await exchange.reply(200 if is_ready else 503, msgspec.json.encode(body), headers)


async def version(state: GatewayState, exchange: Exchange) -> None:
    await exchange.reply(200, msgspec.json.encode({"version": state.version}))


async def metrics(state: GatewayState, exchange: Exchange) -> None:
    text = state.metrics.text(state.levels, vllm_names=b"names=vllm" in exchange.query.split(b"&"))
    await exchange.reply(200, text, kind=CONTENT_TYPE.encode())


async def models(state: GatewayState, exchange: Exchange) -> None:
    body = {"object": "list", "data": [_model_card(state)]}
    await exchange.reply(200, msgspec.json.encode(body))


async def model(state: GatewayState, exchange: Exchange) -> None:
    state.check_model(exchange.path_params["model_id"])
    await exchange.reply(200, msgspec.json.encode(_model_card(state)))


def _model_card(state: GatewayState) -> dict[str, Any]:
    max_model_len = state.routers.max_model_len
    return {
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "microserve",
        "max_model_len": max_model_len or None,
    }


async def tokenize(state: GatewayState, exchange: Exchange) -> None:
    """``{"prompt"}`` or ``{"messages"}`` -> ``{"count", "max_model_len", "tokens"}``."""
    request = parse(await exchange.read_body(state.bodies), TokenizeRequest)
    state.check_model(request.model)
    limit = MAX_TOKENIZE_TOKENS
    if request.messages is not None:
        tokens = await state.tokenizer.encode_chat(template_messages(request.messages), max_tokens=limit)
    elif request.prompt is not None:
        [tokens] = await state.tokenizer.encode(
            [request.prompt], add_special_tokens=request.add_special_tokens, max_tokens=limit
        )
    else:
        raise InvalidRequest("prompt or messages is missing", field="prompt")
    body = {"count": len(tokens), "max_model_len": state.routers.max_model_len or None, "tokens": tokens}
    await exchange.reply(200, msgspec.json.encode(body))


async def detokenize(state: GatewayState, exchange: Exchange) -> None:
    """``{"tokens"}`` -> ``{"prompt"}``."""
    request = parse(await exchange.read_body(state.bodies), DetokenizeRequest)
    state.check_model(request.model)
    vocab_size = state.tokenizer.vocab_size
    if request.tokens and max(request.tokens) >= vocab_size:
        raise InvalidRequest(f"tokens must be between 0 and {vocab_size - 1}", field="tokens")
    body = {"prompt": state.tokenizer.decode(request.tokens)}
    await exchange.reply(200, msgspec.json.encode(body))
