"""What the doctor prints: a table of the mesh and what is wrong with it, or the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microserve.services.command.doctor.observation import Finding, Observation


def lines(seen: Observation, findings: Sequence[Finding]) -> list[str]:
    """For people: what was seen, then each finding with where it is and how it is mended."""
    told = [f"index     {seen.index.address}  {seen.index.reach}"]
    for engine in seen.engines:
        info = engine.info
        what = " ".join(filter(None, [info.backend, info.backend_version]))
        said = [info.engine_id, what, info.model, f"heap {' '.join(info.all_heaps) or 'none'}"]
        said += [info.numerics.name or "no class"]
        told.append("engine    " + "  ".join(filter(None, said)))
    told += [f"router    {router.router_id}  {router.version}".rstrip() for router in seen.routers]
    for gateway in seen.gateways:
        state = gateway.unready or gateway.error or ("ready" if gateway.is_reached else gateway.place.reach)
        told.append("gateway   " + "  ".join(filter(None, [gateway.url, gateway.version, state])))
    for link in seen.links:
        rate = f"{link.bytes_per_s * 8 / 1e6:.0f} Mbit/s" if link.bytes_per_s else link.error
        told.append(f"link      {link.source} -> {link.target}  {link.heap}  {rate}")
    if len(seen.links) < seen.num_pairs:
        told.append(f"          ({seen.num_pairs} pairs in all)" if seen.tried else "link      not tried")
    if seen.cache is not None:
        answers = ", ".join(
            f"{each.how} on {each.engine_id}: {each.found_tokens} tokens found" for each in seen.cache.answers
        )
        told.append(f"answers   {answers}")
    if not findings:
        return [*told, "", "nothing is wrong"]
    for each in findings:
        kind = "error" if each.is_error else "warning"
        told += ["", f"{kind}  {each.name}: {each.where}", f"  {each.what}", f"  mend: {each.mend}"]
    return told


def as_json(seen: Observation, findings: Sequence[Finding]) -> dict[str, Any]:
    """For scripts; findings first, then what was measured."""
    return {
        "findings": [
            {
                "name": each.name,
                "severity": "error" if each.is_error else "warning",
                "what": each.what,
                "where": each.where,
                "mend": each.mend,
            }
            for each in findings
        ],
        "engines": [
            {
                "id": engine.info.engine_id,
                "backend": engine.info.backend,
                "version": engine.info.backend_version,
                "model": engine.info.model,
                "heaps": engine.info.all_heaps,
                "numerics": engine.info.numerics.name,
                "places": {place.what: str(place.reach) for place in engine.places},
                "clock_off_s": None if engine.host is None else engine.host.clock_off_s,
            }
            for engine in seen.engines
        ],
        "routers": [router.router_id for router in seen.routers],
        "gateways": [
            {
                "url": gateway.url,
                "version": gateway.version,
                "reach": str(gateway.place.reach),
                "ready": gateway.is_reached and not (gateway.error or gateway.unready),
            }
            for gateway in seen.gateways
        ],
        "clocks": {
            host.who: {"off_s": host.clock_off_s, "uncertain_s": host.uncertain_s} for host in seen.hosts[1:]
        },
        "links": [
            {
                "source": link.source,
                "target": link.target,
                "heap": link.heap,
                "bytes_per_s": link.bytes_per_s,
                "error": link.error,
            }
            for link in seen.links
        ],
    }
