"""Real service processes for system tests: started, watched for readiness, ended, shown to leave nothing."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from microserve.services.local import leash
from tests.support.process.nursery import Process, nursery

LEASH = Path(leash.__file__)


def start_process(kind: str, arguments: list[str], log: Path) -> Process:
    """A service with all it writes in ``log``; it dies with whoever runs the tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "engine":
        log.touch()
        return nursery().fork(arguments, log, environment)
    module = "microserve.services.command.main"
    # The leash: a test run that is killed takes its services along.
    command = [sys.executable, "-S", "-E", str(LEASH), str(os.getpid()), sys.executable, "-m", module]
    with log.open("w") as sink:
        return subprocess.Popen([*command, *arguments], stdout=sink, stderr=sink, env=environment, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    name: str
    process: Process
    log: Path
    address: str = ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@dataclass
class MeshProcesses:
    """Index, routers, engines and (optionally) gateway, each a child process; a context manager.

    Names: ``index``, ``router`` (a second one is ``router-1``), ``engine-0`` ..., ``gateway``.
    """

    model: Path
    directory: Path
    num_engines: int = 2
    num_routers: int = 1
    gateway: bool = False
    settings: list[str] = field(default_factory=list)
    engine_settings: dict[int, list[str]] = field(default_factory=dict)
    own_settings: dict[str, list[str]] = field(default_factory=dict)
    """By name, beside those of all."""
    services: dict[str, Service] = field(default_factory=dict)
    history: list[Service] = field(default_factory=list)
    """Every life of every service, in the order of their starts."""
    make_port: Callable[[], int] = free_port
    gateway_ports: dict[str, int] = field(default_factory=dict)
    """By name; ``gateway`` and others that are started by hand (``gateway-1``)."""
    router_index: str = ""
    """Where routers find the index, if not where it is."""

    def __post_init__(self) -> None:
        self.index_address = f"tcp://{self.host_of('index')}:{self.make_port()}"
        names = ["router", *(f"router-{number}" for number in range(1, self.num_routers))]
        self.router_addresses = {name: f"tcp://{self.host_of(name)}:{self.make_port()}" for name in names}
        self.router_address = self.router_addresses["router"]
        self.gateway_port = self.gateway_ports["gateway"] = self.make_port()

    def __enter__(self) -> Self:
        try:
            self.start("index")
            for number in range(self.num_engines):
                self.start(f"engine-{number}", wait=False)
            for name in self.router_addresses:
                self.start(name)
            for number in range(self.num_engines):
                self.wait_ready(f"engine-{number}")
            if self.gateway:
                self.start("gateway")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        order: list[str] = [n for n in self.services if n.startswith("gateway")]
        order += [n for n in self.router_addresses if n in self.services]
        order += [n for n in self.services if n.startswith("engine")] + ["index"]
        for name in order:
            self.stop(name)

    def host_of(self, name: str) -> str:
        """Where a service is reached."""
        return "127.0.0.1"

    @property
    def gateway_url(self) -> str:
        return f"http://{self.host_of('gateway')}:{self.gateway_port}"

    def own_settings_of(self, name: str) -> list[str]:
        return self.own_settings.get(name, [])

    def spawn(self, name: str, arguments: list[str], log: Path) -> Process:
        return start_process(arguments[0], arguments, log)

    def start(self, name: str, *, wait: bool = True) -> Service:
        kind, _, number = name.partition("-")
        if kind == "gateway" and name not in self.gateway_ports:
            self.gateway_ports[name] = self.make_port()
        overrides = [
            f"model.path={self.model}",
            f"index.address={self.index_address}",
            f"router.address={self.router_addresses.get(name, self.router_address)}",
            f"gateway.routers={json.dumps(list(self.router_addresses.values()))}",
            f"gateway.port={self.gateway_ports.get(name, self.gateway_port)}",
            "kvcache.checksums=true",
            *self.settings,
        ]
        own = self.own_settings_of(name)
        if not any("bus.curve_dir=" in each for each in [*self.settings, *own]):
            overrides.append("bus.insecure=true")  # tests talk to the services themselves
        if kind == "engine":
            overrides += [f"engine.id={name}", *self.engine_settings.get(int(number), [])]
        if kind == "router":
            overrides += [f"router.id={name}", f"index.address={self.router_index or self.index_address}"]
        arguments = [kind]
        for override in overrides + own:
            arguments += ["--set", override]
        log = self.directory / f"{name}.{len(list(self.directory.glob(f'{name}.*')))}.log"
        process = self.spawn(name, arguments, log)
        service = self.services[name] = Service(name, process, log)
        self.history.append(service)
        if wait:
            self.wait_ready(name)
        return service

    def wait_ready(self, name: str, timeout_s: float = 120.0) -> None:
        service = self.services[name]
        deadline = time.monotonic() + timeout_s
        selector = selectors.DefaultSelector()
        try:
            while time.monotonic() < deadline:
                for line in service.log.read_text().splitlines():
                    if '"service.ready"' in line:
                        service.address = str(json.loads(line).get("address", ""))
                        return
                if service.process.poll() is not None:
                    raise RuntimeError(
                        f"{name} exited {service.process.returncode}:\n{service.log.read_text()}"
                    )
                selector.select(0.05)
        finally:
            selector.close()
        raise TimeoutError(f"{name} is not ready after {timeout_s} s:\n{service.log.read_text()}")

    def stop(self, name: str) -> None:
        service = self.services.pop(name, None)
        if service is None:
            return
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGCONT)
            service.process.terminate()
            try:
                service.process.wait(20)
            except subprocess.TimeoutExpired:
                service.kill()
                raise

    def events(self, name: str) -> list[dict[str, object]]:
        lines = self.services[name].log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
