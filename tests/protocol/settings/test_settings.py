"""Where settings come from, in what order, and how a wrong one is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings


def refused(**sources: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load_settings(**sources)
    return error.value


def test_defaults_are_valid() -> None:
    assert load_settings() == Settings() == Settings().check()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[bus]\ncredit = 1\nliveness = 2\nlinger_s = 3\n[engine]\nlabels = ['prefill']\n")
    environment = {
        "MICROSERVE_BUS__LIVENESS": "20",
        "MICROSERVE_BUS__LINGER_S": "30",
        "OTHER_BUS__CREDIT": "99",
        "MICROSERVE_CONFIG": "not a setting",
    }

    settings = load_settings(file, environment=environment, overrides=["bus.linger_s=300"])

    assert settings.bus.credit == 1
    assert settings.bus.liveness == 20
    assert settings.bus.linger_s == 300.0
    assert settings.engine.labels == ["prefill"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.labels=['a', 'b']", ["a", "b"]),
        ("engine.address=tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
        ("engine.id = 'quoted' ", "quoted"),
        ("kvcache.checksums=true", True),
        ("bus.linger_s=2", 2.0),
        ("router.strategies.balanced.ratio=0.2", {"balanced": {"ratio": 0.2}}),
        ("model.name=", ""),
        ("engine.id=7", "7"),
        ("engine.id=true", "true"),
        ("engine.id=2026-01-02", "2026-01-02"),
    ],
)
def test_values_read_as_toml_or_as_text(override: str, expected: object) -> None:
    section, name = override.partition("=")[0].strip().split(".")[:2]

    assert getattr(getattr(load_settings(overrides=[override]), section), name) == expected


@pytest.mark.parametrize(
    ("override", "field", "reason"),
    [
        ("bus.crdit=3", "bus.crdit", "unknown field"),
        ("buss.credit=3", "buss", "unknown field"),
        ("bus.credit=many", "bus.credit", "must be a whole number above 0, is 'many'"),
        ("bus=3", "bus", "must be a section ([bus] with fields), is 3"),
        ("bus.credit=0", "bus.credit", "bus.credit must be above 0, is 0"),
        ("bus.heartbeat_interval_s=-1", "bus.heartbeat_interval_s", "above 0, is -1"),
        ("bus.credit=2501", "bus.credit", "at most a quarter of bus.high_water_mark"),
        ("engine.labels=prefill", "engine.labels", "must be a list [\"...\", ...] of texts, is 'prefill'"),
        ("kvcache.checksums=2", "kvcache.checksums", "must be true or false, is 2"),
        ("nonsense", "nonsense", "is not section.field=value"),
        ("bus.heartbeat_interval_s=nan", "bus.heartbeat_interval_s", "must be a finite number"),
        ("bus.stuck_s=inf", "bus.stuck_s", "must be a finite number"),
        ("bus.linger_s=-1", "bus.linger_s", "must be 0 or more, is -1"),
        ("mesh.max_restarts=-1", "mesh.max_restarts", "must be 0 or more, is -1"),
        ("gateway.port=65536", "gateway.port", "0 to 65535, is 65536"),
        ("log.level=loud", "log.level", "'loud'"),
        ("kvcache.heap=floppy", "kvcache.heap", "'auto', 'shm', 'cuda_ipc' or 'nvshmem', is 'floppy'"),
        ("engine.device=abacus", "engine.device", "'cpu' or 'cuda:N', is 'abacus'"),
        ("engine.device=cuda:", "engine.device", "'cpu' or 'cuda:N', is 'cuda:'"),
        ("kvcache.heap=cuda_ipc", "engine.device", "must be 'cuda:N' for kvcache.heap 'cuda_ipc'"),
        ("engine.attention=flash", "engine.attention", "'triton' or 'flashinfer', is 'flash'"),
        ("engine.attention=flashinfer", "engine.attention", "on engine.device 'cpu', is 'flashinfer'"),
        ("engine.attention=triton", "engine.attention", "on engine.device 'cpu', is 'triton'"),
        ("engine.cluster=two words", "engine.cluster", "without spaces, is 'two words'"),
        ("engine.advertise=tcp://10.0.0.1:7200", "engine.advertise", "without a port"),
        ("engine.advertise=10.0.0.1:7200", "engine.advertise", "is '10.0.0.1:7200'"),
        ("engine.advertise=0.0.0.0", "engine.advertise", "that others can connect to, is '0.0.0.0'"),
        ("engine.advertise=[::]", "engine.advertise", "must be a host"),
        ("engine.backend=llama", "engine.backend", "'native', 'vllm' or 'vllm-serve', is 'llama'"),
        ("engine.backend=vllm-serve", "vllm.url", "must be set for engine.backend 'vllm-serve'"),
        ("vllm.url=127.0.0.1:80", "vllm.url", "must be http://HOST:PORT, is '127.0.0.1:80'"),
        ("vllm.url=http://u:p@host/?q", "vllm.url", "must be http://HOST:PORT"),
        ("vllm.arguments.block_size=32", "vllm.arguments.block_size", "is set by kvcache.block_size"),
        ("vllm.arguments.kv_transfer_config={}", "vllm.arguments.kv_transfer_config", "MicroServe's own"),
    ],
)
def test_wrong_setting_is_named_by_its_path(override: str, field: str, reason: str) -> None:
    error = refused(overrides=[override])

    assert error.field == field
    assert reason in error.detail


@pytest.mark.parametrize(
    ("overrides", "field", "reason"),
    [
        (["kvcache.doors=['window']"], "kvcache.doors", "must be of 'tcp', 'nixl', has 'window'"),
        (["kvcache.doors=['tcp','tcp']"], "kvcache.doors", "must name each kind once"),
        (["kvcache.share_memory=false"], "kvcache.doors", "must name a door where kvcache.share_memory"),
        (["kvcache.door_address=tcp://host"], "kvcache.door_address", "must be tcp://HOST:PORT"),
        (["kvcache.door_address=tcp://0.0.0.0:0"], "kvcache.door_address", "by which other hosts reach"),
        (["kvcache.door_address=tcp://[::]:0"], "kvcache.door_address", "reach this one, is 'tcp://[::]:0'"),
        (["kvcache.door_address=ipc:///tmp/d"], "kvcache.door_address", "must be tcp://HOST:PORT, is 'ipc"),
        (
            ["kvcache.doors=['tcp']", "kvcache.door_address=tcp://10.0.0.2:0"],
            "kvcache.door_address",
            "reachable from other machines",
        ),
        (
            ["kvcache.doors=['tcp']", "engine.device=cuda:0", "kvcache.heap=cuda_ipc"],
            "kvcache.doors",
            "must be empty for kvcache.heap 'cuda_ipc'",
        ),
    ],
)
def test_a_door_that_leads_nowhere_or_to_everybody_is_refused(
    overrides: list[str], field: str, reason: str
) -> None:
    error = refused(overrides=overrides)

    assert error.field == field
    assert reason in error.detail


def test_ways_into_an_engine_are_named_best_first() -> None:
    doors = ["kvcache.doors=['tcp']"]
    assert load_settings(overrides=[]).heaps == ["shm"]
    assert load_settings(overrides=doors).heaps == ["shm", "tcp"]
    assert load_settings(overrides=[*doors, "kvcache.share_memory=false"]).heaps == ["tcp"]
    far = [*doors, "kvcache.door_address=tcp://10.0.0.2:0"]
    assert load_settings(overrides=[*far, "bus.curve_dir=/keys"]).heaps == ["shm", "tcp"]
    assert load_settings(overrides=[*far, "bus.insecure=true"]).heaps == ["shm", "tcp"]


def test_an_engine_on_a_gpu_keeps_its_kv_there() -> None:
    assert load_settings(overrides=[]).heap == "shm"
    for more in ([], ["kvcache.heap=cuda_ipc"]):
        assert load_settings(overrides=["engine.device=cuda:1", *more]).heap == "cuda_ipc"
    error = refused(overrides=["engine.device=cuda:1", "kvcache.heap=shm"])
    assert error.field == "kvcache.heap"
    assert "'cuda_ipc' or 'nvshmem' on engine.device 'cuda:1'" in error.detail


def test_an_engine_of_vllms_takes_what_vllm_takes() -> None:
    overrides = [
        "engine.backend=vllm",
        "vllm.arguments={tensor_parallel_size = 2}",
        "vllm.python=/opt/v/bin/python",
    ]
    settings = load_settings(overrides=overrides)
    assert settings.vllm.arguments == {"tensor_parallel_size": 2}
    error = refused(overrides=[*overrides, "model.weights=int8"])
    assert error.field == "model.weights"
    assert "for engine.backend 'vllm', is 'int8'" in error.detail
    serve = load_settings(overrides=["engine.backend=vllm-serve", "vllm.url=https://[::1]:8001/v"])
    assert serve.vllm.url == "https://[::1]:8001/v"


def test_flashinfer_is_refused_for_the_dtype_that_it_does_not_do() -> None:
    overrides = ["engine.device=cuda:0", "kvcache.heap=cuda_ipc", "engine.attention=flashinfer"]
    error = refused(overrides=[*overrides, "model.dtype=float32"])

    assert error.field == "engine.attention"
    assert "model.dtype is 'float32'" in error.detail
    settings = load_settings(overrides=overrides)
    assert settings.engine.attention == "flashinfer"


WORLD = [
    "engine.device=cuda:1",
    "kvcache.heap=nvshmem",
    "nvshmem.world=w",
    "nvshmem.rank=1",
    "nvshmem.num_ranks=2",
    "nvshmem.memory_mb=64",
    "bus.curve_dir=keys",
]


def test_an_engine_of_a_world_says_which_and_as_what() -> None:
    settings = load_settings(overrides=WORLD)

    assert (settings.nvshmem.world, settings.nvshmem.rank, settings.nvshmem.num_ranks) == ("w", 1, 2)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine.device=cpu", "must be 'cuda:N' for kvcache.heap 'nvshmem'"),
        ("nvshmem.world=", "1 to 64 printable characters"),
        ("nvshmem.world='a b'", "without spaces, not 'a b'"),
        (f"nvshmem.world={'w' * 65}", "1 to 64"),
        ("nvshmem.rank=2", "must be 0 to 1, is 2"),
        ("nvshmem.rank=-1", "must be 0 or more, is -1"),
        ("nvshmem.num_ranks=0", "must be 1 to 512, is 0"),
        ("nvshmem.num_ranks=513", "must be 1 to 512, is 513"),
        ("nvshmem.memory_mb=0", "must be above 0"),
        ("nvshmem.memory_mb=16777217", "must be 0 to 16777216, is 16777217"),
        ("nvshmem.join_timeout_s=0", "must be above 0"),
        ("nvshmem.join_timeout_s=1e7", "at most 1000000"),
        ("bus.curve_dir=", "authenticated sockets only"),
        ("nvshmem.ranks=2", "unknown field"),
    ],
)
def test_a_world_that_cannot_be_is_refused(override: str, reason: str) -> None:
    error = refused(overrides=[*WORLD, override])

    assert error.field == override.partition("=")[0]
    assert reason in error.detail


def test_who_has_another_heap_needs_no_world() -> None:
    assert load_settings(overrides=["nvshmem.rank=7"]).nvshmem.rank == 7


def test_override_below_a_value_is_refused() -> None:
    error = refused(overrides=["bus.credit=3", "bus.credit.more=4"])

    assert error.field == "bus.credit.more"
    assert "credit is not a section" in error.detail


def test_typo_in_the_environment_is_refused() -> None:
    assert refused(environment={"MICROSERVE_BUS__CRDIT": "3"}).field == "bus.crdit"


@pytest.mark.parametrize("content", [b"[bus", b"bus = {", b"\xff\xfe"])
def test_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mesh.toml"
    file.write_bytes(content)

    assert str(file) in refused(file=file).detail


def test_missing_file_is_named(tmp_path: Path) -> None:
    error = refused(file=tmp_path / "absent.toml")

    assert error.field == str(tmp_path / "absent.toml")
    assert "cannot read" in error.detail


MAY_BE_ZERO = {
    "bus.linger_s": "drop at once",
    "engine.max_model_len": "the model's own",
    "kvcache.num_blocks": "by the memory that is left",
    "engine.drain_s": "stop at once",
    "engine.codec_threads": "KV goes as it is",
    "engine.codec_min_quality": "any will do",
    "gateway.drain_s": "stop at once",
    "gateway.port": "any free port",
    "engine.metrics_port": "none",
    "router.metrics_port": "none",
    "index.metrics_port": "none",
    "router.check_interval_s": "none is made here",
    "router.max_ttft_s": "no bound",
    "router.headroom": "nothing stays idle",
    "router.record_requests": "off",
    "gateway.max_connections": "as descriptors allow",
    "gateway.view_requests": "no view",
    "log.max_mb": "it grows",
    "log.keep": "it begins anew",
    "nvshmem.rank": "the first",
    "nvshmem.num_ranks": "no world; refused where there is to be one",
    "nvshmem.memory_mb": "the same",
    "vllm.kv_cache_mb": "a part of the machine's memory",
    "model.packed_cache_mb": "each engine packs its own",
    "mesh.max_restarts": "never restart",
    "mesh.watchdog_s": "nobody is killed",
}
"""Numbers that may be 0, and what it means; any other must be above 0."""


def numbers() -> dict[str, Any]:
    """Type of every setting that is a number, by path."""
    found = {}
    for section in msgspec.structs.fields(Settings):
        for field in msgspec.structs.fields(section.type):
            base = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
            if base in (int, float):
                found[f"{section.name}.{field.name}"] = field.type
    return found


def test_every_number_has_a_lower_bound_at_its_field() -> None:
    assert numbers().keys() >= MAY_BE_ZERO.keys() and len(numbers()) > 30
    for path, kind in numbers().items():
        bounds = [each for each in get_args(kind) if isinstance(each, msgspec.Meta)]
        assert len(bounds) == 1, f"{path}: no bound"
        assert (bounds[0].ge, bounds[0].gt) == ((0, None) if path in MAY_BE_ZERO else (None, 0)), path


@settings(deadline=None)
@given(st.sampled_from(sorted(numbers())), st.integers(1, 1 << 40))
def test_a_number_out_of_its_bound_is_refused_by_name(path: str, amount: int) -> None:
    kind = numbers()[path]
    section, name = path.split(".")
    low = [-amount] if path in MAY_BE_ZERO else [0, -amount]
    [bound] = [each for each in get_args(kind) if isinstance(each, msgspec.Meta)]
    high = [] if bound.le is None else [int(bound.le) + amount]
    infinite = [math.inf, -math.inf, math.nan] if get_args(kind)[0] is float else []
    for value in [*low, *high, *infinite]:
        error = refused(overrides=[f"{path}={value}"])
        assert error.field == path
        assert error.detail.startswith(f"{path} must be ") and f", is {value}" in error.detail
        own = msgspec.structs.replace(getattr(Settings(), section), **{name: value})
        with pytest.raises(ConfigError, match=path):  # made in Python, not read
            msgspec.structs.replace(Settings(), **{section: own}).check()


def test_settings_do_not_change() -> None:
    settings = load_settings()
    with pytest.raises(AttributeError):
        settings.bus.credit = 3  # type: ignore[misc]


@pytest.mark.parametrize("num_digits", [20, 400, 5_000])
@pytest.mark.parametrize("path", ["bus.credit", "gateway.max_n"])
def test_a_number_that_no_message_holds_is_refused_by_path(path: str, num_digits: int) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(overrides=[f"{path}={'9' * num_digits}"])
    assert raised.value.field == path
    assert len(str(raised.value)) < 200
