"""Where the metrics of each service of a mesh are read, and the list of them for Prometheus.

The port of a setting is the first engine's, and each further engine's is one higher; where none is set, it is
a free one, unless ``mesh.metrics`` is off. The gateway has its own at its own port.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.local.supervisor import Child

TARGETS = "targets.json"
"""In the directory of a mesh; Prometheus reads it by ``file_sd_configs``."""


def check_metric_ports(settings: Settings) -> None:
    """That there is a port for every service. Raises :class:`ConfigError` naming the setting."""
    taken: dict[int, str] = {}
    for name, first, count in (
        ("index", settings.index.metrics_port, 1),
        ("router", settings.router.metrics_port, 1),
        ("engine", settings.engine.metrics_port, settings.mesh.engines),
    ):
        field = f"{name}.metrics_port"
        for port in range(first, first + count) if first else ():
            if port > 65535:
                raise ConfigError(f"{field} {first} leaves no ports for {count} engines", field=field)
            if port in taken:
                raise ConfigError(f"{field}: {port} is {taken[port]}'s already", field=field)
            taken[port] = field


def metric_ports(settings: Settings, free: Iterator[int]) -> dict[str, int]:
    """By the name of the child that has it; ``free``: ports for those that have none set."""
    set_ports = {"index": settings.index.metrics_port, "router": settings.router.metrics_port}
    first = settings.engine.metrics_port
    for number in range(settings.mesh.engines):
        set_ports[f"engine-e{number}"] = first + number if first else 0
    if not settings.mesh.metrics:
        return {name: port for name, port in set_ports.items() if port}
    return {name: port or next(free) for name, port in set_ports.items()}


def reached_at(host: str, port: int) -> str:
    """``HOST:PORT``, as somebody on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def targets(children: Iterable[Child], gateway: str) -> list[dict[str, Any]]:
    """Groups of targets with labels, as Prometheus' ``file_sd`` has them: of those that have a port for
    metrics, and of the gateway at that URL."""
    groups = []
    for child in children:
        service, _, number = child.name.partition("-")
        if child.metrics:
            labels = {"service": service, "id": number or service}
            groups.append({"targets": [child.metrics], "labels": labels})
    scheme, _, address = gateway.partition("://")
    labels = {"service": "gateway", "id": "gateway"} | ({} if scheme == "http" else {"__scheme__": scheme})
    return [*groups, {"targets": [address], "labels": labels}]


def write_targets(directory: Path, children: Iterable[Child], gateway: str) -> None:
    """Replaced whole: somebody may read it at any moment. Raises ``OSError``."""
    scratch = directory / f"{TARGETS}.new"
    scratch.write_text(json.dumps(targets(children, gateway), indent=2) + "\n")
    scratch.replace(directory / TARGETS)
