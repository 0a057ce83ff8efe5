"""Where packed models are kept, and when one that is kept is still what its model's directory holds.

    $MICROSERVE_PACKED_CACHE, else $XDG_CACHE_HOME/microserve/packed, else ~/.cache/microserve/packed
        KEY.packed          a packed model; KEY: digest of all that its bytes depend on
        .N.lock             one process at a time makes any of a sixteenth of all keys

In a key: of every file of the model's directory name, inode, size and when it was written and changed (which
nobody can set back); dtype and kind of weights; the versions of torch and transformers; our own sources that
load and pack; the layout of the native object. A file that changed a moment ago may change once more and look
the same: what was read then is not kept. Owns names, locks and the bound on the room that they take; the
files' form is packed_file.py's.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path

import structlog

from microserve.kernels.cpu.library import Library
from microserve.protocol import log
from microserve.services.engine.native import packed_file
from microserve.services.engine.native.packed_file import NotWhole
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.room import PACKED_SUFFIX

CACHE_VARIABLE = "MICROSERVE_PACKED_CACHE"
WAIT_S = 90.0
"""For another process that makes it: shorter than an engine's start may take (``mesh.ready_timeout_s``)."""
LOOK_S = 0.05
SETTLED_NS = 100_000_000
"""Since the last change of any file: longer than the clocks of file systems stand still ..."""
COARSELY_SETTLED_NS = 2_000_000_000
"""... and of those that count in whole seconds or hundredths."""
_COARSE_NS = 10_000_000
_NUM_LOCKS = 16

_ENGINE = Path(__file__).parents[1]
_SOURCES = (
    *("model/model.py", "model/directory/families.py", "model/spec.py", "model/revision.py"),
    *("native/packing.py", "native/packed_model.py"),
    *("../../kernels/cpu/packing.py", "../../kernels/cpu/weights.py"),
)

_logger = structlog.get_logger()


def cache_directory(environment: Mapping[str, str]) -> Path:
    if named := environment.get(CACHE_VARIABLE):
        return Path(named)
    base = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # who has no home, as in a container
        base = os.path.join(tempfile.gettempdir(), f"cache-{os.geteuid()}")
    return Path(base) / "microserve" / "packed"


class PackedCache:
    """Packed forms of one model directory, as it is now."""

    def __init__(
        self, directory: Path, model: Path, dtype: str, weights: str, library: Library, max_nbytes: int
    ) -> None:
        """directory: of all packed models, made when one is kept; max_nbytes: of them together.

        Raises ``OSError`` where the model's directory cannot be read."""
        self._directory, self._model = directory, model
        self._library, self._max_nbytes = library, max_nbytes
        self._began_ns = time.time_ns()
        self._stamp = _stamp(model)
        told = [_versions(), _sources(), library.layout_version, dtype, weights, self._stamp]
        self._key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
        self.path = directory / f"{self._key}{PACKED_SUFFIX}"

    def find(self) -> PackedModel | None:
        """Whole, or not at all: what is damaged is told, and made anew."""
        try:
            model = packed_file.read(self.path, self._library, self._model.resolve().name)
        except FileNotFoundError:
            return None
        except (OSError, NotWhole) as error:
            _logger.warning(log.WEIGHTS_NOT_KEPT, file=str(self.path), detail=str(error))
            with suppress(OSError):
                self.path.unlink()
            return None
        with suppress(OSError):  # another user's, or a file system that is only read
            os.utime(self.path)  # used now: others go first
        _logger.info(log.WEIGHTS_MAPPED, file=str(self.path), mb=model.weights.memory.nbytes >> 20)
        return model

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """One process at a time makes a packed model, the others wait, not for ever; without a directory to
        lock in, each makes its own."""
        try:
            self._make_directory()
            name = f".{int(self._key, 16) % _NUM_LOCKS}.lock"
            handle = os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            yield
            return
        try:
            end = time.monotonic() + WAIT_S
            while not _try_lock(handle) and time.monotonic() < end:  # noqa: ASYNC110  (another process's)
                await asyncio.sleep(LOOK_S)
            yield
        finally:
            os.close(handle)

    def keep(self, model: PackedModel) -> PackedModel:
        """The same model from its file, which other engines map, too; ``model`` itself where it cannot be
        kept, which is told."""
        try:
            if why := self._why_not(model.weights.memory.nbytes):
                raise OSError(None, why)
            self._make_directory()
            self._make_room(model.weights.memory.nbytes)
            packed_file.write(model, self.path)
        except OSError as error:
            _logger.warning(log.WEIGHTS_NOT_KEPT, file=str(self.path), detail=error.strerror or str(error))
            return model
        _logger.info(log.WEIGHTS_PACKED, file=str(self.path), mb=model.weights.memory.nbytes >> 20)
        return self.find() or model

    def _make_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _why_not(self, nbytes: int) -> str:
        if nbytes > self._max_nbytes:
            return f"{nbytes >> 20} MB are more than model.packed_cache_mb"
        try:
            changed = _stamp(self._model) != self._stamp
        except OSError:
            changed = True
        if changed or not _is_settled(self._stamp, self._began_ns):
            return "the model's files have changed just now"
        return ""

    def _make_room(self, nbytes: int) -> None:
        """Those that were used least recently go; whoever has one mapped keeps it. Raises ``OSError``."""
        kept: list[tuple[int, int, Path]] = []
        for file in self._directory.iterdir():
            with suppress(OSError):
                status = file.lstat()
                if file.name.startswith(".packing-"):
                    # Nobody writes for so long: its writer has died.
                    if self._began_ns - status.st_mtime_ns > WAIT_S * 1e9:
                        file.unlink()
                elif file.suffix == PACKED_SUFFIX:
                    kept.append((status.st_mtime_ns, status.st_size, file))
        total_nbytes = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total_nbytes + nbytes <= self._max_nbytes:
                break
            file.unlink(missing_ok=True)
            total_nbytes -= size


def _stamp(directory: Path) -> list[tuple[str, int, int, int, int]]:
    """Of every file: name, inode, size, when it was written and when anything of it was changed, in ns."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file():
                status = entry.stat()
                times = (status.st_mtime_ns, status.st_ctime_ns)
                found.append((entry.name, status.st_ino, status.st_size, *times))
    return sorted(found)


def _is_settled(stamp: list[tuple[str, int, int, int, int]], now_ns: int) -> bool:
    return all(
        now_ns - changed_ns > (SETTLED_NS if changed_ns % _COARSE_NS else COARSELY_SETTLED_NS)
        for *_, changed_ns in stamp
    )


def _versions() -> list[str]:
    found = []
    for name in ("torch", "transformers", "safetensors", "numpy"):
        try:
            found.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            found.append("")
    return found


def _sources() -> str:
    """What loads and packs decides what is packed."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_ENGINE / name).read_bytes())
    return digest.hexdigest()


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
