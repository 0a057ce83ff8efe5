"""What clients write stays between them and their engines, and who they are with the operator: no word of a
prompt in any view, metric, trace or log line, and nothing of the view without an operator's key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from microserve.protocol.tracing.traceparent import make
from tests.support.process.otlp_collector import Collector
from tests.support.process.processes import MeshProcesses, free_port

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SECRET = "xylophagous"
"""In everything that a client may write."""
PRIVATE = "brontophobia"
"""In a field that the operator has said is private."""
OPERATOR, CLIENT = "operator-of-all", "client-zebra"
VIEW = [
    *("mesh", "requests", "requests?order=slowest", "requests/asked-0", "strategies", "keys", "health"),
    "feed",
]
MEASURED = ("index", "router", "engine-0", "engine-1")


@dataclass
class Watched:
    mesh: MeshProcesses
    metrics: dict[str, int]
    """Ports of what is measured."""
    collector: Collector

    def get(self, path: str, key: str = "") -> tuple[int, str]:
        """Status and text; of a stream the first event."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.stream("GET", f"{self.mesh.gateway_url}{path}", headers=headers, timeout=60) as answer:
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                return answer.status_code, answer.read().decode()
            lines: list[str] = []
            for line in answer.iter_lines():
                lines.append(line)
                if not line:
                    break
            return answer.status_code, "\n".join(lines)

    def post(self, path: str, body: dict[str, Any], name: str) -> int:
        headers = {
            "authorization": f"Bearer {CLIENT}",
            "x-request-id": name,
            "traceparent": make(is_sampled=True).text,
            "x-team": PRIVATE,
        }
        url = f"{self.mesh.gateway_url}{path}"
        return httpx.post(url, json=body, headers=headers, timeout=120).status_code


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("secrets")
    keys = [
        ApiKey(name=name, sha256=(digest_of(name),), operator=name == OPERATOR) for name in (OPERATOR, CLIENT)
    ]
    file = directory / "keys.toml"
    file.write_text("".join(map(entry_of, keys)))
    ports = {name: free_port() for name in MEASURED}
    own = {name: [f"{name.partition('-')[0]}.metrics_port={port}"] for name, port in ports.items()}
    settings = ["model.name=tiny", "log.level=debug", f"gateway.api_keys_file={file}"]
    settings += ['gateway.attributes=["header.x-team"]', 'gateway.private_attributes=["header.x-team"]']
    with Collector() as collector, pytest.MonkeyPatch.context() as environment:
        for name, value in collector.environment.items():
            environment.setenv(name, value)
        with MeshProcesses(tiny_model, directory, gateway=True, settings=settings, own_settings=own) as mesh:
            yield Watched(mesh, ports, collector)


def bodies() -> list[tuple[str, dict[str, Any], int]]:
    """What goes well and what does not, by every API; with the status of each, 0 where either will do: this
    model's template has no tools."""
    text = f"tell me of {SECRET}"
    long = " ".join([text] * 100)
    said = [{"role": "system", "content": text}, {"role": "user", "content": long[:2000]}]
    tool = {"type": "function", "function": {"name": "look", "description": text, "parameters": {}}}
    few: dict[str, Any] = {"model": "tiny", "max_tokens": 8}
    completions, chat = "/v1/completions", "/v1/chat/completions"
    return [
        (completions, {**few, "prompt": long, "logprobs": 2, "echo": True}, 200),
        (completions, {**few, "prompt": text, "stream": True, "stop": [SECRET]}, 200),
        (chat, {**few, "messages": said}, 200),
        (chat, {**few, "messages": said, "tools": [tool], "user": text}, 0),
        (chat, {**few, "messages": said, "response_format": {"type": "json_object"}}, 0),
        (
            "/v1/responses",
            {"model": "tiny", "input": text, "max_output_tokens": 16, "instructions": text},
            200,
        ),
        ("/v1/messages", {**few, "messages": [{"role": "user", "content": text}], "system": text}, 200),
        ("/tokenize", {"model": "tiny", "prompt": text}, 200),
        (completions, {**few, "prompt": text, "temperature": -1}, 400),
        (completions, {**few, "prompt": text, "max_tokens": 10**6}, 400),
        (chat, {**few, "messages": [{"role": text, "content": text}]}, 400),
        (chat, {**few, "messages": said, "tools": [{"type": "function", "function": {"name": text}}]}, 400),
        (completions, {**few, "prompt": {"text": SECRET}}, 400),
    ]


def test_no_word_of_a_client_is_seen_anywhere(watched: Watched) -> None:
    mesh = watched.mesh
    for number, (path, body, status) in enumerate(bodies()):
        told = watched.post(path, body, f"asked-{number}")
        assert told in ((status,) if status else (200, 400)), (told, path, body)
    watched.collector.wait_for(lambda span: span.attributes.get("microserve.http_request_id") == "asked-6")
    seen = {path: watched.get(f"/view/{path}", OPERATOR) for path in VIEW}
    assert {status for status, _ in seen.values()} == {200}
    texts = {path: text for path, (_, text) in seen.items()}
    assert "asked-0" in texts["requests"], "it is the requests' own view"
    _, texts["metrics"] = watched.get("/metrics?names=vllm", OPERATOR)
    _, texts["our metrics"] = watched.get("/metrics", OPERATOR)
    for name, port in watched.metrics.items():
        texts[f"metrics of {name}"] = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    texts["spans"] = repr(watched.collector.spans)
    for service in mesh.history:
        texts[f"log of {service.name}"] = service.log.read_text()
    assert '"request.finished"' in texts["log of gateway"] and "asked-8" in texts["log of gateway"]
    for name, text in texts.items():
        for word in (SECRET, PRIVATE):
            at = text.find(word)
            assert at < 0, f"{name}: ...{text[max(0, at - 300) : at + 100]}..."


def test_without_an_operators_key_nothing_of_the_mesh_is_seen(watched: Watched) -> None:
    assert watched.post(*bodies()[1][:2], "asked-again") == 200
    paths = ["/metrics", "/metrics?names=vllm", *(f"/view/{path}" for path in VIEW)]
    for key, status in (("", 401), ("nobody", 401), (CLIENT, 403)):
        for path in paths:
            assert watched.get(path, key)[0] == status, (path, key)
    open_texts = [watched.get(path)[1] for path in ("/", "/page/main.js", "/health", "/ready")]
    for port in watched.metrics.values():  # whoever reaches the port may read it
        open_texts.append(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text)
    for text in open_texts:
        assert text and not any(word in text for word in (OPERATOR, CLIENT, "asked-"))
    for path in ("/view/nothing", "/view/", "/view/../view/mesh", "//view/mesh", "/VIEW/mesh"):
        assert watched.get(path)[0] in (401, 404), path
