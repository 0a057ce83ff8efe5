"""Where to split a prompt between two engines, and whether that is cheaper than one: a helper of strategies.

Costs are seconds, those that others lose included, so that a split and none can be compared; what they are
made of is in ../engines/prediction.py. Decides nothing: a strategy asks, and acts.

Source: MicroServe, arXiv 2412.12488 (a balanced split), DynaServe, arXiv 2504.09285 (at any token).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request

CROWD = 4
READS_ONLY = ("",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


class Split(NamedTuple):
    """``prefill`` computes the prompt up to ``end``, ``decode`` the rest of it and the answer."""

    prefill: Engine
    decode: Engine
    end: int
    cost_s: float


def alone_s(mesh: Mesh, request: Request, engine: Engine) -> float:
    """What it costs to serve all of it there."""
    return mesh.prefill_cost_s(engine, mesh.uncached(engine, request)) + mesh.decode_cost_s(engine)


def cheapest_split(mesh: Mesh, request: Request, *, reserve: float = 0.0) -> Split:
    """Prefill where that costs least, decode where that does; the whole prompt or an even share of it.

    The answer goes to no engine at which ``CROWD`` more than at another one do not run yet: they wait there
    for KV, for a place, for blocks. At an infinite price where that, or no other engine, leaves nothing."""
    prefill = mesh.pick("prefill", request, cost=lambda e: mesh.prefill_cost_s(e, mesh.uncached(e, request)))
    most = CROWD + min(_coming(mesh, engine) for engine in mesh.engines("decode"))

    def decode_s(engine: Engine) -> float:
        return mesh.decode_cost_s(engine) if _coming(mesh, engine) <= most else math.inf

    decode = mesh.pick("decode", request, exclude=[prefill], cost=decode_s)
    is_pair = prefill.can(REMOTE_SEND) and decode.can(PREP_RECV)
    if prefill == decode or not is_pair or _coming(mesh, decode) > most:
        return Split(prefill, decode, request.num_tokens, math.inf)
    ends = request.num_tokens, even_split(mesh, request, prefill, decode, reserve)
    splits = [Split(prefill, decode, end, split_s(mesh, request, prefill, decode, end)) for end in ends]
    return min(splits, key=lambda split: split.cost_s)


def _coming(mesh: Mesh, engine: Engine) -> int:
    """Sequences there that were not in its batch by its last report."""
    load = mesh.load(engine)
    return max(0, load.sequences - load.running)


def split_s(mesh: Mesh, request: Request, prefill: Engine, decode: Engine, end: int) -> float:
    """What it costs to split there. An idle decode engine computes as much of the rest as one step holds
    while the prefill engine computes its last chunk; one with work to do begins when the KV is in. A put
    holds up all who are at the sender; a link that is not measured yet is tried by one send at a time."""
    here, there = mesh.load(prefill), mesh.load(decode)
    if there.transfer_tokens and not mesh.link(prefill, decode):
        return math.inf
    computed = max(0, end - mesh.prefix(request).get(prefill.id, 0))
    sent = there.transfer_tokens + max(0, end - mesh.prefix(request).get(decode.id, 0))
    rest = request.num_tokens - end
    if not (there.sequences or there.uncached_tokens):
        rest -= min(rest, computed, decode.reported.max_num_batched_tokens or rest)
    rest_s = mesh.prefill_cost_s(decode, rest) if rest else 0.0
    put_s = mesh.transfer_s(prefill, decode, sent) * (1 + here.sequences)
    return mesh.prefill_cost_s(prefill, computed) + put_s + rest_s + mesh.decode_cost_s(decode)


def even_split(mesh: Mesh, request: Request, prefill: Engine, decode: Engine, reserve: float) -> int:
    """The first position from the decode engine's match on where the prefill engine is done no sooner."""
    p, d = mesh.load(prefill), mesh.load(decode)
    rate = p.prefill_tokens_per_s or d.prefill_tokens_per_s or 1.0  # unknown: like the other
    occupancy = min(1.0, d.running / max(1, decode.reported.max_num_seqs))
    decode_rate = (d.prefill_tokens_per_s or rate) * (1.0 - reserve * occupancy)
    matched, cached = (request.num_tokens - mesh.uncached(engine, request) for engine in (decode, prefill))

    def lead_s(split: int) -> float:
        """How much later the prefill engine ends than the decode engine."""
        computed_s = (p.uncached_tokens + max(0, split - cached)) / rate
        sent_s = mesh.transfer_s(prefill, decode, d.transfer_tokens + split - matched)
        return max(computed_s, sent_s) - (d.uncached_tokens + request.num_tokens - split) / decode_rate

    return matched + bisect_left(range(matched, request.num_tokens), 0.0, key=lead_s)
