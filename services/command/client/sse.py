"""Server-sent events out of bytes that may be cut anywhere. Pure; what the events say is others' to read."""

from __future__ import annotations

MAX_EVENT_NBYTES = 64 << 20


class EventTooLong(Exception):
    """No event is so long: whoever sends this does not speak the protocol."""


class EventReader:
    """``push`` bytes as they come; the data of every event that they complete comes out."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_return = False
        """The last byte was a carriage return: a line feed now belongs to it."""
        self.last_id = b""
        """Of the last event that had one: what a reader comes back with."""

    @property
    def is_between_events(self) -> bool:
        """Nothing has begun that has not ended."""
        return not self._rest.strip(b"\n")

    def push(self, data: bytes) -> list[bytes]:
        """Raises :class:`EventTooLong`."""
        if self._after_return or b"\r" in data:
            data = self._with_line_feeds(data)
        self._rest += data
        if b"\n\n" not in self._rest:
            if len(self._rest) > MAX_EVENT_NBYTES:
                raise EventTooLong(f"an event of more than {MAX_EVENT_NBYTES} bytes")
            return []
        *blocks, self._rest = self._rest.split(b"\n\n")
        for block in blocks:
            self.last_id = _id_of(block, self.last_id)
        return [found for block in blocks if (found := _data_of(block)) is not None]

    def _with_line_feeds(self, data: bytes) -> bytes:
        if self._after_return and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._after_return = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data_of(block: bytes) -> bytes | None:
    """None: comments and other fields only."""
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _id_of(block: bytes, otherwise: bytes) -> bytes:
    if b"id:" not in block:
        return otherwise
    ids = [line[3:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"id:")]
    return ids[-1] if ids else otherwise
