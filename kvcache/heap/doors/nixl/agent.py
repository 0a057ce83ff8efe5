"""An agent of NIXL: one region of memory, and the puts into others'.

UCX takes whatever way is best, and on one host that is the writer's own call into our memory (cma), or
pages that both have mapped. Such a writer goes on whatever we close. So an agent has transports of the
network alone, on either end: those of an owner are in its metadata, and decide.

Owns every call of the library. Does not know heaps.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from microserve.protocol.errors import ConfigError, TransferFailed

_TLS: Final = "UCX_TLS"
_NETWORK: Final = "^sm"
"""All but those of memory that both ends reach."""
_OF_ONE_HOST: Final = ("all", "sm", "shm", "mm", "posix", "sysv", "cma", "knem", "xpmem")
_SLEEP_US: Final = 100_000
_lock = threading.Lock()


class Agent:
    """Callable from one thread at a time."""

    def __init__(self, name: str, address: int, nbytes: int) -> None:
        """``name``: nobody else's. Takes half a second. :class:`ConfigError` of field ``doors`` without the
        library, or if it may use memory of one host."""
        api = _import()
        with _lock:  # the environment is everybody's
            said = os.environ.get(_TLS)
            if said is not None and (said.startswith("^") or set(re.split("[,:]", said)) & {*_OF_ONE_HOST}):
                raise ConfigError(
                    f"{_TLS} is {said!r}: a door needs transports of the network alone, by name",
                    field="doors",
                )
            os.environ[_TLS] = said or _NETWORK
            try:
                _let_it_sleep(api)
                self._agent = api.nixl_agent(
                    name, api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
                )
                self._region = self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
            except Exception as error:  # its own, which have no base of their own
                raise ConfigError(f"NIXL gives no agent: {error!r}", field="doors") from error
            finally:
                if said is None:
                    del os.environ[_TLS]
        if "UCX" not in self._agent.backends:
            raise ConfigError("NIXL has no UCX here", field="doors")
        self.address = address

    @property
    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> str:
        """The name of another one. :class:`TransferFailed` if it cannot be reached."""
        try:
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._agent.make_connection(name)
        except Exception as error:
            raise TransferFailed(f"NIXL does not reach the door: {error!r}") from error
        return name

    def forget(self, name: str) -> None:
        with suppress(Exception):  # it is gone already
            self._agent.remove_remote_agent(name)

    def put(self, spans: Iterable[tuple[int, int, int]], name: str, base: int) -> Flight:
        """``(source, target, nbytes)``, targets from ``base`` on. :class:`TransferFailed` if it cannot
        begin."""
        agent = self._agent
        local, remote, began = [], [], time.monotonic()
        for source, target, nbytes in spans:
            local.append((self.address + source, nbytes, 0))
            remote.append((base + target, nbytes, 0))
        try:
            handle = agent.initialize_xfer(
                "WRITE",
                agent.get_xfer_descs(local, "DRAM"),
                agent.get_xfer_descs(remote, "DRAM"),
                name,
                b"",
            )
            state = agent.transfer(handle)
        except Exception as error:
            raise TransferFailed(f"NIXL puts nothing: {error!r}") from error
        return Flight(agent, handle, state, sum(nbytes for _, nbytes, _ in local), began)

    def destroy(self) -> None:
        """Every socket and queue of its is closed when this returns, whatever becomes of the others."""
        agent, self._agent = self._agent, None
        with suppress(Exception):
            agent.deregister_memory(self._region)
        del agent, self._region


class Flight:
    """A put that is on its way."""

    def __init__(self, agent: Any, handle: Any, state: str, nbytes: int, began: float) -> None:
        self._agent, self._handle, self._state = agent, handle, state
        self.nbytes, self.seconds, self._began = nbytes, 0.0, began

    def is_over(self) -> bool:
        """All of it is there. :class:`TransferFailed` if it will never be."""
        if self._state == "PROC":
            try:
                self._state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                raise TransferFailed(f"a put of NIXL failed: {error!r}") from error
        if self._state == "PROC":
            return False
        if self._state != "DONE":
            raise TransferFailed(f"a put of NIXL ended as {self._state}")
        self.seconds = time.monotonic() - self._began
        self.drop()
        return True

    def drop(self) -> None:
        """Nobody waits for it any more."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(Exception):  # it is under way, and goes with its agent
                self._agent.release_xfer_handle(handle)
        self._agent = None


def _let_it_sleep(api: Any) -> None:
    """The thread that brings puts on waits for the network with no patience at all, by a constant in the
    library's Python (``pthrDelay``), so that each agent takes a whole core while nothing is to be done. It is
    woken by what comes, so a long wait costs nothing."""
    bindings: Any = getattr(sys.modules[api.nixl_agent.__module__], "nixlBind", None)
    config: Any = getattr(bindings, "nixlAgentConfig", None)
    if not hasattr(config, "pthrDelay") or hasattr(config, "sleeps"):
        return
    delay = config.pthrDelay
    patient = property(delay.__get__, lambda self, _us: delay.__set__(self, _SLEEP_US))
    bindings.nixlAgentConfig = type("PatientConfig", (config,), {"sleeps": True, "pthrDelay": patient})


def _import() -> Any:
    try:
        api = import_module("nixl._api")
    except ImportError as error:
        raise ConfigError(f"nixl needs the extra microserve[nixl]: {error}", field="doors") from error
    # It writes to stdout what it makes; what it complains of goes the way of all our lines.
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
    logger.propagate = True
    return api
