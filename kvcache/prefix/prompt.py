"""Hashes of prompts, run by run, that remember the beginnings which many prompts share.

    run     blocks of a prompt: 1, 1, 2, 4, 8, then 16 each, cut at the same places in every prompt
    known   (hash before the run + its tokens) -> hashes of the run

Hashing costs more than looking up what was hashed, and prompts begin alike: with one system prompt, or with
what was said before in the same conversation. Whoever reads says which runs are worth remembering. They are
found by all of their tokens: nobody is given another prompt's hashes.

Owns that memory and its bound. The formula is hash.py's; what a hash is good for is index.py's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from microserve.kvcache.prefix.hash import BLOCK_HASH_NBYTES, TOKEN_NBYTES, BlockHash, pack_tokens

Run = Sequence[BlockHash]

_MAX_RUN_BLOCKS = 16
_OBJECTS_NBYTES = 192
"""Of a run besides its tokens and hashes: the dict's entry, a bytes object and a tuple."""
_HASH_OBJECT_NBYTES = 64 + 8


class PromptHashes:
    """For prompts of one block size."""

    __slots__ = ("_block_size", "_known", "_pack_block", "max_nbytes", "max_run_tokens", "nbytes")

    def __init__(self, block_size: int, max_nbytes: int) -> None:
        """``block_size`` in tokens, at least 1; ``max_nbytes`` as counted by ``nbytes``."""
        self.max_run_tokens = _MAX_RUN_BLOCKS * block_size
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        self._known: dict[bytes, Run] = {}
        self._block_size = block_size
        self._pack_block = struct.Struct(f"<{block_size}I").pack

    def run(self, before: BlockHash, tokens: Sequence[int]) -> tuple[bytes, Run]:
        """Its name, and the hashes of these full blocks behind the hash ``before``.

        Raises :class:`InvalidRequest` for a token that is not a u32."""
        if len(tokens) != self._block_size:
            name = before + pack_tokens(tokens)
            return name, self._known.get(name) or self._hashed(name)
        try:  # half of what pack_tokens costs
            name = before + self._pack_block(*tokens)
        except struct.error:
            name = before + pack_tokens(tokens)
        return name, self._known.get(name) or (sha256(name).digest()[:BLOCK_HASH_NBYTES],)

    def _hashed(self, name: bytes) -> Run:
        stride, before = self._block_size * TOKEN_NBYTES, name[:BLOCK_HASH_NBYTES]
        run = []
        for offset in range(BLOCK_HASH_NBYTES, len(name), stride):
            before = sha256(before + name[offset : offset + stride]).digest()[:BLOCK_HASH_NBYTES]
            run.append(before)
        return tuple(run)

    def remember(self, name: bytes, run: Run) -> None:
        """When there is no room, all is forgotten: what is asked for again is soon known again."""
        if name in self._known:
            return
        nbytes = len(name) + _OBJECTS_NBYTES + len(run) * _HASH_OBJECT_NBYTES
        if self.nbytes + nbytes > self.max_nbytes:
            self._known.clear()
            self.nbytes = 0
        if nbytes > self.max_nbytes:
            return
        self._known[name] = run
        self.nbytes += nbytes
