"""A grant: the receiver's written permission to put KV into named blocks of its heap (WIRE.md 4.3).

Travels receiver -> router (in ``Granted``) -> sender (in ``RemoteSend``). Plain data, no behaviour.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.kv.coding import Decoding
from microserve.protocol.messages.kv.geometry import UNSAID, Geometry

MAX_LANES = 4
"""Writers that may share one grant, each in a lane of its own: 0 to 3."""


class HeapAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a heap is; enough for a process on ``host`` to attach it."""

    kind: str
    """``shm``, ``cuda_ipc`` or ``nvshmem``; of a door ``tcp`` or ``nixl``."""
    host: str
    """Kernel boot id: two processes with the same one share a kernel, so they can share memory. Of
    ``nvshmem`` the name of its world."""
    pid: int
    """Of ``nvshmem`` the rank."""
    fd: int
    """File descriptor of the memfd in process ``pid``; 0 of ``nvshmem``."""
    nbytes: int
    """Of the memfd, or of a rank's symmetric memory."""
    incarnation: int
    """Incarnation of the owner; also in the heap's header, so a reused pid cannot be mistaken for it."""
    door: bytes = b""
    """Of a way in over the network: where and how it is entered, opaque to everybody but its kind."""


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """Permission to write KV of prompt tokens ``[matched, end)``."""

    grant_id: str
    engine_id: str
    incarnation: int
    slot: int
    """Index of the grant's control words in the receiver's heap."""
    generation: int
    """Use number of that slot; a writer checks it before every layer."""
    matched: int
    """Tokens that the receiver already holds; always a multiple of ``block_size``, at most ``end``."""
    end: int
    blocks: list[int]
    """Block ``i`` takes tokens ``[matched + i*block_size, matched + (i+1)*block_size)``, cut at ``end``."""
    block_size: int
    layout_hash: str
    """Digest of model, revision, dtype, block and layer geometry; sender and receiver must agree on it."""
    heap: HeapAddress
    lease_s: float
    """The receiver closes the grant by itself after this long without ``StartGenerate`` or ``Commit``."""
    numerics: str = ""
    """Name of the receiver's class; empty: not said."""
    geometry: Geometry = UNSAID
    """Of the blocks: what must be the sender's too."""
    doors: list[HeapAddress] = []
    """Other ways into the same heap, best first; ``heap`` is tried before them."""
    adapter: Adapter | None = None
    """With which the KV is computed; None: the model alone."""
    decoding: Decoding | None = None
    """What may be put as payloads of a codec; None: nothing."""
