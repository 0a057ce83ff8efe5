"""The gateway against its own OpenAPI document, by schemathesis: what it says is valid is taken, what is not
is refused, and every answer is one that it describes.

``MICROSERVE_FUZZ_S``: seconds for all of it, and figures of what came; otherwise a few examples of each.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from microserve.gateway.app import Application
from microserve.gateway.document import OPERATIONS
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, packed
from tests.support.gateway.gateway_world import MAX_MODEL_LEN, Served
from tests.support.gateway.living import Living
from tests.support.gateway.talking_model import make_talking_model
from tests.support.security import wishes

pytestmark = pytest.mark.slow

EXAMPLES = 40
VOCAB_SIZE = 300
FUZZ_S = float(os.environ.get("MICROSERVE_FUZZ_S", "0"))
WISHES = {
    "/v1/chat/completions": wishes.of_chat,
    "/v1/completions": wishes.of_completions,
    "/v1/responses": wishes.of_responses,
    "/v1/messages": wishes.of_messages,
}
"""What is put into bodies that are valid."""
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_schema_conformance, negative_data_rejection),
]
"""A request that is valid may yet be refused (400) for two of its fields that do not fit each other."""


def answer(served: Served) -> None:
    """Two tokens, as many log-probabilities as were asked for, of the prompt too."""
    num_top, num_rows = served.message.sampling.prompt_logprobs, len(served.tokens) - 1
    if num_top is not None and num_rows:
        row = PromptLogprob(-0.5, 1, tuple((each, -0.5 - each) for each in range(num_top)))
        served.send(prompt=packed(1, num_top, [row] * num_rows))
    wanted, count = served.message.sampling.logprobs, min(2, served.message.sampling.max_tokens)
    logprobs = [] if wanted is None else [TokenLogprob(-0.5, [(65, -0.5)][:wanted])] * count
    served.send([65] * count, logprobs=logprobs, ended=served.ended("length"))


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    directory = make_talking_model(tmp_path_factory.mktemp("model") / "talker")
    living = Living(directory, answer=answer, vocab_size=VOCAB_SIZE)
    try:
        yield living
    finally:
        living.close()


@pytest.fixture(scope="module")
def document(living: Living) -> Any:
    reply = httpx.get(f"{living.address}/openapi.json", timeout=30.0)
    assert reply.status_code == 200
    return reply.json()


def test_the_document_is_of_every_path_and_of_these_bounds(document: Any) -> None:
    routes = [each.path for each in Application(None)._routes() if isinstance(each, Route)]  # type: ignore[arg-type]
    paths = [path.replace(":path", "") for path in routes if path != "/" and not path.startswith("/page/")]
    assert sorted(document["paths"]) == sorted(paths), "all but the files of the page"
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"]["enum"] == ["tiny"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 16}
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == MAX_MODEL_LEN - 1
    assert fields["stop_token_ids"]["anyOf"][0]["items"]["maximum"] == VOCAB_SIZE - 1
    assert fields["top_k"]["anyOf"][0]["minimum"] == -1
    assert fields["use_beam_search"]["enum"] == [None, False]


def outcome_of(reply: Any) -> str:
    """The status, and of a refusal what was wrong."""
    if reply.status_code == 200:
        return "200"
    error = json.loads(reply.content)["error"]
    return f"{reply.status_code} {error['param']}: {error['message'][:60]}"


def share_of(method: str, path: str) -> float:
    """Of the time: what reads a body takes nearly all of it."""
    weights = [4.0 if each.path in WISHES else 1.0 for each in OPERATIONS if each.request is not None]
    if method != "post":
        return 0.0
    return (4.0 if path in WISHES else 1.0) / (2 * sum(weights))


NOT_OFFERED = ("/flush_cache",)
"""Whoever asks for it is told so, and never served."""
NEEDS_INDEX = ("/view/strategies",)
"""What only the index knows: there is none here, which is a 504."""
UNENDING = ("/view/feed",)
METHODS = [
    ("post" if each.request else "delete" if each.deletes else "get", each)
    for each in OPERATIONS
    if each.path not in UNENDING + NEEDS_INDEX
]
MODES = [(method, each.path, GenerationMode.POSITIVE) for method, each in METHODS] + [
    (method, each.path, GenerationMode.NEGATIVE) for method, each in METHODS if method == "post"
]


@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_every_operation_is_as_it_is_described(
    living: Living, document: Any, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method.upper()]
    examples = EXAMPLES if method == "post" else EXAMPLES // 10
    outcomes: Counter[str] = Counter()
    is_valid = mode is GenerationMode.POSITIVE
    wish = WISHES[path]() if is_valid and path in WISHES else st.just({})
    phases = list(Phase) if FUZZ_S == 0 else [Phase.generate, Phase.shrink]

    @given(case=operation.as_strategy(generation_mode=mode), more=wish)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    def call(case: Any, more: dict[str, Any]) -> None:
        if is_valid:  # a millisecond is a valid time, and mostly too short
            case.headers.pop("x-microserve-timeout-s", None)
        if more:
            case.body = {**case.body, **more}
        reply = case.call(base_url=living.address, timeout=60.0)
        outcomes[outcome_of(reply)] += 1
        case.validate_response(reply, checks=CHECKS)

    end = time.monotonic() + FUZZ_S * share_of(method, path)
    call()
    while time.monotonic() < end:
        call()
    if FUZZ_S:
        print(
            f"\n{path} {mode.value}: {outcomes.total()} requests, {outcomes['200']} served, "
            f"{len(outcomes)} outcomes: {outcomes.most_common(12)}"
        )
    if mode is GenerationMode.POSITIVE and "{" not in path and path not in NOT_OFFERED:
        assert outcomes["200"], f"nothing that was valid was served: {outcomes}"
