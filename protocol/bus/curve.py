"""CURVE keys: who may speak on the bus (ZeroMQ RFC 25, 26, 27).

A key directory holds one pair of this service and the public keys of those whom it trusts or calls:

    keys/service.key_secret        ours (made by ``microserve keys``), readable by the owner only
    keys/trusted/*.key             public keys of every service that may connect
    keys/operators/*.key           public keys, of those, that may change what is served (read by the index)
    keys/index.key                 public key of the index, where it is not ours (engines, routers, operators)
    keys/router.key                public key of the routers, where it is not ours (gateways)

An engine's public key comes with what the index says of it, so no file names it.

Loopback and ipc addresses may go without; anything else is refused without keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from microserve.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """This service's key pair and the directory of public keys that it trusts."""

    public: bytes
    secret: bytes
    trusted: Path
    servers: Mapping[str, str] = field(default_factory=dict)
    """Public keys (Z85) by address, of those to whom we connect and whose pair is not ours."""

    @classmethod
    def load(cls, directory: str | Path, servers: Mapping[str, str] | None = None) -> CurveKeys:
        """Raises :class:`ConfigError` if the pair is missing, damaged or readable by others."""
        root = Path(directory)
        secret_file = root / "service.key_secret"
        if not secret_file.is_file():
            raise ConfigError(f"no {secret_file}; make one with 'microserve keys'", field="bus.curve_dir")
        if secret_file.stat().st_mode & 0o077:
            raise ConfigError(f"{secret_file} is readable by others; chmod 600", field="bus.curve_dir")
        try:
            public, secret = zmq.auth.load_certificate(secret_file)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{secret_file}: {error}", field="bus.curve_dir") from None
        if secret is None:
            raise ConfigError(f"{secret_file} holds no secret key", field="bus.curve_dir")
        if not (root / "trusted").is_dir():
            raise ConfigError(f"no directory {root / 'trusted'}: nobody could connect", field="bus.curve_dir")
        return cls(public, secret, root / "trusted", servers or {})

    def start_authenticator(self, context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
        """ZAP handler: only keys in ``trusted`` are let in."""
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve(domain="*", location=str(self.trusted))
        return authenticator

    def apply_to_server(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_server = True

    def apply_to_client(self, socket: zmq.Socket[bytes], address: str, server_key: str) -> None:
        """``server_key``: the peer's public key, Z85; empty: the one that is known of ``address``, else our
        own, because all services share our pair."""
        server_key = server_key or self.servers.get(address, "")
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = server_key.encode() if server_key else self.public


def create_keys(directory: str | Path) -> CurveKeys:
    """Make a pair that trusts itself. Raises :class:`ConfigError` rather than overwrite one."""
    root = Path(directory)
    if (root / "service.key_secret").exists():
        raise ConfigError(f"{root / 'service.key_secret'} exists; remove it first", field="bus.curve_dir")
    (root / "trusted").mkdir(parents=True, exist_ok=True)
    public_file, secret_file = zmq.auth.create_certificates(str(root), "service")
    Path(secret_file).chmod(0o600)
    (root / "trusted" / "service.key").write_text(Path(public_file).read_text())
    return CurveKeys.load(root)


def is_operator(directory: str | Path, key: str) -> bool:
    """Whether a public key (Z85) may publish strategies; read anew each time, so that rights end at once."""
    operators = Path(directory) / "operators"
    for file in sorted(operators.glob("*.key")) if operators.is_dir() else ():
        try:
            public, _ = zmq.auth.load_certificate(file)
        except (ValueError, OSError):
            continue  # a damaged file gives nobody a right
        if public.decode() == key:
            return True
    return False


def peer_key(directory: str | Path, name: str) -> str:
    """The public key (Z85) in ``NAME.key``, of a service that has another pair; empty: no such file.

    Raises :class:`ConfigError` if the file is damaged."""
    file = Path(directory) / f"{name}.key"
    if not file.is_file():
        return ""
    try:
        public, _ = zmq.auth.load_certificate(file)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: {error}", field="bus.curve_dir") from None
    return public.decode()


def check_exposure(address: str, keys: CurveKeys | None) -> None:
    """Refuse to bind where other machines can reach us without keys. Raises :class:`ConfigError`."""
    scheme, _, endpoint = address.partition("://")
    if keys is not None or scheme in ("ipc", "inproc"):
        return
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if scheme != "tcp" or not loopback:
        raise ConfigError(
            f"{address} is reachable from other machines; set bus.curve_dir (see 'microserve keys') "
            "or bind to 127.0.0.1",
            field="bus.curve_dir",
        )
