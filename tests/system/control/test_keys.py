"""Two keys at a real mesh: what one has asked the other cannot tell, unless the operator shares the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NUM_PROMPTS = 25
NUM_TOKENS = 100
STRATEGIES = ("data_parallel", "disaggregated", "cache_aware", "balanced", "auto")
SEPARATE, SHARED = "gateway", "gateway-1"


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcesses]:
    directory = tmp_path_factory.mktemp("keys")
    keys = directory / "keys.toml"
    keys.write_text("".join(entry_of(ApiKey(name=name, sha256=(digest_of(name),))) for name in "ab"))
    settings = ["model.name=tiny", "kvcache.num_blocks=1024", f"gateway.api_keys_file={keys}"]
    own = {SHARED: ["gateway.shared_prefix_cache=true"]}
    with MeshProcesses(tiny_model, directory, gateway=True, settings=settings, own_settings=own) as mesh:
        mesh.start(SHARED)
        yield mesh


def cached_tokens(mesh: MeshProcesses, gateway: str, key: str, prompt: list[int], strategy: str) -> int:
    """What an answer tells of the cache."""
    reply = httpx.post(
        f"http://127.0.0.1:{mesh.gateway_ports[gateway]}/v1/completions",
        json={"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0},
        headers={"authorization": f"Bearer {key}", "x-microserve-strategy": strategy},
        timeout=60.0,
    )
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def prompts(first: int) -> list[tuple[list[int], str]]:
    """Prompts that have no prefix in common, and strategies."""
    return [
        ([(first + number + position) % 200 + 10 for position in range(NUM_TOKENS)], STRATEGIES[number % 5])
        for number in range(NUM_PROMPTS)
    ]


def test_a_key_sees_its_own_prompts_and_nobody_elses(mesh: MeshProcesses) -> None:
    for prompt, strategy in prompts(0):
        cached_tokens(mesh, SEPARATE, "a", prompt, strategy)
    seen = [cached_tokens(mesh, SEPARATE, "b", prompt, strategy) for prompt, strategy in prompts(0)]
    assert seen == [0] * NUM_PROMPTS
    own = [cached_tokens(mesh, SEPARATE, "a", prompt, "cache_aware") for prompt, _ in prompts(0)]
    assert min(own) > 0, "the cache does work"


def test_a_shared_cache_is_shared(mesh: MeshProcesses) -> None:
    for prompt, _ in prompts(60):
        cached_tokens(mesh, SHARED, "a", prompt, "cache_aware")
    seen = [cached_tokens(mesh, SHARED, "b", prompt, "cache_aware") for prompt, _ in prompts(60)]
    assert min(seen) > 0
    apart = [cached_tokens(mesh, SEPARATE, "b", prompt, "cache_aware") for prompt, _ in prompts(60)]
    assert apart == [0] * NUM_PROMPTS
