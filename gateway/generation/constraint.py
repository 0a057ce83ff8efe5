"""What an answer must be: the grammar that goes with a request, checked, and what of it is relaxed.

Owns how a schema, thoughts and tools go together in one answer. Knows no family of models; compiles nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from microserve.gateway.grammar.asked import Asked
from microserve.gateway.grammar.checker import Checked
from microserve.gateway.parsing.required import lark_of
from microserve.gateway.parsing.written.lark import Unwritable
from microserve.gateway.request.request import GenerateRequest, ToolUse
from microserve.gateway.routers.mailbox import Inbox
from microserve.gateway.state import GatewayState
from microserve.gateway.text.answer.reading import Reading
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.compiled import json_of
from microserve.protocol.messages.request.sampling import MAX_GRAMMAR_NBYTES, Grammar

_ANY = {"type": "object"}
"""Arguments of a function that says nothing of them."""
JSON_KINDS = ("json_schema", "json_object")
"""Of grammars that a text may have beside tools."""
INLINE_SCHEMAS_CHARS = 8192
"""The grammar of more is written in a thread: patterns are read one by one, in Python."""
MAX_SCHEMAS_CHARS = 2 * MAX_GRAMMAR_NBYTES
"""Of tools whose calls must match, with what does not constrain (descriptions)."""


async def constraint_of(
    state: GatewayState,
    request: GenerateRequest,
    reading: Reading | None,
    prompt_ids: Sequence[int],
    inbox: Inbox,
) -> tuple[Grammar | None, tuple[str, ...]]:
    """The grammar, and what the client is to be warned of. Raises :class:`InvalidRequest`, ``QueueFull``, or
    what has ended the inbox meanwhile.

    Where a thought has begun in the prompt, or comes before every answer, the grammar begins behind it.
    """
    asked, use = request.grammar, request.tools
    warnings: tuple[str, ...] = ()
    if use is not None and reading is not None and (use.must_match or asked is not None):
        answer, told = ("", ()) if asked is None else await _of_answer(state, asked, use, reading, inbox)
        asked, warnings = await _of_calls(state, use, reading, inbox, answer)
        warnings += told
    if asked is None:
        return None, ()
    checked = await _checked(state, asked, inbox)
    after: tuple[int, ...] = ()
    if reading is not None and not (use is not None and reading.grammar_has_thoughts):
        after = reading.thought_ends(state.tokenizer, prompt_ids)
    return (
        msgspec.structs.replace(checked.grammar, after_token_ids=after),
        (*warnings, *checked.warnings),
    )


async def _checked(state: GatewayState, asked: Asked, inbox: Inbox) -> Checked:
    checked = await state.grammars.check(asked, lambda: inbox.error is None)
    if checked is None:  # the client has gone
        assert inbox.error is not None
        raise inbox.error
    return checked


async def _of_answer(
    state: GatewayState, asked: Asked, use: ToolUse, reading: Reading, inbox: Inbox
) -> tuple[str, tuple[str, ...]]:
    """What the answer must be where no tool is called, as a term of Lark, and what is relaxed of it."""
    tools = reading.parsers.tools
    # Calls that are JSON from their first character on cannot be told from an answer that is.
    is_bare = use.mode == "auto" and tools is not None and bool(tools.bare)
    if asked.grammar.kind not in JSON_KINDS or is_bare:
        of_model = f" of this model ({reading.parsers.tool_name})" if is_bare else ""
        raise InvalidRequest(
            f"{asked.field} together with tools{of_model} is not supported", field=asked.field
        )
    checked = await _checked(state, asked, inbox)
    schema = msgspec.json.decode(checked.grammar.text) if checked.grammar.kind == "json_schema" else _ANY
    return json_of(schema), checked.warnings


async def _of_calls(
    state: GatewayState, use: ToolUse, reading: Reading, inbox: Inbox, answer: str
) -> tuple[Asked, tuple[str, ...]]:
    """Calls that must be made, or match: as their schemas say, relaxed where the client does not insist.

    ``answer``: what may come in the place of calls that need not be made; empty for any text.
    """
    parsers = reading.parsers
    tools = parsers.tools
    marks = {text: token for text, (token, _) in parsers.marks(reading.wanted).items()}
    field = "tools" if use.mode == "auto" else "tool_choice"
    if tools is None or tools.frame is None or any(each not in marks for each in tools.frame.needs):
        raise InvalidRequest(
            f"{field}: calls of this model ({parsers.tool_name}) can be neither required nor strict",
            field=field,
        )
    num_chars = 0
    schemas: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    for name, function in use.functions().items():
        schema = _ANY | (function.parameters or {})
        schema.pop("x-guidance", None)  # the library's own options are not a client's to choose
        text = msgspec.json.encode(schema).decode()
        num_chars += len(text)
        if num_chars > MAX_SCHEMAS_CHARS:  # no grammar may be so long, and each is looked at in the loop
            raise InvalidRequest(
                f"{field}: the parameters of all tools may have {MAX_SCHEMAS_CHARS} characters together",
                field=field,
            )
        wish = Asked(Grammar(kind="json_schema", text=text), function.field, function.is_strict)
        checked = await _checked(state, wish, inbox)
        schemas[name] = msgspec.json.decode(checked.grammar.text)
        warnings += checked.warnings
    write = partial(lark_of, one_only=use.one_only, is_free=use.mode == "auto", answer=answer)
    is_long = num_chars > INLINE_SCHEMAS_CHARS
    try:
        written = (tools, schemas, marks)
        text = await asyncio.to_thread(write, *written) if is_long else write(*written)
    except Unwritable as error:
        where = use.functions()[error.tool].field
        raise InvalidRequest(
            f"{where}: calls of this model ({parsers.tool_name}) cannot be held to {error}", field=where
        ) from None
    return Asked(Grammar(kind="lark", text=text), field), tuple(warnings)
