"""``/v1/messages/count_tokens``: how long a conversation is, before it is asked for."""

from __future__ import annotations

from microserve.gateway.anthropic.blocks import encode
from microserve.gateway.anthropic.request import into_counted
from microserve.gateway.anthropic.schema import CountTokensRequest
from microserve.gateway.api.fields import MAX_COUNTED_TOKENS
from microserve.gateway.request.prompts import encoded
from microserve.gateway.request.request import Conversation
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest, PromptTooLong


async def counted(body: CountTokensRequest, tokenizer: ModelTokenizer, max_model_len: int) -> bytes:
    """``{"input_tokens"}``, which may be more than the model has room for: that is what is asked here. Raises
    :class:`InvalidRequest` naming the field."""
    request = into_counted(body)
    assert isinstance(request.prompt, Conversation)
    shown = None if request.tools is None else request.tools.shown
    try:
        ids = await encoded(request.prompt, shown, tokenizer, max_tokens=MAX_COUNTED_TOKENS, field="messages")
    except PromptTooLong as error:
        raise InvalidRequest(
            f"more than {MAX_COUNTED_TOKENS} tokens are not counted here", field=error.field
        ) from None
    return encode({"input_tokens": len(ids)})
