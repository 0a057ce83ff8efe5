"""What lies in an engine's heap: the bytes of a grant's blocks, read from beside.

A grant says where its heap is. One in shared memory of this kernel can be opened as its peers open it; others
(of a GPU, behind a door alone, of another user) cannot, and a test that wants bytes has nothing to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.kvcache.heap.shm import KIND, ShmView
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.messages.kv.grant import Grant


def layout_of(info: EngineInfo) -> KvLayout:
    """As its hello has it, but for the size of the pool, which a heap says itself."""
    geometry = info.geometry
    return KvLayout(
        model=info.model,
        num_layers=geometry.num_layers,
        num_blocks=info.num_blocks,
        block_size=geometry.block_size,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
        revision=info.revision,
        order=geometry.order,
        rope=geometry.rope,
    )


def kv_of(info: EngineInfo, grant: Grant, blocks: Sequence[int]) -> list[list[bytes]] | None:
    """Of these blocks in every layer: ``[layer][block]``. None where this process cannot look."""
    if grant.heap.kind != KIND:
        return None
    try:
        view = ShmView.open(grant.heap, layout_of(info))
    except TransferFailed:
        return None
    try:
        layout = view.layout
        return [
            [
                bytes(
                    view.read_data(
                        layer * layout.layer_nbytes + block * layout.block_nbytes, layout.block_nbytes
                    )
                )
                for block in blocks
            ]
            for layer in range(layout.num_layers)
        ]
    finally:
        view.close()
