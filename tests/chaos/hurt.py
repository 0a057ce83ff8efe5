"""A mesh hurt in every way that should cost no process, while it serves; exit 0 only if nothing was hurt. As
root.

    python tests/chaos/hurt.py --seconds 600 [--streams 8] [--refusals 1000] [--bodies 1] [--model DIR]

The disk of logs and state is full and freed, descriptors are used up and freed, refusals and bodies of 31 MB
come as fast as said, and one engine is killed whenever it is ready. Each stream is compared with
``transformers``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=float, default=8.0, help="streams a second")
    parser.add_argument("--refusals", type=int, default=1000, help="refused requests a second")
    parser.add_argument("--bodies", type=float, default=1.0, help="bodies of 31 MB a second")
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()

    from tests.support.chaos.hurt import Hurt, run_hurt
    from tests.support.engine.model.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or make_tiny_model(Path(scratch) / "tiny")
        hurt = Hurt(model, arguments.seconds, arguments.streams, arguments.refusals, arguments.bodies)
        account = run_hurt(hurt, Path(scratch))
    print(account.table())
    return 1 if account.problems else 0


if __name__ == "__main__":
    sys.exit(main())
