"""Every cell of the table of rights, role by action, tried over the real sockets of a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

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
from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import NotPermitted
from microserve.protocol.messages import engine, index, router
from microserve.protocol.security.rights import (
    APPLY_CONTROL,
    READ_EVENTS,
    READ_REPLAY,
    RIGHTS,
    Entrance,
    Role,
)
from tests.support.bus.socket_world import until
from tests.support.bus.wire_samples import MESSAGES
from tests.support.security.up_mesh import UpMesh, microserve, up_mesh

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SILENCE_S = 5.0
"""Longer than a handshake may take: nobody is let in meanwhile."""
ROLES = [Role.INDEX, Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR]
STRANGER = "stranger"
"""Whose key nobody trusts."""
CHANNELS: list[tuple[Entrance, Any, Codec[Any], Codec[Any]]] = [
    (Entrance.ENGINE, engine.EngineRequest, ENGINE_REQUEST, ENGINE_REPLY),
    (Entrance.ROUTER, router.RouterRequest, ROUTER_REQUEST, ROUTER_REPLY),
    (Entrance.INDEX, index.IndexRequest, INDEX_REQUEST, INDEX_REPLY),
]
JUNK = [b"no header"]
"""What nobody may say: answered in its place, so that what came before is all that there is to come."""
SAMPLES = {type(message): message for codec, message in MESSAGES if codec in {each[2] for each in CHANNELS}}


@pytest.fixture(scope="module")
def mesh(tiny_model: Path) -> Iterator[UpMesh]:
    with up_mesh(tiny_model, num_engines=1) as running:
        yield running


class Caller:
    """One key, and everything that it tries, all at once."""

    def __init__(self, mesh: UpMesh, keys: CurveKeys) -> None:
        info = mesh.targets.engine
        self.bus = ZmqBus(keys=keys, linger_s=0)
        self.key = keys.public.decode()
        self.info = info
        self.places = {
            Entrance.ENGINE: (info.address, info.curve_key),
            Entrance.ROUTER: (mesh.targets.router, mesh.targets.router_key),
            Entrance.INDEX: (mesh.targets.index, mesh.targets.index_key),
        }
        self.told: dict[Any, list[str]] = {}
        """Codes of failures, by action, up to the answer to junk; of streams: what came."""
        self.ended: set[Any] = set()

    def try_everything(self) -> None:
        for entrance, union, to, back in CHANNELS:
            for kind in get_args(union):
                self._try(kind, self._sample(kind), entrance, to, back)
        watch = msgspec.structs.replace(SAMPLES[index.Watch], control_version=0, faults=[], shadows=[])
        self._try(APPLY_CONTROL, watch, Entrance.INDEX, INDEX_REQUEST, INDEX_REPLY)
        self._listen()

    def _sample(self, kind: Any) -> Any:
        sample = SAMPLES[kind]
        if kind is index.Register:
            return index.Register(1, msgspec.structs.replace(sample.info, curve_key=self.key))
        if kind is index.Watch:
            return index.Watch("w")
        return sample

    def _try(self, action: Any, message: Any, entrance: Entrance, to: Codec[Any], back: Codec[Any]) -> None:
        codes = self.told[action] = []
        address, server_key = self.places[entrance]

        def hear(frames: list[bytes]) -> None:
            reply, _ = back.decode(frames)
            if getattr(reply, "detail", "").startswith("1 frames"):
                self.ended.add(action)
            elif action not in self.ended:
                codes.append(getattr(reply, "code", ""))

        client = self.bus.client(address, hear, server_key=server_key)
        bulk = [encode_tokens([1, 2, 3])] if isinstance(message, index.Lookup | router.Generate) else []
        client.send(to.encode(message, *bulk))
        client.send(JUNK)

    def _listen(self) -> None:
        events, replay = self.told.setdefault(READ_EVENTS, []), self.told.setdefault(READ_REPLAY, [])
        info = self.info
        self.bus.subscriber(
            info.events_address, lambda frames: events.append("batch"), server_key=info.curve_key
        )
        client = self.bus.client(
            info.replay_address, lambda frames: replay.append("batch"), server_key=info.curve_key
        )
        client.send([b"", bytes(8)])

    def may(self, action: Any) -> bool:
        """As it turned out."""
        if action in (READ_EVENTS, READ_REPLAY):
            return bool(self.told[action])
        return action in self.ended and NotPermitted.code not in self.told[action]

    def is_through(self, allowed: set[Any]) -> bool:
        return all(self.may(action) for action in allowed)


@pytest.fixture(scope="module")
def callers(mesh: UpMesh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Caller]:
    """One for each role and the stranger, when all of them have tried everything and nothing more comes."""
    keys: dict[str, CurveKeys] = {role: mesh.keys(role) for role in ROLES}
    keys[STRANGER] = create_keys(tmp_path_factory.mktemp("stranger"))
    return asyncio.run(try_all(mesh, keys))


async def try_all(mesh: UpMesh, keys: dict[str, CurveKeys]) -> dict[str, Caller]:
    """One after the other, and one silence for all."""
    callers: dict[str, Caller] = {}
    try:
        for name, own in keys.items():
            caller = callers[name] = Caller(mesh, own)
            caller.try_everything()
            await until(partial(caller.is_through, rights_of(name)))
        await asyncio.sleep(SILENCE_S)  # for what must not come
        return callers
    finally:
        for caller in callers.values():
            caller.bus.close()


def rights_of(name: str) -> set[Any]:
    return {action for action, roles in RIGHTS.items() if name in roles}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_what_the_table_says_and_nothing_else(callers: dict[str, Caller], role: Role) -> None:
    caller = callers[role]
    assert {action for action in RIGHTS if caller.may(action)} == rights_of(role)
    heard = {action: codes for action, codes in caller.told.items() if codes}
    for action in RIGHTS:
        codes = heard.get(action, [])
        if role in RIGHTS[action]:
            assert NotPermitted.code not in codes
        else:
            assert codes in ([], [NotPermitted.code]), (action, codes)


def test_a_stranger_may_nothing(callers: dict[str, Caller]) -> None:
    caller = callers[STRANGER]
    assert not [action for action in RIGHTS if caller.may(action)]
    assert not any(caller.told.values())


@pytest.mark.usefixtures("callers")
def test_what_was_refused_had_no_effect(mesh: UpMesh) -> None:
    """After all that: nothing was changed but by the operator, and the engine is there."""
    history = mesh.run("strategy", "history").stdout
    operator = mesh.keys("operator").public.decode()
    assert all(operator in line for line in history.splitlines()), history
    assert mesh.run("label", "--list").stdout.count("e0 ") == 1


def test_commands_find_the_mesh_of_their_directory_and_its_keys(mesh: UpMesh, tmp_path: Path) -> None:
    listed = mesh.run("strategy", "list")
    assert (listed.returncode, "r0" in listed.stdout) == (0, True), listed.stderr
    elsewhere = microserve(tmp_path, "label", "--list", "--directory", str(mesh.directory.root))
    assert (elsewhere.returncode, "e0" in elsewhere.stdout) == (0, True), elsewhere.stderr
    assert "service.ready" in microserve(tmp_path, "tail", "--directory", str(mesh.directory.root)).stdout
    with ThreadPoolExecutor() as pool:  # both wait for an index that is not there: at once
        asked = pool.submit(microserve, tmp_path, "strategy", "list", "--index", "tcp://127.0.0.1:1")
        other = mesh.run("strategy", "list", MICROSERVE_INDEX__ADDRESS="tcp://127.0.0.1:1")
        nowhere = asked.result()
    assert nowhere.returncode == 1 and "tcp://127.0.0.1:1 does not answer" in nowhere.stderr
    assert other.returncode == 1 and "tcp://127.0.0.1:1 does not answer" in other.stderr, "said is said"
    drained = mesh.run("drain", "e0")
    assert drained.returncode == 0 and drained.stdout.endswith("engine e0 has left\n"), drained.stderr
