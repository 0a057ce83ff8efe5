"""What the workers of a gateway say together: one scrape of any has the metrics of all; so has a view.

Owns a socket on which a worker answers its siblings, and the asking: a question has a name and some bytes,
which are read by who put the answer to it in. The sockets are named in the kernel's abstract namespace by
user, address and number, leave nothing behind, and speak with processes of this user only. One that is gone
or stands is left out. Must not know what is measured or seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec
import structlog
from prometheus_client.core import Metric

from microserve.protocol import log

ANSWER_S = 1.0
"""A worker has so long to tell its siblings."""
MAX_QUESTION_NBYTES = 64 << 10
METRICS = "metrics"
MAX_NBYTES = 64 << 20

Own: TypeAlias = Callable[[], Awaitable[Iterable[Metric]]]
"""What a worker has to tell, as it is now."""
Family: TypeAlias = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""Name, text, type, and samples by name and labels."""

Answerer: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""From the bytes of a question to those of its answer."""

_logger = structlog.get_logger()
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Family])
_question = msgspec.msgpack.Decoder(tuple[str, bytes])
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


class Siblings:
    """Of worker ``number`` of ``count``. Make it inside the loop; ``start`` it, and ``close`` it."""

    def __init__(self, address: str, number: int, count: int, own: Own) -> None:
        """``address``: at which all of them listen. ``own``: this worker's families, as they are now."""
        self.number, self._count = number, count
        self._own = own
        self._answers: dict[str, Answerer] = {}
        self._name = f"\0microserve-gateway-{os.getuid()}-{address}"
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Where another process has our name, siblings do without us, and that is told."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Not by the loop: uvloop cuts such a name at its first byte, which is zero.
            listener.bind(f"{self._name}-{self.number}")
            self._server = await asyncio.start_unix_server(self._tell, sock=listener)
        except OSError as error:
            listener.close()
            _logger.warning(log.WORKER_APART, error=str(error))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def answers(self, what: str, answer: Answerer) -> None:
        """From now on, that question is answered so."""
        self._answers[what] = answer

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError, msgspec.MsgspecError):
            if not _is_of_this_user(writer):
                return
            async with asyncio.timeout(ANSWER_S):
                what, argument = _question.decode(await reader.read(MAX_QUESTION_NBYTES))
            if what == METRICS:
                writer.write(await asyncio.to_thread(_encoded, await self._own()))
            elif answer := self._answers.get(what):
                writer.write(await answer(argument))
            await writer.drain()

    async def families(self) -> list[Metric]:
        """Of all workers that answer, each sample with its ``worker``."""
        told, own = await self.ask(METRICS, b""), await self._own()

        def merge() -> list[Metric]:
            by_worker = {self.number: [_plain(metric) for metric in own]}
            for number, encoded in told.items():
                with contextlib.suppress(msgspec.MsgspecError):
                    by_worker[number] = _decoder.decode(encoded)
            return merged(dict(sorted(by_worker.items())))

        return await asyncio.to_thread(merge)

    async def ask(self, what: str, argument: bytes) -> dict[int, bytes]:
        """What each of the others answers; who does not is left out."""
        numbers = [number for number in range(self._count) if number != self.number]
        question = _encoder.encode((what, argument))
        told = await asyncio.gather(*(self._ask(number, question) for number in numbers))
        return {number: said for number, said in zip(numbers, told, strict=True) if said}

    async def _ask(self, number: int, question: bytes) -> bytes | None:
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(ANSWER_S):
                asking.connect(f"{self._name}-{number}")
                reader, writer = await asyncio.open_unix_connection(sock=asking)
                with contextlib.closing(writer):
                    if not _is_of_this_user(writer):
                        return None
                    writer.write(question)
                    content = bytearray()
                    while part := await reader.read(1 << 20):
                        content += part
                        if len(content) > MAX_NBYTES:
                            return None
                    return bytes(content)
        except (OSError, TimeoutError):
            asking.close()
            return None


def merged(by_worker: Mapping[int, Iterable[Family]]) -> list[Metric]:
    """Families of the same name become one."""
    made: dict[str, Metric] = {}
    for number, families in by_worker.items():
        for name, text, kind, samples in families:
            metric = made.setdefault(name, Metric(name, text, kind))
            for sample, labels, value in samples:
                metric.add_sample(sample, {**labels, "worker": str(number)}, value)
    return list(made.values())


def _encoded(metrics: Iterable[Metric]) -> bytes:
    return _encoder.encode([_plain(metric) for metric in metrics])


def _plain(metric: Metric) -> Family:
    samples = [(each.name, dict(each.labels), float(each.value)) for each in metric.samples]
    return metric.name, metric.documentation, metric.type, samples


def _is_of_this_user(writer: asyncio.StreamWriter) -> bool:
    """Anybody may take, or call, a name in the abstract namespace."""
    connection: socket.socket = writer.get_extra_info("socket")
    held = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(held)[1] == os.getuid())
