"""A model's directory whose template knows tools and thoughts, with markers that are tokens of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from microserve.protocol.messages.engine import TokenLogprob
from tests.support.gateway.gateway_world import Served, make_tokenizer, special_id

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def talking_tokenizer() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return tokenizer


def make_talking_model(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    talking_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"chat_template": TEMPLATE + "{# </think> #}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def call(name: str, **arguments: Any) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )


def saying(
    tokens: Tokenizer, text: str, *, at_once: bool = False, reason: str = "stop"
) -> Callable[[Served], None]:
    """A router's answer to every request: this text, token by token or at once, and its end."""
    stop = special_id(tokens, "<|im_end|>")

    def answer(served: Served) -> None:
        ids = [*tokens.encode(text).ids, *([stop] if reason == "stop" else [])]
        wants = served.message.sampling.logprobs is not None
        for part in [ids] if at_once else [[each] for each in ids]:
            served.send(part, logprobs=[TokenLogprob(-0.25, []) for _ in part] if wants else [])
        served.end(reason, **({"stop_token_id": stop} if reason == "stop" else {}))

    return answer
