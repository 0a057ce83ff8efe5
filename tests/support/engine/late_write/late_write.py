"""A sender that stops before each elementary operation of its transfer.

Its steps run in a greenlet of their own, so it may stand between any two of its writes, for ever if need be,
while the same thread drives everybody else. Does not know why it is stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import greenlet
import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.local import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.services.engine.core.batch import StepResult
from microserve.services.engine.core.scheduler import Step
from tests.support.engine.core_mesh import Engine


class WatchedPeer(MemoryPeerHeap):
    """Calls ``before`` with a name before each operation; copies are put half a slice at a time."""

    def __init__(
        self,
        writer: MemoryHeap,
        owner: MemoryHeap,
        registry: MemoryRegistry,
        before: Callable[[str], None],
    ) -> None:
        super().__init__(writer, owner, registry)
        self._before = before

    def hold(self, slot: int, lane: int) -> bool:
        self._before("hold")
        return super().hold(slot, lane)

    def read(self, word: int) -> int:
        self._before("read")
        return super().read(word)

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        for copy in copies.copies:
            half = copy.nbytes // 2
            for at, nbytes in ((0, half), (half, copy.nbytes - half)):
                part = Copies([Copy(copy.source + at, copy.target + at, nbytes)])
                self._before("put")
                super().put(part, source_shift, target_shift)

    def signal(self, word: int, value: int) -> None:
        self._before("signal")
        super().signal(word, value)

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        for word in words.tolist():
            self.signal(word, value)

    def let_go(self, slot: int, lane: int) -> None:
        self._before("let go")
        super().let_go(slot, lane)


class Sender:
    """Runs the steps of an engine one operation of its transfers at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.operations: list[str] = []
        """All that were begun; the engine stands before the last one."""
        self.is_booking = False
        """It stands inside its lock, where no message can reach it."""
        self._steps = greenlet.greenlet(self._run)
        heap, registry = engine.core._heap, engine.mesh.registry
        assert isinstance(heap, MemoryHeap)

        def attach(address: HeapAddress) -> MemoryPeerHeap:
            return WatchedPeer(heap, registry._find(address), registry, self._before)

        heap.attach = attach  # type: ignore[method-assign]
        complete = engine.core.stepper.complete

        def booking(step: Step, result: StepResult, now: float) -> None:
            self.is_booking = True
            complete(step, result, now)
            self.is_booking = False

        engine.core.stepper.complete = booking  # type: ignore[method-assign]

    @property
    def is_done(self) -> bool:
        return self._steps.dead

    def advance(self) -> bool:
        """Up to the next operation; False when there is nothing more to do."""
        if not self._steps.dead:
            self._steps.switch()
        return not self._steps.dead

    def restart(self) -> None:
        """Step again after having been idle."""
        assert self._steps.dead
        self._steps = greenlet.greenlet(self._run)

    def vanish(self) -> None:
        """Its process is dead: what it stood before never happens."""
        if not self._steps.dead:
            self._steps.throw(greenlet.GreenletExit)

    def _before(self, name: str) -> None:
        self.operations.append(name)
        parent = self._steps.parent
        assert parent is not None
        parent.switch()

    def _run(self) -> None:
        while self.engine.core.step():
            self.engine.collect()
        self.engine.collect()
