"""What is wrong about a mesh, from what was seen of it. Pure: an observation in, findings out.

Owns the index, keys, engines that are no members, machines and clocks; what members say of themselves and do
is judging_engines.py's, gateways are judging_gateways.py's. Each finding says what, where, and how it is
mended.
"""

from __future__ import annotations

from collections.abc import Iterator

from microserve.protocol.messages.index import MissingEngine
from microserve.services.command.doctor.judging_engines import of_cache, of_links, of_members
from microserve.services.command.doctor.judging_gateways import of_gateways
from microserve.services.command.doctor.judging_places import unreached
from microserve.services.command.doctor.observation import Finding, HostSeen, Observation

MAX_CLOCK_OFF_S = 1.0
MIN_DESCRIPTORS = 1024
MIN_SHM_FREE_NBYTES = 16 << 20
KEY_AGE_S = 60.0
"""Who was turned away so long ago has gone, or has been given another key."""

_FIT = {
    "model": (
        "wrong_model",
        "give it the model of the mesh (model.path, model.name), or another index",
    ),
    "revision": ("wrong_model", "load the same files everywhere: weights, configuration, quantisation"),
    "block_size": ("other_block_size", "set kvcache.block_size to one value for all engines"),
    "dtype": ("other_dtype", "set model.dtype to one value for all engines"),
    "layout_hash": ("other_layout", "load the same model, in the same dtype and blocks, on all engines"),
    "wire_version": ("other_version", "run one version of MicroServe everywhere"),
}


def judge(seen: Observation) -> list[Finding]:
    """All that is wrong, what costs most first."""
    found = [*_of_index(seen)]
    if seen.report is not None:
        found += [*_of_keys(seen), *_of_missing(seen), *of_members(seen), *_of_hosts(seen)]
        found += [*of_links(seen), *of_cache(seen)]
    else:
        found += _of_hosts(seen)
    found += of_gateways(seen)
    return sorted(found, key=lambda finding: not finding.is_error)


def _of_index(seen: Observation) -> Iterator[Finding]:
    if (finding := unreached(seen.index, "index", has_keys=seen.has_keys)) is not None:
        yield finding
    elif seen.report is None:
        what = seen.index.detail or "it lets us in and does not answer"
        mend = "is that the index? index.address says so; its log says what it makes of us"
        yield Finding("index_silent", what, f"index, {seen.index.address}", mend)


def _of_keys(seen: Observation) -> Iterator[Finding]:
    assert seen.report is not None
    for key, age_s in seen.report.refused_keys.items():
        if age_s <= KEY_AGE_S:
            yield Finding(
                "wrong_key",
                f"a process with the public key {key} was turned away {age_s:.0f} s ago",
                f"index, {seen.index.address}",
                "whose it is says 'grep -r KEY' in the directories of keys; copy its .key file into the "
                "index's trusted/ROLE/, or give that process the keys of this mesh",
            )


def _of_missing(seen: Observation) -> Iterator[Finding]:
    assert seen.report is not None
    for each in seen.report.missing:
        yield _missing(each)


def _missing(each: MissingEngine) -> Finding:
    where = f"engine {each.engine_id}, {each.address}"
    if each.code == "engine_lost" and not each.field:
        what = f"it {each.detail} {each.age_s:.0f} s ago and is not back"
        if "progress" in each.detail:
            return Finding("stuck_engine", what, where, "restart it; its log says what it was doing")
        return Finding("dead_engine", what, where, "restart it; its log, or the kernel's, says why it ended")
    if each.code == "engine_lost" and each.field == "incarnation":
        return Finding(
            "two_engines_of_one_id",
            f"two processes say that they are {each.engine_id}; the index keeps the younger one",
            where,
            "give each engine an engine.id of its own, or stop one of the two",
        )
    if each.field == "curve_key" or each.code == "not_permitted":
        mend = "give it the directory of keys that its role has in this mesh"
        return Finding("wrong_key", f"the index refuses it: {each.detail}", where, mend)
    name, mend = _FIT.get(each.field, ("does_not_fit", "its log and the index's say more (engine.refused)"))
    return Finding(name, f"the index refuses it: {each.detail}", where, mend)


def _of_hosts(seen: Observation) -> Iterator[Finding]:
    for host in seen.hosts:
        yield from _of_host(host)


def _of_host(host: HostSeen) -> Iterator[Finding]:
    facts, off_s = host.facts, host.clock_off_s
    if off_s is not None and abs(off_s) - host.uncertain_s > MAX_CLOCK_OFF_S:
        ahead = "ahead" if off_s > 0 else "behind"
        what = f"its clock is {abs(off_s):.1f} s {ahead} of the one here"
        mend = "let both hosts follow one source of time (chrony, systemd-timesyncd); their logs differ by it"
        yield Finding("clock_off", what, host.who, mend, is_error=False)
    if 0 < facts.max_descriptors < MIN_DESCRIPTORS:
        yield Finding(
            "few_descriptors",
            f"it may have {facts.max_descriptors} descriptors open, and has {facts.num_descriptors}",
            host.who,
            f"raise 'ulimit -n' (LimitNOFILE= of its unit) to {MIN_DESCRIPTORS} or more: peers take some",
        )
    if facts.shm_nbytes and facts.shm_free_nbytes < MIN_SHM_FREE_NBYTES:
        yield Finding(
            "shm_full",
            f"/dev/shm has {facts.shm_free_nbytes >> 20} of {facts.shm_nbytes >> 20} MiB free",
            host.who,
            "remove what nobody uses there, or make it larger (mount -o remount,size=, --shm-size)",
        )
