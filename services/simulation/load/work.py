"""What each engine of a simulated run has done: counted beside its steps, and looked at now and then.

Owns the counters. Changes nothing of what an engine does or when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from microserve.services.engine.core.batch import Batch, Runner, StepResult
from microserve.services.simulation.mesh import SimulatedMesh

LOOK_EVERY_S = 0.5
"""Virtual seconds between two looks at who holds how much KV."""


@dataclass
class Work:
    """Of one engine, all its lives together."""

    busy_s: float = 0.0
    num_prompt_tokens: int = 0
    """Real tokens, as those below."""
    num_output_tokens: int = 0
    kv_sum: float = 0.0
    """Of the shares of its blocks that requests held, over all looks."""
    kv_peak: float = 0.0
    num_looks: int = 0


class CountedRunner:
    """A runner whose steps are counted."""

    def __init__(self, runner: Runner, work: Work, scale: int, now: Callable[[], float]) -> None:
        """``now``: by the simulation's clock."""
        self.numerics = runner.numerics
        self._runner = runner
        self._work = work
        self._scale = scale
        self._now = now

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        work, began = self._work, self._now()
        try:
            result = self._runner.execute(batch, on_layer)
        finally:  # its engine may be killed meanwhile
            work.busy_s += self._now() - began
        for chunk in batch.chunks:
            sample = chunk.sample
            if sample is not None and sample.output_token_ids and len(chunk.token_ids) == 1:
                work.num_output_tokens += self._scale
            else:
                work.num_prompt_tokens += self._scale * len(chunk.token_ids)
                work.num_output_tokens += sample is not None
        return result


class KvWatch:
    """Looks at the pools of all living engines, if it is time."""

    def __init__(self, mesh: SimulatedMesh, work: Callable[[str], Work]) -> None:
        self._mesh = mesh
        self._work = work
        self._next_at = 0.0

    def look(self) -> None:
        now = self._mesh.loop.now
        if now < self._next_at:
            return
        self._next_at = now + LOOK_EVERY_S
        for engine in self._mesh.living(self._mesh.engines):
            if engine is None:
                continue
            pool, work = engine.core.memory.pool, self._work(engine.core.engine_id)
            share = pool.num_used / pool.num_blocks
            work.kv_sum += share
            work.kv_peak = max(work.kv_peak, share)
            work.num_looks += 1
