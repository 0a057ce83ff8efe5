"""A whole mesh started, asked and stopped from Python: what ``microserve up`` does, without the screen.

    python examples/mesh_from_python.py MODEL_DIR [--engines 2]

``microserve model fetch`` prints the directory of a small model. Children are real processes: they are
restarted when they crash, and none outlives this one.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from microserve.protocol.bus.curve import create_mesh_keys
from microserve.protocol.settings.sources import load_settings
from microserve.services.local.composition import compose
from microserve.services.local.supervisor import Supervisor


async def run(model: str, engines: int, directory: Path) -> None:
    assignments = [
        f"model.path={model}",
        f"mesh.engines={engines}",
        "index.address=tcp://127.0.0.1:0",  # port 0: any free one, told to all children
        "router.address=tcp://127.0.0.1:0",
        "gateway.port=0",
    ]
    settings = load_settings(overrides=assignments)
    flags = [word for each in assignments for word in ("--set", each)]
    keys = str(
        create_mesh_keys(directory / "keys")
    )  # a pair for each role: no other user of this machine gets in
    composition = compose(settings, flags, directory / "logs", directory / "control.db", keys)
    supervisor = Supervisor(
        composition.children,
        max_restarts=settings.mesh.max_restarts,
        restart_window_s=settings.mesh.restart_window_s,
        ready_timeout_s=settings.mesh.ready_timeout_s,
        changed=lambda child: print(f"{child.name}: {child.state}"),
    )
    async with supervisor:
        await supervisor.ready()
        await composition.gateway.until_ready(settings.mesh.ready_timeout_s)
        print(f"{composition.model} is served at {composition.gateway.url}")
        answer = await composition.gateway.chat(
            composition.model, "Hello!", lambda piece: print(piece, end="", flush=True)
        )
        print(f"\n{answer.num_tokens} tokens, the first after {answer.first_token_s:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--engines", type=int, default=2)
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory:
        asyncio.run(run(arguments.model, arguments.engines, Path(directory)))


if __name__ == "__main__":
    main()
