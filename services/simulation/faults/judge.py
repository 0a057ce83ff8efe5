"""What must be true of a mesh after its faults: the promises, each as a check that can fail.

Owns the oracle. Returns violations as text; an empty list is the only good answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import msgspec

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.errors import (
    ConfigError,
    InternalError,
    InvalidInterval,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    ProtocolViolation,
    StrategyError,
    StrategyNotFound,
)
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprobs
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.index.service import IndexService
from microserve.services.router.service import Router
from microserve.services.simulation.engine.engine import VOCAB_SIZE, SimEngine
from microserve.services.simulation.engine.hash_runner import (
    HASH,
    expected_rows,
    expected_samples,
    plain,
)
from microserve.services.simulation.engine.marked_runner import marked
from microserve.services.simulation.faults.scenario import CALM, STORM, Scenario
from microserve.services.simulation.gateway import Answer, SimGateway
from microserve.services.simulation.mesh import INDEX, SimulatedMesh

GONE_S = 0.4
"""Without faults a cancelled request is gone from every engine after so long."""
PATIENCE_S = 2.5
"""With one engine failing, a request takes no longer: 0.6 s until it is missed, and the work done twice."""


INEXCUSABLE = frozenset(
    error.code
    for error in (
        InvalidRequest,
        InvalidInterval,
        PromptTooLong,
        ModelNotFound,
        StrategyNotFound,
        StrategyError,
        ProtocolViolation,
        ConfigError,
        InternalError,
    )
)
"""Codes with which no request of a campaign may end, whatever fails under it."""
MAX_TOKENS = 80
"""No request of a campaign asks for more."""


@cache
def _oracle(
    prompt: tuple[int, ...], temperature: float, seed: int, is_marked: bool, grammar: Grammar | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    params = SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=temperature,
        seed=seed,
        ignore_eos=True,
        logprobs=0,
        grammar=grammar,
    )
    make_runner = marked if is_marked else plain
    samples = expected_samples(prompt, params, vocab_size=VOCAB_SIZE, make_runner=make_runner)
    return tuple(s.token_id for s in samples), tuple(s.logprob or 0.0 for s in samples)


@cache
def _rows(prompt: tuple[int, ...], num_top: int, is_marked: bool) -> PromptLogprobs:
    make_runner = marked if is_marked else plain
    return expected_rows(prompt, num_top, vocab_size=VOCAB_SIZE, make_runner=make_runner)


def expected(
    prompt: Sequence[int], params: SamplingParams, *, is_marked: bool = False
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and log probabilities that any mesh must answer; ``is_marked``: one whose rows have marks."""
    tokens, logprobs = _oracle(tuple(prompt), params.temperature, params.seed, is_marked, params.grammar)
    stops = (length for length, token in enumerate(tokens, start=1) if token in params.stop_token_ids)
    length = min(params.max_tokens, next(stops, params.max_tokens))
    return tokens[:length], logprobs[:length]


def judge_answer(answer: Answer, *, is_marked: bool = False) -> list[str]:
    """A complete answer is the oracle's; one that was cut short is a prefix of it."""
    params = answer.params
    if answer.ended is not None and answer.ended.capped_to:  # so short its strategy wanted it
        params = msgspec.structs.replace(params, max_tokens=answer.ended.capped_to)
    tokens, logprobs = expected(answer.prompt, params, is_marked=is_marked)
    name = f"{answer.request_id} ({answer.strategy}, {len(answer.prompt)} prompt tokens)"
    have, wrong = tuple(answer.token_ids), []
    if answer.is_complete and have != tokens:
        wrong.append(f"wrong tokens: {name}: {list(have)}, expected {list(tokens)}")
    elif answer.is_complete and answer.outcome != (
        "stop" if tokens and tokens[-1] in params.stop_token_ids else "length"
    ):
        wrong.append(f"wrong end: {name}: {answer.outcome}")
    elif have != tokens[: len(have)]:
        wrong.append(f"wrong tokens before its end: {name}: {list(have)}, expected {list(tokens)}")
    if params.logprobs is not None:
        told = tuple(logprob.logprob for logprob in answer.logprobs)
        if told != logprobs[: len(told)] or len(told) != len(have):
            wrong.append(f"wrong logprobs: {name}")
    return wrong + _judge_rows(answer, name, is_marked=is_marked)


def _judge_rows(answer: Answer, name: str, *, is_marked: bool) -> list[str]:
    """Of the prompt's own tokens: all before the first token, the first of them of one that was cut short."""
    if answer.params.prompt_logprobs is None:
        return [] if answer.rows is None else [f"log-probabilities of the prompt: {name} asked for none"]
    rows = _rows(tuple(answer.prompt), answer.params.prompt_logprobs, is_marked)
    told = answer.rows or rows.until(FIRST_POSITION)
    if told != rows.until(told.end) or (len(told) < len(rows) and (answer.is_complete or answer.token_ids)):
        return [f"wrong log-probabilities of the prompt: {name}: {len(told)} of {len(rows)}"]
    return []


def judge_promises(mesh: SimulatedMesh, answers: Sequence[Answer]) -> list[str]:
    """An answer is told to be exact only if all rows that its tokens owe to are of that one exact class; and
    where there is one class only, it is told so."""
    classes = {each.name: each for each in mesh.shape.numerics}
    wrong = []
    for answer in answers:
        name = f"{answer.request_id} ({answer.strategy})"
        if not classes and answer.is_complete and answer.numerics != HASH:
            wrong.append(f"promise: {name} is told of {answer.numerics}, and all engines are of {HASH}")
        for promise, num_tokens in answer.promises.items() if classes else ():
            mark = mesh.mark(classes[promise])
            owed = [mesh.witness.marks.get((answer.request_id, at), set()) for at in range(num_tokens)]
            late = [at for at, marks in enumerate(owed) if mark not in marks]
            if late or not classes[promise].is_exact:
                wrong.append(
                    f"promise: {name} is told {promise!r} of {num_tokens} tokens, not true of {late}"
                )
    return wrong


def judge_outcomes(answers: Sequence[Answer]) -> list[str]:
    return [f"stuck: {a.request_id} ({a.strategy}) has no outcome" for a in answers if not a.outcome]


def judge_codes(answers: Sequence[Answer]) -> list[str]:
    """No fault of processes, clocks or messages makes a good request wrong, or is a defect of ours."""
    return [
        f"code: {a.request_id} ({a.strategy}) ended {a.outcome!r}: {a.detail}"
        for a in answers
        if a.outcome in INEXCUSABLE
    ]


def judge_gone(mesh: SimulatedMesh, request_id: str) -> list[str]:
    """A cancelled request is nowhere any more."""
    return [
        f"leak: {name} still works for {request_id}, cancelled {GONE_S} s ago"
        for name in mesh.engines
        for record in mesh.seats[name].service.core.state.records
        if record.request_id.partition("~")[0] == request_id and not record.is_idle
    ]


def judge_service(
    scenario: Scenario, answers: Sequence[Answer], num_continued: int, held_up: Collection[str]
) -> list[str]:
    """What is promised where nothing, or one engine of several, has failed.

    ``held_up`` requests wait for blocks or for a grant, and a frozen writer keeps its grants and their blocks
    for as long as it is frozen.
    """
    if scenario.kind == STORM:
        return []
    frozen_s = max(
        (fault.until - fault.at for fault in scenario.faults if fault.kind == "freeze"), default=0.0
    )
    wrong = []
    if scenario.kind == CALM and num_continued:
        wrong.append(f"service: {num_continued} requests were begun anew though nothing had failed")
    for answer in answers:
        name = f"{answer.request_id} ({answer.strategy})"
        if not answer.is_complete and not answer.is_cancelled:
            wrong.append(f"service: {name} ended {answer.outcome!r} ({answer.detail})")
            continue
        patience_s = PATIENCE_S + (frozen_s if answer.request_id in held_up else 0.0)
        if answer.ended_at - answer.submitted_at > patience_s:
            seconds = answer.ended_at - answer.submitted_at
            wrong.append(f"service: {name} took {seconds:.1f} s, at most {patience_s}")
    return wrong


def judge_rest(mesh: SimulatedMesh, *, with_indexes: bool = True) -> list[str]:
    """What is left over once nobody asks for anything: nothing.

    ``with_indexes``: every index equals the engines' caches, which takes its time with long prompts.
    """
    left: list[str] = []
    for name in mesh.engines:
        left += _judge_engine(name, mesh.seats[name].service, mesh)
    for name in mesh.routers:
        left += _judge_router(name, mesh.seats[name].service)
    for name in mesh.gateways:
        left += _judge_gateway(name, mesh.seats[name].service)
    left += _judge_connections(mesh)
    return left + (_judge_indexes(mesh) if with_indexes else [])


def _judge_connections(mesh: SimulatedMesh) -> list[str]:
    """Everybody has found everybody again."""
    apart = []
    for name in mesh.routers:
        joined = {connection.engine_id for connection in mesh.seats[name].service.registry.usable()}
        apart += [f"apart: {name} does not use {engine}" for engine in mesh.engines if engine not in joined]
        if len(mesh.seats[name].service.gateways) != len(mesh.gateways):
            apart.append(f"apart: {name} does not have every gateway")
    for name in mesh.gateways:
        if mesh.seats[name].service.num_usable != len(mesh.routers):
            apart.append(f"apart: {name} cannot use every router")
    return apart


def _judge_engine(name: str, engine: SimEngine, mesh: SimulatedMesh) -> list[str]:
    core = engine.core
    pool, state = core.memory.pool, core.state
    counts = core.memory.grants.counts(0.0)
    checks = {
        "blocks in use": pool.num_used,
        "blocks in quarantine": pool.num_quarantined,
        "blocks missing": pool.num_blocks - pool.num_free - pool.num_used - pool.num_quarantined,
        "requests": state.num_requests,
        "grants open": counts.num_open,
        "grants sealed": counts.num_sealed,
        "grant slots missing": core.memory.grants.num_slots - counts.num_free_slots,
        "commits": len(state.committing),
        "routers that are gone": max(0, engine.num_routers - len(mesh.routers) - 1),
    }
    left = [f"leak: {name} has {value} {what}" for what, value in checks.items() if value]
    if engine.numerics.is_exact and (foreign := engine.foreign_blocks()):
        left.append(f"promise: {name} has blocks {foreign} of another class in its prefix cache")
    try:
        core.check_integrity()
    except InternalError as error:
        left.append(f"integrity: {name}: {error.detail}")
    return left


def _judge_router(name: str, router: Router) -> list[str]:
    left = []
    if len(router.serving):
        left.append(f"leak: {name} has {len(router.serving)} live requests")
    if not router.serving.book.is_zero:
        left.append(f"leak: {name}'s load book is not at zero")
    if not router.serving.turnstile.is_idle:
        left.append(f"leak: {name} keeps turns of requests that have ended")
    for connection in router.registry.joined():
        if connection.prompts or connection.has_waiters or not connection.is_idle:
            left.append(f"leak: {name} still waits for {connection.engine_id}")
    return left


def _judge_gateway(name: str, gateway: SimGateway) -> list[str]:
    routers = gateway.routers
    if routers.num_requests or routers.kept_nbytes:
        return [f"leak: {name} has {routers.num_requests} requests, {routers.kept_nbytes} bytes of prompts"]
    return []


def _judge_indexes(mesh: SimulatedMesh) -> list[str]:
    """Every index says of every engine what is in the engine's cache, and nothing else."""
    wrong = []
    truth = {name: _truth(mesh.seats[name].service) for name in mesh.engines}
    service: IndexService = mesh.seats[INDEX].service
    indexes: dict[str, PrefixIndex | None] = {INDEX: service.prefix_index("hash")}
    for name in mesh.routers:
        indexes[name] = mesh.seats[name].service.prefixes.index
    everything = set().union(*truth.values())
    for name, index in indexes.items():
        if index is None:
            wrong.append(f"index: {name} knows no engine")
            continue
        index.check_integrity()
        if index.num_blocks != len({chain[-1] for chain in everything}):
            wrong.append(f"index: {name} has {index.num_blocks} blocks, engines {len(everything)}")
        for chain in everything:
            told = index.lookup_hashes(chain)
            real = {engine: _depth(chain, chains) for engine, chains in truth.items()}
            held = {engine: depth * mesh.shape.block_size for engine, depth in real.items() if depth}
            if told != held:
                wrong.append(f"index: {name} says {told} of a chain of {len(chain)}, engines hold {held}")
                break
    return wrong


Chain = tuple[bytes, ...]
"""Hashes of a prefix, block by block."""


def _truth(engine: SimEngine) -> set[Chain]:
    """Every prefix that ends with a cached block."""
    chains: dict[bytes, Chain] = {}
    for event in engine.core.memory.cache.snapshot():
        parent = event.parent_block_hash
        chain: Chain = chains[parent] if isinstance(parent, bytes) else ()
        for block_hash in event.block_hashes:
            if isinstance(block_hash, bytes):
                chain = (*chain, block_hash)
                chains[block_hash] = chain
    return set(chains.values())


def _depth(chain: Chain, chains: set[Chain]) -> int:
    return next((n for n in range(len(chain), 0, -1) if chain[:n] in chains), 0)
