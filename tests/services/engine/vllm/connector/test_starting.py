"""vLLM's own processes: what is refused at the start, and that all of them end with the front."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.connector.limits import PARALLEL, layout_of, require_supported
from microserve.services.engine.vllm.link_ends import LinkAddress
from tests.support.vllm.hosted import ROOT, Hosted, refusal_of


def vllms_config(**change: Any) -> tuple[Any, Any]:
    """As much of vLLM's settings as is looked at, as they are served; a name with dots is changed."""
    fields: dict[str, Any] = {
        **{f"parallel_config.{field}": 1 for field in PARALLEL},
        "device_config.device_type": "cpu",
        "cache_config.enable_prefix_caching": True,
        "kv_transfer_config.kv_role": "kv_both",
        "scheduler_config.async_scheduling": False,
        "speculative_config": None,
    } | change
    config = SimpleNamespace()
    for path, value in fields.items():
        *rooms, name = path.split(".")
        at = config
        for room in rooms:
            if not hasattr(at, room):
                setattr(at, room, SimpleNamespace())
            at = getattr(at, room)
        setattr(at, name, value)
    return config, kv_cache_config()


class FullAttentionSpec(SimpleNamespace):
    """Of vLLM's name, which is what is looked at."""


class SlidingWindowSpec(FullAttentionSpec):
    pass


def kv_cache_config(kinds: tuple[type[FullAttentionSpec], ...] = (FullAttentionSpec,), **change: Any) -> Any:
    spec = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": "torch.bfloat16"}
    block = 32 * 2 * 64 * 2 * 2
    tensor = {"layers": ["a", "b"], "size": 2 * 9 * block, "layer_stride": 9 * block, "block_stride": block}
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=kind(**spec)) for kind in kinds],
        kv_cache_tensors=[SimpleNamespace(**{**tensor, "offset": 0, **change})],
        kv_cache_layout="LBHNC",
        num_blocks=9,
    )


ADDRESS = LinkAddress(
    pid=1,
    page=3,
    pipes={},
    num_receives=4,
    incarnation=7,
    model="m",
    revision="r",
    grant_slots=4,
    checksums=True,
)


def test_what_is_served() -> None:
    require_supported(*vllms_config())
    layout = layout_of(kv_cache_config(), ADDRESS, "x")
    assert (layout.num_layers, layout.num_blocks, layout.dtype, layout.order) == (2, 9, "bfloat16", "x")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((f"parallel_config.{field}", 2) for field in PARALLEL),
        ("device_config.device_type", "cuda"),
        ("cache_config.enable_prefix_caching", False),
        ("kv_transfer_config.kv_role", "kv_producer"),
        ("scheduler_config.async_scheduling", True),
        ("speculative_config", object()),
    ],
)
def test_a_setting_that_we_cannot_serve_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        require_supported(*vllms_config(**{setting: value}))
    assert caught.value.field and caught.value.field.removesuffix("_type") in setting


@pytest.mark.parametrize(
    "kinds", [(SlidingWindowSpec,), (FullAttentionSpec, SlidingWindowSpec), (FullAttentionSpec,) * 2]
)
def test_a_model_of_other_kv_is_named(kinds: tuple[type[FullAttentionSpec], ...]) -> None:
    config, _ = vllms_config()
    with pytest.raises(ConfigError, match="groups") as caught:
        require_supported(config, kv_cache_config(kinds))
    assert caught.value.field == "model"


def test_blocks_that_are_not_runs_are_refused() -> None:
    config, kv = vllms_config()
    kv.kv_cache_layout = "BLHNC"
    with pytest.raises(ConfigError, match=r"BLHNC.*LBHNC"):
        require_supported(config, kv)


@pytest.mark.parametrize("field", ["size", "layer_stride", "block_stride", "offset"])
def test_a_cache_of_other_bytes_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        layout_of(kv_cache_config((FullAttentionSpec,), **{field: 64}), ADDRESS, "x")


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_refusal_reaches_the_front_before_vllm_fails(vllm_python: Path, model: Path) -> None:
    hosted = Hosted(vllm_python, model, enable_prefix_caching=False)
    try:
        with pytest.raises(RuntimeError, match="enable_prefix_caching"):
            hosted.start()
        assert refusal_of(hosted).field == "enable_prefix_caching"
    finally:
        hosted.close()


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllms_processes_end_with_a_front_that_is_killed(vllm_python: Path, model: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".src"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    front = subprocess.Popen(
        [vllm_python, "-P", str(ROOT / "tests/support/vllm/async_front.py"), str(model)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        assert front.stdout is not None
        line = next(line for line in front.stdout if line.startswith("["))
        worker, tokens, progress = json.loads(line)
        core = parent_of(worker)
        assert len({worker, core, front.pid}) == 3 and parent_of(core) == front.pid
        assert len(tokens) == 3
        assert progress[1] >= 3 * 3, "three layers in each of three steps"
        pidfds = [os.pidfd_open(pid) for pid in (core, worker)]
        front.kill()
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 60)[0], "a process outlives its front"
            os.close(pidfd)
    finally:
        front.kill()
        front.communicate()
        assert front.returncode == -signal.SIGKILL


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
