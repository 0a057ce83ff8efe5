"""HTTPS with a certificate that the test makes: served, read anew, and refused by the name of the setting."""

from __future__ import annotations

import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from microserve.gateway.http.tls import Certificate
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.sources import load_settings
from tests.support.gateway.certificate import make_pair
from tests.support.gateway.gateway_world import Served, gateway_world, run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("tls")
    return [make_pair(directory, name) for name in ("one", "two")]


def test_a_stream_over_tls(model: Path, pairs: list[tuple[Path, Path]]) -> None:
    cert, key = pairs[0]

    async def main() -> None:
        async with gateway_world(model, f"gateway.tls_cert={cert}", f"gateway.tls_key={key}") as world:
            assert world.address.startswith("https://127.0.0.1:")

            def answer(served: Served) -> None:
                served.send([5, 6])
                served.end("length")

            world.router.answer = answer
            trusting = ssl.create_default_context(cafile=str(cert))
            async with httpx.AsyncClient(base_url=world.address, verify=trusting) as http:
                body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True}
                reply = await http.post("/v1/completions", json=body)
                assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")
            async with httpx.AsyncClient(base_url=world.address) as http:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await http.get("/health")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}") as http:
                with pytest.raises(httpx.TransportError):
                    await http.get("/health")

    run(main())


def shown(certificate: Certificate) -> bytes:
    """What a client is shown now."""
    client_in, client_out, server_in, server_out = (ssl.MemoryBIO() for _ in range(4))
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client = trusting.wrap_bio(client_in, client_out)
    server = certificate.context.wrap_bio(server_in, server_out, server_side=True)
    for _ in range(5):
        for side, outgoing, incoming in ((client, client_out, server_in), (server, server_out, client_in)):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            incoming.write(outgoing.read())
    return client.getpeercert(binary_form=True) or b""


def test_a_new_certificate_is_shown_from_then_on_and_a_wrong_one_never(
    tmp_path: Path, pairs: list[tuple[Path, Path]]
) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"

    def install(cert_of: int, key_of: int) -> None:
        cert.write_bytes(pairs[cert_of][0].read_bytes())
        key.write_bytes(pairs[key_of][1].read_bytes())

    install(0, 0)
    certificate = Certificate(str(cert), str(key))
    first = shown(certificate)
    assert first == ssl.PEM_cert_to_DER_cert(pairs[0][0].read_text())
    install(1, 0)
    certificate.reload()
    key.unlink()
    certificate.reload()
    assert shown(certificate) == first
    install(1, 1)
    certificate.reload()
    assert shown(certificate) == ssl.PEM_cert_to_DER_cert(pairs[1][0].read_text())


def test_what_is_wrong_is_named(tmp_path: Path, pairs: list[tuple[Path, Path]]) -> None:
    (cert, key), (_, other) = pairs
    locked = tmp_path / "locked.key"
    command: list[str | Path] = ["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:secret"]
    command += ["-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    text = tmp_path / "text"
    text.write_text("no PEM")
    for wrong_cert, wrong_key, field in (
        (tmp_path / "absent", key, "gateway.tls_cert"),
        (cert, tmp_path / "absent", "gateway.tls_key"),
        (text, key, "gateway.tls_cert"),
        (key, key, "gateway.tls_cert"),
        (cert, text, "gateway.tls_key"),
        (cert, cert, "gateway.tls_key"),
        (cert, other, "gateway.tls_key"),
        (cert, locked, "gateway.tls_key"),
        (tmp_path, key, "gateway.tls_cert"),
    ):
        with pytest.raises(ConfigError) as caught:
            Certificate(str(wrong_cert), str(wrong_key))
        assert caught.value.field == field, (wrong_cert, wrong_key)


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_one_goes_with_the_other(given: str, missing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides=[f"gateway.{given}=/some/file"])
    assert caught.value.field == f"gateway.{missing}"
