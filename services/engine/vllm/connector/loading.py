"""Receives on the worker's side: which are reported to vLLM, and the wait for layers of those started early.

    begin_step ── layer 0 is in ── layer 0 ── layer 1 is in ── layer 1 ... end_step: Arrived, or NotArrived

vLLM writes a step's own K and V of a layer before it calls the hook in front of that layer's attention, and a
peer writes whole blocks: so a layer is waited for behind the one before it, and none of its rows is written
before all of the peer's are. Each layer is verified before it is used, by us: afterwards the receive's
request has written its last row again, and the writer's sum is no longer the block's.

The wait ends when the layer is in or the front has closed the grant: who writes, who has died and how long
is too long is the front's to know. What was not in is told to vLLM in the same step, and never again: blocks
that it hears of later may be somebody else's.

Owns reports and waits. Knows words and counts; neither vLLM nor who writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from microserve.kvcache.grant.arrival import Arrival
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.words import OPEN, pack_state
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.connector.orders import Started, Watched
from microserve.services.engine.vllm.link import DROP, START, TAKE, Arrived, NotArrived, Notice, Page

LOOK_S = 0.0002
"""Pause between two looks at a layer that is not in."""


class Reports:
    """The worker's part: which of the watched are to be reported now; each once."""

    def __init__(self, fate: Callable[[int], int], is_started: Callable[[int], bool]) -> None:
        """``is_started``: was the receive ever started early?"""
        self._fate = fate
        self._is_started = is_started
        self._reported: set[str] = set()

    def due(self, watched: list[Watched]) -> list[Watched]:
        """A step may be made before the last one's reports are read, and watch what is reported already."""
        self._reported &= {each.request_id for each in watched}
        due = [each for each in watched if each.request_id not in self._reported and self._is_due(each)]
        self._reported.update(each.request_id for each in due)
        return due

    def _is_due(self, watched: Watched) -> bool:
        fate = self._fate(watched.id)
        if watched.is_aborted:
            return fate in (TAKE, DROP)
        # One that was started ends by itself, also when it is given up before we have seen that.
        return fate in (TAKE, START) or (fate == DROP and self._is_started(watched.id))


@dataclass(slots=True)
class _Load:
    id: int
    blocks: list[int]
    arrival: Arrival | None
    """None: the front has given it up."""
    state: tuple[int, int] = (0, 0)
    """Index of the grant's STATE, and what it is while writers may write."""
    num_layers: int = 0
    """Verified."""
    detail: str = ""
    """Why it has failed."""


class Loading:
    """The step's receives that were started early, layer by layer."""

    def __init__(
        self,
        heap: Heap,
        page: Page,
        tell: Callable[[Notice], None],
        *,
        checksums: bool,
        pause: Callable[[], None] = lambda: time.sleep(LOOK_S),
    ) -> None:
        """``checksums``: verify every byte."""
        self._heap = heap
        self._page = page
        self._tell = tell
        self._checksums = checksums
        self._pause = pause
        self._loads: list[_Load] = []
        self._invalid: set[int] = set()

    def begin_step(self, started: list[Started]) -> None:
        """Returns when their first layer is in."""
        self._loads = [self._load_of(each) for each in started]
        self._wait(0)

    def computed(self, layer: int) -> None:
        """That layer is; returns when the next one is in."""
        self._wait(layer + 1)

    def require_loaded(self, layer: int) -> None:
        """Attention begins there: what is not in by now has been used out of order."""
        for load in self._loads:
            if not load.detail and load.num_layers <= layer:
                load.detail = f"layer {layer} was computed before it was waited for"

    def end_step(self) -> None:
        """What has failed is to be reported now."""
        for load in self._loads:
            if not load.detail and load.num_layers < self._heap.layout.num_layers:
                load.detail = f"the step has computed {load.num_layers} layers"
            if load.detail:
                self._invalid.update(load.blocks)
                self._tell(NotArrived(load.id, load.detail))
            else:
                self._tell(Arrived(load.id))
        self._loads = []

    def take_invalid(self) -> set[int]:
        """Blocks of this step that vLLM must not build on, once."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def _load_of(self, started: Started) -> _Load:
        under = self._page.started(started.id)
        if under is None or self._page.fate(started.id) != START:
            return _Load(started.id, started.blocks, None, detail="its grant is closed")
        slot, generation = under
        layout, address = self._heap.layout, self._heap.address
        grant = Grant(
            grant_id=f"{slot}/{generation}",
            engine_id="",
            incarnation=address.incarnation,
            slot=slot,
            generation=generation,
            matched=started.matched,
            end=started.end,
            blocks=started.blocks,
            block_size=layout.block_size,
            layout_hash=layout.layout_hash,
            heap=address,
            lease_s=0.0,
        )
        return _Load(
            started.id,
            started.blocks,
            Arrival(self._heap, grant, verify_checksums=self._checksums),
            (self._heap.words.state(slot), pack_state(generation, OPEN)),
        )

    def _wait(self, layer: int) -> None:
        if layer < self._heap.layout.num_layers:
            for load in self._loads:
                while not load.detail and not self._is_decided(load, layer):
                    self._pause()

    def _is_decided(self, load: _Load, layer: int) -> bool:
        """The layer is in and right, or never will be."""
        word, is_open = load.state
        closed = self._heap.load(word) != is_open  # before the counts: after it they are final
        if load.arrival is None or not load.arrival.layer_complete(layer):
            if closed:
                load.detail = f"the grant was closed before layer {layer} was in"
            return closed
        try:
            load.arrival.verify(layer)
        except TransferFailed as error:
            load.detail = error.detail
            return True
        load.num_layers = layer + 1
        return True
