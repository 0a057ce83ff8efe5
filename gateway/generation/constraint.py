"""What an answer must be: the grammar that goes with a request, checked, and what of it is relaxed.

Owns how a schema, thoughts and tools go together in one answer. Knows no family of models; compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microserve.gateway.grammar.asked import asked_of
from microserve.gateway.openai.schema import GenerationRequest
from microserve.gateway.state import GatewayState
from microserve.gateway.text.reading import Reading
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.sampling import Grammar


async def constraint_of(
    state: GatewayState, request: GenerationRequest, reading: Reading | None, prompt_ids: Sequence[int]
) -> tuple[Grammar | None, tuple[str, ...]]:
    """The grammar, and what the client is to be warned of. Raises :class:`InvalidRequest`.

    Where a thought has begun in the prompt, or comes before every answer, the grammar begins behind it.
    """
    asked = asked_of(request)
    if asked is None:
        return None, ()
    if reading is not None and reading.wanted.types:
        raise InvalidRequest(f"{asked.field} together with tools is not supported", field=asked.field)
    checked = await state.grammars.check(asked)
    after = () if reading is None else reading.thought_ends(state.tokenizer, prompt_ids)
    return msgspec.structs.replace(checked.grammar, after_token_ids=after), checked.warnings
