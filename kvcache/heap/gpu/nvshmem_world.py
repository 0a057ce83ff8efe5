"""A world of NVSHMEM: a fixed number of engines, one symmetric allocation in each, made and left together.

    one engine   new_unique_id() ──bytes over the bus──> all engines   NvshmemWorld(...): waits for all

The unique id is a capability: it holds the address at which the world meets, and whoever has it can join.
Send it over authenticated sockets only, and keep it out of logs; ``name`` is a digest of it, to be shown.

NVSHMEM ends the process on many of its errors, and every collective call (joining, ``allocate``, ``leave``)
waits for all engines, forever if one has died. So it lives in the engine's process and nowhere else, joining
is to be watched with a deadline from outside, and after a death nobody leaves: the process just exits.
nvshmem4py lets other Python threads run while ``init`` waits, but not during ``allocate`` and ``barrier``:
whoever watches these must not need the interpreter.

One thread at a time may be inside of NVSHMEM, so calls take turns here.

Owns the calls. nvshmem4py is imported when it is first needed. Does not know heaps.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, Protocol

import numpy as np

from microserve.protocol.errors import ConfigError, InvalidRequest

UNIQUE_ID_NBYTES: Final = 128
_SIGNAL_SET: Final = 9
_ALIGNMENT: Final = 256
"""What cuMemAlloc gives: kernels load 16 bytes at a time."""
_MARGIN_NBYTES: Final = 64 << 20
"""For the alignment, and what the library takes for itself."""


class SymmetricMemory(Protocol):
    """One engine's view of a world. Addresses of others are given as our own in the symmetric memory."""

    name: str
    """The same for all of one world, and for no other."""
    rank: int
    num_ranks: int

    def allocate(self, nbytes: int) -> int:
        """Collective: all engines, the same ``nbytes``. Its content is not zero. Never freed."""

    def barrier(self) -> None:
        """Collective: what was done before by anyone is seen after by everyone."""

    def mapped_address(self, address: int, rank: int) -> int:
        """Where our device finds the other engine's; 0 if it does not."""

    def put(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        """Enqueue a copy from here to ``rank``."""

    def get(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        """Enqueue a copy from ``rank`` to here."""

    def signal(self, word: int, value: int, rank: int, stream: int) -> None:
        """Enqueue a store of 8 bytes, after all that this stream put there."""

    def quiet(self, stream: int) -> None:
        """What is enqueued later comes when all that was put and signalled before is there."""

    def leave(self) -> None:
        """Collective. Never after a death: it would wait for the dead."""


def new_unique_id() -> bytes:
    """For one engine of the future world, which must live until all have joined: it listens for them.

    :class:`ConfigError` without the library."""
    core = _import("nvshmem.core")
    with _one_line("NVSHMEM gives no unique id", "heap"):
        unique_id = core.get_unique_id()
    packed = bytes(unique_id._data.view(np.int8).tobytes())
    if len(packed) != UNIQUE_ID_NBYTES:
        raise ConfigError(f"this NVSHMEM has unique ids of {len(packed)} bytes", field="heap")
    return packed


class NvshmemWorld:
    """The library itself. One a process, for its life."""

    def __init__(
        self, unique_id: bytes, *, rank: int, num_ranks: int, device: int = 0, symmetric_nbytes: int = 0
    ) -> None:
        """Blocks until all have come; see the module. ``symmetric_nbytes``, the same everywhere: what will be
        allocated; 0, or where the environment says otherwise (NVSHMEM_SYMMETRIC_SIZE): as the library likes.

        :class:`InvalidRequest` names a bad argument, :class:`ConfigError` a library, a driver or a device
        that cannot be used."""
        if len(unique_id) != UNIQUE_ID_NBYTES:
            raise InvalidRequest(
                f"the unique id has {len(unique_id)} bytes, not {UNIQUE_ID_NBYTES}", field="unique_id"
            )
        if not 0 <= rank < num_ranks:
            raise InvalidRequest(f"rank is {rank}, below {num_ranks}", field="rank")
        core, self._bindings = _import("nvshmem.core"), _import("nvshmem.bindings")
        cuda = _import("cuda.core")
        with _one_line(f"cuda:{device} cannot be used", "device"):
            its_device = cuda.Device(device)
            its_device.set_current()
        if symmetric_nbytes:
            # Where the library cannot let its memory grow, it takes this much at the start.
            os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(symmetric_nbytes + _MARGIN_NBYTES))
        with _one_line("the NVSHMEM world cannot be joined", "heap"):
            unpacked = core.get_unique_id(empty=True)
            unpacked._data.view(np.int8)[:] = np.frombuffer(unique_id, np.int8)
            core.init(device=its_device, uid=unpacked, rank=rank, nranks=num_ranks, initializer_method="uid")
        self._core = core
        self._device = its_device
        self._turn = threading.Lock()
        self._thread = threading.local()
        self.name = hashlib.blake2b(unique_id, digest_size=16).hexdigest()
        self.rank = rank
        self.num_ranks = num_ranks

    def allocate(self, nbytes: int) -> int:
        with self._calling() as library:
            address = int(library.malloc(nbytes + _ALIGNMENT - 1))
        if not address:
            raise ConfigError(f"no {nbytes} bytes of symmetric memory", field="num_blocks")
        # The same step everywhere: the memory itself starts at such a boundary in every engine.
        return -(-address // _ALIGNMENT) * _ALIGNMENT

    def barrier(self) -> None:
        with self._calling() as library:
            library.barrier_all()

    def mapped_address(self, address: int, rank: int) -> int:
        with self._calling() as library:
            return int(library.ptr(address, rank))

    def put(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        with self._calling() as library:
            library.putmem_on_stream(target, source, nbytes, rank, stream)

    def get(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        with self._calling() as library:
            library.getmem_on_stream(target, source, nbytes, rank, stream)

    def signal(self, word: int, value: int, rank: int, stream: int) -> None:
        with self._calling() as library:
            library.signal_op_on_stream(word, value, _SIGNAL_SET, rank, stream)

    def quiet(self, stream: int) -> None:
        with self._calling() as library:
            library.quiet_on_stream(stream)

    def leave(self) -> None:
        with self._calling():
            self._core.finalize()

    @contextmanager
    def _calling(self) -> Iterator[Any]:
        """Our turn, on our device: the current one belongs to a thread."""
        with self._turn:
            if not getattr(self._thread, "is_ready", False):
                self._device.set_current()
                self._thread.is_ready = True
            yield self._bindings


@contextmanager
def _one_line(what: str, field: str) -> Iterator[None]:
    """What the library and its loaders raise, as :class:`ConfigError`."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{what}: {type(error).__name__}: {reason}", field=field) from error


def _import(name: str) -> Any:
    with _one_line("the nvshmem heap needs nvshmem4py (the extra cuda12 or cuda13)", "heap"):
        return import_module(name)
