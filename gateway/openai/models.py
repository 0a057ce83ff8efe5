"""``/v1/models``: what there is to know of the model before it is asked: its bounds and its abilities.

Pure. OpenAI's fields, vLLM's (``root``, ``parent``, ``max_model_len``), and ours, which say what a request
may ask for without being refused.
"""

from __future__ import annotations

from typing import Any

from microserve.gateway.parsing.parsers import ModelParsers
from microserve.gateway.text.prompt.chat_template import ChatTemplate

REASONING_OPTIONS = ("reasoning_effort", "enable_thinking")


def model_card(
    name: str,
    *,
    created: int,
    max_model_len: int,
    parsers: ModelParsers,
    template: ChatTemplate | None,
    dtype: str,
    weights: str,
    parent: str | None = None,
) -> dict[str, Any]:
    """``parent``: of an adapter, the model; ``max_model_len``: 0 while no engine has told it; ``weights``:
    ``dtype``, or how they are rounded."""
    tools = parsers.tools if template is not None and template.knows("tools") else None
    context = max_model_len or None
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "microserve",
        "root": parent or name,
        "parent": parent,
        "max_model_len": context,
        "context_length": context,
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "dtype": dtype,
        "quantization": None if weights == "dtype" else weights,
        "capabilities": {
            "chat": template is not None,
            "completions": True,
            "tools": tools is not None,
            "required_tools": tools is not None and tools.frame is not None,
            "reasoning": parsers.thoughts is not None,
            "reasoning_options": [
                each for each in REASONING_OPTIONS if template is not None and template.knows(each)
            ],
            "structured_output": True,
            "logprobs": True,
        },
    }
