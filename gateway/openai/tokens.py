"""``/tokenize`` and ``/detokenize`` (vLLM's): a text's ids, and ids' text, as JSON."""

from __future__ import annotations

from microserve.gateway.api.fields import MAX_COUNTED_TOKENS
from microserve.gateway.openai.answer import encode
from microserve.gateway.openai.chat import conversation_of
from microserve.gateway.openai.schema import DetokenizeRequest, TokenizeRequest
from microserve.gateway.openai.tools import names_of
from microserve.gateway.request.prompts import encoded
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest, PromptTooLong


async def tokenized(request: TokenizeRequest, tokenizer: ModelTokenizer, max_model_len: int) -> bytes:
    """``max_model_len``: 0 while it is not known. Raises :class:`InvalidRequest` naming the field."""
    limit = MAX_COUNTED_TOKENS
    try:
        if request.messages is not None:
            if request.add_special_tokens:
                raise InvalidRequest(
                    "add_special_tokens is not for messages: the template writes them",
                    field="add_special_tokens",
                )
            conversation = conversation_of(request, request.messages)
            names_of(request.tools or [])
            tokens = await encoded(conversation, request.tools, tokenizer, max_tokens=limit, field="messages")
        elif request.prompt is not None:
            [tokens] = await tokenizer.encode(
                [request.prompt],
                add_special_tokens=request.add_special_tokens is not False,
                max_tokens=limit,
            )
        else:
            raise InvalidRequest("prompt or messages is missing", field="prompt")
    except PromptTooLong as error:
        raise InvalidRequest(f"more than {limit} tokens are not counted here", field=error.field) from None
    return encode(
        {
            "count": len(tokens),
            "max_model_len": max_model_len or None,
            "tokens": list(tokens),
            "token_strs": tokenizer.names(tokens) if request.return_token_strs else None,
        }
    )


async def detokenized(request: DetokenizeRequest, tokenizer: ModelTokenizer, max_model_len: int) -> bytes:
    """Raises :class:`InvalidRequest` for ids beyond the vocabulary."""
    if request.tokens and max(request.tokens) >= tokenizer.vocab_size:
        raise InvalidRequest(f"tokens must be between 0 and {tokenizer.vocab_size - 1}", field="tokens")
    return encode({"prompt": tokenizer.decode(request.tokens)})
