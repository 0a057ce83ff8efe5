"""How the answers of a request are read: which calls of tools, and whether there are thoughts."""

from __future__ import annotations

from microserve.gateway.parsing.parsers import ModelParsers, Wanted
from microserve.gateway.parsing.typed import schemas_of
from microserve.gateway.request.request import Conversation, GenerateRequest
from microserve.gateway.text.answer.reading import Reading
from microserve.protocol.errors import InvalidRequest


def reading_of(request: GenerateRequest, parsers: ModelParsers) -> Reading | None:
    """None where answers are text and nothing else. Raises :class:`InvalidRequest`."""
    if not isinstance(request.prompt, Conversation):
        return None
    use, is_continued = request.tools, request.prompt.continues
    if use is None:
        return Reading(parsers, Wanted(), is_continued) if parsers.thoughts is not None else None
    if parsers.tools is None:
        raise InvalidRequest(
            "tools is not supported: it is not known how this model calls them (model.tool_parser)",
            field="tools",
        )
    types = {name: schemas_of(function.parameters) for name, function in use.functions().items()}
    wanted = Wanted(types, use.one_only, is_json=request.grammar is not None)
    return Reading(parsers, wanted, is_continued, use.mode == "named")
