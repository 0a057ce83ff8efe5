"""Identity of a block: a hash chained over everything before it.

    root   = sha256(model, adapter, salt, revision)[:16]    each field behind its length, no empty revision
    hash_i = sha256(hash_{i-1} || tokens of block i, u32 LE)[:16]

So one hash names a whole prefix. Owns the formula and nothing else: engines, index and routers all
compute it, natively where they can (``native/sha256.h``), and golden values in the tests keep them from
drifting apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

from microserve.kvcache.prefix.extension import extension
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import ConfigError, InvalidRequest

BlockHash = bytes
"""16 bytes. Wide enough that nobody finds two prefixes with one hash; whoever reuses KV compares tokens all
the same."""

BLOCK_HASH_NBYTES = 16
TOKEN_NBYTES = 4


@lru_cache(maxsize=1024)
def root_hash(model: str, *, adapter: str = "", salt: str = "", revision: str = "") -> BlockHash:
    """Parent of every first block: prefixes under different models, adapters, salts or revisions of a model
    never meet. ``revision``: empty of an engine that names none."""
    digest = sha256(b"microserve block hash 1")
    for field in (model, adapter, salt, revision) if revision else (model, adapter, salt):
        # "surrogatepass": a str that came from outside may hold lone surrogates; it still gets a hash.
        encoded = field.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()[:BLOCK_HASH_NBYTES]


def chain_hash(parent: BlockHash, packed_tokens: bytes) -> BlockHash:
    """Hash of one block from its parent's hash and its tokens as little-endian u32."""
    return sha256(parent + packed_tokens).digest()[:BLOCK_HASH_NBYTES]


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32. Raises :class:`InvalidRequest` for one that is not."""
    try:
        return encode_tokens(tokens)
    except (OverflowError, TypeError):
        raise not_tokens() from None


def not_tokens() -> InvalidRequest:
    """What is said of tokens that are no u32."""
    return InvalidRequest("a token id is outside 0 to 4294967295", field="tokens")


class HashChain:
    """Hashes of the full blocks of one growing sequence; each block is hashed once."""

    __slots__ = ("block_size", "hashes", "root")

    def __init__(self, root: BlockHash, block_size: int) -> None:
        """``block_size`` in tokens; raises :class:`ConfigError` unless it is positive."""
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}, at least 1", field="block_size")
        self.root = root
        self.block_size = block_size
        self.hashes: list[BlockHash] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Hash every full block of ``tokens`` that is not hashed yet.

        ``tokens`` is the whole sequence from its start; what was hashed before must not have changed.
        Raises :class:`InvalidRequest` for a token that is not a u32."""
        begin = len(self.hashes) * self.block_size
        end = len(tokens) - len(tokens) % self.block_size
        if end <= begin:
            return
        parent = self.hashes[-1] if self.hashes else self.root
        if native := extension():
            listed = tokens if type(tokens) is list else list(tokens)
            try:
                self.hashes += native.chain(parent, listed, self.block_size, len(self.hashes))
            except (OverflowError, TypeError):
                raise not_tokens() from None
            return
        packed = pack_tokens(tokens[begin:end])
        stride = self.block_size * TOKEN_NBYTES
        for offset in range(0, len(packed), stride):
            parent = chain_hash(parent, packed[offset : offset + stride])
            self.hashes.append(parent)


def block_hashes(tokens: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """Hashes of all full blocks of ``tokens``; a partial last block has none."""
    chain = HashChain(root, block_size)
    chain.extend(tokens)
    return chain.hashes
