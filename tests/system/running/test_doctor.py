"""``microserve doctor`` on real processes: a mesh in which all is well, then faults planted in it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.heavy, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-m", "microserve.services.command.main", "doctor", "--json"]


def doctor(mesh: MeshProcesses, keys: Path, *more: str, before: tuple[str, ...] = ()) -> tuple[int, Any]:
    """Exit code, and what it prints."""
    told = ["--set", f"index.address={mesh.index_address}", "--set", f"bus.curve_dir={keys}", *more]
    done = subprocess.run(
        [*before, *COMMAND, *told],
        cwd=mesh.directory,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def found(report: Any) -> dict[str, str]:
    """Where each finding is, by name."""
    return {finding["name"]: finding["where"] for finding in report["findings"]}


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    gives_up_at = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < gives_up_at, what()
        time.sleep(0.2)


def test_planted_faults_are_found_by_name(tiny_model: Path, tmp_path: Path) -> None:
    keys, strange = create_mesh_keys(tmp_path / "keys"), create_mesh_keys(tmp_path / "strange")
    settings = [f"bus.curve_dir={keys}", "kvcache.num_blocks=256"]
    with MeshProcesses(tiny_model, tmp_path, settings=settings) as mesh:
        code, report = doctor(mesh, keys)
        assert [finding for finding in report["findings"] if finding["severity"] == "error"] == []
        assert code == bool(report["findings"])
        assert [(link["heap"], link["error"]) for link in report["links"]] == [("shm", "")] * 2
        assert all(link["bytes_per_s"] > 0 for link in report["links"])
        assert {engine["backend"] for engine in report["engines"]} == {"native"}

        assert found(doctor(mesh, strange)[1]).keys() == {"wrong_key"}
        tight = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")
        assert found(doctor(mesh, keys, "--quick", before=tight)[1])["shm_full"] == "this host, doctor"

        # An engine that knows the index, and whom the index does not know.
        shutil.copy(keys / "engine" / "index.key", strange / "engine" / "index.key")
        other = make_tiny_model(tmp_path / "another", seed=1)
        for name, wrong in {
            "engine-2": ["engine.id=engine-0"],
            "engine-3": ["kvcache.block_size=32"],
            "engine-4": [f"model.path={other}"],
            "engine-5": ["engine.advertise=127.0.0.3"],
            "engine-6": [f"bus.curve_dir={strange}"],
        }.items():
            mesh.own_settings[name] = wrong
            mesh.start(name)
        resource.prlimit(mesh.services["engine-5"].process.pid, resource.RLIMIT_NOFILE, (300, 300))
        resource.prlimit(mesh.services["engine-1"].process.pid, resource.RLIMIT_NOFILE, (300, 300))

        wanted = {
            *("two_engines_of_one_id", "other_block_size", "wrong_model", "port_closed", "wrong_key"),
            "few_descriptors",
        }
        told: dict[str, str] = {}

        def all_are_found() -> bool:
            told.update(found(doctor(mesh, keys, "--quick")[1]))
            return wanted <= told.keys()

        until(all_are_found, lambda: f"not found: {wanted - told.keys()}; found: {told}")
        assert told["two_engines_of_one_id"].startswith("engine engine-0")
        assert told["other_block_size"].startswith("engine engine-3")
        assert told["wrong_model"].startswith("engine engine-4")
        assert told["port_closed"].startswith("engine engine-5")
        assert told["few_descriptors"] == "engine engine-1"

        mesh.services["engine-1"].kill()
        until(
            lambda: found(doctor(mesh, keys, "--quick")[1]).get("dead_engine", "") != "",
            lambda: "a dead engine",
        )
