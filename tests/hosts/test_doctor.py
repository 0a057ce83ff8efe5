"""``microserve doctor`` between hosts: from the front, of engines that are elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.hosts.mesh import MICROSERVE, HostMesh
from tests.support.hosts.world import World

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 KiB of KV a token: 2 MiB take 1.6 s at 10 Mbit/s."""
    shape: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    path = tmp_path_factory.mktemp("wide") / "wide"
    return make_tiny_model(path, hidden_size=64, num_hidden_layers=4, **shape)


def doctor(mesh: HostMesh, *more: str) -> Any:
    told = ["--index", mesh.index_address, "--set", f"bus.curve_dir={mesh.keys}", *more]
    done = mesh.world.front.inside.run(*MICROSERVE, "doctor", "--json", *told, timeout_s=200.0)
    assert done.returncode in (0, 1), done.stdout
    return json.loads(done.stdout)


def test_a_link_of_10_mbit_s_and_a_host_that_is_gone_are_found(
    wide_model: Path, logs: Path, world: World
) -> None:
    with HostMesh(wide_model, logs, world=world, settings=["kvcache.num_blocks=600"]) as mesh:
        whole = doctor(mesh)
        assert [each for each in whole["findings"] if each["severity"] == "error"] == []
        assert {link["heap"] for link in whole["links"]} == {"tcp"}

        world.slow("e0", 10)
        slow = doctor(mesh)
        where = {each["where"] for each in slow["findings"] if each["name"] == "slow_link"}
        assert where == {"engine-0 -> engine-1", "engine-1 -> engine-0"}
        assert all(0 < link["bytes_per_s"] < 2e6 for link in slow["links"]), slow["links"]

        world.vanish("e1")
        names = {each["name"] for each in doctor(mesh, "--quick")["findings"]}
        assert names & {"dead_engine", "unreachable", "engine_silent"}
