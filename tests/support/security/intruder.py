"""What somebody tries who can reach the sockets of a mesh, with whatever keys he has; also from another user.

Owns the attempts and what came back; whether that should be so is for the tests to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from microserve.protocol.bus.codec import (
    ENGINE_REPLY,
    ENGINE_REQUEST,
    INDEX_REPLY,
    INDEX_REQUEST,
    ROUTER_REPLY,
    ROUTER_REQUEST,
    Codec,
    encode_tokens,
)
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.transport import ClientSocket, ZmqBus
from microserve.protocol.messages import engine, index, router
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy import control

T = TypeVar("T")
SOURCE = "import os\n\nos.system('id > /tmp/intruder')\n"


@dataclass(frozen=True)
class Targets:
    """Where the sockets are, and whose key is expected there: no secrets."""

    index: str
    router: str
    engine: engine.EngineInfo
    index_key: str
    router_key: str


@dataclass(frozen=True)
class Attempt:
    """Messages to one socket, and what says that they had an effect."""

    name: str
    socket: str
    codecs: tuple[Codec[Any], Codec[Any]]
    messages: tuple[tuple[Any, ...], ...]
    """Each with its bulk."""


def attempts(targets: Targets) -> list[Attempt]:
    """The eight of case B3, over sockets."""
    to_engine, to_router = (ENGINE_REQUEST, ENGINE_REPLY), (ROUTER_REQUEST, ROUTER_REPLY)
    to_index = (INDEX_REQUEST, INDEX_REPLY)
    info = msgspec.structs.replace(targets.engine, engine_id="intruder", incarnation=99)
    prompt = encode_tokens([5] * 40)
    sampling = SamplingParams(max_tokens=4)
    hello = engine.Hello(1, "r-intruder", 77, 8)
    change = control.Change(1, "c-intruder", "publish", "intruder", source=SOURCE)
    return [
        Attempt("publish a strategy", "index", to_index, ((change,),)),
        Attempt("register an engine", "index", to_index, ((index.Register(1, info),),)),
        Attempt("watch the members", "index", to_index, ((index.Watch("w-intruder"),),)),
        Attempt(
            "ask as a gateway",
            "router",
            to_router,
            (
                (router.GatewayHello("g-intruder", 88, 8),),
                (router.Generate("q-intruder", targets.engine.model, sampling, 30.0), prompt),
            ),
        ),
        Attempt("read what is cached", "engine", to_engine, ((hello,), (engine.Snapshot(2),))),
        Attempt(
            "generate on an engine",
            "engine",
            to_engine,
            ((hello,), (engine.StartGenerate(2, "q2-intruder", 0, sampling, 30.0), prompt)),
        ),
        Attempt(
            "drain an engine",
            "engine",
            to_engine,
            ((hello,), (engine.Drain(2, targets.engine.incarnation),)),
        ),
    ]


async def try_all(
    targets: Targets, keys: CurveKeys | None, names: Mapping[str, Attempt], seconds: float
) -> dict[str, list[str]]:
    """What came back within the time, by attempt: names of messages, with the code of failures."""
    bus = ZmqBus(keys=keys, linger_s=0)
    got: dict[str, list[str]] = {name: [] for name in names}
    got |= {"read events": [], "replay events": []}
    places = {
        "index": (targets.index, targets.index_key),
        "router": (targets.router, targets.router_key),
        "engine": (targets.engine.address, targets.engine.curve_key),
    }
    try:
        for name, attempt in names.items():
            address, server_key = places[attempt.socket]
            server_key = server_key if keys else ""

            def hear(frames: list[bytes], name: str = name, codec: Codec[Any] = attempt.codecs[1]) -> None:
                got[name].append(_told(codec.decode(frames)[0]))

            client: ClientSocket | NumberedClient = (
                bus.client(address, hear, server_key=server_key)
                if attempt.socket == "index"  # which numbers nothing
                else NumberedClient(bus, address, hear, lambda why: None, server_key=server_key)
            )
            for message, *bulk in attempt.messages:
                client.send(attempt.codecs[0].encode(message, *bulk))
        info = targets.engine
        bus.subscriber(
            info.events_address,
            lambda frames: got["read events"].append("batch"),
            server_key=info.curve_key if keys else "",
        )
        replay = bus.client(
            info.replay_address,
            lambda frames: got["replay events"].append("batch"),
            server_key=info.curve_key if keys else "",
        )
        replay.send([b"", (0).to_bytes(8, "big")])
        await asyncio.sleep(seconds)
    finally:
        bus.close()
    return got


def _told(message: Any) -> str:
    code = getattr(message, "code", "")
    return f"{type(message).__name__} {code}".strip()


# --- without a socket ------------------------------------------------------------------------------


def look_around(directory: Path, pids: list[int]) -> dict[str, str]:
    """Files of a mesh's directory and insides of its processes that can be opened: path to content."""
    found: dict[str, str] = {}
    for path in [directory, *_below(directory), *map(Path, _known(directory))]:
        with contextlib.suppress(OSError):
            found[str(path)] = str(os.listdir(path)) if path.is_dir() else path.read_bytes()[:40].hex()
    for pid in pids:
        for what in ("fd", "map_files"):
            with contextlib.suppress(OSError):
                found[f"/proc/{pid}/{what}"] = str(os.listdir(f"/proc/{pid}/{what}"))
        for what in ("environ", "mem", *(f"fd/{number}" for number in range(64))):
            with contextlib.suppress(OSError):
                os.close(os.open(f"/proc/{pid}/{what}", os.O_RDONLY))
                found[f"/proc/{pid}/{what}"] = "opened"
        if ctypes.CDLL(None).ptrace(16, pid, None, None) == 0:  # PTRACE_ATTACH
            found[f"ptrace {pid}"] = "attached"
    return found


def _below(directory: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(directory) for name in names]


def _known(directory: Path) -> list[str]:
    """Paths that anybody can guess."""
    roles = ("index", "engine", "router", "gateway", "operator")
    names = ["mesh.json", "mesh.pid", "control.db", "up.out", "logs/index.jsonl", "logs/gateway.jsonl"]
    return [
        f"{directory}/{name}" for name in [*names, *(f"keys/{role}/service.key_secret" for role in roles)]
    ]


def as_user(uid: int, task: Callable[[], T]) -> T:
    """Run ``task`` in a fork that is that user and nobody else; what it returns is pickled."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        theirs.send(task())

    child = context.Process(target=run)
    child.start()
    theirs.close()
    try:
        result: T = ours.recv()
        return result
    finally:
        child.join(30)
