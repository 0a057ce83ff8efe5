"""Composition of a mesh: who is started with which settings, and in which order they stop."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.local.composition import PortTaken, check_ports, compose, free_ports
from microserve.services.local.supervisor import Child


def child_settings(child: Child) -> Settings:
    """What the child itself would read from its command line."""
    overrides = [after for word, after in zip(child.argv, child.argv[1:], strict=False) if word == "--set"]
    return load_settings(overrides=overrides)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "Tiny").mkdir()
    (tmp_path / "Tiny" / "config.json").write_text("{}")
    return str(tmp_path / "Tiny")


def test_the_control_log_outlives_the_mesh_unless_another_one_is_named(model: str, tmp_path: Path) -> None:
    def index_flags(*overrides: str) -> Sequence[str]:
        settings = load_settings(overrides=[f"model.path={model}", *overrides])
        composition = compose(settings, [], tmp_path, tmp_path / "control.db")
        return next(child.argv for child in composition.children if child.name == "index")

    assert f'index.control_path="{tmp_path / "control.db"}"' in index_flags()
    assert not any("control_path" in flag for flag in index_flags("index.control_path=other.db"))


def test_engines_of_a_world_get_their_ranks(model: str, tmp_path: Path) -> None:
    world = [
        *(f"model.path={model}", "mesh.engines=2", "engine.device=cuda:0", "kvcache.heap=nvshmem"),
        *("bus.curve_dir=keys", "nvshmem.world=w", "nvshmem.memory_mb=1", "nvshmem.rank=1"),
    ]

    def ranks(*overrides: str) -> list[int]:
        overrides = (*world, *overrides)
        flags = [word for override in overrides for word in ("--set", override)]
        composition = compose(load_settings(overrides=overrides), flags, tmp_path, tmp_path / "control.db")
        engines = [child for child in composition.children if child.name.startswith("engine")]
        return [child_settings(child).nvshmem.rank for child in engines]

    assert ranks("nvshmem.num_ranks=3") == [1, 2], "another machine has the first"
    with pytest.raises(ConfigError) as caught:
        ranks("nvshmem.num_ranks=2")
    assert caught.value.field == "nvshmem.num_ranks"


def test_a_gateway_of_several_workers_is_a_child_for_each_on_one_port(model: str, tmp_path: Path) -> None:
    overrides = [f"model.path={model}", "gateway.port=0", "gateway.workers=2"]
    flags = [word for override in overrides for word in ("--set", override)]
    composition = compose(load_settings(overrides=overrides), flags, tmp_path, tmp_path / "control.db")
    gateways = [child for child in composition.children if child.name.startswith("gateway")]
    assert [(child.name, child.argv[-2:]) for child in gateways] == [
        ("gateway-0", ["--worker", "0"]),
        ("gateway-1", ["--worker", "1"]),
    ]
    assert {child_settings(child).gateway.port for child in gateways} == {composition.gateway.port}
    assert [child_settings(child).log.file for child in gateways] == ["gateway-0.jsonl", "gateway-1.jsonl"]


def test_children_agree_on_addresses_and_each_engine_has_an_id(model: str, tmp_path: Path) -> None:
    flags = ["--set", "index.address=tcp://127.0.0.1:0", "--set", "mesh.engines=3"]
    settings = load_settings(
        overrides=[*flags[1::2], "router.address=tcp://127.0.0.1:0", "gateway.port=0", f"model.path={model}"]
    )
    composition = compose(settings, flags, tmp_path, tmp_path / "control.db")
    assert [child.name for child in composition.children] == [
        "index",
        "router",
        "engine-e0",
        "engine-e1",
        "engine-e2",
        "gateway",
    ]
    read = [child_settings(child) for child in composition.children]
    assert len({each.index.address for each in read}) == 1
    assert not read[0].index.address.endswith(":0")
    assert len({each.router.address for each in read}) == 1
    assert {each.gateway.port for each in read} == {composition.gateway.port} != {0}
    assert {each.model.path for each in read} == {model}
    assert [str(Path(each.log.dir) / each.log.file) for each in read] == [
        str(child.log) for child in composition.children
    ]
    assert [each.engine.id for each in read[2:5]] == ["e0", "e1", "e2"]
    assert composition.model == "Tiny"


def test_callers_stop_before_those_they_call(model: str, tmp_path: Path) -> None:
    composition = compose(
        load_settings(overrides=[f"model.path={model}"]), [], tmp_path, tmp_path / "control.db"
    )
    in_order = sorted(composition.children, key=lambda child: child.stop_order)
    assert [child.name for child in in_order] == ["gateway", "router", "engine-e0", "engine-e1", "index"]
    assert all(child.stop_timeout_s > Settings().engine.drain_s for child in in_order[2:4])


def test_configured_addresses_stay(model: str, tmp_path: Path) -> None:
    overrides = ["gateway.host=0.0.0.0", "gateway.port=81", f"model.path={model}"]
    composition = compose(load_settings(overrides=overrides), [], tmp_path, tmp_path / "control.db")
    assert child_settings(composition.children[0]).index.address == Settings().index.address
    assert composition.gateway.url == "http://127.0.0.1:81"


def test_engines_cannot_share_a_port(model: str, tmp_path: Path) -> None:
    overrides = ["engine.address=tcp://127.0.0.1:7200", f"model.path={model}"]
    settings = load_settings(overrides=overrides)
    with pytest.raises(ConfigError, match="cannot serve 2 engines") as caught:
        compose(settings, [], tmp_path, tmp_path / "control.db")
    assert caught.value.field == "engine.address"


def test_each_engine_publishes_at_a_port_of_its_own(model: str, tmp_path: Path) -> None:
    overrides = [
        "engine.events_address=tcp://127.0.0.1:7200",
        "engine.replay_address=tcp://[::1]:7300",
        f"model.path={model}",
    ]
    composition = compose(load_settings(overrides=overrides), [], tmp_path, tmp_path / "control.db")
    engines = [child_settings(child).engine for child in composition.children if "engine-" in child.name]
    assert [engine.events_address for engine in engines] == [
        "tcp://127.0.0.1:7200",
        "tcp://127.0.0.1:7201",
    ]
    assert [engine.replay_address for engine in engines] == ["tcp://[::1]:7300", "tcp://[::1]:7301"]


@pytest.mark.parametrize(
    ("events", "replay", "problem", "field"),
    [
        ("tcp://127.0.0.1:65535", "tcp://127.0.0.1:0", "leaves no ports for 2", "engine.events_address"),
        ("tcp://127.0.0.1:7200", "tcp://127.0.0.1:7201", "has 7201", "engine.replay_address"),
    ],
)
def test_ports_of_events_that_would_meet_are_refused(
    model: str, tmp_path: Path, events: str, replay: str, problem: str, field: str
) -> None:
    overrides = [f"engine.events_address={events}", f"engine.replay_address={replay}", f"model.path={model}"]
    with pytest.raises(ConfigError, match=problem) as caught:
        compose(load_settings(overrides=overrides), [], tmp_path, tmp_path / "control.db")
    assert caught.value.field == field


def test_a_model_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        compose(load_settings(overrides=[f"model.path={tmp_path}"]), [], tmp_path, tmp_path / "control.db")


def test_free_ports_differ() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port > 0 for port in ports)


@pytest.mark.parametrize(
    ("override", "field", "way_out"),
    [
        ("gateway.port={port}", "gateway.port", "--port 0"),
        ("index.address=tcp://127.0.0.1:{port}", "index.address", "--set index.address=tcp://127.0.0.1:0"),
        ("router.address=tcp://localhost:{port}", "router.address", "--set router.address=tcp://127.0.0.1:0"),
        ("router.address=tcp://*:{port}", "router.address", "--set router.address=tcp://127.0.0.1:0"),
    ],
)
def test_a_port_in_use_is_said_with_the_way_out(override: str, field: str, way_out: str) -> None:
    index, router, gateway = free_ports(3)
    free = [f"index.address=tcp://127.0.0.1:{index}", f"router.address=tcp://127.0.0.1:{router}"]
    free.append(f"gateway.port={gateway}")
    check_ports(load_settings(overrides=free))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"^{field}: .*:{port} is in use") as caught:
            check_ports(load_settings(overrides=[*free, override.format(port=port)]))
    assert way_out in str(caught.value)


def test_any_free_port_and_no_port_are_never_taken() -> None:
    check_ports(
        load_settings(
            overrides=["gateway.port=0", "index.address=ipc:///tmp/index", "router.address=tcp://127.0.0.1:0"]
        )
    )


def test_a_mesh_keeps_what_keys_have_used_in_its_directory(model: str, tmp_path: Path) -> None:
    settings = load_settings(overrides=[f"model.path={model}"])
    gateway = compose(settings, [], tmp_path, tmp_path / "control.db").children[-1]
    assert child_settings(gateway).gateway.usage_path == str(tmp_path / "usage.db")
    assert child_settings(gateway).gateway.responses_path == str(tmp_path / "responses.db")
    flags = ["--set", "gateway.usage_path=/elsewhere/used.db"]
    settings = load_settings(overrides=[f"model.path={model}", flags[1]])
    gateway = compose(settings, flags, tmp_path, tmp_path / "control.db").children[-1]
    assert child_settings(gateway).gateway.usage_path == "/elsewhere/used.db"


def test_a_mesh_with_a_certificate_is_asked_by_https(model: str, tmp_path: Path) -> None:
    overrides = [
        "gateway.tls_cert=/c.pem",
        "gateway.tls_key=/k.pem",
        "gateway.port=81",
        f"model.path={model}",
    ]
    composition = compose(load_settings(overrides=overrides), [], tmp_path, tmp_path / "control.db")
    assert composition.gateway.url == "https://127.0.0.1:81"
    assert composition.gateway.tls_cert == "/c.pem"
