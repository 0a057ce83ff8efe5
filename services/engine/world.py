"""An engine's NVSHMEM world: joined within a deadline, served in, and ended without a word to the others.

    loop      ask the index until all are there ─────────────── wait, at most join_timeout_s ── serve
    thread    (rank 0: unique id) ──────────────── the library's init ── heap ──● gone

Joining. NVSHMEM waits for all ranks, for ever, and cannot be called off. So it is entered only when the index
has seen all of them, on a thread of its own, and if it is not out again in time the process ends. Where it
waits with the interpreter in its hands, no Python runs any more: then faulthandler's own thread ends the
process ``GRACE_S`` later, with a traceback instead of a log line.

Leaving. Nobody ever leaves the world: it would wait for all, and for ever once one has died. An engine that
stops lets go of its lanes, says in its memory that it is gone, closes its sockets, and ends without exit
handlers (``Lifecycle.skips_exit_handlers``). A world that has lost a rank goes on without it, and takes
nobody in: a restarted engine waits for a new round, that is, until all are restarted.

Death. A rank in our own pid namespace is proven dead by its process word (process.py); the heap is told, and
the lanes that it held are free. Of a rank elsewhere nothing is ever proven: what it held stays in quarantine.

Owns the deadline, the thread and the look for deaths. Does not know requests, nor what a heap is used for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import structlog

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver, LibCuda
from microserve.kvcache.heap.gpu.device import BlockPut
from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.heap.gpu.nvshmem_places import require_room
from microserve.kvcache.heap.gpu.nvshmem_world import NvshmemWorld, SymmetricMemory, new_unique_id
from microserve.kvcache.heap.process import is_gone, this_namespace, this_process
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError, DeadlineExceeded
from microserve.protocol.logging import setup as logging
from microserve.protocol.messages.world import JoinWorld, WorldRank
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.rendezvous import Rendezvous

GRACE_S: Final = 5.0
"""Behind the deadline: for this process to end by itself."""
DEATH_LOOK_S: Final = 1.0
"""Pause between looks for ranks that have died."""
_STDERR: Final = 2

T = TypeVar("T")
_logger = structlog.get_logger()


class MakeWorld(Protocol):
    def __call__(
        self, unique_id: bytes, *, rank: int, num_ranks: int, device: int, symmetric_nbytes: int
    ) -> SymmetricMemory: ...


@dataclass(frozen=True, slots=True)
class Library:
    """What a world is made with: NVSHMEM and the driver, or what stands for them where there is no GPU."""

    new_unique_id: Callable[[], bytes] = new_unique_id
    make_world: MakeWorld = NvshmemWorld
    make_driver: Callable[[int], CudaDriver] = LibCuda


class World:
    """One engine in its world: its heap, and who of the others has died."""

    def __init__(self, heap: NvshmemHeap, ranks: Sequence[WorldRank]) -> None:
        """``ranks``: those whose death can be proven here."""
        self.heap = heap
        self._watched = {each.incarnation: each.process for each in ranks}

    def look_for_deaths(self, lock: AbstractContextManager[object]) -> None:
        """Tell the heap of ranks that are gone since the last look. ``lock``: the heap's user's."""
        for incarnation, process in list(self._watched.items()):
            if is_gone(process):
                with lock:
                    self.heap.report_dead(incarnation)
                del self._watched[incarnation]
                _logger.warning(log.RANK_LOST, world=self.heap.world.name, incarnation=incarnation)

    async def watch(self, lock: AbstractContextManager[object]) -> None:
        """Look for deaths until cancelled."""
        while True:
            self.look_for_deaths(lock)
            await asyncio.sleep(DEATH_LOOK_S)


async def join_world(
    settings: Settings,
    bus: Bus,
    lifecycle: Lifecycle,
    layout: KvLayout,
    incarnation: int,
    *,
    device: int,
    block_put: BlockPut | None = None,
    library: Library | None = None,
) -> World:
    """Wait for the other ranks of ``nvshmem.world``, and make our heap beside theirs.

    Raises :class:`ConfigError` for what cannot work, before anybody is kept waiting where that can be known;
    :class:`InvalidRequest` for a rank that does not fit in; :class:`DeadlineExceeded` at the end of
    ``nvshmem.join_timeout_s``. From here on the process ends without exit handlers.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.nvshmem.join_timeout_s
    own, num_slots = settings.nvshmem, settings.kvcache.grant_slots
    library = library or Library()
    capacity_nbytes = own.memory_mb << 20
    with _paths_named():
        require_room(layout, num_slots, own.num_ranks, capacity_nbytes)
        driver = library.make_driver(device)
    lifecycle.skips_exit_handlers = True
    stage = "the library has given no unique id"

    def make_heap(unique_id: bytes) -> NvshmemHeap:
        world = library.make_world(
            unique_id,
            rank=own.rank,
            num_ranks=own.num_ranks,
            device=device,
            symmetric_nbytes=capacity_nbytes,
        )
        return NvshmemHeap(
            layout,
            incarnation=incarnation,
            world=world,
            driver=driver,
            capacity_nbytes=capacity_nbytes,
            num_slots=num_slots,
            block_put=block_put,
        )

    def on_waiting(present: list[int]) -> None:
        _logger.info(log.WORLD_AWAITED, world=own.world, rank=own.rank, present=present, of=own.num_ranks)
        lifecycle.status(f"waits for its world: {len(present)} of {own.num_ranks} ranks are there")

    try:
        with _paths_named():
            async with asyncio.timeout_at(deadline):
                unique_id = b""
                if own.rank == 0:
                    unique_id = await _on_thread(library.new_unique_id, deadline - loop.time())
                meeting = Rendezvous(
                    bus,
                    settings.index.address,
                    JoinWorld(
                        1,
                        own.world,
                        own.rank,
                        own.num_ranks,
                        WorldRank(incarnation, this_namespace(), this_process()),
                        unique_id,
                        capacity_nbytes,
                    ),
                    heartbeat_interval_s=settings.bus.heartbeat_interval_s,
                    liveness=settings.bus.liveness,
                    on_waiting=on_waiting,
                )
                stage = ""
                joined = await meeting.meet()
                provable = [each for each in joined.ranks if _is_provable(each, incarnation)]
                stage = "all ranks were there, but NVSHMEM has not brought them together"
                heap = await _on_thread(lambda: make_heap(joined.unique_id), deadline - loop.time())
    except TimeoutError:
        reason = stage or _missing(meeting, own.num_ranks)
        raise DeadlineExceeded(
            f"nvshmem.join_timeout_s: rank {own.rank} is in no world {own.world} of {own.num_ranks} ranks "
            f"after {own.join_timeout_s:g} s: {reason}"
        ) from None
    _logger.info(log.WORLD_JOINED, world=own.world, name=heap.world.name, rank=own.rank, ranks=own.num_ranks)
    return World(heap, provable)


def _is_provable(rank: WorldRank, mine: int) -> bool:
    """Its death would show here. Asked while it lives: who is no process here then never was one, whatever
    its namespace is called."""
    return rank.incarnation != mine and rank.host == this_namespace() and not is_gone(rank.process)


def _missing(meeting: Rendezvous, num_ranks: int) -> str:
    if not meeting.has_heard:
        return "the index does not answer"
    return f"of the ranks, {sorted(set(range(num_ranks)) - set(meeting.present))} have not come"


@contextmanager
def _paths_named() -> Iterator[None]:
    """Heaps and drivers name what is wrong by their own parameters; people by settings."""
    paths = {
        "num_blocks": "nvshmem.memory_mb",
        "model": "model.name",
        "heap": "kvcache.heap",
        "device": "engine.device",
    }
    try:
        yield
    except ConfigError as error:
        path = paths.get(error.field or "")
        if path is None:
            raise
        raise ConfigError(f"{path}: {error.detail}", field=path) from error


async def _on_thread(call: Callable[[], T], within_s: float) -> T:
    """Its result, from a thread that nobody waits for if the caller gives up. If it is inside of ``call``
    then, the process must end: it has ``GRACE_S`` more than ``within_s``, even if no Python runs any more."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled

    def run() -> None:
        if (lines := logging.current()) is not None:
            lines.flush()  # the library may hold the interpreter's lock: no other thread would write them
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    faulthandler.dump_traceback_later(max(within_s, 0.0) + GRACE_S, exit=True, file=_STDERR)
    threading.Thread(target=run, name="nvshmem", daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    finally:
        if future.done():
            faulthandler.cancel_dump_traceback_later()
