"""The two ends of a link (link.py): the front makes it, the connector's sides open it by ``/proc``.

A pipe has one writer, so what it tells comes whole and in order. Writing never blocks: what does not fit
waits here until the next ``flush``, which a side calls each step. Only as much waits as the front asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Any, Final, Literal, Self

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.link import KEY, Notice, Page, Refused

Side = Literal["scheduler", "worker"]
_LENGTH: Final = struct.Struct("<I")
_PIPE_NBYTES: Final = 1 << 20
_READ_NBYTES: Final = 1 << 16


class LinkAddress(msgspec.Struct, frozen=True):
    """How the connector finds the front, and who it is for others."""

    pid: int
    page: int
    """Descriptors of process ``pid``."""
    pipes: dict[Side, int]
    num_receives: int
    incarnation: int
    """Of the engine: its heap's, too."""
    model: str
    revision: str
    """Both are part of the layout's hash."""
    grant_slots: int
    checksums: bool


def address_of(extra_config: dict[str, Any]) -> LinkAddress:
    """From ``kv_connector_extra_config``; :class:`ConfigError` if it is not of a front."""
    try:
        return msgspec.convert(extra_config.get(KEY), LinkAddress)
    except msgspec.ValidationError as error:
        field = f"kv_connector_extra_config.{KEY}"
        raise ConfigError(f"{field}: {error}", field=field) from error


class Front:
    """The front's end: owns the page and both pipes."""

    def __init__(
        self,
        *,
        incarnation: int,
        model: str,
        revision: str,
        num_receives: int,
        grant_slots: int,
        checksums: bool,
    ) -> None:
        page = os.memfd_create("microserve-link", os.MFD_CLOEXEC)
        os.ftruncate(page, Page.nbytes(num_receives))
        self.page = Page(page, num_receives)
        pipes: dict[Side, tuple[int, int]] = {
            "scheduler": os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK),
            "worker": os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK),
        }
        self._fds = [page, *(fd for pipe in pipes.values() for fd in pipe)]
        self.readable = [pipe[0] for pipe in pipes.values()]
        """To wait on; then :meth:`read`."""
        for _, write in pipes.values():
            with contextlib.suppress(OSError):  # more than this user may have: what does not fit waits
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_NBYTES)
        self._unread = {fd: bytearray() for fd in self.readable}
        self._decoder: msgspec.msgpack.Decoder[Notice] = msgspec.msgpack.Decoder(Notice)
        self.address = LinkAddress(
            pid=os.getpid(),
            page=page,
            pipes={side: write for side, (_, write) in pipes.items()},
            num_receives=num_receives,
            incarnation=incarnation,
            model=model,
            revision=revision,
            grant_slots=grant_slots,
            checksums=checksums,
        )

    @property
    def extra_config(self) -> dict[str, Any]:
        """For ``KVTransferConfig.kv_connector_extra_config``."""
        return {KEY: msgspec.to_builtins(self.address)}

    def read(self) -> list[Notice]:
        """All that both sides have told since the last call, each side's in order; never blocks."""
        notices: list[Notice] = []
        for fd in self.readable:
            unread = self._unread[fd]
            with contextlib.suppress(BlockingIOError):
                while part := os.read(fd, _READ_NBYTES):
                    unread += part
            at = 0
            while len(unread) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(unread, at)
                end = at + _LENGTH.size + length
                if len(unread) < end:
                    break
                notices.append(self._decoder.decode(bytes(unread[at + _LENGTH.size : end])))
                at = end
            del unread[:at]
        return notices

    def close(self) -> None:
        """After vLLM's processes have ended."""
        self.page.close()
        while self._fds:
            os.close(self._fds.pop())
        self.readable = []


class End:
    """One side's end, in a process of vLLM's."""

    def __init__(self, address: LinkAddress, side: Side) -> None:
        """:class:`ConfigError` if the front is gone, or another user's."""
        self.address = address
        with contextlib.ExitStack() as undo:
            try:
                page = _open(address.pid, address.page, os.O_RDWR)
                undo.callback(os.close, page)
                self.page = Page(page, address.num_receives)
                self._pipe = _open(address.pid, address.pipes[side], os.O_WRONLY | os.O_NONBLOCK)
            except (OSError, ValueError) as error:
                raise ConfigError(f"the front, process {address.pid}, is out of reach: {error}") from error
        self._unwritten = bytearray()

    def tell(self, notice: Notice) -> None:
        packed = msgspec.msgpack.encode(notice)
        self._unwritten += _LENGTH.pack(len(packed)) + packed
        self.flush()

    def refuse(self, error: ConfigError) -> None:
        """Before vLLM fails by it, with words of its own."""
        self.tell(Refused(error.field or "", error.detail))

    def flush(self) -> None:
        with contextlib.suppress(
            BlockingIOError, BrokenPipeError
        ):  # broken: the front is gone, and so are we
            while self._unwritten:
                del self._unwritten[: os.write(self._pipe, self._unwritten)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.page.close()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def _open(pid: int, fd: int, flags: int) -> int:
    return os.open(f"/proc/{pid}/fd/{fd}", flags | os.O_CLOEXEC)
