"""Events under our own hashes: of an engine's cache, and of one that is told again for another engine.

Owns their form: where the salt stands (foreign.py:salt_of reads it), and removals in a row are one event.
"""

from __future__ import annotations

from microserve.kvcache.prefix.hash import BlockHash
from microserve.protocol.messages.kv.kv_events import BlockRemoved, BlockStored, KVEvent


def stored_event(
    hashes: list[BlockHash],
    parent: BlockHash | None,
    tokens: list[int],
    block_size: int,
    salt: str,
    adapter: str = "",
    adapter_number: int | None = None,
) -> BlockStored:
    """``hashes`` is a chain and ``tokens`` are its blocks'; ``parent`` None where it starts a sequence.
    ``adapter_number``: what the adapter is at its engine, for readers who do not go by its name."""
    named = (adapter,) if adapter else ()
    first = (*named, salt) if parent is None and salt else named
    keys = [first or None, *[named or None] * (len(hashes) - 1)]
    return BlockStored(
        block_hashes=[*hashes],
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=block_size,
        lora_id=adapter_number,
        lora_name=adapter or None,
        extra_keys=keys if first else None,
    )


def append_removed(events: list[KVEvent], hashes: list[BlockHash]) -> None:
    """Joined with the last event, if that is of removals too."""
    last = events[-1] if events else None
    if isinstance(last, BlockRemoved):
        last.block_hashes.extend(hashes)
    else:
        events.append(BlockRemoved([*hashes]))
