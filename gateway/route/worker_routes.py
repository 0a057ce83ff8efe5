"""What other people's routers ask of a worker, in SGLang's words: sglang-router and its like.

Owns those few answers. A worker is one model on a card of its own to them; what a gateway does not have, they
are told is 1, or not offered.
"""

from __future__ import annotations

import msgspec

from microserve.gateway.http.errors import NotOffered
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.openai.replies import ModelInfoReply, ServerInfoReply
from microserve.gateway.state import GatewayState


async def server_info(state: GatewayState, exchange: Exchange) -> None:
    """Without a model that the key may see, its fields are empty."""
    model = _visible_model(state, exchange)
    body = ServerInfoReply(
        model_path=model,
        served_model_name=model,
        version=state.version,
        max_total_num_tokens=state.routers.max_model_len,
        max_running_requests=state.max_choices,
    )
    await exchange.reply(200, msgspec.json.encode(body))


async def model_info(state: GatewayState, exchange: Exchange) -> None:
    model = _visible_model(state, exchange)
    await exchange.reply(200, msgspec.json.encode(ModelInfoReply(model_path=model, tokenizer_path=model)))


async def flush_cache(state: GatewayState, exchange: Exchange) -> None:
    """It could empty no cache but those of engines, which other gateways use as well."""
    raise NotOffered(
        "a gateway empties no prefix cache; an engine that is restarted begins with an empty one"
    )


def _visible_model(state: GatewayState, exchange: Exchange) -> str:
    allowed = exchange.key.models
    return state.model if not allowed or state.model in allowed else ""
