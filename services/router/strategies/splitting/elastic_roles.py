"""Roles that follow the load: engines move between prefill and decode as the queues shift, and drain first.

Source: Arrow, arXiv 2505.11916 (roles are labels, moved by TTFT and decode load), and Dynamo's planner (two
bounds apart, so that nothing swings). Arrow moves at once; here an engine takes nothing new until few
sequences are left, or ``drain_s`` over: prefill between many decodes would cost each of them its TPOT.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from microserve.services.router.authoring import Chunks, EngineFacts, Mesh, Meta, PlanMesh, Request, strategy
from microserve.services.router.strategies.splitting.disaggregated import disaggregated

Seconds = Annotated[float, Meta(gt=0.0)]
ROLES, LABELS = ("decode", "prefill"), {"decode", "prefill", "to-decode", "to-prefill"}
BUSY, CALM, FEW = 0.8, 0.7, 2
"""Share of a batch's places that is enough; of the other role's work below which one gives; what is few."""


def full(mesh: PlanMesh, engine: EngineFacts, ttft_s: float) -> float:
    """1: as full as it should be, in seconds to a first token or in places of its batch."""
    places = mesh.load(engine).running / max(1, engine.reported.max_num_seqs)
    return max(mesh.predicted_ttft_s(engine, 0) / ttft_s, places / BUSY)


async def move_roles(mesh: PlanMesh, *, period_s: float, ttft_s: float, drain_s: float) -> None:
    """One engine at a time, to a role that is full from one that has enough, or less to do, without it."""
    work, mover, until = dict.fromkeys(ROLES, 0.0), "", 0.0
    while True:
        is_over = asyncio.get_running_loop().time() >= until
        for engine in sorted(mesh.engines(), key=lambda e: (LABELS.isdisjoint(e.labels), e.id)):
            rarer = min(ROLES, key=lambda role: sum(role in e.labels for e in mesh.engines()))
            label = next((label for label in engine.labels if label in LABELS), rarer)
            load = mesh.load(engine)
            left = load.running if label == "to-prefill" else load.sequences
            waits = engine.id == mover and left > FEW and not is_over
            mesh.label(engine, label if waits else label.removeprefix("to-"))
        pools = {role: [e for e in mesh.engines() if role in e.labels] for role in ROLES}
        work = {role: (work[role] + sum(full(mesh, e, ttft_s) for e in pools[role])) / 2 for role in ROLES}
        calm, short = sorted(ROLES, key=lambda role: (not pools[role], work[role] / max(1, len(pools[role]))))
        need = work[short] / max(1, len(pools[short]))
        helps = need > 1.0 and work[calm] < CALM * need * (len(pools[calm]) - 1)
        is_settled = sum(map(len, pools.values())) == len(mesh.engines())
        if is_settled and (helps or len(pools[calm]) > 1 > len(pools[short])):
            mesh.label(chosen := min(pools[calm], key=mesh.load), f"to-{short}")
            mover, until = chosen.id, asyncio.get_running_loop().time() + drain_s
        await asyncio.sleep(period_s)


@strategy(plan=move_roles)
async def elastic_roles(
    mesh: Mesh, request: Request, *, period_s: Seconds = 1.0, ttft_s: Seconds = 1.0, drain_s: Seconds = 10.0
) -> Chunks:
    """As ``disaggregated``, between the roles of now; it looks at them every ``period_s``."""
    async for generation in disaggregated(mesh, request):
        yield generation
