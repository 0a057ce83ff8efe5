"""The keys' file on a living gateway: taken over when it changes, left alone while it is wrong."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from microserve.gateway.keys.reader import KeyReader
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from tests.support.gateway.gateway_world import run


def entry(name: str) -> str:
    return entry_of(ApiKey(name=name, sha256=(digest_of(name),)))


class Watched:
    """A reader that looks all the time, and what it has handed out."""

    def __init__(self, path: Path, look_s: float = 0.005) -> None:
        self.reader = KeyReader(str(path), look_s=look_s)
        self.reader.read()
        self.taken: asyncio.Queue[list[str]] = asyncio.Queue()
        self.task = asyncio.create_task(self.reader.watch(self.take))

    def take(self, keys: list[ApiKey]) -> None:
        self.taken.put_nowait([key.name for key in keys])

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled(), "it has ended by itself"


def test_every_change_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"

    async def main() -> None:
        path.write_text(entry("a"))
        watched = Watched(path)
        path.write_text(entry("a") + entry("b"))
        assert await watched.taken.get() == ["a", "b"]
        # Another file in its place, of the same size and the same time: only its number differs.
        stat = path.stat()
        other = tmp_path / "other"
        other.write_text(entry("a") + entry("c"))
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)
        assert await watched.taken.get() == ["a", "c"]
        path.write_text("")
        assert await watched.taken.get() == []
        await watched.close()

    run(main())


def test_a_mistake_leaves_the_keys_as_they_are_and_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"

    async def main() -> None:
        path.write_text(entry("a"))
        with capture_logs() as lines:
            watched = Watched(path)
            for mistake in ("[keys.a", None):
                rejected = [line for line in lines if line["event"] == log.KEYS_REJECTED]
                path.unlink() if mistake is None else path.write_text(mistake)
                while [line for line in lines if line["event"] == log.KEYS_REJECTED] == rejected:
                    await asyncio.sleep(0.005)
            assert watched.taken.empty()
            path.write_text(entry("b"))
            assert await watched.taken.get() == ["b"]
            assert sum(line["event"] == log.KEYS_REJECTED for line in lines) == 2
            await watched.close()

    run(main())


def test_a_file_that_is_being_written_takes_no_key_away(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("a"))
    reader = KeyReader(str(path))
    reader.read()
    with path.open("w") as file:  # an editor's way: first it is empty, and a part of it is valid, too
        assert reader.read_if_changed() is None
        file.write(entry("a"))
        file.flush()
        assert reader.read_if_changed() is None
        file.write(entry("b"))
    assert reader.read_if_changed() is None
    assert [key.name for key in reader.read_if_changed() or []] == ["a", "b"]
    assert reader.read_if_changed() is None


def test_it_is_read_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"

    async def main() -> None:
        path.write_text(entry("a"))
        watched = Watched(path, look_s=3600.0)
        path.write_text(entry("b"))
        watched.reader.ask()
        assert await watched.taken.get() == ["b"]
        await watched.close()

    run(main())


def test_a_gateway_does_not_start_without_its_keys(tmp_path: Path) -> None:
    async def main() -> None:
        for content in (None, b"\xff\xfe", b"[keys.a"):
            path = tmp_path / "keys.toml"
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ConfigError) as caught:
                KeyReader(str(path)).read()
            assert caught.value.field == "gateway.api_keys_file"

    run(main())
