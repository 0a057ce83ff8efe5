"""Addresses of sockets, as ZeroMQ writes them: ``tcp://10.0.0.1:7100``, ``tcp://[::1]:7100``,
``ipc:///run/x``.

Owns what can be read in one, and what others are told of one that is bound. Does not decide who may bind
where (``curve.py``).
"""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache

EVERYWHERE = ("*", "0.0.0.0", "::")
"""Hosts of a socket that takes connections by every interface: an address of nobody."""
LOOPBACK = "127.0.0.1"


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


def announced(bound: str, advertise: str, towards: str) -> str:
    """What others are told of a socket that is ``bound``: ``advertise`` as its host if there is one; of one
    that takes connections by every interface the address by which this host reaches ``towards``, so one that
    it can be reached by from there. Else what is bound, which is all of an address that is not TCP.

    Raises ``OSError`` if no way leads to ``towards``."""
    host = host_of(bound)
    if not host or not (advertise or host in EVERYWHERE):
        return bound
    host = (advertise or own_host_towards(towards)).strip("[]")
    port = bound.rpartition(":")[2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def url_towards(url: str, towards: str) -> str:
    """What is told, at the other end of the way to ``towards``, of HTTP that is bound as ``url`` says, as
    :func:`announced` does; empty where only this host reaches it, or no way leads there."""
    scheme, _, place = url.partition("://")
    try:
        told = announced(f"tcp://{place}", "", towards)
    except OSError:
        return ""
    return "" if is_out_of_reach(told, towards) else f"{scheme}://{told.removeprefix('tcp://')}"


def own_host_towards(address: str) -> str:
    """The address of this host on its way to another one; nothing is sent. Raises ``OSError`` if there is no
    way."""
    return _way_to(address)[0]


def is_out_of_reach(address: str, towards: str) -> bool:
    """Whether only this host reaches ``address``, while ``towards`` is on another one. False when unsure: a
    name may not be known yet."""
    try:
        return _is_loopback(host_of(address)) and (way := _way_to(towards))[0] != way[1]
    except OSError:
        return False


def _way_to(address: str) -> tuple[str, str]:
    """Our host, and the other one, as numbers; one host for what is not TCP."""
    host = host_of(address)
    if not host or host in EVERYWHERE:
        return LOOPBACK, LOOPBACK
    family = socket.AF_INET6 if is_ipv6(address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(address.rpartition(":")[2]) or 1))  # of a datagram: a look at the routes
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(each).is_loopback for each in found)


@lru_cache(256)
def _has_ipv6_only(name: str) -> bool:
    """Asked once a name, at the first use of it: the loop waits meanwhile."""
    try:
        families = {each[0] for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return families == {socket.AF_INET6}
