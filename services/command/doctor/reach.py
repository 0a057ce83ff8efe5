"""Who answers at an address: TCP first, then a handshake of ZeroMQ with our keys.

Owns the sockets that a question takes, and how their events are read. Sends no message. Blocks: for a thread.
"""

from __future__ import annotations

import socket as sockets
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from microserve.protocol.bus.address import host_of, is_ipv6, port_of
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.types import NO_KEY
from microserve.services.command.doctor.observation import Place, Reach

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
)


def try_place(what: str, address: str, keys: CurveKeys | None, server_key: str, timeout_s: float) -> Place:
    """Connect, wait for the handshake, and close. ``server_key``: as for ``Bus.client``; who does not let us
    in is silent, so that takes all of ``timeout_s``."""
    host, port = host_of(address), port_of(address)
    if port:
        try:
            sockets.create_connection((host, port), timeout=timeout_s).close()
        except sockets.gaierror as error:
            return Place(what, address, Reach.NO_ADDRESS, f"{host} is nobody's name here ({error.strerror})")
        except UnicodeError as error:  # no name can be so
            return Place(what, address, Reach.NO_ADDRESS, str(error))
        except ConnectionRefusedError:
            return Place(what, address, Reach.REFUSED)
        except OSError as error:
            return Place(what, address, Reach.SILENT, error.strerror or "no answer in time")
    return _shake_hands(what, address, keys, server_key, timeout_s)


def _shake_hands(what: str, address: str, keys: CurveKeys | None, server_key: str, timeout_s: float) -> Place:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = context.socket(zmq.SUB if what == "events" else zmq.DEALER)
    client.linger = 0
    monitor = client.get_monitor_socket()
    try:
        if keys is not None and server_key != NO_KEY:
            keys.apply_to_client(client, address, server_key)
        client.setsockopt(zmq.IPV6, is_ipv6(address))
        client.connect(address)
        gives_up_at = time.monotonic() + timeout_s
        while (left_s := gives_up_at - time.monotonic()) > 0 and monitor.poll(int(left_s * 1000) + 1):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return Place(what, address)
            if event in _HANDSHAKE_FAILED:
                break
        return Place(what, address, Reach.NO_HANDSHAKE)
    except (zmq.ZMQError, OSError, ValueError) as error:
        return Place(what, address, Reach.NO_ADDRESS, str(error))
    finally:
        client.disable_monitor()
        monitor.close(0)
        client.close(0)
        context.term()
