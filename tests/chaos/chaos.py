"""Chaos on real processes: Poisson load and Poisson faults by seed; exit 0 only if every promise was kept.

    python tests/chaos/chaos.py --seconds 60 --seed 1 [--rate 4] [--faults 0.5] [--hosts] [--model DIR]
        [--out FILE]

Two routers, three engines, an index and a gateway. Services are killed, frozen, drained and cut off while
clients compare every token with what one undisturbed engine says. With ``--hosts`` each engine has a host of
its own (namespaces; as root), which is unplugged, deaf, mute or without power as well. Without ``--model``: a
tiny random one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second, on average")
    parser.add_argument("--faults", type=float, default=0.5, help="faults a second, on average")
    parser.add_argument("--hosts", action="store_true", help="each engine on a host of its own; as root")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines of every fault and request")
    parser.add_argument("--logs", type=Path, help="keep the services' logs here")
    arguments = parser.parse_args()

    from tests.support.chaos.run import Chaos, run_chaos
    from tests.support.engine.model.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or make_tiny_model(Path(scratch) / "tiny")
        logs = arguments.logs or Path(scratch) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(
            model, arguments.seconds, arguments.seed, arguments.rate, arguments.faults, hosts=arguments.hosts
        )
        report = run_chaos(chaos, logs, arguments.out)
    print(report.table())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
