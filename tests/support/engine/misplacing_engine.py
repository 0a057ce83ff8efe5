"""An engine whose transfers are at fault as long as a file is there: each layer it sends is its first one.

Nothing on the way notices: the bytes are whole, and all of them arrive. Run as
``python -m tests.support.engine.misplacing_engine FILE engine --set ...``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from microserve.kvcache.heap.heap import Copies
from microserve.kvcache.heap.mapped import MappedPeerHeap
from microserve.services.command.main import main


def misplace(switch: Path) -> None:
    """From now on, while ``switch`` exists."""
    put = MappedPeerHeap.put

    def wrong(self: MappedPeerHeap, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        put(self, copies, 0 if switch.exists() else source_shift, target_shift)

    MappedPeerHeap.put = wrong  # type: ignore[method-assign]


if __name__ == "__main__":
    misplace(Path(sys.argv[1]))
    sys.argv = ["microserve", *sys.argv[2:]]
    main()
