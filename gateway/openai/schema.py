"""Request bodies of the OpenAI API (and vLLM's extras): their shape, what is refused and what is ignored.

Owns types and names only; which numbers are allowed is decided in ``sampling.py``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import InvalidRequest, located


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both kinds of completion share. ``None`` is the default everywhere, as clients send ``null``."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    # vLLM's extras, sent by clients as ``extra_body``.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str | int | list[int]]
    """Text, texts, ids or lists of ids; mixtures are refused."""
    logprobs: int | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


_IGNORED = frozenset(
    {
        *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("service_tier", "parallel_tool_calls"),
    }
)
"""Labels and hints: they change no token, so dropping them is honest."""

_ONLY_NULL: tuple[Any, ...] = ()
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # Field -> the values that ask for nothing (beside null); any other is refused rather than dropped.
    **dict.fromkeys(
        (
            *("audio", "prediction", "web_search_options", "reasoning_effort", "reasoning", "verbosity"),
            *("truncate_prompt_tokens", "prompt_logprobs", "prompt_embeds", "chat_template", "documents"),
            *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
            *("logits_processors", "allowed_token_ids", "mm_processor_kwargs", "kv_transfer_params"),
        ),
        _ONLY_NULL,
    ),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}

# Names of unknown fields come from clients: the memory of them is bounded.
_MAX_WARNED_FIELDS = 64
_MAX_WARNED_CHARS = 64
_warned: set[str] = set()
_logger = structlog.get_logger()

R = TypeVar("R", bound=msgspec.Struct)
_decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse(body: bytes, kind: type[R]) -> R:
    """Decode and check one body. Raises :class:`InvalidRequest` naming the field, for any bytes at all."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        _check_names(_fields.decode(body), kind)
        request: R = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refused(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    return request


def _check_names(fields: dict[str, msgspec.Raw], kind: type[msgspec.Struct]) -> None:
    known = kind.__struct_fields__
    for name, raw in fields.items():
        if name in known or name in _IGNORED:
            continue
        if name in _UNSUPPORTED:
            value = msgspec.json.decode(raw)
            if value is not None and value not in _UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported", field=name)
        else:
            _warn_once(name[:_MAX_WARNED_CHARS])


def _warn_once(field: str) -> None:
    if field not in _warned and len(_warned) < _MAX_WARNED_FIELDS:
        _warned.add(field)
        _logger.warning(log.HTTP_FIELD_IGNORED, field=field)


def _refused(error: msgspec.ValidationError) -> InvalidRequest:
    path, message = located(error)
    return InvalidRequest(f"{path}: {message}" if path else message, field=path or None)
