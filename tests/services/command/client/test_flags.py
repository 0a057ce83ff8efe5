"""Which server is meant, and that it is the one that shows its certificate."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.flags import find_endpoint
from microserve.services.command.client.http import Client
from microserve.services.command.shared.flags import WrongFlag
from tests.services.command.client.test_http import run
from tests.support.command.scripted_server import ScriptedServer
from tests.support.gateway.certificate import make_pair


def test_without_a_mesh_the_settings_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
    assert find_endpoint(None, None, None, ()) == Endpoint("127.0.0.1", 8000)
    found = find_endpoint(None, None, None, ("gateway.host=::", "gateway.port=1", 'gateway.api_keys=["k"]'))
    assert (found.url, found.api_key) == ("http://[::1]:1", "k")
    assert find_endpoint("http://h:1/v1", None, None, ()).api_key == "sk-theirs"
    with pytest.raises(WrongFlag, match="is not http://"):
        find_endpoint("ftp://h", None, None, ())


def test_tls_is_with_whom_it_is_meant_to_be(tmp_path: Path) -> None:
    """A certificate of the settings is believed for any name; another is not, nor is ours by the system."""
    ours, others = make_pair(tmp_path, "ours"), make_pair(tmp_path, "others")

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*ours)

        async def answer(_: object) -> None: ...

        server = ScriptedServer(answer)
        listening = await asyncio.start_server(server.serve, "localhost", 0, ssl=context)
        port = listening.sockets[0].getsockname()[1]
        host = listening.sockets[0].getsockname()[0]
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        client = Client(Endpoint.at(url, tls_cert=str(ours[0])))
        assert (await client.fetch("GET", "/v1/models"))[0] == 200
        await client.close()
        for certificate in (str(others[0]), ""):
            with pytest.raises(ConnectionError, match="certificate verify failed"):
                await Client(Endpoint.at(url, tls_cert=certificate)).fetch("GET", "/v1/models")
        listening.close()

    run(main())
