"""Addresses of sockets, as ZeroMQ writes them: ``tcp://10.0.0.1:7100``, ``tcp://[::1]:7100``,
``ipc:///run/x``.

Owns what can be read in one. Does not decide who may bind where (``curve.py``).
"""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache


def host_of(address: str) -> str:
    """The host of a TCP address, without brackets; empty if there is none."""
    scheme, _, endpoint = address.partition("://")
    return endpoint.rpartition(":")[0].strip("[]") if scheme == "tcp" else ""


def port_of(address: str) -> int:
    """The port of a TCP address; 0 if it names none, or any free one."""
    scheme, _, endpoint = address.partition("://")
    port = endpoint.rpartition(":")[2]
    return int(port) if scheme == "tcp" and port.isdecimal() else 0


def shifted(address: str, by: int) -> str:
    """The address with a port so much higher; as it is if it names none. Raises ``ValueError``."""
    port = port_of(address)
    if not port:
        return address
    if not 0 < port + by <= 65535:
        raise ValueError(f"{address} has no port {by} higher")
    return f"{address.removesuffix(str(port))}{port + by}"


def is_ipv6(address: str) -> bool:
    """Whether a socket needs IPv6 for it. A name does only if it has no IPv4 address: with IPv6 on, libzmq
    would take the other one of a name that has both, and miss who is bound to the first."""
    host = host_of(address)
    try:
        return isinstance(ipaddress.ip_address(host), ipaddress.IPv6Address)
    except ValueError:
        return bool(host) and host != "*" and _has_ipv6_only(host)


@lru_cache(256)
def _has_ipv6_only(name: str) -> bool:
    """Asked once a name, at the first use of it: the loop waits meanwhile."""
    try:
        families = {each[0] for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return families == {socket.AF_INET6}
