"""The planner's threshold from what engines have measured: no profile file is needed on a living mesh.

Prefill is a line through nothing here, since an engine reports tokens a second and no curve: what is planned
is where both clusters are equally full. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

from microserve.services.clusters.drift import LengthDrift
from microserve.services.router.authoring.view import EngineFacts, MeshView

FINENESS = 32
"""Of engines that do both, parts that a plan gives to prefill or to decode."""
STEPS = 512
"""Thresholds that are tried, evenly up to the longest prompt."""


def replanned(
    mesh: MeshView, home: str, other: str, drift: LengthDrift, link_bytes_per_s: float
) -> float | None:
    """The best threshold in tokens for prompts of these lengths, which are taken; None, and nothing is taken,
    where something that it depends on has not been measured yet."""
    from microserve.services.clusters.curve import Curve
    from microserve.services.clusters.lengths import Lengths
    from microserve.services.clusters.planner import solve
    from microserve.services.clusters.profile import GBIT, VERSION, ClusterProfile, Side

    near, far = mesh.engines(cluster=home), mesh.engines(cluster=other)
    here, there = _mean(near, mesh, _prefill_rate), _mean(far, mesh, _prefill_rate)
    step_s, answer = _mean(near, mesh, _step_s), _mean(near, mesh, _output_tokens)
    places, nbytes = _mean(near, mesh, _places), mesh.kv_nbytes_per_token
    if not (here and there and step_s and answer and places and nbytes and link_bytes_per_s):
        return None
    num_prefill = len(mesh.engines("prefill", strict=True, cluster=home))
    parts = 1 if 0 < num_prefill < len(near) else FINENESS
    profile = ClusterProfile(
        version=VERSION,
        kv_nbytes=Curve(quadratic=(0.0, nbytes, 0.0)),
        link_gbps=link_bytes_per_s / GBIT,
        output_tokens=answer,
        remote=Side(len(far), Curve(quadratic=(0.0, 1.0 / there, 0.0))),
        local=Side(
            len(near) * parts,
            Curve(quadratic=(0.0, parts / here, 0.0)),
            places=max(1, round(places)),
            step_s=step_s * parts,
        ),
    )
    lengths = Lengths.from_histogram(drift.take())
    step = max(1, int(lengths.longest / STEPS))
    splits = range(num_prefill, num_prefill + 1) if parts == 1 else None
    return solve(profile, lengths, step_tokens=step, splits=splits).threshold


def _mean(
    engines: Iterable[EngineFacts], mesh: MeshView, of: Callable[[MeshView, EngineFacts], float]
) -> float:
    """Of those that have measured it; 0: nobody has."""
    known = [value for engine in engines if (value := of(mesh, engine)) > 0.0]
    return fmean(known) if known else 0.0


def _prefill_rate(mesh: MeshView, engine: EngineFacts) -> float:
    return mesh.load(engine).prefill_tokens_per_s


def _step_s(mesh: MeshView, engine: EngineFacts) -> float:
    return mesh.load(engine).decode_step_s


def _output_tokens(mesh: MeshView, engine: EngineFacts) -> float:
    return engine.reported.mean_output_tokens


def _places(mesh: MeshView, engine: EngineFacts) -> float:
    return engine.reported.max_num_seqs
