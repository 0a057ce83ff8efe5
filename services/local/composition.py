"""What a mesh on one machine consists of: children, their commands, addresses and order of stopping.

Owns the composition only: pure but for asking the kernel for free ports.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.index.foreign import foreign_engines
from microserve.services.local.demo.request import Gateway
from microserve.services.local.directory import ForeignState
from microserve.services.local.event_ports import check_event_ports, event_ports
from microserve.services.local.metric_ports import check_metric_ports, metric_ports, reached_at
from microserve.services.local.supervisor import Child

USAGE = "usage.db"
RESPONSES = "responses.db"
"""In the directory of a mesh: what each API key has used, if the settings name no other file."""
GATEWAY_STOPS, ROUTER_STOPS, ENGINES_STOP, INDEX_STOPS = range(4)
"""Callers before those whom they call, so that nobody calls into the void."""

STOP_TIMEOUT_S = 10.0
ENGINE_PATIENCE = 4
"""Of ``mesh.watchdog_s``: a step may be long. As in deploy/systemd."""


@dataclass(frozen=True, slots=True)
class Composition:
    children: list[Child]
    gateway: Gateway
    model: str
    index: str
    router: str
    """Addresses."""
    keys: str
    """Directory of keys; empty: none."""
    foreign: list[ForeignState]


def assignment(path: str, value: Any) -> list[str]:
    """A flag for one setting, quoted as TOML (of which JSON's strings, numbers and lists are a part)."""
    return ["--set", f"{path}={json.dumps(value, ensure_ascii=False)}"]


def model_assignments(settings: Settings) -> list[str]:
    """All services have one directory, and one name for it: that of a model that was found by its name."""
    named = assignment("model.name", settings.model.name) if settings.model.name else []
    return [*assignment("model.path", settings.model.path), *named]


def service_command(service: str) -> list[str]:
    """How this interpreter starts a service; ``-P`` keeps the current directory off the import path."""
    return [sys.executable, "-P", "-m", "microserve.services", service]


def worker_flag(number: int) -> list[str]:
    """What tells a gateway's process which of ``gateway.workers`` it is."""
    return ["--worker", str(number)]


def compose(
    settings: Settings, flags: Sequence[str], logs: Path, control: Path, keys: str = ""
) -> Composition:
    """Children for ``settings``, which ``flags`` (``--config``, ``--set``) describe to them.

    ``control`` is the index's control log if the settings name none: what was published is there after a
    restart, of the index alone or of everything. What keys have used is kept beside it. ``keys``: a directory
    of the bus's keys for all of them.
    Ports that are 0 become free ones now, so that a restarted child comes back where the others look for it.
    Raises :class:`ConfigError`.
    """
    if not (Path(settings.model.path) / "config.json").is_file():
        raise ConfigError(
            f"model.path {settings.model.path!r} is not a model's directory: it holds no config.json",
            field="model.path",
        )
    if settings.mesh.engines > 1:
        address = settings.engine.address
        if address.startswith("tcp://") and not address.endswith(":0"):
            raise ConfigError(
                f"engine.address {address} cannot serve {settings.mesh.engines} engines; use port 0",
                field="engine.address",
            )
        check_event_ports(settings)
    first_rank, num_ranks = settings.nvshmem.rank, settings.nvshmem.num_ranks
    if settings.heap == "nvshmem" and first_rank + settings.mesh.engines > num_ranks:
        raise ConfigError(
            f"nvshmem.num_ranks {num_ranks} is too small for {settings.mesh.engines} engines from rank "
            f"{first_rank} on",
            field="nvshmem.num_ranks",
        )
    check_metric_ports(settings)
    ports = iter(free_ports(5 + settings.mesh.engines))
    index = _with_port(settings.index.address, ports)
    router = _with_port(settings.router.address, ports)
    port = settings.gateway.port or next(ports)
    metrics = metric_ports(settings, ports)
    common = [
        *flags,
        *assignment("log.dir", str(logs)),
        *assignment("index.address", index),
        *assignment("router.address", router),
        *assignment("gateway.port", port),
        *model_assignments(settings),
        *(assignment("bus.curve_dir", keys) if keys else []),
    ]

    def child(service: str, name: str, stop_order: int, *own: str, stop_s: float = STOP_TIMEOUT_S) -> Child:
        argv = [*service_command(service), *common, *assignment("log.file", f"{name}.jsonl"), *own]
        read_at = metrics.get(name, 0)
        if read_at:
            argv += assignment(f"{service}.metrics_port", read_at)
        watchdog_s = settings.mesh.watchdog_s * (ENGINE_PATIENCE if service == "engine" else 1)
        log, output = logs / f"{name}.jsonl", logs / f"{name}.out"
        address = reached_at(settings.metrics.host, read_at) if read_at else ""
        return Child(name, argv, log, output, stop_order, stop_s, watchdog_s, metrics=address)

    drain_s = settings.engine.drain_s + STOP_TIMEOUT_S

    def engine(number: int) -> Child:
        own = assignment("engine.id", f"e{number}")
        for path, address in event_ports(settings, number).items():
            own += assignment(path, address)
        if settings.heap == "nvshmem":
            own += assignment("nvshmem.rank", first_rank + number)
        return child("engine", f"engine-e{number}", ENGINES_STOP, *own, stop_s=drain_s)

    engines = [engine(number) for number in range(settings.mesh.engines)]
    kept = [
        assignment(f"gateway.{name}", str(control.with_name(file)))
        for name, file in (("usage_path", USAGE), ("responses_path", RESPONSES))
        if not getattr(settings.gateway, name)
    ]
    files = [word for words in kept for word in words]
    num_workers = settings.gateway.workers
    stop_s = settings.gateway.drain_s + STOP_TIMEOUT_S
    gateways = [child("gateway", "gateway", GATEWAY_STOPS, *files, stop_s=stop_s)]
    if num_workers > 1:
        own = [*files, *assignment("gateway.id", settings.gateway.id or "g0")]
        gateways = [
            child("gateway", f"gateway-{number}", GATEWAY_STOPS, *own, *worker_flag(number), stop_s=stop_s)
            for number in range(num_workers)
        ]
    router_own = assignment("router.id", settings.router.id or "r0")
    if not settings.router.trace_path:
        router_own += assignment("router.trace_path", str(control.with_name("router.trace")))
    control_log = [] if settings.index.control_path else assignment("index.control_path", str(control))
    children = [
        child("index", "index", INDEX_STOPS, *control_log),
        child("router", "router", ROUTER_STOPS, *router_own),
        *engines,
        *gateways,
    ]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.gateway.host, settings.gateway.host)
    model = settings.model.name or Path(settings.model.path).name
    gateway = Gateway(host, port, first_key(settings), settings.gateway.tls_cert)
    foreign = [
        ForeignState(each.engine_id, each.model, each.events_address, each.replay_address)
        for each in foreign_engines(settings.index.foreign, incarnation=1)
    ]
    return Composition(children, gateway, model, index, router, keys, foreign)


def first_key(settings: Settings) -> str:
    """An API key that the gateway accepts; empty if it asks for none, or only their digests are known."""
    return next(iter(settings.gateway.api_keys), "")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing uses at this moment, of neither family, all different."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            own = stack.enter_context(socket.socket())
            own.bind(("127.0.0.1", 0))
            port = own.getsockname()[1]
            try:
                stack.enter_context(socket.socket(socket.AF_INET6)).bind(("::1", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
            ports.append(port)
        return ports


def _with_port(address: str, ports: Iterable[int]) -> str:
    if address.startswith("tcp://") and address.endswith(":0"):
        return f"{address.removesuffix(':0')}:{next(iter(ports))}"
    return address


# --- ports that must be free ---------------------------------------------------------------------------


class PortTaken(Exception):
    """The text names the setting, the address, and what to do."""


def check_ports(settings: Settings) -> None:
    """Raises :class:`PortTaken`. Addresses that are no TCP, and ports that are 0, are free; what else may be
    wrong with an address is said by the service that has it."""
    for field, host, port, other in _wanted(settings):
        try:
            family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, number) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"{field}: {host}:{port} is in use, perhaps by another mesh; {other} takes a free port"
                ) from None
            if error.errno == errno.EACCES:
                raise PortTaken(
                    f"{field}: {host}:{port}: {error.strerror} (ports below 1024 are for root)"
                ) from None


def _wanted(settings: Settings) -> Iterator[tuple[str, str, int, str]]:
    """Setting, host, port, and the flag that would take another one."""
    gateway = settings.gateway
    if gateway.port:
        yield "gateway.port", gateway.host, gateway.port, "--port 0"
    for field, address in (
        ("index.address", settings.index.address),
        ("router.address", settings.router.address),
    ):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if address.startswith("tcp://") and port != "0":
            host = "0.0.0.0" if host == "*" else host.strip("[]")
            yield field, host, int(port), f"--set {field}=tcp://127.0.0.1:0"
