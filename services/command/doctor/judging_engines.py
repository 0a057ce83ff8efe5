"""What is wrong about engines that are members, and about what they did for us. Pure, as judging.py.

Owns: do they agree, are their addresses reached, do they send to each other and how fast, are answers the
same whatever the cache had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from microserve.protocol.messages.engine_info import disagreement
from microserve.services.command.doctor.judging_places import unreached
from microserve.services.command.doctor.observation import EngineSeen, Finding, LinkSeen, Observation, Reach

SLOW_BYTES_PER_S = 12_500_000.0
"""100 Mbit/s: less than that, and sending is rarely cheaper than computing."""
MIN_SLOW_S = 0.2
"""Who took less may have been busy, or its KV is small: that is no news of the link."""
MIN_LOCKED_NBYTES = 1 << 30
_PINNED = frozenset({"nixl", "nvshmem"})
"""Heaps and doors whose memory is registered with a device."""


def of_members(seen: Observation) -> Iterator[Finding]:
    if not seen.engines:
        mend = "start one ('microserve engine'), with the index.address and the keys of this mesh"
        yield Finding("no_engines", "nobody is a member", f"index, {seen.index.address}", mend)
    if not seen.routers:
        mend = "start one ('microserve router'), or look at its log: it follows the index that it is told"
        yield Finding("no_router", "no router watches the index", f"index, {seen.index.address}", mend)
    for engine in seen.engines:
        yield from _of_engine(engine, has_keys=seen.has_keys)
    yield from _of_agreement(seen)
    versions = {seen.version} if seen.version else set()
    versions |= {router.version for router in seen.routers} - {""}
    versions |= {gateway.version for gateway in seen.gateways} - {""}
    versions |= {e.info.backend_version for e in seen.engines if e.info.backend == "native"} - {""}
    if len(versions) > 1:
        mend = "run one version everywhere; engines are renewed before gateways"
        told = ", ".join(sorted(versions))
        yield Finding("versions_differ", f"versions {told}", "this mesh", mend, is_error=False)


def _where(engine: EngineSeen) -> str:
    return f"engine {engine.info.engine_id}, {engine.info.address or engine.info.events_address}"


def _of_engine(engine: EngineSeen, *, has_keys: bool) -> Iterator[Finding]:
    who, has_unreached = f"engine {engine.info.engine_id}", False
    for place in engine.places:
        if (finding := unreached(place, who, has_keys=has_keys)) is not None:
            has_unreached = True
            yield finding
    if engine.error and not has_unreached:
        mend = "its log says more; if it is stuck, restart it"
        yield Finding("engine_silent", f"it does not answer: {engine.error}", _where(engine), mend)
    locked = engine.host.facts.max_locked_nbytes if engine.host is not None else 0
    if 0 < locked < MIN_LOCKED_NBYTES and not _PINNED.isdisjoint(engine.info.all_heaps):
        yield Finding(
            "little_locked_memory",
            f"it may lock {locked >> 20} MiB of memory, and its heap is registered with a device",
            _where(engine),
            "raise 'ulimit -l' (LimitMEMLOCK=infinity of its unit)",
            is_error=False,
        )


def _of_agreement(seen: Observation) -> Iterator[Finding]:
    """Members are let in by model: those of another one than most serve nobody there."""
    models = Counter(engine.info.model for engine in seen.engines)
    [(usual, _)] = models.most_common(1) or [("", 0)]
    for engine in seen.engines:
        if engine.info.model != usual:
            mend = "give it the model of the mesh (model.path, model.name), or an index of its own"
            what = f"it serves {engine.info.model!r}, the mesh {usual!r}: routers do not use it"
            yield Finding("wrong_model", what, _where(engine), mend)
    same = [engine for engine in seen.engines if engine.info.model == usual]
    for engine in same[1:]:
        if found := disagreement(same[0].info, engine.info):
            what = f"its {found.field} is {found.theirs!r}, {same[0].info.engine_id} has {found.mine!r}"
            mend = "engines of one mesh have the same model, dtype and blocks"
            yield Finding("does_not_fit", what, _where(engine), mend)


def of_links(seen: Observation) -> Iterator[Finding]:
    heaps = {engine.info.engine_id: engine.info.all_heaps for engine in seen.engines}
    for link in seen.links:
        where = f"{link.source} -> {link.target}"
        if link.error:
            yield _failed(link, where, heaps)
        elif 0.0 < link.bytes_per_s < SLOW_BYTES_PER_S and link.seconds >= MIN_SLOW_S:
            yield Finding(
                "slow_link",
                f"KV goes at {link.bytes_per_s * 8 / 1e6:.1f} Mbit/s ({link.heap or 'heap not said'})",
                where,
                "use a faster way between these hosts, or a strategy that sends nothing (data_parallel); "
                "'auto' finds out by itself that it does not pay",
                is_error=False,
            )


def _failed(link: LinkSeen, where: str, heaps: dict[str, list[str]]) -> Finding:
    kinds = f"{' '.join(heaps.get(link.source, []))} here, {' '.join(heaps.get(link.target, []))} there"
    mend = (
        "let both have a heap that reaches the other: on one host shm, between hosts a door (kvcache.doors), "
        "whose port must be open from there to here"
    )
    return Finding("heap_unreachable", f"KV cannot be sent: {link.error} (heaps: {kinds})", where, mend)


def of_cache(seen: Observation) -> Iterator[Finding]:
    if seen.cache is None:
        return
    answers = seen.cache.answers
    for answer in answers:
        where = f"engine {answer.engine_id}"
        if answer.error:
            mend = "its log says more"
            yield Finding("probe_failed", f"no {answer.how} answer: {answer.error}", where, mend)
        elif answer.how != "cold" and not answer.found_tokens:
            mend = "is the pool large enough (kvcache.num_blocks)? Under load a prefix may be gone at once"
            what = f"a prompt that it had just seen was not in its cache ({answer.how})"
            yield Finding("no_cache_hit", what, where, mend, is_error=False)
    whole = [answer for answer in answers if not answer.error]
    for answer in whole[1:]:
        if answer.token_ids != whole[0].token_ids:
            promised = seen.cache.is_exact
            what = f"its {answer.how} answer differs from the {whole[0].how} one of {whole[0].engine_id}"
            mend = (
                "take it out of the mesh and keep its log: in one exact class this must never happen"
                if promised
                else "nothing, where small differences are fine: these engines promise no equal bits"
            )
            yield Finding("answers_differ", what, f"engine {answer.engine_id}", mend, is_error=promised)


def is_usable(engine: EngineSeen) -> bool:
    """It can be asked for something."""
    is_reached = all(p.reach is Reach.REACHED for p in engine.places if p.what == "actions")
    return is_reached and not engine.error and not engine.load.draining
