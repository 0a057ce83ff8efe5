"""An engine's whole shell (sockets, actions, scheduler, blocks, events) over a runner that computes nothing.

    python benchmarks/mesh/control_parts/instant_engine.py STEP_S SECTION.FIELD=VALUE ...

A step takes no less than STEP_S seconds. All but the model is what ``microserve engine`` runs, without torch.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from functools import partial

from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.run import run_service
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, Sampled, StepResult
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.step_thread import StepThread

NUM_LAYERS = 2
MAX_MODEL_LEN = 8192
VOCAB_SIZE = 49_152
FIRST_TOKEN_ID = 24
"""Of 64 that are a printable character each in a byte-level vocabulary: every token is seen at once."""


class NullRunner:
    """Samples without a model, at most once in ``step_s`` seconds."""

    numerics = UNKNOWN

    def __init__(self, step_s: float) -> None:
        self.numerics = UNKNOWN
        self._step_s = step_s
        self._next_at = 0.0

    def execute(self, batch: Batch, on_layer: Callable[[int], None] = lambda layer: None) -> StepResult:
        for layer in range(NUM_LAYERS):
            on_layer(layer)
        if self._step_s:
            now = time.monotonic()
            if now < self._next_at:
                time.sleep(self._next_at - now)
            self._next_at = max(now, self._next_at) + self._step_s
        return StepResult(
            [
                None
                if chunk.sample is None
                else Sampled(FIRST_TOKEN_ID + (chunk.start + len(chunk.token_ids)) % 64, None, [])
                for chunk in batch.chunks
            ]
        )


def make_core(settings: Settings, step_s: float) -> EngineCore:
    incarnation = secrets.randbits(62) | 1
    layout = KvLayout(
        model=settings.model.name,
        num_layers=NUM_LAYERS,
        num_blocks=settings.kvcache.num_blocks,
        block_size=settings.kvcache.block_size,
        num_kv_heads=1,
        head_dim=2,
        dtype="float32",
        revision="instant",
    )
    return EngineCore(
        engine_id=settings.engine.id,
        incarnation=incarnation,
        model=layout.model,
        heap=ShmHeap(layout, incarnation=incarnation, num_slots=settings.kvcache.grant_slots),
        runner=NullRunner(step_s),
        limits=Limits(
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            num_blocks=layout.num_blocks,
            max_waiting=settings.engine.max_waiting,
            eos_token_ids=frozenset({2}),
        ),
        max_num_seqs=settings.engine.max_num_seqs,
        max_num_batched_tokens=settings.engine.max_num_batched_tokens,
        lease_s=settings.kvcache.lease_s,
        checksums=settings.kvcache.checksums,
    )


def main() -> int:
    step_s, settings = float(sys.argv[1]), load_settings(None, environment={}, overrides=sys.argv[2:])

    async def serve(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
        core = make_core(settings, step_s)
        engine = EngineShell(settings, bus, lifecycle, core, partial(StepThread, core))
        try:
            await engine.run()
        finally:
            engine.close()

    return run_service("engine", settings, lambda: serve)


if __name__ == "__main__":
    sys.exit(main())
