"""CURVE keys: pairs, and whose key is expected where (ZeroMQ RFC 25, 26).

A key directory holds one pair of this service and the public keys of those whom it trusts or calls:

    keys/service.key_secret        ours (made by ``microserve keys``), readable by the owner only
    keys/trusted/*.key             public keys of services that may connect, as whatever they say they are
    keys/trusted/ROLE/*.key        the same, as that role only (security/rights.py)
    keys/operators/*.key           public keys of those who may change what is served
    keys/index.key                 public key of the index, where it is not ours (all who call it)
    keys/router.key                public key of the routers, where it is not ours (gateways)

An engine's public key comes with what the index says of it, so no file names it. A mesh's directory holds
such a directory for each role, ``keys/index``, ``keys/engine`` and so on, and nothing else; who is given it
takes that of its own role. Which of the trusted keys may do what is ``security/``'s."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth

from microserve.protocol.bus.address import host_of
from microserve.protocol.errors import ConfigError
from microserve.protocol.security.rights import Role
from microserve.protocol.security.trust import STATED_ROLES, key_files, places, read_key

SECRET, PUBLIC = "service.key_secret", "service.key"
"""Files of a pair."""

_CALLERS: Mapping[Role, tuple[Role, ...]] = {
    Role.INDEX: (Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR),
    Role.ENGINE: (Role.INDEX, Role.ROUTER, Role.OPERATOR),
    Role.ROUTER: (Role.GATEWAY,),
    Role.GATEWAY: (),
    Role.OPERATOR: (),
}
_CALLED: Mapping[Role, tuple[Role, ...]] = {
    Role.INDEX: (),
    Role.ENGINE: (Role.INDEX,),
    Role.ROUTER: (Role.INDEX,),
    Role.GATEWAY: (Role.INDEX, Role.ROUTER),
    Role.OPERATOR: (Role.INDEX,),
}
"""Whose keys a service needs as files; an engine's come with the index's list."""


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
        """Raises :class:`ConfigError` if the pair is missing, damaged, unreadable or readable by others."""
        try:
            return cls._load(Path(directory), servers or {})
        except OSError as error:
            raise ConfigError(f"{directory}: {error}", field="bus.curve_dir") from None

    @classmethod
    def _load(cls, root: Path, servers: Mapping[str, str]) -> CurveKeys:
        secret_file = root / SECRET
        if not secret_file.is_file():
            raise ConfigError(f"no {secret_file}; make one with 'microserve keys'", field="bus.curve_dir")
        if secret_file.stat().st_mode & 0o077:
            raise ConfigError(f"{secret_file} is readable by others; chmod 600", field="bus.curve_dir")
        try:
            public, secret = zmq.auth.load_certificate(secret_file)
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{secret_file}: {error}", field="bus.curve_dir") from None
        if secret is None:
            raise ConfigError(f"{secret_file} holds no secret key", field="bus.curve_dir")
        if not (root / "trusted").is_dir():
            raise ConfigError(f"no directory {root / 'trusted'}: nobody could connect", field="bus.curve_dir")
        list(places(root))
        return cls(public, secret, root / "trusted", servers)

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
    _create_pair(root)
    shutil.copyfile(root / PUBLIC, root / "trusted" / PUBLIC)
    return CurveKeys.load(root)


def create_mesh_keys(directory: str | Path) -> Path:
    """Make a directory of keys for each role of a mesh, each trusting who calls it as what he is; those that
    are there are kept, so it may be called again. Raises :class:`ConfigError` for one that cannot be used."""
    root = Path(directory)
    _make_private(root)
    with open(root / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # services that start together may each ask for it
        _fill_mesh_keys(root)
    return root


def _fill_mesh_keys(root: Path) -> None:
    fresh = [role for role in STATED_ROLES if not (root / role).exists()]
    for role in STATED_ROLES:
        if role in fresh:
            scratch = _scratch(root / role)
            _create_pair(scratch)
            scratch.rename(root / role)
        CurveKeys.load(root / role)
    for role in STATED_ROLES:
        for caller in _CALLERS[role]:
            place = root / role / "trusted" / caller
            if caller in fresh or not place.exists():  # an empty one is a right that was taken away
                shutil.rmtree(place, ignore_errors=True)
                scratch = _scratch(place)
                _make_private(scratch)
                shutil.copyfile(root / caller / PUBLIC, scratch / f"{caller}.key")
                scratch.rename(place)
        for called in _CALLED[role]:
            if called in fresh or not (root / role / f"{called}.key").exists():
                shutil.copyfile(root / called / PUBLIC, root / role / f"{called}.key")


def _scratch(target: Path) -> Path:
    """Where a directory is made before it gets its name, whole: we may be killed meanwhile."""
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    return scratch


def keys_of_role(directory: str | Path, role: str) -> Path:
    """``directory`` itself, or, if it is a mesh's, what it holds for ``role``."""
    root = Path(directory)
    own = root / role
    return own if not (root / SECRET).exists() and (own / SECRET).exists() else root


def _create_pair(root: Path) -> None:
    if (root / SECRET).exists():
        raise ConfigError(f"{root / SECRET} exists; remove it first", field="bus.curve_dir")
    _make_private(root)
    (root / "trusted").mkdir(mode=0o700, exist_ok=True)
    before = os.umask(0o077)  # from the first byte on: others must not get a moment to open it
    try:
        zmq.auth.create_certificates(str(root), PUBLIC.removesuffix(".key"))
    finally:
        os.umask(before)
    (root / SECRET).chmod(0o600)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def is_operator(directory: str | Path, key: str) -> bool:
    """Whether a public key (Z85) may publish strategies; read anew each time, so that rights end at once."""
    operators = [place for place, role in places(Path(directory)) if role is Role.OPERATOR]
    for place in operators:
        for file, _ in key_files(place):
            try:
                if key and read_key(file) == key:
                    return True
            except OSError:
                continue  # what cannot be read gives nobody a right
    return False


def peer_key(directory: str | Path, name: str) -> str:
    """The public key (Z85) in ``NAME.key``, of a service that has another pair; empty: no such file.

    Raises :class:`ConfigError` if the file is damaged."""
    file = Path(directory) / f"{name}.key"
    if not file.is_file():
        return ""
    try:
        key = read_key(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error}", field="bus.curve_dir") from None
    if not key:
        raise ConfigError(f"{file} holds no public key", field="bus.curve_dir")
    return key


def check_exposure(address: str, keys: CurveKeys | None) -> None:
    """Refuse to bind where other machines can reach us without keys. Raises :class:`ConfigError`."""
    scheme = address.partition("://")[0]
    if keys is not None or scheme in ("ipc", "inproc"):
        return
    host = host_of(address)
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if scheme != "tcp" or not loopback:
        raise ConfigError(
            f"{address} is reachable from other machines; set bus.curve_dir (see 'microserve keys') "
            "or bind to 127.0.0.1 (or say bus.insecure = true)",
            field="bus.curve_dir",
        )
