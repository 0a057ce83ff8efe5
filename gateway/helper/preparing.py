"""A large body -> what is sent to a router, or the whole reply where no router is asked.

Owns the order of things in the helper; every step is the one that small bodies take in the gateway itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from microserve.gateway.api.parse import Parsed, Shape, parsed
from microserve.gateway.dialects import COUNTINGS, DIALECTS
from microserve.gateway.grammar.checker import check_asked
from microserve.gateway.helper.jobs import Answered, Prepare, Prepared, Result, Setup, Wanting
from microserve.gateway.request.prompts import prompts_of
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.tokenizer import Maps, ModelTokenizer
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import InternalError, InvalidRequest, ModelNotFound, NoEngines

MAX_LABEL_NBYTES = 64 << 10
MAX_REST_NBYTES = 1 << 20
"""Of a request without its prompt, as it goes back to the gateway: read there in some milliseconds."""


class Preparer:
    """One per process."""

    def __init__(
        self, setup: Setup, render: Callable[[Maps, Maps | None, Mapping[str, Any] | None], str]
    ) -> None:
        async def renderer(messages: Maps, tools: Maps | None, options: Mapping[str, Any] | None) -> str:
            return render(messages, tools, options)

        self._model = setup.model
        self._shape = Shape(setup.max_values, setup.max_depth)
        self._tokenizer = ModelTokenizer.load(
            setup.directory, renderer=renderer, parse_control_tokens=setup.parse_control_tokens
        )

    async def prepare(self, job: Prepare, body: bytes) -> tuple[Result, bytes]:
        """The answer and its bulk. Raises what a small body of the kind would."""
        if (dialect := DIALECTS.get(job.kind)) is not None:
            body, kept = _apart(body, job.kept)
            found = self._parsed(body, dialect.body, job)
            if not job.has_kept and (needed := dialect.needs(found.body)):
                return Wanting(dict(needed)), b""
            request = dialect.request(found.body, kept)
            request.warnings += found.warnings
            prompts = await prompts_of(request, self._tokenizer, _limits(job))
            request.drop_prompt()
            return _prepared(request, prompts)
        if (counting := COUNTINGS.get(job.kind)) is not None:
            found = self._parsed(body, counting.body, job)
            reply = await counting.reply(found.body, self._tokenizer, job.max_model_len)
            return Answered(found.warnings), reply
        raise InternalError(f"no job is called {job.kind!r}")

    def _parsed(self, body: bytes, kind: type[Any], job: Prepare) -> Parsed[Any]:
        found = parsed(body, kind, self._shape)
        if found.body.model not in (None, self._model, *job.adapters):
            raise ModelNotFound(f"the model {found.body.model!r} is not served here", field="model")
        return found


def _apart(bulk: bytes, sizes: Mapping[str, int]) -> tuple[bytes, dict[str, bytes]]:
    """The body, and what was kept under these names."""
    begin = len(bulk) - sum(sizes.values())
    body, kept = bulk[:begin], {}
    for name, size in sizes.items():
        kept[name] = bulk[begin : begin + size]
        begin += size
    return body, kept


def _limits(job: Prepare) -> ModelLimits:
    limits = ModelLimits(job.max_model_len, job.vocab_size)
    if not limits.are_known:
        raise NoEngines("no engine has told the limits of the model yet")
    return limits


def _prepared(request: GenerateRequest, prompts: Sequence[Sequence[int]]) -> tuple[Result, bytes]:
    if request.grammar is not None:
        check_asked(request.grammar)  # before it is anybody's work to look at a text of any size
    for name, value in list(request.labels.items()):  # may be as large as the body, which no attribute is
        if len(msgspec.json.encode(value)) > MAX_LABEL_NBYTES:
            del request.labels[name]
    context, request.context = request.context, b""
    rest = msgspec.json.encode(request)
    if len(rest) > MAX_REST_NBYTES:  # the gateway reads it in its loop
        prompt = request.name_of("prompt")
        raise InvalidRequest(
            f"beside {prompt} a request may have {MAX_REST_NBYTES} bytes at most, this one has {len(rest)}"
        )
    bulk = b"".join([*map(encode_tokens, prompts), context])
    return Prepared(rest, list(map(len, prompts))), bulk
